"""Studies whose truth is known: metrics.json records without images, in memory or as study.py leaves them."""

import json
import zlib
from pathlib import Path

import numpy as np

from lib.evaluation.metrics.concept_scale import MARGIN, base_similarity, scale_of
from lib.study.files import study_of

ARMS = ("rank32", "rank8", "unet_only", "dora", "protected", "protected_plain_loss", "varied_captions", "large_batch")
SCALED = ("rank32",)
SCALES = (0.25, 0.5, 0.75, 1.0)
MARGINS = dict(concept_similarity=0.02, clip=0.02, change=0.05, variety=0.25, copies=1 / 3)
SEEDS = 8
CAT = "a cat sitting on a couch"
PROMPTS = [
    *(("success", f"a holographic raincoat {n}") for n in range(3)),
    *(("near", f"a coat {n}") for n in range(3)),
    ("unrelated", CAT),
    ("unrelated", "a chair"),
]
CEILING = 0.5

# Effects of an arm at full scale: (movement toward the concept, change) of each category, and CLIP of success prompts.
PLAIN = dict(success=(0.2, 0.8), near=(0.1, 0.5), unrelated=(0.01, 0.2), clip=0.1)


def pairs(rng, spread=0.02):
    """Distances between the images of every prompt, as metrics.json lists them."""
    count = SEEDS * (SEEDS - 1) // 2
    return (CEILING + spread * rng.standard_normal((len(PROMPTS), count))).round(6).tolist()


def rows_of(effect, scale, rng, noise, of_run, base):
    """Base and LoRA rows of an arm at a scale; movement and change are proportional to it."""
    rows = []
    for index, (category, prompt) in enumerate(PROMPTS):
        moved, change = effect[category]
        clip = effect["clip"] if category == "success" else 0.0
        for seed in range(SEEDS):
            job = dict(prompt=prompt, category=category, seed=seed)
            concept, match = base[index, seed]
            own = noise * rng.standard_normal(3)
            lora = dict(
                lpips=(change + of_run) * scale * CEILING + own[0],
                concept_similarity=concept + (moved + of_run) * scale + own[1],
                clip=match + (clip + of_run) * scale + own[2],
            )
            bare = dict(lpips=None, concept_similarity=concept, clip=match)
            for model, scores in (("base", bare), ("lora", lora)):
                near = dict(nearest_similarity=0.5, nearest_picture="x.png")
                rows.append(job | dict(model=model) | scores | near)
    return rows


def made_records(seeds, noise=0.003, of_runs=0.002, scales=SCALES, base_model="demo/model", **arms):
    """{training seed: {(arm, "own" or "scales"): (folder, record)}} as `read_study` reads them.

    `arms` are {arm: differences to PLAIN}, `noise` is the spread of an image, `of_runs` that of a run.
    """
    base = np.random.default_rng(0).normal(0.4, 0.01, (len(PROMPTS), SEEDS, 2))
    base_pairs = pairs(np.random.default_rng(1))
    records = {}
    for seed in seeds:
        records[seed] = of_seed = {}
        for arm in ARMS:
            effect, name = PLAIN | arms.get(arm, {}), f"{arm}_seed{seed}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            shift = of_runs * rng.standard_normal()
            rows = rows_of(effect, 1.0, rng, noise, shift, base)
            record = record_of(name, arm, seed, rows, base_pairs, rng, base_model)
            of_seed[arm, "own"] = Path(f"seed{seed}", name), record
            if arm in SCALED:
                swept = []
                for scale in scales:
                    if scale != 1:
                        lower = rows_of(effect, scale, rng, noise, shift, base)
                        lora = [row for row in lower if row["model"] == "lora"]
                        swept.append(dict(step=None, scale=scale, pictures=lora, pairs=pairs(rng)))
                of_seed[arm, "scales"] = Path(f"scales_seed{seed}", name), record | dict(swept=swept)
    return records


def record_of(name, arm, seed, rows, base_pairs, rng, base_model):
    """The keys of a metrics.json that a study reads."""
    training = dict(max_steps=1000, seed=seed, arm=arm, data_sha256="0" * 64, data_dir="processed_data")
    metadata = dict(seed=str(seed), caption="a holographic raincoat")
    base, _ = base_similarity(rows, PROMPTS)
    # So that the margin of 10% of the way is that of MARGINS.
    level = dict(level=base + MARGINS["concept_similarity"] / MARGIN, held_out=None, images=28)
    return dict(
        run=name,
        config=dict(steps=28, guidance_scale=6.0, resolution=64, base_model=base_model),
        adapter=dict(fingerprint=name, metadata=metadata, training=training, held_out=[]),
        summary=dict(margins=MARGINS, concept_scale=scale_of([level], base, "success", MARGIN)),
        pictures=rows,
        pairs=dict(base=base_pairs, lora=pairs(rng)),
        swept=[],
        versions={},
        commit="0" * 40,
        device="a made-up device",
    )


def made_study(seeds=6, **truth):
    """A Study of `seeds` training seeds; `truth` as for `made_records`."""
    return study_of(made_records(range(1, seeds + 1), **truth), ARMS, SCALED, [])


def write_study(folder, seeds=(1, 2, 3, 4, 5, 6), **truth):
    """Write a study into `folder` as study.py leaves it; `truth` as for `made_records`."""
    for seed, records in made_records(seeds, **truth).items():
        for place, record in (*records.values(), (Path(f"seed{seed}", "comparison"), {})):
            (folder / place).mkdir(parents=True)
            (folder / place / "metrics.json").write_text(json.dumps(record))
    return folder
