"""The scores, over lists of PIL pictures, and their intervals; each function works on its own.

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
from scipy import stats
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


# ---- statistics ----------------------------------------------------------------------------


def mean_interval(values, level=0.95):
    """Mean of `values` [runs, seeds] with its confidence interval and two-sided p-value against 0.

    Training runs and sampling seeds are crossed: every run draws the same seeds. The interval is
    the one of the two-way random-effects model (Searle, Casella & McCulloch 1992, chapter 4): the
    variance of the grand mean is (MS_runs + MS_seeds - MS_residual) / (runs * seeds), never less
    than either mean square gives alone, with Satterthwaite's degrees of freedom. With one run only
    the seeds vary, and it is Student's interval over them; with one seed, over the runs.

    Why not the percentile bootstrap over prompts, seeds and runs: with 2 prompts, 3 runs or 8 seeds
    there is too little to draw from. Its 95% intervals held the truth in 76% to 99% of simulated
    studies of this size, these in 93% to 98% (`python bench/coverage.py`).

    Returns a dict: mean, low, high, p, runs, seeds. With a single value the interval is unknown
    (NaN), and p is 1.
    """
    values = np.asarray(values, np.float64)
    runs, seeds = values.shape
    mean = values.mean()
    by_run, by_seed = values.mean(axis=1), values.mean(axis=0)
    squares = []  # (mean square, degrees of freedom) of each factor that varies
    if runs > 1:
        squares.append((seeds * by_run.var(ddof=1), runs - 1))
    if seeds > 1:
        squares.append((runs * by_seed.var(ddof=1), seeds - 1))
    if not squares:
        return dict(mean=float(mean), low=np.nan, high=np.nan, p=1.0, runs=runs, seeds=seeds)
    square, freedom = max(squares)
    if len(squares) == 2:
        residual = values - by_run[:, None] - by_seed + mean
        residual_freedom = (runs - 1) * (seeds - 1)
        residual_square = (residual**2).sum() / residual_freedom
        total = squares[0][0] + squares[1][0] - residual_square
        if total > square:
            terms = [*squares, (residual_square, residual_freedom)]
            square, freedom = total, total**2 / sum(ms**2 / df for ms, df in terms)
    error = np.sqrt(square / values.size)
    half = stats.t.ppf(0.5 + level / 2, freedom) * error
    # Where every value is the same it is certain, whether it is 0 or not.
    p = 2 * stats.t.sf(abs(mean) / error, freedom) if error > 0 else float(mean == 0)
    return dict(mean=float(mean), low=float(mean - half), high=float(mean + half), p=float(p),
                runs=runs, seeds=seeds)  # fmt: skip


def holm(p_values):
    """p-values corrected for testing several at once (Holm 1979), in the order given."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def share_interval(hits):
    """Share of true values in `hits` [runs, prompts, seeds] with its 95% interval: a dict.

    The wider of two: Wilson's, which takes every picture for independent, and `mean_interval` over
    runs and seeds, which does not, but is empty where all values are equal.
    """
    crossed = mean_interval(hits.mean(axis=1))
    wilson = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95, method="wilson")
    return dict(mean=float(hits.mean()), low=max(0.0, float(np.fmin(wilson.low, crossed["low"]))),
                high=min(1.0, float(np.fmax(wilson.high, crossed["high"]))))  # fmt: skip
