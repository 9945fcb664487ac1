"""Zero-shot classification of images by demo/clip."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from demo import world
from demo.build.data import phrase
from lib.errors import UserError


class Scorer:
    """demo/clip: embeddings of images and texts, and zero-shot naming of attributes."""

    def __init__(self, config):
        if not (Path(config["clip_dir"]) / "config.json").is_file():
            raise UserError(f"{config['clip_dir']} is incomplete; run `python -m demo.build clip` first")
        self.model = CLIPModel.from_pretrained(config["clip_dir"], dtype=torch.float32).eval()
        self.processor = CLIPProcessor.from_pretrained(config["clip_dir"])

    @torch.no_grad()
    def of_images(self, images):
        """Unit vectors [N, D] of uint8 images [N, 3, H, W]."""
        pil_images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.cpu()]
        inputs = self.processor(images=pil_images, return_tensors="pt")
        return F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)

    @torch.no_grad()
    def of_texts(self, texts):
        """Unit vectors [N, D] of captions."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    def name(self, images, attribute, thing, values=None):
        """For each embedded image, the value of `attribute` whose caption of a `thing` is nearest."""
        values = values or world.ATTRIBUTES[attribute]
        texts = [phrase(attribute, value, thing) for value in values]
        nearest = (images @ self.of_texts(texts).T).argmax(1)
        return [values[i] for i in nearest.tolist()]
