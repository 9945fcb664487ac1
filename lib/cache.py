"""What can be computed again, kept on disk beside the data that it is of: written whole, or not at all."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.files import replacing, sha256_file

CLOCK_TICK = 2 * 10**9  # ns; the coarsest that a file system (FAT) notes times of change in


def first_process():
    """Whether this is the process that writes, of several that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def keep(path, write):
    """Let `write` fill a file beside `path` that then takes its place: two that write at a time do not meet, and what
    is left half is removed. What fails is said and goes no further, for nothing is lost."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            write(beside)
    except OSError as problem:
        reason = problem.strerror or problem
        print(f"note: {path} cannot be written ({reason}); it will be computed again next time")


def file_state(path):
    """[size, time of change of the content, time of change of the file itself], the times in ns: what differs once a
    file was written. (The last one cannot be set back, as a copy that keeps the times sets back the second.)"""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def content_digest(path):
    """SHA-256 of a file's whole content, in hex. Gigabytes take seconds, so it is kept beside the hub's models
    (HF_HOME) and computed again where the file's state is another."""
    from huggingface_hub import constants

    path = os.path.realpath(path)  # two links to a file are one file
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    record, state = Path(constants.HF_HOME) / "digests" / f"{name}.json", file_state(path)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["state"] == state and len(known["sha256"]) == 64:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    found = sha256_file(path)
    # A file that was written a moment ago may be written again within the same tick of the clock, and while it is read.
    if state == file_state(path) and time.time_ns() - max(state[1:]) > CLOCK_TICK:
        text = json.dumps(dict(state=state, sha256=found))
        keep(record, lambda beside: beside.write_text(text, encoding="utf-8"))
    return found


def prefetch(function, items, threads=4):
    """`function` of each of `items`, in their order, a few computed in threads before they are asked for."""
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
