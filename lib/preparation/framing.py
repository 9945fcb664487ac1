"""Which part of an image is trained on, and at what size."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

CROPS = ("centre", "top", "subject")
OUTLINE, OUTSIDE = (230, 30, 60), (40, 90, 255)
MOST_SIZES = 6  # training records its work on a GPU once for each, a second or more
RARE = 0.05  # of the images; a size that fewer have is merged, where that cuts off little
LITTLE = 0.85  # of an image must stay then
# A backdrop is plain where so much of the border is within so many levels of its median.
PLAIN_SHARE, PLAIN_SPREAD = 0.7, 30


# ---- sizes ------------------------------------------------------------------------------------


def bucket_sizes(resolution):
    """[(width, height)] of the area of a square of `resolution`, an eighth more or less, with sides from half to twice
    of it in steps of 64 pixels, or of an eighth of the side where that is less (always a multiple of 8)."""
    step = min(64, max(8, resolution // 64 * 8))
    sides = range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step)
    near = [(w, h) for w in sides for h in sides if abs(w * h / resolution**2 - 1) <= 1 / 8]
    return near or [(resolution, resolution)]


def kept_share(shape, size):
    """How much of an image of `shape` (width, height) is left when it fills `size`: from 0 to 1."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return min(ratio, 1 / ratio)


def nearest_size(shape, sizes):
    """That of `sizes` which keeps most of an image of `shape`."""
    return max(sizes, key=lambda size: (kept_share(shape, size), size))


def choose_sizes(shapes, resolution):
    """(sizes, merged): the sizes that images of `shapes` are brought to, few, and what was given up for that:
    {size: how many images were nearest to it}."""
    sizes = sorted({nearest_size(shape, bucket_sizes(resolution)) for shape in set(shapes)})
    # Of each image (a row), how much is left of it in each size.
    ratios = np.array([[w / h] for w, h in shapes]) / np.array([[w / h for w, h in sizes]])
    shares = np.minimum(ratios, 1 / ratios)
    first, left, merged = shares.argmax(axis=1), list(range(len(sizes))), {}

    def cost(number):
        """What giving a size up cuts off of all images together, and the least that stays of one."""
        mine = shares[np.array(left)[shares[:, left].argmax(axis=1)] == number]
        after = mine[:, [other for other in left if other != number]].max(axis=1)
        lost = mine[:, number].sum() - after.sum()
        return lost, after.min(initial=1.0), len(mine), number

    while len(left) > 1:
        costs = sorted(map(cost, left))
        rare = [c for c in costs if c[2] < RARE * len(shapes) and c[1] >= LITTLE]
        if len(left) <= MOST_SIZES and not rare:
            break
        number = (rare or costs)[0][3]
        left.remove(number)
        merged[sizes[number]] = int((first == number).sum())
    return [sizes[number] for number in left], merged


# ---- one image --------------------------------------------------------------------------------


def framed(image, size, crop="centre", mask=None):
    """(image, mask, frame): an RGB image and its mask (or None) at `size` (width, height), their proportions
    unchanged, and a dict of what was done: `box`, the part of `image` that is shown (left, top, right,
    bottom), `kept`, that part's share of it, whether it was `enlarged`, and `words` for the manifest.

    `crop` says which part: the "centre", the "top", or where the "subject" is: what the mask marks or else what
    differs from a plain backdrop; where there is neither, the centre, which the words say.
    """
    centering, words = (0.5, 0.5), ""
    if crop == "top":
        centering, words = (0.5, 0.0), " at the top"
    elif crop == "subject":
        subject = subject_box(image, mask)
        words = " around the subject" if subject else " at the centre, no subject being found"
        if subject:
            centering = centering_on(subject, image.size, size)
    scale = max(size[0] / image.width, size[1] / image.height)
    ready = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centering)
    if mask is not None:
        mask = ImageOps.fit(mask, size, Image.Resampling.BILINEAR, centering=centering)
    frame = dict(
        box=kept_box(image.size, size, centering),
        kept=kept_share(image.size, size),
        enlarged=scale > 1,
        words=f"resized by {scale:.3f} and cropped to {size[0]}x{size[1]}{words}",
    )
    return ready, mask, frame


def kept_box(source, size, centering=(0.5, 0.5)):
    """The part (left, top, right, bottom) of an image of the size `source` that fills one of `size`."""
    scale = max(size[0] / source[0], size[1] / source[1])
    width, height = size[0] / scale, size[1] / scale
    left, top = (source[0] - width) * centering[0], (source[1] - height) * centering[1]
    return left, top, left + width, top + height


def subject_box(image, mask=None):
    """Where the subject is, as shares of width and height (left, top, right, bottom); None if nothing tells.

    A backdrop is plain if most of the border has nearly one colour; the lower border does not count, where a
    person is often cut off. Few pixels that differ (a shadow, a letter) are left out.
    """
    small = np.asarray(image.resize((96, 96), Image.Resampling.BOX), np.int16)
    if mask is not None:
        differs = np.asarray(mask.resize((96, 96), Image.Resampling.BOX)) > 127
    else:
        border = np.concatenate(
            [small[:3].reshape(-1, 3), small[:64, :3].reshape(-1, 3), small[:64, -3:].reshape(-1, 3)]
        )
        colour = np.median(border, axis=0)
        near = np.abs(border - colour).max(axis=1) <= PLAIN_SPREAD
        if near.mean() < PLAIN_SHARE:
            return None
        differs = np.abs(small - colour).max(axis=2) > PLAIN_SPREAD * 1.3
    if differs.mean() < 0.01:
        return None
    edges = []
    for axis in (0, 1):  # over the rows: left and right; over the columns: top and bottom
        mass = np.cumsum(differs.sum(axis=axis))
        low, high = np.searchsorted(mass, [0.01 * mass[-1], 0.99 * mass[-1]])
        edges.append((low / 96, (high + 1) / 96))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def centering_on(subject, source, size):
    """ImageOps.fit's centering for which the part that is kept has the subject in its middle or, where the subject is
    longer than that part, begins a little above its top."""
    scale = max(size[0] / source[0], size[1] / source[1])
    found = []
    for axis in (0, 1):
        window = size[axis] / scale / source[axis]
        low, high = subject[axis], subject[axis + 2]
        start = (low + high - window) / 2
        if axis == 1 and high - low > window:
            start = low - 0.03
        found.append(float(min(1.0, max(0.0, start / (1 - window)))) if window < 1 - 1e-9 else 0.5)
    return tuple(found)


def view(image, frame, mask=None, side=160):
    """A thumbnail of the whole image of at most `side` pixels: what was cut off is pale and the rest outlined; what
    lies outside the mask is tinted blue."""
    shrink = max(1, max(image.size) // (2 * side))  # quick, before the fine filter
    thumbnail = image.reduce(shrink) if shrink > 1 else image.copy()
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
    if mask is not None:
        tinted = Image.blend(thumbnail, Image.new("RGB", thumbnail.size, OUTSIDE), 0.5)
        thumbnail = Image.composite(thumbnail, tinted, mask.resize(thumbnail.size))
    scale = thumbnail.width / image.width, thumbnail.height / image.height
    left, top, right, bottom = (round(edge * scale[axis % 2]) for axis, edge in enumerate(frame["box"]))
    if (left, top, right, bottom) == (0, 0, *thumbnail.size):
        return thumbnail
    pale = Image.blend(thumbnail, Image.new("RGB", thumbnail.size, "white"), 0.6)
    pale.paste(thumbnail.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(pale).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE)
    return pale
