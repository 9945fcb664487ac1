"""Results cached on disk next to their data, and prefetching in threads."""

import contextlib
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.files import replacing, sha256_file

CLOCK_TICK = 2 * 10**9  # ns; the coarsest resolution of a file system's modification times (FAT's)


def first_process():
    """Whether this is the main process of those that `accelerate launch` started: the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def write_cached(path, write):
    """Write the cache file `path`: `write` fills a temporary file, which then replaces it. This is atomic and safe with
    several writers. A failure is printed and otherwise ignored."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write(temporary)
    except OSError as problem:
        reason = problem.strerror or problem
        print(f"note: {path} cannot be written ({reason}); it will be computed again next time")


def file_state(path):
    """[size in bytes, modification time, change time], times in ns; changes whenever the file is written. (Copying with
    preserved times resets the modification time. The change time cannot be set.)"""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def hash_ahead(folder):
    """Begin to compute, in a thread, the `content_digest` of the weights in a base model's `folder`: gigabytes take
    seconds, which the script's imports take too. Names that are no folder are ignored."""

    def work():
        paths = sorted(Path(folder).glob("*/*.safetensors"))
        for path in [path for path in paths if ".fp16" in path.name] or paths:
            with contextlib.suppress(OSError):
                content_digest(path)

    threading.Thread(target=work, daemon=True).start()


_hashing = threading.Lock()  # a second thread waits for the first one's result


def _renew_lock():
    global _hashing
    _hashing = threading.Lock()


if hasattr(os, "register_at_fork"):  # a forked process lacks the thread that would release it
    os.register_at_fork(after_in_child=_renew_lock)


def content_digest(path):
    """SHA-256 of a file's content, in hex. As gigabytes take seconds, it is cached in HF_HOME and computed again when
    the file's state has changed."""
    with _hashing:
        return _content_digest(path)


def _content_digest(path):
    from huggingface_hub import constants

    path = os.path.realpath(path)
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    record, state = Path(constants.HF_HOME) / "digests" / f"{name}.json", file_state(path)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["state"] == state and len(known["sha256"]) == 64:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    digest = sha256_file(path)
    # The file may have been written while it was read, or be written again within the same tick of the clock.
    if state == file_state(path) and time.time_ns() - max(state[1:]) > CLOCK_TICK:
        text = json.dumps(dict(state=state, sha256=digest))
        write_cached(record, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return digest


def prefetch(function, items, threads=4):
    """Yield `function` of each of `items` in order, computing a few ahead in threads."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
