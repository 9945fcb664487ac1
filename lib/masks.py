"""Masks next to images: their names, and how they are read."""

import re

import numpy as np
from PIL import Image

from lib.photographs import Unusable, decoded, reading
from lib.texts import Names

ENDINGS = r"\.(png|jpe?g|jfif|webp|bmp|tiff?|gif|avif|hei[cf])"
# Always a mask: photo.mask.png, or OneTrainer's photo-masklabel.png, next to photo.jpg.
SURELY = re.compile(rf"(.+)(?:\.mask|[.-]masklabel){ENDINGS}", re.I | re.S)
# photo_mask.png is a mask only next to photo.*: an image that shows a mask may have such a name too.
PERHAPS = re.compile(rf"(.+)[_-]mask{ENDINGS}", re.I | re.S)
BLACK, WHITE = 32, 223  # a level up to BLACK counts as black, from WHITE as white


def find_masks(names):
    """{image: [its masks]} among the file names of a folder."""
    images = Names(name for name in names if not SURELY.fullmatch(name))
    masks = {}
    for name in names:
        if match := SURELY.fullmatch(name) or PERHAPS.fullmatch(name):
            for image in images.find(match[1]):
                masks.setdefault(image, []).append(name)
    return masks


def only_mask(paths):
    """The mask of an image, of the `paths` of its masks; None without one. Raises Unusable if there are several."""
    if len(paths) > 1:
        raise Unusable(f"it has {len(paths)} masks, {' and '.join(p.name for p in paths)}; keep one")
    return paths[0] if paths else None


def subject_mask(path, image, alpha, max_megapixels=200):
    """(mask, its origin in words) of an image: an L PIL image of the image's size, 255 where the subject is. It is read
    from `path` or, without one, is the image's transparency `alpha`; (None, None) without either. Raises Unusable
    with the reason."""
    if path is None:
        return (alpha, "masked by its transparency") if alpha is not None else (None, None)
    try:
        with reading(path, max_megapixels):
            mask = levels(decoded(path, max_megapixels)[0])
    except (Unusable, OSError) as reason:
        raise Unusable(f"its mask {path.name}: {reason}") from None
    if abs(mask.width / mask.height * image.height / image.width - 1) > 0.02:
        raise Unusable(
            f"its mask {path.name} is {mask.width}x{mask.height}, another shape than the image's "
            f"{image.width}x{image.height}"
        )
    if mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    return mask, f"masked by {path.name}"


def levels(image):
    """A decoded mask as an L image, 255 where the subject is.

    Transparent pixels are not the subject, whatever their colour. A mask of one level besides black, such as the 1 of
    programs that number objects, marks its subject fully. Raises Unusable for a mask that is black everywhere, and for
    one of several dark levels, whose meaning is unknown.
    """
    grey, alpha = np.asarray(image.convert("L")), None
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        grey, alpha = np.asarray(layers.convert("L")), np.asarray(layers.getchannel("A"))
        visible = grey[alpha > 127]
        black, white = (visible <= BLACK).sum(), (visible >= WHITE).sum()
        if min(black, white) and black + white > 0.95 * visible.size:  # black and white, partly transparent
            grey = (grey.astype(np.uint16) * alpha // 255).astype(np.uint8)
        elif alpha.min() < 255:  # the subject on a transparent background
            grey = alpha
    brightest, marked = int(grey.max()), np.unique(grey[grey > 0])
    if not marked.size:
        raise Unusable("it marks nothing: it is black everywhere")
    if marked.size == 1:
        grey = np.where(grey > 0, np.uint8(255), np.uint8(0))
    elif brightest < 128:
        raise Unusable(
            f"it has {marked.size} levels besides black, the brightest {brightest} of 255; make "
            "the subject white and the rest black"
        )
    return Image.fromarray(grey)
