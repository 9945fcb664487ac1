"""CLIP embeddings of images and texts, and the score that compares them.

CLIP scores are cosines in float32, neither clamped nor scaled by 100. A non-square image is resized whole to CLIP's
square: the processor's centre crop would cut off the head and the hem of a portrait (`python bench/clip_shapes.py`).
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor

from lib.errors import UserError
from lib.evaluation.metrics.similarity import embed_batches, load_encoder, unit_length
from lib.models import fetch_model, model_digest


@dataclass
class Clip:
    """A CLIP model with its processor, as `load_clip` returns it; one of the image encoders of similarity.py."""

    model: CLIPModel
    processor: CLIPProcessor
    folder: Path

    @property
    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings

    @property
    def width(self):
        return self.model.config.projection_dim

    @property
    def image_processor(self):
        return self.processor.image_processor

    @functools.cached_property
    def digest(self):
        return model_digest(self.folder)

    def embed(self, images):
        return image_embeddings(images, self)


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
    return Clip(*load_encoder("CLIP model", folder, CLIPModel, CLIPProcessor, device), Path(folder))


def image_embeddings(images, clip, batch_size=32):
    """CLIP image embeddings of unit length, float32 [n, d]."""

    def features(pixels):
        return clip.model.visual_projection(clip.model.vision_model(pixel_values=pixels).pooler_output)

    return embed_batches(images, clip.image_processor, clip.model.device, features, batch_size)


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


def clip_scores(images, prompts, model):
    """Cosine of each image and its prompt, float32 [n]; `model` is a Clip."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images against {len(prompts)} prompts")
    return (image_embeddings(images, model) * text_embeddings(prompts, model)).sum(axis=1)
