"""Output folders that are replaced whole or not at all, locked while they are written, and files
that are never half there."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import UserError


def real_folder(path):
    """The absolute `path` with all links followed: a folder is made and replaced where it really
    lies, on that disk, and a link to it stays a link.

    A link may point to a folder that is still to be made in one that exists; UserError naming the
    link if it points to nothing of the kind.
    """
    path = Path(path).absolute()
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            goal = Path(os.path.realpath(place))
            if goal.is_symlink() or not goal.parent.is_dir():
                raise UserError(
                    f"{place} is a link to {os.readlink(place)}, where no folder can be made; "
                    "mend the link, or name another output folder"
                )
    return Path(os.path.realpath(path))


def check_output_folder(folder, marker):
    """Raise UserError unless `folder` can be written and may be replaced.

    A folder that exists and holds files must hold `marker` too, the file by which an earlier
    output of the same script is known; any other is a person's own.
    """
    folder, real = Path(folder), real_folder(folder)
    if real.exists() and not real.is_dir():
        what = f"a link to the file {real}" if folder.is_symlink() else "a file"
        raise UserError(f"{folder} is {what}; name a folder for the output")
    if os.path.ismount(real):
        raise UserError(f"{folder} is where a disk is mounted, which cannot be replaced; name a folder in it")
    if real.is_dir() and any(real.iterdir()) and written_files(real, marker) is None:
        raise UserError(
            f"{folder} holds files that this script did not write (it has no {marker} of its own); "
            "name another output folder, or move them away"
        )
    parent = next(place for place in real.parents if place.exists())
    try:
        probe = parent / f".{real.name}.probe{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as problem:
        raise UserError(f"{parent} cannot be written: {problem.strerror}") from None


def beside(final, ending):
    """The hidden path beside the real folder of `final` that is named after it and ends in `ending`."""
    final = real_folder(final)
    if not final.name:
        raise UserError(f"{final} is where a disk is mounted; name a folder in it")
    return final.with_name(f".{final.name}.{ending}")


def unfinished(final):
    """Where the output that will be the folder `final` is written."""
    return beside(final, "unfinished")


# The files of an output whose marker does not list them, because an earlier version wrote it.
UNLISTED = {
    "manifest.json": ("captions.jsonl", "contact_sheet.png", "images/image_*.png"),
    "config.json": ("log.jsonl", "loss.png", "pytorch_lora_weights.safetensors"),
    "metrics.json": (
        "metrics.csv",
        "summary.md",
        "report.html",
        "comparison_all.png",
        "success_cases.png",
        "unrelated_cases.png",
        "sweep.png",
        "sweep_pictures.png",
        "forest.png",
        "comparison.csv",
        "images/*/base_*.png",
        "images/*/lora_*.png",
    ),
}


def write_marker(path, record):
    """Write `record` (a dict with a key "config") and the names of all files in its folder as the JSON
    file `path`: with it the folder is an output that is whole, and may be replaced some day. (Some, such as
    checkpoints, may be gone by then.)"""
    folder = Path(path).parent
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    write_json(path, record | {"files_written": sorted(written | {Path(path).name})})


def written_files(folder, marker):
    """What this project wrote into the output `folder`, the only files in it that may ever be removed:
    a set of names relative to it, or None if it holds no `marker` of ours."""
    try:
        record = json.loads((folder / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "config" not in record:
        return None
    if isinstance(record.get("files_written"), list):
        return {marker, *map(str, record["files_written"])}
    if not {"versions", "pillow"} & record.keys():
        return None
    found = (path for pattern in UNLISTED.get(marker, ()) for path in folder.glob(pattern))
    return {marker, *(path.relative_to(folder).as_posix() for path in found)}


def replace_folder(final, marker):
    """Put the finished folder `unfinished(final)` in the place of `final`. Of the folder that was there,
    the files that its `marker` lists go, once the new one is in its place; all else moves over."""
    final = real_folder(final)
    new, old = unfinished(final), beside(final, "old")
    for path in (*new.rglob("*"), new):
        flush(path)
    clear_away(old, final, marker)
    try:
        if final.exists():
            final.rename(old)
        new.rename(final)
    except OSError as problem:  # on Windows: a file in it is open in another program
        raise UserError(
            f"{final} cannot be replaced: {problem.strerror}. The new output is whole, in {new}: close what "
            "uses the old one and run the command again, which begins with putting it in its place"
        ) from None
    clear_away(old, final, marker)


def clear_away(old, final, marker):
    """Remove the folder `old`, an earlier output that `final` has replaced: first all that this
    project did not write moves to `final`, then what it did write goes, the list of it last."""
    if not old.is_dir():
        return
    written = written_files(old, marker) or set()
    try:
        move_others(old, final, written)
        for path in sorted(old.rglob("*"), reverse=True):  # a folder comes behind what is in it
            name = path.relative_to(old).as_posix()
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif name in written - {marker}:
                path.unlink()
        (old / marker).unlink(missing_ok=True)
        old.rmdir()
    except OSError as problem:
        print(f"note: {old}, the output before this one, cannot be cleared away yet: {problem}")


def move_others(source, target, written, inside=""):
    """Move what is in the folder `source` and not among the names `written` to the folder `target`,
    beside what is there; `inside` is where in the output `source` lies, with a slash at its end."""
    for path in sorted(source.iterdir()):
        name, goal = f"{inside}{path.name}", target / path.name
        is_folder = path.is_dir() and not path.is_symlink()
        ours = any(file.startswith(f"{name}/") for file in written)
        if is_folder and (ours or goal.is_dir()):
            move_others(path, goal, written, f"{name}/")
        elif is_folder or name not in written:
            numbers = itertools.count(1)
            while os.path.lexists(goal):
                goal = target / f"{path.name}.kept{next(numbers)}"
            if goal.name != path.name:
                print(f"note: your {name} is kept as {goal}")
            target.mkdir(parents=True, exist_ok=True)
            path.rename(goal)


def recover_folder(final, marker):
    """Mend what a run that was killed in replace_folder, or just before it, left.

    `marker` is the file that is written last: with it the new folder is whole and takes its place;
    without it, where `final` is missing, the old one comes back.
    """
    final = real_folder(final)
    old = beside(final, "old")
    if old.is_dir() and not final.exists():
        old.rename(final)
    if (unfinished(final) / marker).is_file():
        replace_folder(final, marker)
    clear_away(old, final, marker)


def fresh_folder(final):
    """An empty folder `unfinished(final)`, to be filled and then given to replace_folder."""
    new = unfinished(final)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


@contextlib.contextmanager
def locked(final):
    """Hold the output folder `final` against a second run; UserError naming the run that has it, or
    saying that its file system cannot lock.

    The lock is the operating system's, on a file beside the folder: it goes with its process,
    however that ends. Who holds it stands in a second file: on Windows a locked one cannot be read.
    """
    path, holder = beside(final, "lock"), beside(final, "lock.holder")
    lock = FileLock(path, timeout=0.1, poll_interval=0.02, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        try:
            owner = holder.read_text(encoding="utf-8")
        except OSError:
            owner = "another process"
        raise UserError(f"{final} is being written by {owner}; wait for it or stop it") from None
    except OSError as problem:
        raise UserError(
            f"{path} cannot be locked: {problem.strerror or problem}; where that is because the file system "
            "knows no locks, name an output folder on another one"
        ) from None
    try:
        owner = f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})"
        write_bytes(holder, owner.encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        # Before it is free: one who waits for a file that is gone begins again. On Windows, where an
        # open file cannot be removed, the lock does it itself.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


NO_FOLDER_FLUSHED = {
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EINVAL,
    errno.EIO,
    errno.EISDIR,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
}


def flush(path):
    """Wait until a file or folder is on the disk itself, where a power cut leaves it.

    A folder only where its file system can: Windows cannot open one, SMB, FUSE and WSL's do not flush one.
    """
    try:
        opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as problem:
        if not (path.is_dir() and problem.errno in NO_FOLDER_FLUSHED):
            raise


@contextlib.contextmanager
def replacing(path):
    """A path beside `path`, of this process's own, which takes its place at the end of the block and is
    gone if the block fails. (It is not flushed: for what can be made again and is checked when read.)"""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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


def what_else(path):
    """What a file that is no safetensors file is, as far as its beginning tells: a few words, or "" where it does
    not."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to the file, which `git lfs pull` fetches"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "it is a web page, as a download that needed a login gives; fetch the file again"
    if start.startswith((b"PK\3\4", b"\x80\2", b"\x80\4")):
        return "it is a pickle or another archive by another name"
    if not start:
        return "it is empty"
    printable = sum(byte >= 32 or byte in b"\t\r\n" for byte in start)
    return "it is a text" if printable == len(start) and start[8:9] != b"{" else ""


def sha256_file(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
