"""The scores, over lists of PIL pictures; each function can be used on its own.

CLIP scores are cosines in float32, neither clamped nor scaled by 100. LPIPS is AlexNet v0.1 of the
`lpips` package (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) on pictures in [-1, 1] at
their own size; its AlexNet layers come from alexnet_features.safetensors beside this file, so that
nothing is downloaded.
"""

import functools
import warnings
from dataclasses import dataclass

import lpips
import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from common import ROOT, UserError, fetch_model

ALEXNET = ROOT / "alexnet_features.safetensors"


@functools.cache
def lpips_model(device="cpu"):
    """The LPIPS network (AlexNet v0.1), float32, in evaluation mode."""
    if not ALEXNET.is_file():
        raise UserError(
            f"{ALEXNET.name} is missing beside metrics.py; restore it from the repository"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision's renamed `pretrained`
        # pnet_rand: torchvision would fetch AlexNet from the network. The package brings only the
        # linear layers on top.
        model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    weights = {key.removeprefix("features."): w.float() for key, w in load_file(ALEXNET).items()}
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):  # fmt: skip
        own = {key: weights.pop(key) for key in part.state_dict()}
        part.load_state_dict(own)
    if weights:
        raise RuntimeError(f"{ALEXNET.name} has layers that AlexNet has not: {sorted(weights)}")
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def lpips_distances(images_a, images_b, device="cpu"):
    """LPIPS of each pair of pictures, float32 [n]: 0 for equal ones, about 0.7 for unrelated ones.

    Raises ValueError if the lists differ in length or a pair in size; nothing is resized, because
    that would change the figure.
    """
    if len(images_a) != len(images_b):
        raise ValueError(f"{len(images_a)} pictures against {len(images_b)}")
    model = lpips_model(str(device))
    distances = []
    for a, b in zip(images_a, images_b, strict=True):
        if a.size != b.size:
            raise ValueError(
                f"a picture of {a.size} against one of {b.size}; LPIPS does not resize"
            )
        pair = [torch.from_numpy(np.array(image.convert("RGB"))).to(device) for image in (a, b)]
        pair = [pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0 for pixels in pair]
        distances.append(model(*pair).item())
    return np.array(distances, np.float32)


@dataclass
class Clip:
    """A CLIP model with its processor; what `load_clip` returns."""

    model: CLIPModel
    processor: CLIPProcessor

    @property
    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings


def fetch_clip(name, revision=None):
    """The local folder of a CLIP model (safetensors only); UserError if it cannot be had."""
    folder = fetch_model(name, revision, ["model"], False, ["*.json", "merges.txt"])
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"CLIP model {name}: config.json or model.safetensors missing in {folder}; a pickle is "
            "not read: take a revision or a folder with safetensors"
        )
    return folder


def load_clip(folder, device="cpu"):
    """Load a CLIP folder in float32."""
    try:
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder)
    except Exception as problem:
        reason = " ".join(str(problem).split())[:160]
        raise UserError(f"CLIP model {folder} cannot be loaded: {reason}") from None
    return Clip(model.eval().requires_grad_(False).to(device), processor)


@torch.no_grad()
def image_embeddings(images, clip, batch_size=32):
    """CLIP image embeddings of unit length, float32 [n, d]."""
    device, parts = clip.model.device, []
    for start in range(0, len(images), batch_size):
        batch = [image.convert("RGB") for image in images[start : start + batch_size]]
        pixels = clip.processor.image_processor(batch, return_tensors="pt").pixel_values.to(device)
        pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
        parts.append(clip.model.visual_projection(pooled))
    return unit_length(torch.cat(parts))


@torch.no_grad()
def text_embeddings(texts, clip):
    """CLIP text embeddings of unit length, float32 [n, d]; ValueError for a text that is too long."""
    for text in texts:
        length = len(clip.processor.tokenizer(text).input_ids)
        if length > clip.max_tokens:
            raise ValueError(f"«{text[:60]}…» has {length} tokens, CLIP reads {clip.max_tokens}")
    tokens = clip.processor.tokenizer(list(texts), padding=True, return_tensors="pt")
    tokens = {key: tokens[key].to(clip.model.device) for key in ("input_ids", "attention_mask")}
    return unit_length(clip.model.text_projection(clip.model.text_model(**tokens).pooler_output))


def unit_length(embeddings):
    return (embeddings / embeddings.norm(dim=-1, keepdim=True)).cpu().numpy()


def clip_scores(images, prompts, model):
    """Cosine of each picture's embedding and its prompt's, float32 [n]; `model` from load_clip."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures against {len(prompts)} prompts")
    return (image_embeddings(images, model) * text_embeddings(prompts, model)).sum(axis=1)


def concept_similarity(embeddings, training):
    """Mean cosine of each embedding [n, d] to the training pictures' [m, d]: float32 [n]."""
    return (embeddings @ training.T).mean(axis=1)


def nearest_training(embeddings, training, mirrored):
    """(highest cosine [n], index of that training picture [n]).

    `training` and `mirrored` [m, d] are the embeddings of the training pictures and of their mirror
    images; a copy that was mirrored is a copy too.
    """
    cosines = np.maximum(embeddings @ training.T, embeddings @ mirrored.T)
    return cosines.max(axis=1), cosines.argmax(axis=1)


def training_embeddings(images, clip):
    """(embeddings, embeddings of the mirrored pictures) of the training pictures, [m, d] each."""
    mirrored = [ImageOps.mirror(image) for image in images]
    return image_embeddings(images, clip), image_embeddings(mirrored, clip)
