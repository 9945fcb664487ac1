"""Which part of an image is trained on, at what size, and the contact sheet that shows it."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from lib.images import contact_sheet

CROPS = ("centre", "top", "subject")
OUTLINE, OUTSIDE = (230, 30, 60), (40, 90, 255)
MOST_SIZES = 6  # training captures CUDA graphs for each, which takes a second or more
RARE = 0.05  # share of the images below which a size is merged, provided that
LEAST_KEPT = 0.85  # of each image is kept
# A backdrop is plain if this share of the border is within this many levels of its median.
PLAIN_SHARE, PLAIN_SPREAD = 0.7, 30
THUMBNAILS_PER_PAGE = 200


# ---- sizes ------------------------------------------------------------------------------------


def bucket_sizes(resolution):
    """[(width, height)] whose area is within an eighth of resolution², with sides from resolution/2 to 2 * resolution.
    The step is 64 pixels or, if less, an eighth of `resolution`, in multiples of 8."""
    step = min(64, max(8, resolution // 64 * 8))
    sides = range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step)
    near = [(w, h) for w in sides for h in sides if abs(w * h / resolution**2 - 1) <= 1 / 8]
    return near or [(resolution, resolution)]


def kept_share(shape, size):
    """The share of an image of `shape` (width, height) that is left when it fills `size`: 0 to 1."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return min(ratio, 1 / ratio)


def nearest_size(shape, sizes):
    """The one of `sizes` that keeps the largest share of an image of `shape`."""
    return max(sizes, key=lambda size: (kept_share(shape, size), size))


def choose_sizes(shapes, resolution):
    """Choose few sizes for images of `shapes`. Returns (sizes, merged); `merged` is {dropped size: number of images that
    were nearest to it}."""
    sizes = sorted({nearest_size(shape, bucket_sizes(resolution)) for shape in set(shapes)})
    ratios = np.array([[w / h] for w, h in shapes]) / np.array([[w / h for w, h in sizes]])
    shares = np.minimum(ratios, 1 / ratios)  # [images, sizes]: kept_share of each image in each size
    first, left, merged = shares.argmax(axis=1), list(range(len(sizes))), {}

    def cost(number):
        """(share lost over all images if a size is dropped, least share kept of one, number of images, the size)."""
        mine = shares[np.array(left)[shares[:, left].argmax(axis=1)] == number]
        after = mine[:, [other for other in left if other != number]].max(axis=1)
        lost = mine[:, number].sum() - after.sum()
        return lost, after.min(initial=1.0), len(mine), number

    while len(left) > 1:
        costs = sorted(map(cost, left))
        rare = [c for c in costs if c[2] < RARE * len(shapes) and c[1] >= LEAST_KEPT]
        if len(left) <= MOST_SIZES and not rare:
            break
        number = (rare or costs)[0][3]
        left.remove(number)
        merged[sizes[number]] = int((first == number).sum())
    return [sizes[number] for number in left], merged


# ---- one image --------------------------------------------------------------------------------


def framed(image, size, crop="centre", mask=None):
    """Resize and crop an RGB image and its mask (or None) to `size` (width, height), without squashing.

    Returns (image, mask, frame). `frame` holds `box`, the visible part of `image` (left, top, right, bottom); `kept`,
    its share; whether it was `enlarged`; and `words` for the manifest. `crop` is "centre", "top" or "subject": what
    the mask marks, else what differs from a plain backdrop, else the centre, as `words` says.
    """
    centering, words = (0.5, 0.5), ""
    if crop == "top":
        centering, words = (0.5, 0.0), " at the top"
    elif crop == "subject":
        subject = subject_box(image, mask)
        words = " around the subject" if subject else " at the centre, as no subject was found"
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
    """The part (left, top, right, bottom) of an image of size `source` that fills `size`."""
    scale = max(size[0] / source[0], size[1] / source[1])
    width, height = size[0] / scale, size[1] / scale
    left, top = (source[0] - width) * centering[0], (source[1] - height) * centering[1]
    return left, top, left + width, top + height


def subject_box(image, mask=None):
    """Where the subject is, as fractions of width and height (left, top, right, bottom); None if unknown.

    Without a mask, the subject is whatever differs from a plain backdrop, one whose border has nearly one colour. The
    lower border is ignored, because a person is often cut off there. A few differing pixels (a shadow, a letter) are
    ignored too.
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
    for axis in (0, 1):  # sums over rows give left and right, over columns top and bottom
        mass = np.cumsum(differs.sum(axis=axis))
        low, high = np.searchsorted(mass, [0.01 * mass[-1], 0.99 * mass[-1]])
        edges.append((low / 96, (high + 1) / 96))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def centering_on(subject, source, size):
    """ImageOps.fit's `centering` that puts the middle of the subject in the middle of the kept part. If the subject is
    taller than that part, the part starts a little above its top."""
    scale = max(size[0] / source[0], size[1] / source[1])
    centering = []
    for axis in (0, 1):
        window = size[axis] / scale / source[axis]
        low, high = subject[axis], subject[axis + 2]
        start = (low + high - window) / 2
        if axis == 1 and high - low > window:
            start = low - 0.03
        centering.append(float(min(1.0, max(0.0, start / (1 - window)))) if window < 1 - 1e-9 else 0.5)
    return tuple(centering)


# ---- contact sheet ----------------------------------------------------------------------------


def view(image, frame, mask=None, side=160):
    """A thumbnail of the whole image, at most `side` pixels wide and high. What was cut off is pale, the rest outlined;
    what lies outside the mask is tinted blue."""
    shrink = max(1, max(image.size) // (2 * side))  # fast, before the fine filter
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


def write_contact_sheets(folder, views, titles):
    """Write contact_sheet.jpg into `folder` or, if there are several pages, contact_sheet_01.jpg and so on. `views` are
    paths of thumbnails, with one of `titles` under each. Returns the name of the first page."""
    starts = range(0, len(views), THUMBNAILS_PER_PAGE)
    digits = max(2, len(str(len(starts))))
    names = [f"contact_sheet_{page:0{digits}}.jpg" for page in range(1, len(starts) + 1)]
    if len(names) == 1:
        names = ["contact_sheet.jpg"]
    for name, start in zip(names, starts, strict=True):
        images = []
        for path in views[start : start + THUMBNAILS_PER_PAGE]:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        sheet = contact_sheet(images, titles[start : start + THUMBNAILS_PER_PAGE])
        sheet.save(folder / name, quality=88)
    return names[0]
