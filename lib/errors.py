"""What goes wrong for a person to mend, said in one line: UserError and what becomes one."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from pathlib import Path


class UserError(ValueError):
    """Something that the user can mend: a line that names what and how, and perhaps one of advice.

    What it quotes from a file may hold anything; control characters appear as Python spells them.
    """

    def __str__(self):
        lines = (
            "".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in self.args
        )
        return "\n  ".join(lines)


def one_line(problem, length):
    """The text of an exception in one line of at most `length` characters."""
    return " ".join(str(problem).split())[:length]


def run_script(main):
    """Call `main()`; a UserError becomes one line on stderr and exit status 1.

    SIGINT ends with 130 and SIGTERM with 143, as shells count.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Output that Windows sends to a file has 256 letters: «?» in place of the others, no error.
            stream.reconfigure(errors="replace")
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        main()
    except UserError as error:
        # Under `accelerate launch` most errors meet every process, some only one: each says its own.
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def memory_for(doing, advice):
    """Turn running out of GPU memory inside into two lines: what was being done, what to change."""
    try:
        yield
    except RuntimeError as problem:
        if type(problem).__name__ != "OutOfMemoryError":  # torch's, which need not be imported
            raise
        raise UserError(f"the GPU's memory ran out while {doing}", advice) from None


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
