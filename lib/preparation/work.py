"""Prepares images on every core. The results are stored in a folder of parts until the training set is written.

The name of a part is a hash of its inputs: the source's content and the settings. After an interruption, finished parts
are therefore reused, unless either has changed.
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from PIL import Image
from tqdm import tqdm

from lib.errors import UserError
from lib.files import replacing, sha256_file
from lib.masks import SURELY, only_mask, subject_mask
from lib.photographs import Unusable, check_content, fetched_by, read_layers, upright_shape
from lib.preparation.duplicates import fingerprint
from lib.preparation.framing import framed, view
from lib.texts import is_utf8

FEW = 8  # images that take less time than starting another process
MEGAPIXELS_AT_ONCE = 32  # in all processes together; an image takes about 16 MB per megapixel
MAKER = 2  # version of this code: another number invalidates all parts
# Endings of an image's parts.
PNG, MASK, VIEW, RECORD = ".png", ".mask.png", ".jpg", ".json"


def prepare_images(data_dir, names, masks, sizes, parts, settings, processes=0):
    """Prepare the images `names` of the folder `data_dir`. Returns (images, skipped), in the order of the names: what
    is known of each image, and source and reason of each that cannot be used.

    An image's `key` is the stem of its parts in the folder `parts`: PNG, the training image at its size of `sizes`;
    MASK, if it has one; VIEW, a thumbnail for the contact sheet. `masks` is from `find_masks`; `settings` are `crop`,
    see `framed`, and `max_megapixels`. `processes` are used, 0 for one per core.
    """
    work = functools.partial(prepare_image, data_dir, parts, settings)
    workers = min(processes or cores(), math.ceil(len(names) / FEW))
    images, masks = [], [masks.get(name, []) for name in names]
    bar = functools.partial(tqdm, total=len(names), desc="preparing", unit="image", leave=False)
    try:
        if workers <= 1:
            images.extend(bar(map(work, names, masks, sizes)))
        else:
            with process_pool(workers) as pool:
                images.extend(bar(pool.map(work, names, masks, sizes, chunksize=2)))
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped at {len(images)} of {len(names)} images; the same command resumes from there")
        raise
    except BrokenProcessPool:
        raise UserError(
            f"a process that prepares images died after {len(images)} of {len(names)}, perhaps out of memory; the same "
            "command resumes from there; --processes 1 prepares one image at a time"
        ) from None
    if reused := sum(image.pop("reused", False) for image in images):
        print(f"{reused} images were prepared by an interrupted run and have not changed since")
    skipped = [row for row in images if "reason" in row]
    return [row for row in images if "reason" not in row], skipped


def cores():
    """How many processes can run at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- one image ------------------------------------------------------------------------------


def prepare_image(data_dir, parts, settings, name, masks, size):
    """Write the parts of one image unless they are there already. Returns its row, see `prepare_images`."""
    path = data_dir / name
    try:
        if not is_utf8(name):
            name = name.encode("utf-8", "replace").decode()
            raise Unusable("its name is not UTF-8; give it another")
        if not path.exists() and path.is_symlink():
            raise Unusable(f"a link to {os.readlink(path)}, which is not there{fetched_by(path)}")
        if not path.is_file():
            raise Unusable("a folder or special file; only files directly in it are read")
        if SURELY.fullmatch(name):
            raise Unusable("a mask, but there is no image of that name")
        mask = only_mask([data_dir / mask for mask in masks])
        sha256 = source_hash(path, "cannot be read")
        mask_sha256 = source_hash(mask, f"its mask {mask.name} cannot be read") if mask else None
        made_from = [MAKER, sha256, mask_sha256, masks, path.suffix.lower(), size, settings]
        part = parts / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
        record = read_record(part)
        if record is None:
            with memory_share(path):
                record = dict(sha256=sha256, bytes=path.stat().st_size)
                record |= write_parts(path, mask, part, size, settings)
            write_part(part.with_suffix(RECORD), lambda file: file.write(json.dumps(record).encode()))
        else:
            record["reused"] = True
    except Unusable as reason:
        return dict(source=name, reason=str(reason))
    return dict(source=name, key=part.name, **record)


def source_hash(path, failure):
    """SHA-256 of a source; Unusable, with `failure`, if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as problem:
        raise Unusable(f"{failure} ({problem.strerror})") from None


def write_parts(path, mask_path, part, size, settings):
    """Prepare the image at `path`, whose mask is at `mask_path` or None, and write its parts. Returns its record."""
    image, alpha, info, done = read_layers(path, settings["max_megapixels"])
    check_content(image, alpha)
    mask, masked = subject_mask(mask_path, image, alpha, settings["max_megapixels"])
    ready, ready_mask, frame = framed(image, size, settings["crop"], mask)
    if mask is not None:
        done.append(masked)
        brightest = ready_mask.getextrema()[1]
        if brightest < 8:
            raise Unusable(
                f"{masked}, of which nothing is left {frame['words'].partition(' and ')[2]}; "
                "--crop subject and --buckets cut off less of it"
            )
        if brightest < 128:  # a thin subject, paler now that it is smaller
            ready_mask = ready_mask.point(lambda level: level * 255 // brightest)
    done.append(frame["words"])
    write_part(part.with_suffix(PNG), lambda file: ready.save(file, "PNG"))
    if mask is not None:
        write_part(part.with_suffix(MASK), lambda file: ready_mask.save(file, "PNG"))
    sheet = view(image, frame, mask)
    write_part(part.with_suffix(VIEW), lambda file: sheet.save(file, "JPEG", quality=90))
    endings = (PNG, MASK) if mask is not None else (PNG,)
    return dict(
        **info,
        done=done,
        size=list(size),
        pixels=image.width * image.height,
        kept=frame["kept"],
        enlarged=frame["enlarged"],
        **fingerprint(image),
        files={ending: sha256_file(part.with_suffix(ending)) for ending in endings},
    )


def read_record(part):
    """The record of an image whose parts are all there and intact, else None."""
    try:
        record = json.loads(part.with_suffix(RECORD).read_bytes())
        intact = all(sha256_file(part.with_suffix(ending)) == sha256 for ending, sha256 in record["files"].items())
        with Image.open(part.with_suffix(VIEW), formats=("JPEG",)) as image:
            image.load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if intact else None


def write_part(path, write):
    """Write the file `path` atomically: `write` fills an open file. (A file truncated by a power cut is detected by its
    checksum.)"""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


# ---- several processes --------------------------------------------------------------------------

# In a process of a pool: its share of the memory, and the lock under which an image takes it.
_share = None


@contextlib.contextmanager
def process_pool(workers):
    """A pool of processes that end with this one, even if it is killed. If the block raises, pending tasks are
    dropped."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # its processes share the memory of these imports
        context.set_forkserver_preload([__name__, "scipy.fftpack"])
    share = context.Semaphore(MEGAPIXELS_AT_ONCE), context.Lock()
    pool = ProcessPoolExecutor(workers, context, initializer=initialize_worker, initargs=share)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def initialize_worker(slots, turn):
    """Ignore Ctrl-C in a process of the pool, which is for the parent, and end with the parent."""
    global _share
    _share = slots, turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def end_with(parent):
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def memory_share(path):
    """Wait until the image at `path` fits into the memory that all processes may use together."""
    if _share is None:  # the only process
        yield
        return
    slots, turn = _share
    width, height = upright_shape(path) or (1, 1)
    needed = min(MEGAPIXELS_AT_ONCE, math.ceil(width * height / 1e6))
    with turn:  # one at a time, so that no two wait for each other's slots
        for _ in range(needed):
            slots.acquire()
    try:
        yield
    finally:
        for _ in range(needed):
            slots.release()
