#!/usr/bin/env python3
"""How far a DoRA is off in other programs: each way to read its file, and plain LoRAs of several ranks.

    python train_experiment_dora.py --demo
    python bench/dora_files.py lora_weights/demo_runs/lora_weights_dora

Two columns: the error of the change of the weights, and of the noise predictions that follow. Both are the norm of the
difference over the norm of the DoRA's own change. The predictions are for four training images at four timesteps, with
their caption.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import adapter_files, adapters
from lib.dataset import read_dataset
from lib.evaluation.generation import load_pipeline
from lib.models import fetch_base_model
from lib.training.latents import encode_latents

RANKS = (16, 32, 64, 96)


def readings(base, changed, magnitude):
    """{reading: change of the weight} of a layer; `changed` is W + alpha / rank * B A. The DoRA itself is the first."""
    true = adapters.with_norms(changed, base, magnitude)
    scale = magnitude * base.norm(dim=1) / changed.norm(dim=1)
    weights = {
        "the DoRA": true,
        "norms of columns": changed * scale[:, None] / changed.norm(dim=0),
        "without dora_scale": changed,
        "norms of the rows of W for those of W + s B A": changed * (magnitude / base.norm(dim=1))[:, None],
    }
    rows = {name: weight - base for name, weight in weights.items()}
    left, values, right = torch.linalg.svd(true - base, full_matrices=False)
    return rows | {f"plain LoRA of rank {r}": (left[:, :r] * values[:r]) @ right[:r] for r in RANKS}


def predictions(pipeline, latents, caption):
    """Noise predictions of noised `latents` [n, channels, h, w] at four timesteps, [4 n, channels, h, w]."""
    ids = pipeline.tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids.to(latents.device))[0].expand(len(latents), -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    outputs = []
    for timestep in (100, 400, 700, 900):
        signal = pipeline.scheduler.alphas_cumprod[timestep]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        outputs.append(pipeline.unet(noisy, timestep, states).sample)
    return torch.cat(outputs)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a DoRA run")
    run = parser.parse_args().run
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(Path(fetch_base_model(config["base_model"])), torch.float32, device)
    models = dict(unet=pipeline.unet, text_encoder=pipeline.text_encoder)
    data = read_dataset(config["data_dir"], config["resolution"])
    latents = torch.cat([mean for _, mean, _ in encode_latents(pipeline.vae, data, range(4), device)]).to(device)

    layers = []  # (weight, base, {reading: change})
    applied = adapters.Applied(adapter_files.read_adapter(run), models)
    for weight, base, a, b, magnitude in applied.layers:
        layers.append((weight, base, readings(base, base + b @ a, magnitude)))
    results = {}
    for name in (None, *layers[0][2]):
        for weight, base, changes in layers:
            weight.copy_(base if name is None else base + changes[name])
        results[name] = predictions(pipeline, latents, data[0].caption)

    def norm(name, other=None):
        parts = [changes[name] - (changes[other] if other else 0) for *_, changes in layers]
        return torch.stack([part.norm() for part in parts]).norm()

    own = results["the DoRA"] - results[None]
    weights = torch.stack([base.norm() for _, base, _ in layers]).norm()
    print(f"the DoRA changes the weights by {norm('the DoRA') / weights:.2%} of their norm")
    for name in list(layers[0][2])[1:]:
        error, off = (
            norm(name, "the DoRA") / norm("the DoRA"),
            (results[name] - results["the DoRA"]).norm() / own.norm(),
        )
        print(f"{name:48} weights {error:8.2%}   noise predictions {off:8.2%}")


if __name__ == "__main__":
    main()
