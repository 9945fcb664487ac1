"""What can be computed again, kept on disk beside the data that it is of: written whole, or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.files import replacing


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


def ahead(function, items, threads=4):
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
