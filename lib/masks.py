"""Masks beside images: by which names they are known, and how they are read."""

import re

import numpy as np
from PIL import Image

from lib.photographs import Unusable, decoded, reading
from lib.texts import Names

ENDINGS = r"\.(png|jpe?g|jfif|webp|bmp|tiff?|gif|avif|hei[cf])"
# photo.mask.png, and photo-masklabel.png as OneTrainer has it, beside photo.jpg.
SURELY = re.compile(rf"(.+)(?:\.mask|[.-]masklabel){ENDINGS}", re.I | re.S)
# photo_mask.png, a mask only beside photo.*: an image of a mask may be called so too.
PERHAPS = re.compile(rf"(.+)[_-]mask{ENDINGS}", re.I | re.S)
BLACK, WHITE = 32, 223  # up to which and from which a level of a mask is meant as such


def find_masks(names):
    """{image: [its masks]} among the file names of a folder."""
    pictures = Names(name for name in names if not SURELY.fullmatch(name))
    masks = {}
    for name in names:
        if found := SURELY.fullmatch(name) or PERHAPS.fullmatch(name):
            for picture in pictures.find(found[1]):
                masks.setdefault(picture, []).append(name)
    return masks


def only_mask(paths):
    """The one of an image's masks; None if it has none, Unusable if it has several."""
    if len(paths) > 1:
        raise Unusable(f"it has {len(paths)} masks, {' and '.join(p.name for p in paths)}; keep one")
    return paths[0] if paths else None


def subject_mask(path, image, alpha, max_megapixels=200):
    """(the mask of an image, in words where it is from): an L PIL image of the image's size, 255 where the subject is;
    None twice if it has none. It is read from `path` or, where that is None, is the transparency `alpha` of the image,
    if it has any. Raises Unusable with the reason."""
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

    What is transparent is not the subject, whatever is painted there. A mask of one level besides black, such as the 1
    of programs that number what they find, marks its subject fully. Unusable for one that is black everywhere, and for
    one of several dark levels, of which nobody knows what they mean.
    """
    grey, alpha = np.asarray(image.convert("L")), None
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        grey, alpha = np.asarray(layers.convert("L")), np.asarray(layers.getchannel("A"))
        seen = grey[alpha > 127]
        black, white = (seen <= BLACK).sum(), (seen >= WHITE).sum()
        if min(black, white) and black + white > 0.95 * seen.size:  # black and white, in part cut out
            grey = (grey.astype(np.uint16) * alpha // 255).astype(np.uint8)
        elif alpha.min() < 255:  # the subject, cut out
            grey = alpha
    brightest, marked = int(grey.max()), np.unique(grey[grey > 0])
    if not marked.size:
        raise Unusable("it marks nothing: it is black everywhere")
    if marked.size == 1:
        grey = np.where(grey > 0, np.uint8(255), np.uint8(0))
    elif brightest < 128:
        raise Unusable(
            f"it has {marked.size} levels besides black, the brightest {brightest} of 255; make what "
            "the training is about white, the rest black"
        )
    return Image.fromarray(grey)
