"""Which part of a picture is trained on, and at what size."""

from PIL import Image, ImageDraw, ImageOps

OUTLINE = (230, 30, 60)


def framed(image, settings):
    """(picture, frame): an RGB picture as it is trained on, its proportions unchanged, and a dict of what
    was done: `box`, the part of `image` that it shows (left, top, right, bottom), whether it was `enlarged`,
    and `words` for the manifest.

    `settings` holds `resolution`, the side of the square in pixels.
    """
    size = (settings["resolution"], settings["resolution"])
    scale = max(size[0] / image.width, size[1] / image.height)
    ready = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    words = f"resized by {scale:.3f} and cropped to {size[0]}x{size[1]}"
    return ready, dict(box=kept_box(image.size, size), enlarged=scale > 1, words=words)


def kept_box(source, size, centering=(0.5, 0.5)):
    """The part (left, top, right, bottom) of a picture of the size `source` that fills one of `size`."""
    scale = max(size[0] / source[0], size[1] / source[1])
    width, height = size[0] / scale, size[1] / scale
    left, top = (source[0] - width) * centering[0], (source[1] - height) * centering[1]
    return left, top, left + width, top + height


def view(image, frame, side=160):
    """A thumbnail of the whole picture of at most `side` pixels; what was cut off is pale, the rest outlined."""
    thumbnail = image.copy()
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    scale = thumbnail.width / image.width, thumbnail.height / image.height
    left, top, right, bottom = (
        round(edge * scale[axis % 2]) for axis, edge in enumerate(frame["box"])
    )
    if (left, top, right, bottom) == (0, 0, *thumbnail.size):
        return thumbnail
    pale = Image.blend(thumbnail, Image.new("RGB", thumbnail.size, "white"), 0.6)
    pale.paste(thumbnail.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(pale).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE)
    return pale
