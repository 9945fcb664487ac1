"""LPIPS, the perceptual distance of two images, and what is measured by it: change and variety.

AlexNet v0.1 of the `lpips` package (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) on images in [-1, 1] at
their own size. Its layers are the two safetensors files in weights/: no download, no pickle.
"""

import functools
import itertools
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
from safetensors.torch import load_file

from lib.errors import UserError
from lib.evaluation.statistics import jackknife
from lib.models import digest_of

# Scores are fp32; cuDNN would otherwise round convolutions to TF32 on a GPU.
torch.backends.cudnn.allow_tf32 = False

WEIGHTS = Path(__file__).parent / "weights"
ALEXNET = WEIGHTS / "alexnet_features.safetensors"
LINEAR = WEIGHTS / "lpips_linear.safetensors"  # the learned weights of AlexNet's channels
AT_ONCE = 8  # images whose features are computed together, 11 MB each for 512x512; two such blocks are in memory


@functools.cache
def lpips_model(device="cpu"):
    """The LPIPS network (AlexNet v0.1), float32, in evaluation mode."""
    for path in (ALEXNET, LINEAR):
        if not path.is_file():
            raise UserError(f"{path.name} is missing in {path.parent}; restore it from git")
    # By default the package downloads AlexNet and unpickles its own layers. On the meta device it initialises no random
    # weights, which takes longer than scoring forty images.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", UserWarning)  # torchvision's renamed `pretrained`
        model = lpips.LPIPS(net="alex", version="0.1", pretrained=False, pnet_rand=True, verbose=False)
    model.scaling_layer = lpips.ScalingLayer()
    names = [name for name, _ in model.net.named_parameters()]  # sliceN.<number>.weight, …
    features = {key.removeprefix("features."): w.float() for key, w in load_file(ALEXNET).items()}
    features_of_net = {name: features.pop(name.split(".", 1)[1]) for name in names}
    model.net.load_state_dict(features_of_net, assign=True)
    linear = load_file(LINEAR)
    for number in range(len(model.chns)):
        key = f"lin{number}.model.1.weight"
        layer = {"model.1.weight": linear.pop(key)}
        getattr(model, f"lin{number}").load_state_dict(layer, assign=True)
    if features or linear:
        raise RuntimeError(f"unexpected layers in the LPIPS weights: {sorted(features | linear)}")
    return model.eval().requires_grad_(False).to(device)


def lpips_digest():
    """SHA-256 of the LPIPS weights."""
    return digest_of((ALEXNET, LINEAR))


@torch.no_grad()
def features(images, device):
    """The AlexNet features of images of one size, float32 [n, values]. LPIPS is their squared Euclidean distance: each
    layer's features are normalized per pixel, and here also multiplied by the root of LPIPS's weight of their channel,
    over the number of pixels."""
    model = lpips_model(str(device))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    layers = []
    for layer, linear in zip(model.net(model.scaling_layer(pixels)), model.lins, strict=True):
        weight = linear.model[-1].weight / layer[0, 0].numel()  # [1, channels, 1, 1], none is negative
        layers.append((lpips.normalize_tensor(layer) * weight.sqrt()).flatten(1))
    return torch.cat(layers, dim=1)


def lpips_distances(images_a, images_b, device="cpu"):
    """LPIPS of each pair of images, float32 [n]: 0 for equal images, about 0.7 for unrelated ones.

    ValueError if the lists differ in length or a pair in size: resizing would change the distance.
    """
    if len(images_a) != len(images_b):
        raise ValueError(f"{len(images_a)} images against {len(images_b)}")
    for a, b in zip(images_a, images_b, strict=True):
        check_sizes([a, b])
    distances = []
    pairs = zip(images_a, images_b, strict=True)
    for _, same_size in itertools.groupby(pairs, key=lambda pair: pair[0].size):
        while batch := list(itertools.islice(same_size, AT_ONCE)):
            a, b = (features(images, device) for images in zip(*batch, strict=True))
            distances += (a - b).square().sum(dim=1).tolist()
    return np.array(distances, np.float32)


def check_sizes(images):
    """ValueError unless the images have one size."""
    for image in images:
        if image.size != images[0].size:
            raise ValueError(f"an image of {images[0].size} against one of {image.size}; LPIPS does not resize")


def pairwise_lpips(images, device="cpu"):
    """LPIPS between all pairs of `images`, of one size: float64 [n, n], symmetric with a zero diagonal.

    For base images of one prompt at different seeds, the mean over the pairs is LPIPS's *ceiling*: the distance
    of unrelated images of the same prompt. For LoRA images it is their variety. Features are computed once per image, of
    more than AT_ONCE images once per pair of blocks.
    """
    check_sizes(images)
    distances = np.zeros((len(images), len(images)))
    blocks = [slice(start, start + AT_ONCE) for start in range(0, len(images), AT_ONCE)]
    for place, rows in enumerate(blocks):
        of_rows = features(images[rows], device)
        for columns in blocks[place:]:
            of_columns = of_rows if columns is rows else features(images[columns], device)
            block = torch.stack([(of_columns - row).square().sum(dim=1) for row in of_rows]).cpu().numpy()
            distances[rows, columns], distances[columns, rows] = block, block.T
    return distances


def pair_mean(distances):
    """Mean over the pairs of symmetric `distances` [..., n, n] with a zero diagonal: [...]; NaN for n < 2."""
    count = distances.shape[-1]
    if count < 2:
        return np.full(distances.shape[:-2], np.nan)
    return distances.sum(axis=(-2, -1)) / (count * (count - 1))


def subset_mean(distances, seeds):
    """`pair_mean` over a subset of the seeds."""
    return pair_mean(distances[..., seeds, :][..., seeds])


# ---- shares of the ceiling: ratios of means over the seeds, so their values per seed are the jackknife's, which
# carry the ceiling's own error --------------------------------------------------------------

FEWEST_SEEDS = 4  # per prompt, 6 pairs of images; fewer do not show how much images vary by chance


def no_change_reason(base_pairs):
    """Why change and variety are unavailable with these `base_pairs` [prompts, seeds, seeds]: a sentence, or None."""
    seeds = base_pairs.shape[-1]
    if seeds < FEWEST_SEEDS:
        few = f"{seeds} seed{'s' if seeds > 1 else ''} a prompt"
        return f"{few} cannot estimate the LPIPS ceiling; change and variety need {FEWEST_SEEDS}"
    without = [np.delete(np.arange(seeds), seed) for seed in range(seeds)]
    if min(subset_mean(base_pairs, kept).min() for kept in without) <= 0:
        return "the base images of one prompt are all identical; change and variety need a base model that varies"
    return None


def change(runs, effects, base_pairs):
    """Distance to the base image / ceiling: [runs, prompts, seeds]."""

    def share(seeds):
        return effects["lpips"][:, :, seeds].mean(axis=2) / subset_mean(base_pairs, seeds)

    return jackknife(share, base_pairs.shape[-1])


def variety(runs, effects, base_pairs):
    """Distance between LoRA images at different seeds / ceiling: [runs, prompts, seeds], or None without them."""
    if any(run.pairs is None for run in runs):
        return None
    pairs = np.stack([run.pairs for run in runs])

    def share(seeds):
        return subset_mean(pairs, seeds) / subset_mean(base_pairs, seeds)

    return jackknife(share, base_pairs.shape[-1])
