"""Image files of cameras, phones and the web, read as upright, opaque 8-bit sRGB."""

import contextlib
import io
import os
import warnings

import numpy as np
import PIL
import pillow_heif
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from lib.errors import one_line

# HEIC of phones, without the depth maps, mattes and thumbnails in such files.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
# Detected by content, not by the file's ending.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")
SRGB = ImageCms.createProfile("sRGB")

# Undeveloped sensor data. Some of these are TIFF files whose only image, for a TIFF reader, is a tiny preview.
RAW_ENDINGS = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
# Placeholders of Git LFS and git-annex for a large file.
POINTERS = (b"version https://git-lfs", b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/")
TEXTS = (".txt", ".caption", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".xml", ".xmp", ".yaml", ".yml")
DNG_VERSION = 50706  # a TIFF tag
RAW = (
    "a camera's raw file ({}); develop it, in the camera's program, darktable or RawTherapee, and export "
    "a JPEG, TIFF or PNG"
)


# Pillow rejects text chunks above 1 MiB; ComfyUI writes its whole graph into a PNG.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
# `decoded` refuses these images itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # of greys of 1, 8, 10, 12, 14 and 16 bits


class Unusable(Exception):
    """An image cannot be used, with the reason."""


def read_image(path, max_megapixels=200):
    """Read an image file as 8-bit sRGB, upright and opaque.

    Returns (image, info, done): an RGB PIL image; a dict of the source's format, mode, width and height; and a list of
    what was done beyond decoding. Raises Unusable with the reason.
    """
    image, _, info, done = read_layers(path, max_megapixels)
    return image, info, done


def read_layers(path, max_megapixels=200):
    """(image, alpha, info, done): like `read_image`, with the transparency as an L PIL image (255: opaque), or None if
    the image is opaque."""
    with reading(path, max_megapixels):
        image, info, done = decoded(path, max_megapixels)
        return *to_srgb(image, done), info, done


@contextlib.contextmanager
def reading(path, max_megapixels):
    """Turn what a decoder raises in the block into Unusable, with the reason."""
    try:
        yield
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {max_megapixels} megapixels") from None
    except PIL.UnidentifiedImageError:
        raise Unusable(f"{unread_kind(path)} (read are {', '.join(FORMATS)})") from None
    # Decoders raise almost anything on a damaged file; the image is then skipped and named.
    except Exception as problem:
        raise Unusable(f"damaged or truncated ({one_line(problem, 100)})") from None


def decoded(path, max_megapixels):
    """(image, info, done) of an image file, like `read_image`, but of any mode. To be called within `reading`."""
    if path.stat().st_size == 0:
        raise Unusable("empty file")
    if kind := raw_kind(path):
        raise Unusable(RAW.format(kind))
    Image.MAX_IMAGE_PIXELS = int(max_megapixels * 1e6)  # of a frame; above twice as many Pillow raises
    image = Image.open(path, formats=FORMATS)
    info = dict(format=image.format, mode=image.mode, width=image.width, height=image.height)
    if image.width * image.height > max_megapixels * 1e6:
        raise Unusable(f"more than {max_megapixels} megapixels")
    if image.format == "TIFF" and DNG_VERSION in image.tag_v2:
        raise Unusable(RAW.format("DNG"))
    frames = getattr(image, "n_frames", 1)
    if image.format != "HEIF":  # which opens at its main image, not always the first
        image.seek(0)
    # MPO is the JPEG of many cameras and phones: an image and its preview or depth map.
    animated = frames > 1 and image.format not in ("MPO", "HEIF")
    done = [f"first of {frames} frames"] if animated else []
    if image.format == "HEIF":
        done += heif_notes(image, frames)
    turned, deep = orientation(image) != 1, deep_colours(path, image)
    tiff = image.format == "TIFF"
    negative = tiff and image.mode.startswith(("I", "F")) and image.tag_v2.get(262) == 0
    image.load()
    if turned and not tiff:
        image = ImageOps.exif_transpose(image)
    if turned:
        done.append("rotated as its EXIF says")
    if image.mode.startswith(("I", "F")):
        image = eight_bits(image, negative, done)
    elif deep and image.convert("L").getextrema()[1] < 16:
        # Pillow keeps only the upper 8 bits of colours.
        raise Unusable(
            "nearly black: of 16 bits it uses 12 or fewer, as 16-bit colours are not read; "
            "export it with 8 bits, or with its values stretched"
        )
    return image, info, done


def orientation(image):
    """The EXIF orientation (1 to 8) of an opened image. Always 1 for HEIF, which pillow_heif has already rotated.
    Pillow rotates a TIFF file itself while loading it."""
    if image.format == "HEIF":
        return 1
    tag = image.getexif().get(0x0112, 1)
    if image.format == "TIFF":
        tag = image.tag_v2.get(0x0112) or tag
    return tag if tag in range(2, 9) else 1


def upright_shape(path):
    """(width, height) of an image as shown, from its header; None if that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, quarter = image.size, orientation(image) in range(5, 9)
            if image.format == "TIFF":
                # Pillow has swapped them already if the orientation is in the TIFF tag, but not if it is in XMP.
                quarter = quarter and image.tag_v2.get(0x0112, 1) not in range(5, 9)
            return size[::-1] if quarter else size
    except Exception:  # reported when the image is read
        return None


def deep_colours(path, image):
    """Whether a file has more than 8 bits per channel; Pillow reads 8 of them."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24:] == b"\x10"
    return image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8


def eight_bits(image, negative, done):
    """A greyscale image of more than 8 bits, or of floats, as an L image. Appends what was done to `done`.

    White is the smallest of WHITES that is at least the brightest value: cameras and scanners store 10 to 14 bits in a
    16-bit file. `negative` means that 0 is white.
    """
    levels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    top = levels.max(initial=0)
    white = next((white for white in WHITES if top <= white), top)
    if negative:
        levels = white - levels
    done.append(f"16 or more bits reduced to 8, with {white:g} as {'black' if negative else 'white'}")
    return Image.fromarray(np.clip(levels / white * 255 + 0.5, 0, 255).astype(np.uint8))


def to_srgb(image, done):
    """(opaque 8-bit sRGB copy of an image from `decoded`, its transparency or None). Appends what was done to `done`."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("RGB", "CMYK", "L", "LAB"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            description = ImageCms.getProfileDescription(source).strip()
            image = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
            if not description.startswith("sRGB"):
                done.append(f"colours converted from “{description}” to sRGB")
        except (ImageCms.PyCMSError, OSError) as problem:
            done.append(f"its ICC profile was ignored ({str(problem)[:60]})")
    image = image.convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return image, None
    done.append("put on white")
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha), alpha


def check_content(image, alpha):
    """Raise Unusable if an RGB image with the transparency `alpha`, or None, shows nothing."""
    if alpha is not None and alpha.getextrema()[1] == 0:
        raise Unusable("transparent everywhere: nothing of it can be seen")
    if all(low == high for low, high in image.getextrema()):
        raise Unusable("of one colour everywhere: it shows nothing")


def raw_kind(path):
    """The kind of a camera raw file, by its first bytes and, for those that are TIFF files, its name; None for any other
    file."""
    with path.open("rb") as file:
        head = file.read(16)
    ending = path.suffix.lower()
    is_tiff = head[:4] in (b"II*\0", b"MM\0*")
    if is_tiff and (head[8:10] == b"CR" or ending in RAW_ENDINGS):
        return "CR2" if head[8:10] == b"CR" else ending[1:].upper()
    known = {
        "CR3": head[4:12] == b"ftypcrx ",
        "RAF": head.startswith(b"FUJIFILMCCD-RAW"),
        "ORF": head[:4] in (b"IIRO", b"IIRS", b"MMOR"),
        "RW2": head[:4] == b"IIU\0",
    }
    return next((kind for kind, fits in known.items() if fits), None)


def fetched_by(link):
    """How to fetch the target of a git-annex link, in words after a semicolon; "" for another link."""
    return "; run git annex get" if ".git/annex/" in os.readlink(link).replace("\\", "/") else ""


def unread_kind(path):
    """What a file is that no decoder recognizes, in words."""
    with path.open("rb") as file:
        head = file.read(30)
    if head.startswith(b"%PDF-"):
        return "a PDF"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL, which is not read; convert it to PNG or JPEG"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC image that is damaged or truncated"
    if head[4:8] == b"ftyp":
        return "a video or another kind of file"
    if path.suffix.lower() in RAW_ENDINGS:
        return "by its name a camera's raw file, but damaged or of an unknown kind"
    if head.startswith(POINTERS):
        return "a pointer to an image that was not fetched; run git lfs pull or git annex get"
    if path.suffix.lower() in TEXTS:
        return "no image; captions are read from photo.txt next to photo.jpg, and from captions.jsonl"
    return "not an image, or one in another format"


def heif_notes(image, count):
    """What was done to a HEIC image while it was read: a list of words."""
    notes = []
    if image.info.get("original_orientation") in range(2, 9):
        notes.append("rotated as the file says")
    if count > 1:
        notes.append(f"the main one of {count} images")
    if image.info.get("bit_depth", 8) > 8:
        notes.append(f"{image.info['bit_depth']} bits reduced to 8")
    # Without an ICC profile colours are described by code points (ITU-T H.273); those listed are close to sRGB's.
    nclx = image.info.get("nclx_profile") or {}
    numbers = [int(nclx.get(key, 2)) for key in ("color_primaries", "transfer_characteristics")]
    if "icc_profile" not in image.info and (numbers[0] not in (1, 2, 5, 6) or numbers[1] in (16, 18)):
        notes.append(
            f"no ICC profile, taken for sRGB though its primaries are {numbers[0]} and its transfer "
            f"function {numbers[1]} (H.273)"
        )
    return notes
