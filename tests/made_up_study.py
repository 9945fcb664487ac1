"""A study whose truth is known, written as study.py leaves it: metrics.json files, without images."""

import json
import zlib

import numpy as np

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

# What an arm does to each kind of prompts, (movement toward the concept, change), and to CLIP of success
# prompts, at full scale.
PLAIN = dict(success=(0.2, 0.8), near=(0.1, 0.5), unrelated=(0.01, 0.2), clip=0.1, seconds=100.0)


def pairs(rng, spread=0.02):
    """Distances between the images of every prompt, as metrics.json lists them."""
    count = SEEDS * (SEEDS - 1) // 2
    return (CEILING + spread * rng.standard_normal((len(PROMPTS), count))).round(6).tolist()


def rows_of(does, scale, rng, noise, of_run, base):
    """Base and LoRA rows of an arm at a scale; movement and change grow with it in a straight line."""
    rows = []
    for index, (category, prompt) in enumerate(PROMPTS):
        moved, change = does[category]
        clip = does["clip"] if category == "success" else 0.0
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


def write_study(
    folder, seeds=(1, 2, 3, 4, 5, 6), noise=0.003, of_runs=0.002, scales=SCALES, base_model="demo/model", **arms
):
    """Write a study into `folder`; `arms` are {arm: what differs from PLAIN}. `noise` is an image's, `of_runs`
    a run's own share."""

    def record(*of, **more):
        found = record_of(*of) | more
        return found | dict(config=found["config"] | dict(base_model=base_model))

    base = np.random.default_rng(0).normal(0.4, 0.01, (len(PROMPTS), SEEDS, 2))
    base_pairs = pairs(np.random.default_rng(1))
    for seed in seeds:
        for arm in ARMS:
            does, name = PLAIN | arms.get(arm, {}), f"{arm}_seed{seed}"
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            shift = of_runs * rng.standard_normal()
            own = rows_of(does, 1.0, rng, noise, shift, base)
            write(folder / f"seed{seed}" / name, record(name, arm, seed, does, own, base_pairs, rng))
            if arm in SCALED:
                swept = []
                for scale in scales:
                    if scale != 1:
                        rows = rows_of(does, scale, rng, noise, shift, base)
                        lora = [row for row in rows if row["model"] == "lora"]
                        swept.append(dict(step=None, scale=scale, pictures=lora, pairs=pairs(rng)))
                found = record(name, arm, seed, does, own, base_pairs, rng, swept=swept)
                write(folder / f"scales_seed{seed}" / name, found)
        write(folder / f"seed{seed}" / "comparison", {})
    return folder


def record_of(name, arm, seed, does, rows, base_pairs, rng):
    """A metrics.json, as far as a study reads it."""
    steps = 1000
    training = dict(max_steps=steps, seed=seed, arm=arm, data_sha256="0" * 64)
    adapter = dict(
        fingerprint=name,
        metadata=dict(seed=str(seed)),
        training=training,
        held_out=[],
        speed=dict(
            steps_a_second=steps / does["seconds"] * rng.normal(1, 0.01),
            device="a made-up device",
            peak_gib_reserved=1.0,
        ),
    )
    return dict(
        run=name,
        config=dict(steps=28, guidance_scale=6.0, resolution=64),
        adapter=adapter,
        summary=dict(margins=MARGINS),
        pictures=rows,
        pairs=dict(base=base_pairs, lora=pairs(rng)),
        swept=[],
        versions={},
        commit="0" * 40,
        device="a made-up device",
    )


def write(folder, found):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found))
