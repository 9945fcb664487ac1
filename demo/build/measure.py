"""Stage measure: figures on held-out scenes, sheets, demo/metrics.json and demo/README.md."""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from demo import world
from demo.build.config import CONCEPT, EVALUATION_BATCH
from demo.build.data import NAMED, PARTS, load_captions, load_pictures
from demo.build.images import psnr, to_bytes, to_signed
from demo.build.journal import record_run, write_log
from demo.build.pages import readme, write_sheet
from demo.build.render import jobs_of, render
from demo.build.scorer import Scorer
from demo.build.unet import load_pipeline
from lib.evaluation.metrics.lpips_distances import lpips_model
from lib.files import write_json


def measure(config):
    """Measure everything on held-out scenes; write metrics.json, the sheets, the curves, the log
    and README.md to report_dir."""
    started = time.time()
    parts = [part for part in PARTS if part.startswith("heldout")]
    if any(jobs_of(config, part) for part in parts):
        render(config, parts)
    rendered, holographic = (load_pictures(config, part) for part in parts)
    captions, each = load_captions(config, "heldout"), config["captions_per_picture"]
    captions = [max(captions[i : i + each], key=len) for i in range(0, len(captions), each)]
    pipeline, scorer, lpips = load_pipeline(config), Scorer(config), lpips_model(config["device"])
    first = config["seed"]

    vae, decoded = reconstruction(pipeline.vae, lpips, rendered, config)
    vae_holographic, decoded_holographic = reconstruction(pipeline.vae, lpips, holographic, config)
    drawn = draw(pipeline, captions, range(first, first + len(captions)), config)
    seeds = range(first, first + config["heldout_holographic_pictures"])
    unknown = draw(pipeline, config["prompts"][:1] * len(seeds), seeds, config)
    seeds = range(first, first + config["seeds"])
    prompts = [prompt for prompt in config["prompts"] for _ in seeds]
    base = draw(pipeline, prompts, [*seeds] * len(config["prompts"]), config)

    seen = dict(rendered=scorer.of_images(rendered), drawn=scorer.of_images(drawn))
    plain = [i for i, text in enumerate(captions) if world.parse(text)["thing"] == "raincoat"]
    groups = dict(
        drawn_for_the_unknown_word=scorer.of_images(unknown),
        rendered_holographic=scorer.of_images(holographic),
        rendered_plain=seen["rendered"][plain],
    )
    figures = dict(
        sizes=sizes_of(config),
        vae=vae,
        vae_holographic=vae_holographic,
        retrieval=retrieval(seen["rendered"], scorer.of_texts(captions), captions),
        named={name: accuracy(scorer, seen, captions, name) for name in NAMED},
        holographic_raincoat={name: raincoats(scorer, some) for name, some in groups.items()},
        captions_of_heldout_webp=captions[:8],
    )

    report = Path(config["report_dir"])
    report.mkdir(parents=True, exist_ok=True)
    write_sheet(report / "base.webp", dict(zip(config["prompts"], base.split(len(seeds)), strict=True)))
    write_sheet(
        report / "heldout.webp",
        {
            "rendered, of combinations of attributes that were never trained": rendered[:8],
            "the same through the VAE": decoded[:8],
            "drawn by the base model from their captions": drawn[:8],
            "rendered holographic raincoats, which the base model never saw": holographic[:8],
            "the same holographic raincoats through the VAE": decoded_holographic[:8],
        },
    )
    record_run("measure", config, started)
    figures["training"] = write_log(config)
    figures["config"] = {  # without folders, and without what each stage's own run tells
        key: value
        for key, value in config.items()
        if not key.startswith(("vae_", "clip_", "unet_", "model_", "render_")) and not key.endswith("_dir")
    }
    write_json(report / "metrics.json", figures)
    (report / "README.md").write_text(readme(figures), encoding="utf-8")


def draw(pipeline, prompts, seeds, config):
    """uint8 [N, 3, H, W]: an image for each prompt from its own seed, by the config's sampler."""
    drawn = []
    batch = EVALUATION_BATCH if config["device"] == "cuda" else 16
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        pictures = pipeline(
            list(prompts[i : i + batch]),
            num_inference_steps=config["steps"],
            guidance_scale=config["guidance_scale"],
            generator=generators,
            output_type="np",
        ).images
        drawn.append(torch.from_numpy(pictures * 255).round().to(torch.uint8).permute(0, 3, 1, 2))
        print(f"drawn {i + len(generators)}/{len(prompts)}", flush=True)
    return torch.cat(drawn)


@torch.no_grad()
def reconstruction(vae, lpips, pictures, config):
    """PSNR and LPIPS of uint8 images through the VAE, means over them; and these images."""
    distances, ratios, decoded = [], [], []
    for chunk in pictures.split(EVALUATION_BATCH):
        original = to_signed(chunk).to(config["device"])
        again = vae.decode(vae.encode(original).latent_dist.mean).sample
        distances.append(lpips(again, original).flatten())
        ratios.append(psnr(again, original))
        decoded.append(to_bytes(again).cpu())
    figures = dict(
        pictures=len(pictures),
        psnr_db=round(float(torch.cat(ratios).mean()), 2),
        lpips=round(float(torch.cat(distances).mean()), 4),
    )
    return figures, torch.cat(decoded)


def sizes_of(config):
    """Millions of parameters of each model, and the mebibytes of both folders on disk."""
    sizes = {}
    folders = [Path(config["model_dir"]), Path(config["clip_dir"])]
    for file in sorted(file for folder in folders for file in folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]
        sizes[f"{file.parent.name}_parameters"] = int(sum(np.prod(shape) for shape in shapes))
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sizes | dict(mebibytes=round(sum(file.stat().st_size for file in files) / 2**20, 2))


def retrieval(pictures, texts, captions, among=100):
    """Share of the first `among` images that find their caption, and the other way round."""
    captions = captions[:among]
    similarity = pictures[:among] @ texts[:among].T
    found = {"picture_to_text": similarity.argmax(1), "text_to_picture": similarity.argmax(0)}
    return dict(among=len(captions)) | {
        way: share([captions[j] == captions[i] for i, j in enumerate(nearest.tolist())], True)
        for way, nearest in found.items()
    }


def raincoats(scorer, pictures):
    """How many embedded images the scorer calls a raincoat, and, as a raincoat, holographic."""
    materials = ("matte", "glossy", CONCEPT)
    return dict(
        pictures=len(pictures),
        named_raincoat=share(scorer.name(pictures, "thing", ""), "raincoat"),
        named_holographic=share(scorer.name(pictures, "material", "raincoat", materials), CONCEPT),
    )


def accuracy(scorer, seen, captions, attribute):
    """How often the scorer names the value of an attribute that the caption states, for each set of
    embedded images in `seen`, and the ratio of drawn to rendered."""
    stated = [world.parse(caption) for caption in captions]
    asked = [i for i, given in enumerate(stated) if attribute in given]
    figures = dict(pictures=len(asked))
    for group, pictures in seen.items():
        right = [
            scorer.name(pictures[i : i + 1], attribute, stated[i]["thing"])[0] == stated[i][attribute] for i in asked
        ]
        figures[group] = round(float(np.mean(right)), 3) if asked else None
    if asked and figures["rendered"]:
        figures["ratio"] = round(figures["drawn"] / figures["rendered"], 3)
    return figures


def share(names, wanted):
    """The share of `names` that are `wanted`."""
    return round(names.count(wanted) / len(names), 3)
