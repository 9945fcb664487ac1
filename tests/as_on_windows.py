"""Run scripts of this project one after another as on Windows: without the modules that it lacks, and under its rules
for open files and folders.

    python tests/as_on_windows.py train.py --max-steps 2 , inference.py --seeds 1
"""

import builtins
import os
import shutil
import sys
from pathlib import Path

# Modules that Windows lacks. The libraries' builds for Linux import some of FOR_LIBRARIES themselves, so these are
# hidden from this project's own files only.
MISSING = "fcntl grp pwd syslog".split()
FOR_LIBRARIES = "posix pty resource termios tty".split()


def deny(path, why):
    raise PermissionError(13, f"as on Windows: {why}", str(path))


def open_paths():
    """The files that this process has open."""
    for number in os.listdir("/proc/self/fd"):
        try:
            yield Path(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the descriptor of the listing itself
            continue


def mapped_paths():
    """The files that this process has mapped into memory."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        return {Path(line.split(maxsplit=5)[5].rstrip()) for line in file if "/" in line}


def in_use(path):
    """Whether this process has `path`, or a file in it, open or mapped."""
    real = Path(os.path.realpath(path))
    held = {*open_paths(), *mapped_paths()}
    return any(real == other or real in other.parents for other in held)


def patch_os():
    """Patch the functions of os to refuse what Windows refuses."""
    real = {name: getattr(os, name) for name in "open fsync rename replace unlink".split()}

    def opened(path, flags, *rest, **named):
        if os.path.isdir(path):
            deny(path, "a folder cannot be opened")
        return real["open"](path, flags, *rest, **named)

    def fsync(number):
        with open(f"/proc/self/fdinfo/{number}", encoding="utf-8") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags"))
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "as on Windows: opened to read only")
        real["fsync"](number)

    def rename(source, target, **named):
        if in_use(source):
            deny(source, "it is open")
        if os.path.lexists(target):
            raise FileExistsError(17, "as on Windows: it exists", str(target))
        real["rename"](source, target, **named)

    def replace(source, target, **named):
        for path in (source, target):
            if in_use(path):
                deny(path, "it is open")
        real["replace"](source, target, **named)

    def unlink(path, *rest, **named):
        if in_use(path):
            deny(path, "it is open")
        real["unlink"](path, *rest, **named)

    os.open, os.fsync, os.rename, os.replace = opened, fsync, rename, replace
    os.unlink = os.remove = unlink
    shutil._use_fd_functions = False


def main():
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))
    os.environ["USERNAME"] = "someone"  # always set there
    for name in MISSING:
        sys.modules[name] = None
    find = builtins.__import__

    def own_import(name, importer=None, *rest, **named):
        if name in FOR_LIBRARIES and Path((importer or {}).get("__file__", "/")).parent == root:
            raise ModuleNotFoundError(f"as on Windows: no module {name}")
        return find(name, importer, *rest, **named)

    builtins.__import__ = own_import
    commands, command = [], []
    for word in [*sys.argv[1:], ","]:
        if word == ",":
            commands, command = [*commands, command], []
        else:
            command.append(word)

    import inference
    import preprocess
    import train
    from lib.errors import run_script

    works = {
        "preprocess.py": preprocess.main,
        "train.py": lambda: train.main(train.CONFIG, train.__doc__),
        "inference.py": inference.main,
    }
    patch_os()
    for command in commands:
        sys.argv = command
        run_script(works[command[0]])


if __name__ == "__main__":
    main()
