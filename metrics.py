"""The scores, over lists of PIL pictures; each function works on its own.

CLIP scores are cosines in float32, neither clamped nor scaled by 100. LPIPS is AlexNet v0.1 of the
`lpips` package (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) on pictures in [-1, 1] at
their own size; its layers come from two safetensors files beside this one, so that nothing is downloaded
and nothing unpickled.
"""

import functools
import itertools
import warnings
from dataclasses import dataclass

import lpips
import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from common import ROOT, UserError, fetch_model, one_line

# Scores are fp32; cuDNN would otherwise round convolutions to TF32 on a GPU.
torch.backends.cudnn.allow_tf32 = False

ALEXNET = ROOT / "alexnet_features.safetensors"
LINEAR = ROOT / "lpips_linear.safetensors"  # the learned weights of AlexNet's channels


@functools.cache
def lpips_model(device="cpu"):
    """The LPIPS network (AlexNet v0.1), float32, in evaluation mode."""
    for path in (ALEXNET, LINEAR):
        if not path.is_file():
            raise UserError(f"{path.name} is missing beside metrics.py; restore it from git")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision's renamed `pretrained`
        # Left to itself the package fetches AlexNet from the network and unpickles its own layers.
        model = lpips.LPIPS(
            net="alex", version="0.1", pretrained=False, pnet_rand=True, verbose=False
        )
    names = [name for name, _ in model.net.named_parameters()]  # sliceN.<number>.weight, …
    features = {key.removeprefix("features."): w.float() for key, w in load_file(ALEXNET).items()}
    model.net.load_state_dict({name: features.pop(name.split(".", 1)[1]) for name in names})
    linear = load_file(LINEAR)
    for number in range(len(model.chns)):
        key = f"lin{number}.model.1.weight"
        getattr(model, f"lin{number}").load_state_dict({"model.1.weight": linear.pop(key)})
    if features or linear:
        raise RuntimeError(f"layers that LPIPS has not: {sorted(features | linear)}")
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
    for a, b in zip(images_a, images_b, strict=True):
        if a.size != b.size:
            raise ValueError(
                f"a picture of {a.size} against one of {b.size}; LPIPS does not resize"
            )

    def tensor(images):
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    distances = []
    pairs = zip(images_a, images_b, strict=True)
    for _, same_size in itertools.groupby(pairs, key=lambda pair: pair[0].size):
        while batch := list(itertools.islice(same_size, 8)):
            distances += model(*map(tensor, zip(*batch, strict=True))).flatten().tolist()
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
        reason = one_line(problem, 160)
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
        length = len(clip.processor.tokenizer(text, verbose=False).input_ids)
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


def lpips_ceiling(images, device="cpu"):
    """Mean LPIPS over all pairs of `images`: base pictures of one prompt at different seeds.

    It gives LPIPS a scale: what "an unrelated picture of the same prompt" measures. NaN for fewer
    than two pictures.
    """
    pairs = [(a, b) for index, a in enumerate(images) for b in images[index + 1 :]]
    if not pairs:
        return float("nan")
    return float(lpips_distances(*map(list, zip(*pairs, strict=True)), device).mean())


def leave_one_out(training, mirrored):
    """Highest cosine of each training picture to any other, mirrored or not: float32 [m].

    `training` and `mirrored` as in `nearest_training`.
    """
    cosines = np.maximum(training @ training.T, training @ mirrored.T)
    np.fill_diagonal(cosines, -1)
    return cosines.max(axis=1)
