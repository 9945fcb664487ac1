"""The scores of one adapter's images beside the base model's."""

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ImageOps
from tqdm import tqdm

from lib.config import image_size
from lib.dataset import Images, prepared_as, read_dataset
from lib.errors import UserError
from lib.evaluation.metrics.clip_scores import (
    concept_similarity,
    fetch_clip,
    image_embeddings,
    kept_training_embeddings,
    load_clip,
    nearest_training,
    text_embeddings,
)
from lib.evaluation.metrics.lpips_distances import lpips_distances, pairwise_lpips
from lib.evaluation.prompts import check_prompt_lengths


@dataclass
class Run:
    """One adapter's images beside the base model's, and their scores."""

    name: str
    target: Path  # where its results go
    adapter: dict  # fingerprint, rank, alpha, metadata, training: what metrics.json says of it
    base: list  # PIL images, prompt by prompt and seed by seed
    lora: list  # likewise
    points: dict = field(default_factory=dict)  # {Point: images}, where more than `lora` was asked for
    rows: list = None  # a dict an image; see `score`
    folder: Path = None  # the adapter's, where its images are drawn; not where they are read
    pairs: np.ndarray = None  # LPIPS between the LoRA images of a prompt, [prompts, seeds, seeds]
    embeddings: dict = None  # {"base", "lora", "lora_mirrored"}: CLIP embeddings [prompts, seeds, d]
    sweep: dict = field(default_factory=dict)  # {Point: Run} of `points`, scored
    saving: list = ()  # futures of what writes its images meanwhile

    def is_own(self, point):
        """Whether a Point of `points` is the adapter as training left it, whose images are `lora`."""
        return point.scale == 1 and point.steps == max(other.steps for other in self.points)

    @property
    def training_seed(self):
        seed = self.adapter.get("metadata", {}).get("seed")
        return int(seed) if str(seed).isdecimal() else None


@dataclass
class TrainingSet:
    """The training images as the scores need them."""

    names: list
    pictures: Images  # PIL, each read when it is asked for
    hashes: tuple  # SHA-256 of them with each column of captions that a run can have trained on
    embeddings: np.ndarray  # [m, d]
    mirrored: np.ndarray  # of the mirrored images
    sizes: list = ()  # (width, height) of each

    def is_of(self, adapter):
        """Whether these are the images that `adapter`, as `describe` gives it, was trained on."""
        return adapter.get("metadata", {}).get("data_sha256") in (None, *self.hashes)

    def trained_on(self, adapter):
        """Indices of the images less those that the adapter's run held out."""
        held_out = set(adapter.get("held_out", ())) if self.is_of(adapter) else set()
        return [i for i, name in enumerate(self.names) if name not in held_out]


def load_scorer(config, prompts, runs, device):
    """(Clip, TrainingSet), each None, and said aloud, where it is not asked for or not there."""
    if config["clip_model"] == "none":
        print("note: without a CLIP model only LPIPS is computed")
        return None, None
    folder = fetch_clip(config["clip_model"], config["clip_revision"])
    data_dir, rows = config["data_dir"], None
    if (Path(data_dir) / "captions.jsonl").is_file():
        rows = read_dataset(data_dir, training_resolution(config, runs))
    else:
        print(f"note: {data_dir} holds no captions.jsonl; the concept similarity is not computed")
    clip = load_clip(folder, device)
    check_prompt_lengths(prompts, clip.processor.tokenizer, clip.max_tokens, config["clip_model"])
    if not rows:
        return clip, None
    hashes = [rows.sha256]
    with contextlib.suppress(UserError):  # where the images have descriptions too
        hashes.append(read_dataset(data_dir, rows.resolution, "description").sha256)
    embeddings = kept_training_embeddings(rows, folder, clip)
    names = [row.name for row in rows]
    return clip, TrainingSet(names, Images(rows), tuple(hashes), *embeddings, rows.sizes)


def training_resolution(config, runs):
    """The resolution of the training images, whatever size is drawn: where they kept their shapes the one that
    they were prepared for, else that which the first of `runs` was trained at, as far as it is known and they were
    prepared for it."""
    prepared, kept_shapes = prepared_as(config["data_dir"])
    if kept_shapes:
        return prepared
    trained = [(run.adapter.get("training") or {}).get("resolution") for run in runs]
    found = next(filter(None, [*trained, prepared]), min(image_size(config["resolution"])))
    return min(found, prepared or found)


def note_other_images(runs, training, data_dir):
    """Say which adapters were trained on other images than those of the TrainingSet."""
    for run in runs:
        if training and not training.is_of(run.adapter):
            print(
                f"note: {run.name} was trained on other images (or sizes) than {data_dir}; "
                "what it held out is not known here"
            )


def image_scores(images, texts, clip, training):
    """(rows, embeddings): clip and concept_similarity of each image in a dict, and the images'
    CLIP embeddings [n, d]. `texts` are the images' prompts. What cannot be had without a Clip or a
    TrainingSet is None."""
    rows = [dict(clip=None, concept_similarity=None) for _ in images]
    if not clip:
        return rows, None
    embeddings = image_embeddings(images, clip)
    cosines = (embeddings * text_embeddings(texts, clip)).sum(axis=1)
    for row, cosine in zip(rows, cosines, strict=True):
        row["clip"] = float(cosine)
    if training:
        concept = concept_similarity(embeddings, training.embeddings)
        for row, similarity in zip(rows, concept, strict=True):
            row["concept_similarity"] = float(similarity)
    return rows, embeddings


def nearest_rows(count, embeddings, training, adapter):
    """For each of `count` images its nearest_similarity and nearest_picture among those that the
    adapter was trained on: dicts, of None without a TrainingSet."""
    if not training:
        return [dict(nearest_similarity=None, nearest_picture=None) for _ in range(count)]
    trained = training.trained_on(adapter)
    nearest, which = nearest_training(embeddings, training.embeddings[trained], training.mirrored[trained])
    return [
        dict(nearest_similarity=float(similarity), nearest_picture=training.names[trained[index]])
        for similarity, index in zip(nearest, which, strict=True)
    ]


def score(run, prompts, seeds, clip, training, device, base_scores, embedded=True):
    """Fill `run.rows` (a dict an image, base and LoRA of each prompt and seed in turn), `run.pairs` and,
    if `embedded`, `run.embeddings`. `base_scores` is image_scores of the base images, which runs
    share."""
    jobs = [(category, prompt, seed) for category, prompt in prompts for seed in seeds]
    distances = lpips_distances(run.base, run.lora, device)
    scored = image_scores(run.lora, [prompt for _, prompt, _ in jobs], clip, training)
    models = []
    for rows, embeddings in (base_scores, scored):
        nearest = nearest_rows(len(rows), embeddings, training, run.adapter)
        models.append([row | near for row, near in zip(rows, nearest, strict=True)])
    run.rows = []
    for i, (category, prompt, seed) in enumerate(jobs):
        job = dict(prompt=prompt, category=category, seed=seed)
        run.rows.append(job | dict(model="base", lpips=None) | models[0][i])
        run.rows.append(job | dict(model="lora", lpips=float(distances[i])) | models[1][i])
    run.pairs = prompt_pairs(run.lora, len(seeds), device)
    if training and embedded:
        shape = len(prompts), len(seeds), -1
        mirrored = image_embeddings([ImageOps.mirror(image) for image in run.lora], clip)
        found = dict(base=base_scores[1], lora=scored[1], lora_mirrored=mirrored)
        run.embeddings = {name: values.reshape(shape) for name, values in found.items()}


def score_runs(runs, prompts, seeds, clip, training, device):
    """Score every run and, where one was drawn at several points, each of them, in `sweep`: {Point: Run}."""
    texts = [prompt for _, prompt in prompts for _ in seeds]
    for run in tqdm(runs, desc="scores", unit="run", leave=False, disable=len(runs) == 1):
        if run.base is not runs[0].base or run is runs[0]:  # drawn once, they are scored once
            base_scores = image_scores(run.base, texts, clip, training)
        scoring = prompts, seeds, clip, training, device, base_scores
        score(run, *scoring)
        for point, images in sorted(run.points.items()):
            if run.is_own(point):
                run.sweep[point] = run
                continue
            run.sweep[point] = part = Run(f"{run.name}, {point}", None, run.adapter, run.base, images)
            score(part, *scoring, embedded=False)


def shape_warnings(runs, training):
    """That no training image has the shape of the images drawn, if so: sentences."""
    if not training:
        return []
    width, height = runs[0].lora[0].size
    if any(abs(w / h / (width / height) - 1) < 0.1 for w, h in training.sizes):
        return []
    return [
        f"The images are {width}x{height}, a shape that no training image has: resized to squares for CLIP, "
        "they lie further from the training images, and copies are found less surely."
    ]


def prompt_pairs(images, count, device):
    """LPIPS between the `count` images of each prompt: [prompts, count, count]."""
    chunks = [images[i : i + count] for i in range(0, len(images), count)]
    return np.stack([pairwise_lpips(chunk, device) for chunk in chunks])


def image_warnings(runs, prompts, seeds):
    """Images that are one flat colour, and LoRA images that two runs share: sentences."""
    jobs = [(prompt, seed) for _, prompt in prompts for seed in seeds]
    found, owners = [], {}
    for index, run in enumerate(runs):
        kinds = [("LoRA", run.lora)] + ([("base", run.base)] if index == 0 else [])
        for kind, images in kinds:
            for (prompt, seed), image in zip(jobs, images, strict=True):
                if all(low == high for low, high in image.convert("RGB").getextrema()):
                    found.append(
                        f"{run.name}: the {kind} image of “{prompt}”, seed {seed}, is one flat "
                        "colour: NaN in half precision, or a broken model"
                    )
        for (prompt, seed), image in zip(jobs, run.lora, strict=True):
            key = (prompt, seed, hashlib.sha256(image.tobytes()).hexdigest())
            if key in owners:
                found.append(
                    f"{owners[key]} and {run.name} have the same image of “{prompt}”, seed "
                    f"{seed}: were both scored on one adapter?"
                )
            owners.setdefault(key, run.name)
    return found
