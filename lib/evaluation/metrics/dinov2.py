"""DINOv2 as the image encoder of similarities (Oquab et al. 2023, https://arxiv.org/abs/2304.07193).

Its embedding is the class token of the last layer. On whether two images show the same subject, models of this family
agree better with people than CLIP: Krippendorff's alpha on DreamBench++ is 0.311 for DINO, 0.345 for DINOv3-L and 0.135
for CLIP (as reproduced in https://arxiv.org/abs/2605.22469, which does not list DINOv2 itself).
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel

from lib.errors import UserError, one_line
from lib.evaluation.metrics.similarity import embed_batches, load_encoder
from lib.models import fetch_model, model_digest

DEFAULT = "facebook/dinov2-base"  # inference.py's similarity_model
KINDS = ("dinov2", "dinov2_with_registers")  # supported values of model_type
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@dataclass
class Dinov2:
    """A DINOv2 model with its image processor, as `load_dinov2` returns it; see similarity.py."""

    model: torch.nn.Module
    image_processor: object
    folder: Path

    @property
    def width(self):
        return self.model.config.hidden_size

    @functools.cached_property
    def digest(self):
        return model_digest(self.folder)

    def embed(self, images):
        """Embeddings of unit length, float32 [n, width]."""

        def features(pixels):
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]  # [batch, width]

        return embed_batches(images, self.image_processor, self.model.device, features)


def fetch_dinov2(name, revision=None):
    """The local folder of a DINOv2 model (safetensors only); UserError if it is unavailable or another model."""
    folder = fetch_model(name, revision, ["model"], False, ["*.json"])
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise UserError(
            f"similarity model {name}: {folder} lacks {', '.join(missing)}; pickles are not loaded, use a revision or a "
            "folder with safetensors"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(f"{folder / 'config.json'} cannot be read as a model's: {one_line(problem, 100)}") from None
    if kind not in KINDS:
        raise UserError(
            f"similarity model {name}: its model_type is {kind}, supported are {' and '.join(KINDS)}; for CLIP's image "
            "encoder use --similarity-model clip"
        )
    return folder


def load_dinov2(folder, device="cpu"):
    """Load a DINOv2 folder as a Dinov2 in float32."""
    return Dinov2(*load_encoder("similarity model", folder, AutoModel, AutoImageProcessor, device), Path(folder))
