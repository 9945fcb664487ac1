"""What goes wrong for a person to mend, said in one line: UserError and what becomes one."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
from pathlib import Path


class UserError(ValueError):
    """Something that the user can mend: a line that names what and how, and perhaps one of advice.

    What it quotes from a file may hold anything; control characters appear as Python spells them.
    """

    def __str__(self):
        lines = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in self.args)
        return "\n  ".join(lines)


def one_line(problem, length):
    """The text of an exception in one line of at most `length` characters."""
    return " ".join(str(problem).split())[:length]


# Those that ask a process to end, of what this system has: a terminal that is closed, Ctrl-C, a batch system.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in "SIGHUP SIGINT SIGQUIT SIGTERM SIGUSR1 SIGUSR2 SIGBREAK".split()
    if hasattr(signal, name)
]


def heeded(signals=STOP_SIGNALS):
    """Those of the signals that are not ignored, as `nohup` ignores SIGHUP, nor handled by a library."""
    return [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]


class Spoken:
    """A text stream that whoever reads it may leave, as a terminal that is closed or a `| tee` that has ended: what
    is written from then on goes nowhere, and is no error."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            # Output that Windows sends to a file has 256 letters: “?” in place of the others, no error.
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.go_nowhere()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.go_nowhere()

    def go_nowhere(self):
        """Also what libraries write there, and what is still in the buffer."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


def run_script(main):
    """Call `main()`; a UserError becomes one line on stderr and exit status 1.

    A signal ends it with 128 and its number, as shells count: SIGINT with 130, SIGTERM with 143.
    """
    sys.stdout, sys.stderr = Spoken(sys.stdout), Spoken(sys.stderr)
    try:
        for number in heeded():
            if number != signal.SIGINT:
                signal.signal(number, lambda number, frame: sys.exit(128 + number))
        main()
    except UserError as error:
        # Under `accelerate launch` most errors meet every process, some only one: each says its own.
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


# How the allocators of PyTorch, CUDA, its libraries and Triton say that memory ran out.
NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|MemoryAllocation|can't allocate memory", re.I)


def is_memory(problem):
    """Whether an exception says that memory ran out: PyTorch's own, or an error of what is underneath."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True  # torch's, which need not be imported
    return isinstance(problem, RuntimeError) and bool(NO_MEMORY.search(str(problem)))


@contextlib.contextmanager
def memory_for(doing, advice):
    """Turn running out of memory inside into two lines: what was being done, what to change."""
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
    """Turn a disk that fills up while `folder` is being made into one line that names it."""
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
