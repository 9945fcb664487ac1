"""Images made ready on every core, each in parts that wait on disk until the training set is written.

The parts of an image are named after what they are made from: the bytes of its file and the settings.
What a run that was interrupted has made is therefore found again, and made again where either changed.
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
from lib.preparation.sources import is_text

FEW = 8  # images that are made ready sooner than a process that would help starts
MEGAPIXELS_AT_ONCE = 32  # in all processes together; an image takes about 16 MB a megapixel
MAKER = 2  # another number makes all parts anew
# Endings of an image's parts.
PNG, MASK, VIEW, RECORD = ".png", ".mask.png", ".jpg", ".json"


def prepare_images(data_dir, names, masks, sizes, parts, settings, processes=0):
    """(images, skipped): a dict of what is known of each image of `names` in the folder `data_dir`,
    and source and reason of each that cannot be used, both in the order of the names. `masks` is what `find_masks`
    gives.

    An image's `key` is the name of its parts in the folder `parts`: PNG, as it is trained on, at its size of
    `sizes`; MASK, where it has one; and VIEW, a thumbnail for the contact sheet. `settings` are `crop`, see
    `framed`, and `max_megapixels`. `processes` work at once, 0 meaning one a core.
    """
    work = functools.partial(prepared, data_dir, parts, settings)
    workers = min(processes or cores(), math.ceil(len(names) / FEW))
    found, beside = [], [masks.get(name, []) for name in names]
    bar = functools.partial(tqdm, total=len(names), desc="preparing", unit="picture", leave=False)
    try:
        if workers <= 1:
            found.extend(bar(map(work, names, beside, sizes)))
        else:
            with process_pool(workers) as pool:
                found.extend(bar(pool.map(work, names, beside, sizes, chunksize=2)))
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped at {len(found)} of {len(names)} images; the same command goes on from there")
        raise
    except BrokenProcessPool:
        raise UserError(
            f"a process that prepares images died after {len(found)} of {len(names)}, for want of memory "
            "perhaps; the same command goes on from there, with --processes 1 one image at a time"
        ) from None
    if ready := sum(picture.pop("ready", False) for picture in found):
        print(f"{ready} images were made ready before an interruption and have not changed since")
    skipped = [row for row in found if "reason" in row]
    return [row for row in found if "reason" not in row], skipped


def cores():
    """How many processes can work at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- one image ------------------------------------------------------------------------------


def prepared(data_dir, parts, settings, name, masks, size):
    """What `prepare_images` tells of one image; its parts are in their folder afterwards."""
    path = data_dir / name
    try:
        if not is_text(name):
            name = name.encode("utf-8", "replace").decode()
            raise Unusable("its name is not UTF-8; give it another")
        if not path.exists() and path.is_symlink():
            raise Unusable(f"a link to {os.readlink(path)}, which is not there{fetched_by(path)}")
        if not path.is_file():
            raise Unusable("a folder or special file; only files directly in it are read")
        if SURELY.fullmatch(name):
            raise Unusable("a mask, but there is no image of that name")
        mask = only_mask([data_dir / mask for mask in masks])
        try:
            sha256 = sha256_file(path)
        except OSError as problem:
            raise Unusable(f"cannot be read ({problem.strerror})") from None
        try:
            mask_sha256 = sha256_file(mask) if mask else None
        except OSError as problem:
            raise Unusable(f"its mask {mask.name} cannot be read ({problem.strerror})") from None
        made_from = [MAKER, sha256, mask_sha256, masks, path.suffix.lower(), size, settings]
        part = parts / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
        record = kept_record(part)
        if record is None:
            with room_for(path):
                record = dict(sha256=sha256, bytes=path.stat().st_size)
                record |= write_parts(path, mask, part, size, settings)
            write_beside(part.with_suffix(RECORD), lambda file: file.write(json.dumps(record).encode()))
        else:
            record["ready"] = True
    except Unusable as reason:
        return dict(source=name, reason=str(reason))
    return dict(source=name, key=part.name, **record)


def write_parts(path, mask_path, part, size, settings):
    """Make the image at `path`, whose mask may lie at `mask_path`, ready: write its parts, return what is known."""
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
    write_beside(part.with_suffix(PNG), lambda file: ready.save(file, "PNG"))
    if mask is not None:
        write_beside(part.with_suffix(MASK), lambda file: ready_mask.save(file, "PNG"))
    sheet = view(image, frame, mask)
    write_beside(part.with_suffix(VIEW), lambda file: sheet.save(file, "JPEG", quality=90))
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


def kept_record(part):
    """The record of an image whose parts are all there and whole, or None."""
    try:
        record = json.loads(part.with_suffix(RECORD).read_bytes())
        whole = all(sha256_file(part.with_suffix(ending)) == sha256 for ending, sha256 in record["files"].items())
        with Image.open(part.with_suffix(VIEW), formats=("JPEG",)) as image:
            image.load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def write_beside(path, write):
    """Let `write` fill the file `path`, which is there whole or not at all; what a power cut leaves half is
    seen by its checksum."""
    with replacing(path) as beside, beside.open("wb") as file:
        write(file)


# ---- several processes --------------------------------------------------------------------------

# In a process of a pool: its share of the memory, and the lock under which an image takes what it needs.
_share = None


@contextlib.contextmanager
def process_pool(workers):
    """So many processes, which end with this one however that ends. What is waiting is dropped if the
    block is left by an exception."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:  # whose processes share the memory of what it has imported
        context.set_forkserver_preload([__name__, "scipy.fftpack"])
    share = context.Semaphore(MEGAPIXELS_AT_ONCE), context.Lock()
    pool = ProcessPoolExecutor(workers, context, initializer=begin, initargs=share)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def begin(slots, turn):
    """What a process of the pool does first: Ctrl-C is for the one that started it, whose end it shares."""
    global _share
    _share = slots, turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def end_with(parent):
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def room_for(path):
    """Wait until the image at `path` fits into the memory that is meant for all processes."""
    if _share is None:  # the only process
        yield
        return
    slots, turn = _share
    width, height = upright_shape(path) or (1, 1)
    wanted = min(MEGAPIXELS_AT_ONCE, math.ceil(width * height / 1e6))
    with turn:  # one at a time, so that no two wait for what the other holds
        for _ in range(wanted):
            slots.acquire()
    try:
        yield
    finally:
        for _ in range(wanted):
            slots.release()
