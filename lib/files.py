"""Output folders that are replaced whole or not at all, locked while they are written, and files
that are never half there."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from lib.errors import UserError


def check_output_folder(folder, marker):
    """Raise UserError unless `folder` can be written and may be replaced.

    A folder that exists and holds files must hold `marker` too, the file by which an earlier
    output of the same script is known; anything else is a person's own and stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(
            f"{folder} holds files that this script did not write (it has no {marker}); "
            "name another output folder, or move them away"
        )
    parent = next(place for place in folder.absolute().parents if place.exists())
    try:
        probe = parent / f".{folder.name}.probe{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as problem:
        raise UserError(f"{parent} cannot be written: {problem.strerror}") from None


def beside(final, ending):
    """The hidden path beside the folder `final` that is named after it and ends in `ending`."""
    final = Path(final).absolute()  # so that "." has a name
    return final.with_name(f".{final.name}.{ending}")


def unfinished(final):
    """Where the output that will be the folder `final` is written."""
    return beside(final, "unfinished")


def replace_folder(final):
    """Put the finished folder `unfinished(final)` in the place of `final`, which goes only then."""
    final = Path(final)
    for path in (*unfinished(final).rglob("*"), unfinished(final)):
        flush(path)
    old = beside(final, "old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    unfinished(final).rename(final)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(final, marker):
    """Mend what a run that was killed in replace_folder, or just before it, left.

    `marker` is the file that is written last: with it the new folder is whole and takes its place;
    without it, where `final` is missing, the old one comes back.
    """
    final = Path(final)
    old = beside(final, "old")
    if old.is_dir() and not final.exists():
        old.rename(final)
    if (unfinished(final) / marker).is_file():
        replace_folder(final)
    shutil.rmtree(old, ignore_errors=True)


def fresh_folder(final):
    """An empty folder `unfinished(final)`, to be filled and then given to replace_folder."""
    new = unfinished(final)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


@contextlib.contextmanager
def locked(final):
    """Hold the output folder `final` against a second run; UserError naming the run that has it.

    The lock is the operating system's, on a file beside the folder: it goes with its process,
    however that ends.
    """
    path = beside(final, "lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as problem:
            raise UserError(f"{path.parent} cannot be written: {problem.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{final} is being written by {owner}; wait for it or stop it"
            ) from None
        # The one before may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def flush(path):
    """Wait until a file or folder is on the disk itself, where a power cut leaves it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path, data):
    """Write a file so that it is there whole or, as before, not at all: beside it, flushed to the
    disk, then renamed. UserError with the path and the bytes needed if the disk is full."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(data)
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path} cannot be written: {problem.strerror}; {len(data):,} bytes needed, {free:,} free"
        ) from None


def write_json(path, value):
    """Write `value` as readable JSON, whole or not at all; NaN becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_file(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
