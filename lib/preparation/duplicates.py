"""Near-duplicates: images whose brightness and colours are nearly the same."""

import base64

import imagehash
import numpy as np
from PIL import Image

THUMBNAIL = 16  # pixels a side of the image whose colours are compared


def fingerprint(image):
    """What near-duplicates share, as JSON can hold it: `phash`, the 64-bit DCT hash of imagehash in
    hex, and `thumbnail`, the bytes of a 16x16 RGB image in base64."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = base64.b64encode(small.tobytes()).decode()
    return dict(phash=str(imagehash.phash(image)), thumbnail=thumbnail)


def without_duplicates(pictures, duplicate_bits, duplicate_colour):
    """(kept, duplicates), by their sources' names: of two that are nearly the same the better one is
    kept, which is the one with more pixels, then the larger file.

    Two are, if at most `duplicate_bits` of the 64 bits of their hashes differ and their thumbnails'
    values by at most `duplicate_colour` on average: the hash sees brightness only, and shops photograph
    one cut in many colours. Each image is compared with all that are kept so far at once, in numpy.
    """
    hashes = np.zeros(len(pictures), np.uint64)
    colours = np.zeros((len(pictures), THUMBNAIL * THUMBNAIL * 3), np.uint8)
    kept, duplicates = [], []
    for picture in sorted(pictures, key=lambda p: (-p["pixels"], -p["bytes"], p["source"])):
        phash = np.uint64(int(picture["phash"], 16))
        colour = np.frombuffer(base64.b64decode(picture["thumbnail"]), np.uint8)
        bits = np.bitwise_count(hashes[: len(kept)] ^ phash)
        near = np.nonzero(bits <= duplicate_bits)[0]
        apart = np.abs(colours[near].astype(np.int16) - colour).mean(axis=1, dtype=np.float32)
        twins = near[apart <= duplicate_colour]
        if len(twins):
            twin = kept[twins[0]]
            exact = picture["sha256"] == twin["sha256"]
            duplicates.append(
                dict(
                    source=picture["source"],
                    duplicate_of=twin["source"],
                    reason="the same file" if exact else "nearly the same image",
                    bits=int(bits[twins[0]]),
                    notes=lost_mask(picture, twin),
                )
            )
        else:
            hashes[len(kept)], colours[len(kept)] = phash, colour
            kept.append(picture)
    kept.sort(key=lambda picture: picture["source"])
    duplicates.sort(key=lambda row: row["source"])
    return kept, duplicates


def lost_mask(picture, twin):
    """What is to be said of the mask of an image that is dropped for its `twin`: a list of words."""
    masked = [".mask.png" in one.get("files", ()) for one in (picture, twin)]
    return ["its mask is not used"] if masked == [True, False] else []


def with_those_of_duplicates(captions, duplicates):
    """`captions`, as `read_captions` gives them, where an image that was kept has what was written for the one that was
    dropped, if nothing was for itself. What becomes of a caption is added to `notes` of the rows of `duplicates`."""
    captions = {name: dict(own) for name, own in captions.items()}
    for row in duplicates:
        own, twin = captions[row["source"]], captions[row["duplicate_of"]]
        for key, words in own.items():
            kept = twin.setdefault(key, words)
            what = "caption" if key == "text" else key
            if kept is words:
                row["notes"].append(f"its {what} is used there")
            elif kept[0] != words[0]:
                row["notes"].append(f"its {what} is not used: “{words[0]}”")
    return captions
