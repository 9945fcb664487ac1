"""Sheets of images: thumbnails with a title under each, and strips that show how images change. Empty figures."""

import bisect
import io

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (24, 26, 31), (255, 255, 255), (110, 115, 125)


def contact_sheet(images, titles, columns=8, side=160):
    """A grid of thumbnails with a title under each; `images` PIL images of any size."""
    font = ImageFont.load_default(11)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    gap, line = 8, 18
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + line + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = gap + index % columns * (side + gap)
        y = gap + index // columns * (side + line + gap)
        thumbnail = image.copy()
        thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (x, y))
        draw.text((x, y + side + 2), fit_text(title, font, side), INK, font)
    return sheet


def height_at(image, width):
    """The height of a PIL image scaled to `width` pixels."""
    return max(1, round(width * image.height / image.width))


def shown(image, width):
    """A PIL image scaled to `width` pixels, its aspect ratio kept."""
    return image.resize((width, height_at(image, width)), Image.Resampling.LANCZOS)


def strip(columns, prompts, side=192):
    """A table of images as one PIL image: one row per prompt, one column per label.

    `columns` is {label: one image per prompt, of any size}; `side` is the width of each in pixels.
    """
    font = ImageFont.load_default(15)
    gap, line = 6, 24
    # Wide enough for the prompt above a row, even with one column.
    width = max(gap + len(columns) * (side + gap), 480)
    height = max(height_at(image, side) for images in columns.values() for image in images)
    sheet = Image.new("RGB", (width, line + len(prompts) * (height + gap + line)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns.items()):
        x = gap + column * (side + gap)
        draw.text((x, 3), fit_text(label, font, side), INK, font)
        for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            y = line + row * (height + gap + line)
            if column == 0:
                draw.text((x, y + 3), fit_text(prompt, font, width - 2 * gap), QUIET, font)
            sheet.paste(shown(image, side), (x, y + line))
    return sheet


def webp(image, quality=90, exif=None):
    """A PIL image as the bytes of a WebP file, with a PIL Exif if one is given."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, **(dict(exif=exif) if exif else {}))
    return buffer.getvalue()


def fit_lines(text, font, width, most=2):
    """`text` broken between words into a list of at most `most` lines of `width` pixels; a line that is still too wide
    ends in an ellipsis."""
    lines = []
    for word in text.split():
        if lines and (len(lines) == most or font.getlength(f"{lines[-1]} {word}") <= width):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [fit_text(line, font, width) for line in lines]


def fit_text(text, font, width):
    """`text`, its end replaced by an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(1, len(text)), width, key=lambda end: font.getlength(text[:end] + "…"))
    return text[:fitting] + "…"


def empty_figure(width, height, dpi):
    """A matplotlib figure of `width` and `height` in inches."""
    import matplotlib  # here: training and generation start without it
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a prompt or a run's name may hold dollar signs
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")
