"""CLIP embeddings of images and texts, and the scores that compare them.

CLIP scores are cosines in float32, neither clamped nor scaled by 100. A non-square image is resized whole to CLIP's
square: the processor's centre crop would cut off the head and the hem of a portrait (`python bench/clip_shapes.py`).
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from lib.cache import write_cached
from lib.dataset import KEPT, Images
from lib.errors import UserError, one_line
from lib.models import fetch_model, model_digest


@dataclass
class Clip:
    """A CLIP model with its processor; what `load_clip` returns."""

    model: CLIPModel
    processor: CLIPProcessor
    digest: str = None  # SHA-256 of its files

    @property
    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings


def fetch_clip(name, revision=None):
    """The local folder of a CLIP model (safetensors only); UserError if it is unavailable."""
    folder = fetch_model(name, revision, ["model"], False, ["*.json", "merges.txt"])
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"CLIP model {name}: {folder} lacks config.json or model.safetensors; pickles are not loaded, use a "
            "revision or a folder with safetensors"
        )
    return folder


def load_clip(folder, device="cpu"):
    """Load a CLIP folder as a Clip in float32."""
    try:
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder)
    except Exception as problem:
        reason = one_line(problem, 160)
        raise UserError(f"CLIP model {folder} cannot be loaded: {reason}") from None
    return Clip(model.eval().requires_grad_(False).to(device), processor, model_digest(Path(folder)))


@torch.no_grad()
def image_embeddings(images, clip, batch_size=32):
    """CLIP image embeddings of unit length, float32 [n, d]."""
    device, parts = clip.model.device, []
    process = clip.processor.image_processor
    side = process.size.get("shortest_edge")  # by default only the shorter side is resized to it
    size = dict(height=side, width=side) if side else process.size
    for start in range(0, len(images), batch_size):
        places = range(start, min(start + batch_size, len(images)))
        batch = [images[place].convert("RGB") for place in places]
        pixels = process(batch, size=size, return_tensors="pt").pixel_values.to(device)
        pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
        parts.append(clip.model.visual_projection(pooled))
    return unit_length(torch.cat(parts))


@torch.no_grad()
def text_embeddings(texts, clip):
    """CLIP text embeddings of unit length, float32 [n, d]; ValueError for a text with too many tokens."""
    for text in texts:
        length = len(clip.processor.tokenizer(text, verbose=False).input_ids)
        if length > clip.max_tokens:
            raise ValueError(f"“{text[:60]}…” has {length} tokens, CLIP reads {clip.max_tokens}")
    tokens = clip.processor.tokenizer(list(texts), padding=True, return_tensors="pt")
    tokens = {key: tokens[key].to(clip.model.device) for key in ("input_ids", "attention_mask")}
    return unit_length(clip.model.text_projection(clip.model.text_model(**tokens).pooler_output))


def unit_length(embeddings):
    return (embeddings / embeddings.norm(dim=-1, keepdim=True)).cpu().numpy()


def clip_scores(images, prompts, model):
    """Cosine of each image and its prompt, float32 [n]; `model` is a Clip."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images against {len(prompts)} prompts")
    return (image_embeddings(images, model) * text_embeddings(prompts, model)).sum(axis=1)


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


def training_embeddings(images, clip, at_once=32):
    """(embeddings, embeddings of the mirrored images) of the training images, [m, d] each.

    `at_once` images are held in memory; `images` may be a sequence that reads them on access.
    """
    # Allocated at once: small arrays that stay between large ones that are freed would fragment the heap.
    embeddings = np.empty((2, len(images), clip.model.config.projection_dim), np.float32)
    for start in range(0, len(images), at_once):
        chunk = [images[i] for i in range(start, min(start + at_once, len(images)))]
        mirrored = [ImageOps.mirror(image) for image in chunk]
        for target, part in zip(embeddings, (chunk, mirrored), strict=True):
            target[start : start + len(chunk)] = image_embeddings(part, clip)
    return tuple(embeddings)


def kept_training_embeddings(data, folder, clip):
    """`training_embeddings` of a Dataset, cached beside its images. The cache is valid for the same images, the same
    model (that of `folder`), the same library versions and the same kind of device."""
    made_of = [[row.sha256 for row in data], data.resolution, model_digest(folder)]
    made_of += [version("torch"), version("transformers"), clip.model.device.type, "whole images"]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = data.folder / KEPT / f"embeddings_{made_of[2][:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            cached = kept["embeddings"], kept["mirrored"]
            shapes = {part.shape for part in cached}
            if str(kept["key"]) == key and len(shapes) == 1 and cached[0].shape[0] == len(data):
                return cached
    except FileNotFoundError:
        pass
    except Exception:  # zipfile and NumPy's reader raise almost anything on a damaged file
        print(f"note: {path} is damaged; the training images are embedded again")
    embeddings, mirrored = training_embeddings(Images(data), clip)
    arrays = dict(embeddings=embeddings, mirrored=mirrored, key=np.array(key))

    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    write_cached(path, write)
    return embeddings, mirrored


def kernel_distance(embeddings, training, subsets=50):
    """Kernel distance of two sets of unit-length embeddings, [n, d] and [m, d]: a float.

    The unbiased squared maximum mean discrepancy with the cubic polynomial kernel (KID, Bińkowski et al. 2018) over CLIP
    features in place of Inception's; torchmetrics computes it, as the mean over `subsets` random subsets of each set, the
    same ones in every call. Unlike a mean cosine it is 0 (or slightly below) only if both sets have the same
    distribution. Features are scaled to a mean square of 1 per component, as that kernel expects.
    """
    size = min(len(embeddings), len(training))
    if size < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about features kept in memory
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=subsets, subset_size=size)
    for real, features in ((True, training), (False, embeddings)):
        metric.update(torch.from_numpy(features * features.shape[1] ** 0.5), real=real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])
