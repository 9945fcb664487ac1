#!/usr/bin/env python3
"""Effect of 8-bit optimizer states on small LoRA matrices.

    python bench/optimizer_state.py [OPTION OF train.py ...]    # the miniature, 40 steps, some minutes on a CPU

bitsandbytes keeps 32-bit states for tensors of fewer than 4,096 elements. train.py gives it one vector per component,
which is longer. Each rank is trained three times from the same start: like train.py, with bitsandbytes' rule per
matrix, and with 32 bits for all. Prints the norm of the difference of the trained B factors from the 32-bit run's, over
their norm, and the share of the parameters in such matrices, here and in Stable Diffusion v1.5.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bitsandbytes
import limits
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from lib.adapter_files import WEIGHTS
from lib.adapters import target_layers
from lib.config import parse_config
from lib.training import parameters, updates

updates.missing_kernels = lambda device: "this script compares bitsandbytes' own optimizer"
FLAT, FLATTEN = bitsandbytes.optim.AdamW8bit, parameters.flatten_parameters


def matrix_by_matrix(smallest, sizes):
    """An AdamW8bit that splits each flat vector into its matrices of `sizes`; those of fewer than `smallest` elements
    have 32-bit states."""

    class MatrixByMatrix(FLAT):
        def __init__(self, groups, **named):
            self.flats = [group["params"][0] for group in groups]
            views = [flat.data.split(part) for flat, part in zip(self.flats, sizes, strict=True)]
            self.parts = [[torch.nn.Parameter(view) for view in part] for part in views]
            groups = [g | dict(params=p) for g, p in zip(groups, self.parts, strict=True)]
            super().__init__(groups, min_8bit_size=smallest, **named)

        def step(self, closure=None):
            for flat, parts in zip(self.flats, self.parts, strict=True):
                grads = flat.grad.split([part.numel() for part in parts])
                for part, grad in zip(parts, grads, strict=True):
                    part.grad = grad
            return super().step(closure)

    return MatrixByMatrix


def trained(config, folder, name, smallest=None):
    """Train; returns (B factors as one vector, sizes of the matrices)."""
    sizes = []

    def flatten(weights, dtype):
        sizes.append([weight.numel() for weight in weights])
        return FLATTEN(weights, dtype)

    parameters.flatten_parameters = flatten
    kind = FLAT if smallest is None else matrix_by_matrix(smallest, sizes)
    bitsandbytes.optim.AdamW8bit = kind
    AcceleratorState._reset_state(reset_partial_state=True)
    target = train.train(config | dict(output_dir=folder, run_name=name))
    weights = load_file(Path(target) / WEIGHTS)
    b = [weights[key].flatten() for key in sorted(weights) if "lora_B" in key]
    return torch.cat(b), [size for part in sizes for size in part]


def small_share(sizes):
    return sum(size for size in sizes if size < 4096) / sum(sizes)


def full_size(rank):
    """The sizes of the LoRA matrices of Stable Diffusion v1.5."""
    unet, text_encoder, *_ = limits.architecture(demo=False)
    layers = [*target_layers(unet, train.CONFIG["unet_targets"])]
    layers += target_layers(text_encoder, train.CONFIG["text_encoder_targets"])
    return [rank * n for _, layer in layers for n in (layer.in_features, layer.out_features)]


def main():
    short = dict(max_steps=40, warmup_steps=0, validation_count=0, preview_every=0, snapshot_every=0)
    config = parse_config(train.CONFIG | train.DEMO | short | dict(wandb_project="bench"), __doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (8, 32):
            mine = config | dict(rank=rank, alpha=float(rank))
            exact, sizes = trained(mine, folder, "exact", smallest=2**62)
            rule, _ = trained(mine, folder, "rule", smallest=4096)
            flat, _ = trained(mine, folder, "flat")
            shares = small_share(sizes), small_share(full_size(rank))
            differences = [((other - exact).norm() / exact.norm()).item() for other in (flat, rule)]
            between = ((flat - rule).norm() / rule.norm()).item()
            rows.append((rank, shares, (*differences, between)))
    print(
        "| rank | in matrices under 4,096 | in SD v1.5 | one vector against 32 bits | bitsandbytes' rule "
        "against 32 bits | the two against one another |\n|--:|--:|--:|--:|--:|--:|"
    )
    for rank, shares, differences in rows:
        cells = [f"{share:.0%}" for share in shares] + [f"{d:.1%}" for d in differences]
        print(f"| {rank} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
