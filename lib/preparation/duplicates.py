"""Near-duplicates: images of nearly the same brightness and colours."""

import base64

import imagehash
import numpy as np
from PIL import Image

THUMBNAIL = 16  # side of the image whose colours are compared, in pixels


def fingerprint(image):
    """What near-duplicates share, for JSON: `phash`, imagehash's 64-bit DCT hash in hex, and `thumbnail`, the bytes of
    a 16x16 RGB image in base64."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = base64.b64encode(small.tobytes()).decode()
    return dict(phash=str(imagehash.phash(image)), thumbnail=thumbnail)


def without_duplicates(images, duplicate_bits, duplicate_colour):
    """(kept, duplicates), sorted by source name. The near-duplicate with more pixels is kept, in a tie the one with
    the larger file.

    Two images are near-duplicates if at most `duplicate_bits` of the 64 bits of their hashes differ and their
    thumbnails differ by at most `duplicate_colour` on average. The thumbnails are needed because the hash sees
    brightness only, and shops photograph one cut in many colours. Each image is compared with all images kept so far at
    once, in numpy.
    """
    hashes = np.zeros(len(images), np.uint64)
    colours = np.zeros((len(images), THUMBNAIL * THUMBNAIL * 3), np.uint8)
    kept, duplicates = [], []
    for image in sorted(images, key=lambda image: (-image["pixels"], -image["bytes"], image["source"])):
        phash = np.uint64(int(image["phash"], 16))
        colour = np.frombuffer(base64.b64decode(image["thumbnail"]), np.uint8)
        bits = np.bitwise_count(hashes[: len(kept)] ^ phash)
        near = np.nonzero(bits <= duplicate_bits)[0]
        apart = np.abs(colours[near].astype(np.int16) - colour).mean(axis=1, dtype=np.float32)
        twins = near[apart <= duplicate_colour]
        if len(twins) == 0:
            hashes[len(kept)], colours[len(kept)] = phash, colour
            kept.append(image)
            continue
        twin = kept[twins[0]]
        masked, twin_masked = (".mask.png" in one.get("files", ()) for one in (image, twin))
        same = image["sha256"] == twin["sha256"]
        duplicates.append(
            dict(
                source=image["source"],
                duplicate_of=twin["source"],
                reason="the same file" if same else "nearly the same image",
                bits=int(bits[twins[0]]),
                notes=["its mask is not used"] if masked and not twin_masked else [],
            )
        )
    kept.sort(key=lambda image: image["source"])
    duplicates.sort(key=lambda row: row["source"])
    return kept, duplicates


def inherit_captions(captions, duplicates):
    """`captions` (see `read_captions`), where an image without a caption or description inherits its duplicate's. The
    `notes` of the duplicate's row in `duplicates` state whether it was used."""
    captions = {name: dict(own) for name, own in captions.items()}
    for row in duplicates:
        twin = captions[row["duplicate_of"]]
        for key, words in captions[row["source"]].items():
            kept = twin.setdefault(key, words)
            what = "caption" if key == "text" else key
            if kept is words:
                row["notes"].append(f"its {what} is used there")
            elif kept[0] != words[0]:
                row["notes"].append(f"its {what} is not used: “{words[0]}”")
    return captions
