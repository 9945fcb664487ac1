"""Similarity of images to the training images, by the embeddings of an image encoder.

An encoder is CLIP's image encoder (clip_scores.py) or DINOv2 (dinov2.py). Both have `embed(images)`, which returns
embeddings of unit length, float32 [n, width]; `width`; `digest`, the SHA-256 of its files; `image_processor`; and
`model`, whose device is part of a cache's key.
"""

import hashlib
import json
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.cache import write_cached
from lib.dataset import KEPT, Images
from lib.errors import UserError, one_line


def unit_length(embeddings):
    """Embeddings [n, d] divided by their norms, as a NumPy array."""
    return (embeddings / embeddings.norm(dim=-1, keepdim=True)).cpu().numpy()


def whole_images(images, processor):
    """Pixel values [n, 3, height, width] of PIL images by a model's image processor. An image that is not square is
    resized to a square as a whole; square images are processed as the model does it."""
    side = processor.size.get("shortest_edge")  # by default only the shorter side is resized to it
    size = dict(height=side, width=side) if side else processor.size
    return processor([image.convert("RGB") for image in images], size=size, return_tensors="pt").pixel_values


def load_encoder(what, folder, model_class, processor_class, device):
    """(model in float32 on `device`, its processor) from a folder; UserError, which calls it `what`, if they cannot be
    loaded."""
    try:
        model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        processor = processor_class.from_pretrained(folder)
    except Exception as problem:
        raise UserError(f"{what} {folder} cannot be loaded: {one_line(problem, 160)}") from None
    return model.eval().requires_grad_(False).to(device), processor


@torch.no_grad()
def embed_batches(images, processor, device, features, batch_size=32):
    """Embeddings of unit length, float32 [n, d], of PIL images; `features` maps pixel values [b, 3, height, width] to
    features [b, d]."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [images[place] for place in range(start, min(start + batch_size, len(images)))]
        parts.append(features(whole_images(batch, processor).to(device)))
    return unit_length(torch.cat(parts))


def concept_similarity(embeddings, training):
    """Mean cosine of each embedding [n, d] to the training images' [m, d]: float32 [n]."""
    return (embeddings @ training.T).mean(axis=1)


def similarities(embeddings, others, mirrored):
    """Cosine [n, m] of each embedding [n, d] to each of the others [m, d] or its mirror image, whichever is higher."""
    cosines = embeddings @ others.T
    return np.maximum(cosines, embeddings @ mirrored.T, out=cosines)


def nearest_training(embeddings, training, mirrored):
    """(highest cosine [n], index of that training image [n]) of `embeddings` [n, d].

    `training` and `mirrored` [m, d] are the embeddings of the training images and of the mirrored ones: a mirrored copy
    is a copy.
    """
    cosines = similarities(embeddings, training, mirrored)
    return cosines.max(axis=1), cosines.argmax(axis=1)


def training_embeddings(images, encoder, at_once=32):
    """(embeddings, embeddings of the mirrored images) of the training images, [m, d] each.

    `at_once` images are held in memory; `images` may be a sequence that reads them on access.
    """
    # Allocated at once: small arrays that stay between large ones that are freed would fragment the heap.
    embeddings = np.empty((2, len(images), encoder.width), np.float32)
    for start in range(0, len(images), at_once):
        chunk = [images[i] for i in range(start, min(start + at_once, len(images)))]
        mirrored = [ImageOps.mirror(image) for image in chunk]
        for target, part in zip(embeddings, (chunk, mirrored), strict=True):
            target[start : start + len(chunk)] = encoder.embed(part)
    return tuple(embeddings)


class Subjects:
    """The masked images of a Dataset as PIL images that show their subject alone: a lazy sequence.

    What lies outside the mask has the encoder's mean colour, which its image processor maps to 0; soft edges are blended.
    """

    def __init__(self, data, masked, encoder):
        self.data, self.masked = data, masked
        self.colour = tuple(round(255 * level) for level in encoder.image_processor.image_mean)

    def __len__(self):
        return len(self.masked)

    def __getitem__(self, place):
        image = self.data.image(self.masked[place])
        mask = Image.fromarray(self.data.mask(self.masked[place], image.size).numpy())
        return Image.composite(image, Image.new("RGB", image.size, self.colour), mask)


def cached_training_embeddings(data, encoder, masked=()):
    """`training_embeddings` of a Dataset or, with `masked`, the indices of images with a mask, of their Subjects; cached
    beside its images. The cache is valid for the same images and masks, the same encoder, the same library versions and
    the same kind of device."""
    made_of = [[row.sha256 for row in data], data.resolution, encoder.digest]
    made_of += [version("torch"), version("transformers"), encoder.model.device.type, "whole images"]
    made_of += [list(masked), data.masks_sha256()] if masked else []
    images = Subjects(data, masked, encoder) if masked else Images(data)
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = data.folder / KEPT / f"{'subjects' if masked else 'embeddings'}_{made_of[2][:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            cached = kept["embeddings"], kept["mirrored"]
            shapes = {part.shape for part in cached}
            if str(kept["key"]) == key and len(shapes) == 1 and cached[0].shape[0] == len(images):
                return cached
    except FileNotFoundError:
        pass
    except Exception:  # zipfile and NumPy's reader raise almost anything on a damaged file
        print(f"note: {path} is damaged; the training images are embedded again")
    embeddings, mirrored = training_embeddings(images, encoder)
    arrays = dict(embeddings=embeddings, mirrored=mirrored, key=np.array(key))

    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    write_cached(path, write)
    return embeddings, mirrored


def kernel_distance(embeddings, training, subsets=50):
    """Kernel distance of two sets of unit-length embeddings, [n, d] and [m, d]: a float.

    The unbiased squared maximum mean discrepancy with the cubic polynomial kernel (KID, Bińkowski et al. 2018) over the
    encoder's features in place of Inception's: the mean over `subsets` random subsets of each set, the same ones in every
    call. The result is that of torchmetrics' KernelInceptionDistance, which takes a second to import. Unlike a mean
    cosine it is 0 (or slightly below) only if both sets have the same distribution. Features are scaled to a mean square
    of 1 per component, as that kernel expects.
    """
    size = min(len(embeddings), len(training))
    if size < 2:
        return float("nan")
    width = training.shape[1]
    training, embeddings = (torch.from_numpy(features * width**0.5) for features in (training, embeddings))
    generator = torch.Generator().manual_seed(0)

    def kernel(a, b):
        return (a @ b.T * (1 / width) + 1) ** 3

    def off_diagonal(kernels):
        return (kernels.sum(dim=1) - kernels.diag()).sum()

    distances = []
    for _ in range(subsets):
        a, b = (
            features[torch.randperm(len(features), generator=generator)[:size]] for features in (training, embeddings)
        )
        within = (off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b))) / (size * (size - 1))
        distances.append(within - 2 * kernel(a, b).sum(dim=0).sum() / size**2)
    return float(torch.stack(distances).mean())
