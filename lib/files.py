"""Output folders that are replaced as a whole and locked while they are written; files written atomically."""

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

# ---- output folders ---------------------------------------------------------------------------


def real_folder(path):
    """The absolute `path` with all links resolved: a folder is written and replaced on the disk that it really is on,
    and a link to it stays a link.

    A link may point to a missing folder whose parent exists. Raises UserError naming any other broken link.
    """
    path = Path(path).absolute()
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            goal = Path(os.path.realpath(place))
            if goal.is_symlink() or not goal.parent.is_dir():
                raise UserError(
                    f"{place} is a link to {os.readlink(place)}, where no folder can be made; "
                    "fix the link, or name another output folder"
                )
    return Path(os.path.realpath(path))


def check_output_folder(folder, marker):
    """Raise UserError unless `folder` can be written and may be replaced.

    A folder that holds files must also hold `marker`, the file that identifies an earlier output of the same script.
    Any other folder belongs to the user.
    """
    folder, real = Path(folder), real_folder(folder)
    if real.exists() and not real.is_dir():
        what = f"a link to the file {real}" if folder.is_symlink() else "a file"
        raise UserError(f"{folder} is {what}; name a folder for the output")
    if os.path.ismount(real):
        raise UserError(f"{folder} is a mount point, which cannot be replaced; name a folder in it")
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


def hidden_sibling(folder, suffix):
    """The path .<name>.<suffix> next to the real folder of `folder`."""
    folder = real_folder(folder)
    if not folder.name:
        raise UserError(f"{folder} is a mount point; name a folder in it")
    return folder.with_name(f".{folder.name}.{suffix}")


def unfinished(folder):
    """Where the output is written that will become `folder`."""
    return hidden_sibling(folder, "unfinished")


def fresh_folder(folder):
    """An empty folder `unfinished(folder)`, to be filled and then passed to `replace_folder`."""
    new = unfinished(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def write_marker(path, record):
    """Write `record`, a dict with a key "config", as the JSON file `path`, with the names of all files in its folder
    under "files_written". A folder with this file is a complete output, which may be replaced later. (Some of the
    files, such as checkpoints, may be gone by then.)"""
    folder = Path(path).parent
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    write_json(path, record | {"files_written": sorted(written | {Path(path).name})})


def written_files(folder, marker):
    """The names, relative to the output `folder`, of the files that this project wrote: the only ones in it that may
    be removed. None if `folder` holds no `marker` of ours."""
    try:
        record = json.loads((folder / marker).read_text(encoding="utf-8"))
        if "config" in record and isinstance(record["files_written"], list):
            return {marker, *map(str, record["files_written"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def replace_folder(folder, marker):
    """Move the finished `unfinished(folder)` to `folder`. The files of the folder that was there are removed if its
    `marker` lists them. All others are moved to the new one."""
    folder = real_folder(folder)
    new, old = unfinished(folder), hidden_sibling(folder, "old")
    for path in (*new.rglob("*"), new):
        flush(path)
    clear_away(old, folder, marker)
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as problem:  # on Windows: a file in it is open in another program
        raise UserError(
            f"{folder} cannot be replaced: {problem.strerror}. The new output is complete, in {new}: close the program "
            "that uses the old one and run the command again, which first moves it to its place"
        ) from None
    clear_away(old, folder, marker)


def clear_away(old, folder, marker):
    """Remove the folder `old`, an earlier output that `folder` has replaced. The user's files in it move to `folder`
    first; then ours are removed, the list of them last."""
    if not old.is_dir():
        return
    written = written_files(old, marker) or set()
    try:
        move_unlisted(old, folder, written)
        for path in sorted(old.rglob("*"), reverse=True):  # contents before their folder
            name = path.relative_to(old).as_posix()
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif name in written - {marker}:
                path.unlink()
        (old / marker).unlink(missing_ok=True)
        old.rmdir()
    except OSError as problem:
        print(f"note: {old}, the previous output, cannot be removed yet: {problem}")


def move_unlisted(source, target, written, prefix=""):
    """Move the contents of the folder `source` that are not among the names `written` to the folder `target`, under
    another name where theirs is taken. `prefix` is the path of `source` within the output, ending in a slash."""
    for path in sorted(source.iterdir()):
        name, goal = f"{prefix}{path.name}", target / path.name
        is_folder = path.is_dir() and not path.is_symlink()
        ours = any(file.startswith(f"{name}/") for file in written)
        if is_folder and (ours or goal.is_dir()):
            move_unlisted(path, goal, written, f"{name}/")
        elif is_folder or name not in written:
            numbers = itertools.count(1)
            while os.path.lexists(goal):
                goal = target / f"{path.name}.kept{next(numbers)}"
            if goal.name != path.name:
                print(f"note: your {name} is kept as {goal}")
            target.mkdir(parents=True, exist_ok=True)
            path.rename(goal)


def recover_folder(folder, marker):
    """Complete or undo a replacement that was killed in `replace_folder` or right before it.

    `marker` is the file that is written last. With it the new folder is complete and is moved to its place. Without
    it, and if `folder` is missing, the old one is moved back.
    """
    folder = real_folder(folder)
    old = hidden_sibling(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    if (unfinished(folder) / marker).is_file():
        replace_folder(folder, marker)
    clear_away(old, folder, marker)


@contextlib.contextmanager
def locked(folder):
    """Lock the output folder `folder` against a second run. Raises UserError naming the run that holds the lock, or
    if the file system cannot lock.

    The lock is the operating system's, on a file next to the folder: it is released when the process ends, even if
    killed. The holder is named in a second file, as Windows does not let others read a locked one.
    """
    path, holder = hidden_sibling(folder, "lock"), hidden_sibling(folder, "lock.holder")
    lock = FileLock(path, timeout=0.1, poll_interval=0.02, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        try:
            owner = holder.read_text(encoding="utf-8")
        except OSError:
            owner = "another process"
        raise UserError(f"{folder} is being written by {owner}; wait for it or stop it") from None
    except OSError as problem:
        raise UserError(
            f"{path} cannot be locked: {problem.strerror or problem}; if its file system does not support locks, "
            "name an output folder on another one"
        ) from None
    try:
        owner = f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})"
        write_bytes(holder, owner.encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        # Removed before it is released: a waiting process that finds its file gone starts over. Windows cannot remove
        # an open file; there the lock removes it on release.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


# ---- files ------------------------------------------------------------------------------------

# How file systems refuse to flush a folder: Windows cannot open one; SMB, FUSE and WSL's cannot flush one.
NO_FOLDER_FLUSH = {
    getattr(errno, name) for name in "EACCES EPERM EBADF EINVAL EIO EISDIR ENOSYS ENOTSUP EOPNOTSUPP ENOTTY".split()
}


def flush(path):
    """Wait until a file or, where the file system supports it, a folder is on the disk and survives a power cut."""
    try:
        opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as problem:
        if not (path.is_dir() and problem.errno in NO_FOLDER_FLUSH):
            raise


@contextlib.contextmanager
def replacing(path):
    """A temporary path next to `path`, which replaces it at the end of the block and is removed if the block fails.
    Each process has its own. It is not flushed: meant for files that can be made again and are checked when read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, data):
    """Write a file atomically: to a temporary file that is flushed to the disk and renamed. Raises UserError with the
    path and the number of bytes if that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(data)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path} cannot be written: {problem.strerror}; {len(data):,} bytes needed, {free:,} free"
        ) from None


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN and infinities become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def describe_content(path):
    """What a file that is not a safetensors file is, judging by its first bytes: a few words, "" if unknown."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` to fetch the file"
    if re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        return "it is a web page, as a download that needed a login gives; fetch the file again"
    if start.startswith((b"PK\3\4", b"\x80\2", b"\x80\4")):
        return "it is a pickle or another archive under a wrong name"
    if not start:
        return "it is empty"
    printable = sum(byte >= 32 or byte in b"\t\r\n" for byte in start)
    return "it is a text file" if printable == len(start) and start[8:9] != b"{" else ""


HASHED_AT_ONCE = 2**25  # bytes


def sha256_file(path):
    """The SHA-256 of a file's content, in hex.

    A large part at a time: between two parts a thread may have to wait for Python's lock.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        part = memoryview(bytearray(min(HASHED_AT_ONCE, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()
