"""Errors that the user can fix, reported in one line: UserError, and exceptions that become one."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix: one line with the problem and its remedy, and optionally a line of advice.

    Control characters, in text quoted from a file, are printed as escapes."""

    def __str__(self):
        lines = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in self.args)
        return "\n  ".join(lines)


def one_line(problem, length):
    """The text of an exception in one line of at most `length` characters."""
    return " ".join(str(problem).split())[:length]


# Signals that ask a process to stop (sent by a closing terminal, Ctrl-C or a batch system), if this system has them.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in "SIGHUP SIGINT SIGQUIT SIGTERM SIGUSR1 SIGUSR2 SIGBREAK".split()
    if hasattr(signal, name)
]


def heeded(signals=STOP_SIGNALS):
    """Those of `signals` that are not ignored (as `nohup` ignores SIGHUP) and have a handler set from Python."""
    return [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]


class RobustStream:
    """A text stream whose reader may go away, such as a closed terminal or a `| tee` that has ended: further output is
    dropped without an error."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            # Output redirected to a file on Windows has an 8-bit encoding: “?” replaces other characters.
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.drop_output()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.drop_output()

    def drop_output(self):
        """Including what libraries write to the file descriptor, and what is still buffered."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), self.stream.fileno())


def run_script(main):
    """Call `main()`. A UserError becomes one line on stderr and exit status 1; a signal becomes exit status
    128 + its number, as in shells (SIGINT 130, SIGTERM 143)."""
    sys.stdout, sys.stderr = RobustStream(sys.stdout), RobustStream(sys.stderr)
    try:
        for number in heeded():
            if number != signal.SIGINT:
                signal.signal(number, lambda number, frame: sys.exit(128 + number))
        main()
    except UserError as error:
        # Under `accelerate launch` most errors occur in every process, some in one only: each prints its own.
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# In the out-of-memory messages of PyTorch, CUDA, its libraries and Triton.
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|MemoryAllocation|can't allocate memory", re.I)


def is_memory(problem):
    """Whether an exception means that memory ran out, in PyTorch or in a library below it."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    return isinstance(problem, RuntimeError) and bool(OUT_OF_MEMORY.search(str(problem)))


@contextlib.contextmanager
def memory_for(doing, advice):
    """Turn running out of memory in the block into two lines: the current operation, and advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_memory(problem):
            raise
        on_cpu = isinstance(problem, MemoryError) or "CPUAllocator" in str(problem)
        which = "the computer's memory" if on_cpu else "the GPU's memory"
        raise UserError(f"{which} ran out while {doing}", advice) from None


@contextlib.contextmanager
def disk_for(folder):
    """Turn a full or read-only disk while `folder` is being written into one line that names the file."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        place = next(place for place in Path(os.path.realpath(folder)).parents if place.exists())
        raise UserError(
            f"{problem.filename or folder} cannot be written: {problem.strerror}; "
            f"{shutil.disk_usage(place).free:,} bytes free"
        ) from None
