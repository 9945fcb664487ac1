"""Scores of the base model's and an adapter's images."""

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import ImageOps
from tqdm import tqdm

from lib.config import image_size
from lib.dataset import Images, prepared_as, read_dataset
from lib.errors import UserError
from lib.evaluation.metrics.clip_scores import Clip, fetch_clip, load_clip
from lib.evaluation.metrics.dinov2 import DEFAULT as DINOV2
from lib.evaluation.metrics.dinov2 import Dinov2, fetch_dinov2, load_dinov2
from lib.evaluation.metrics.lpips_distances import lpips_digest, pairwise_lpips
from lib.evaluation.metrics.similarity import cached_training_embeddings
from lib.evaluation.metrics.table import METRICS
from lib.evaluation.prompts import check_prompt_lengths
from lib.models import base_model_name

AT_ONCE = 32  # images of one model that are scored together: an encoder's batch


@dataclass
class Run:
    """One adapter: its images, the base model's, and their scores."""

    name: str
    target: Path  # its results folder
    adapter: dict  # its entry in metrics.json, as `describe` returns it
    base: Sequence  # PIL images, prompt by prompt and seed by seed, read on access
    lora: Sequence  # likewise
    points: dict = field(default_factory=dict)  # {Point: images} of a sweep
    rows: list = None  # a dict an image; see `score`
    folder: Path = None  # the adapter's own, if its images were generated now
    pairs: np.ndarray = None  # LPIPS between the LoRA images of a prompt, [prompts, seeds, seeds]
    embeddings: dict = None  # {"base", "lora", "lora_mirrored"}: embeddings [prompts, seeds, d]
    sweep: dict = field(default_factory=dict)  # {Point: Run}: `points`, scored
    looks: dict = None  # {"base", "lora"}: (whether it is one flat colour, SHA-256 of its pixels) of each image
    saving: list = ()  # futures of the threads that write its overview and copy images

    def kinds(self):
        """{first part of the files' names: images} of all that it was generated at."""
        others = {p.file_stem: images for p, images in self.points.items() if p.scale and not self.is_own(p)}
        return dict(base=self.base, lora=self.lora) | others

    def is_own(self, point):
        """Whether a Point of `points` is the final adapter at full scale, whose images are `lora`."""
        return point.scale == 1 and point.steps == max(other.steps for other in self.points)

    @property
    def training_seed(self):
        seed = self.adapter.get("metadata", {}).get("seed")
        return int(seed) if str(seed).isdecimal() else None


def data_hash(adapter):
    """SHA-256 of the data that `adapter`, as `describe` returns it, was trained on, or None if unknown."""
    places = (adapter.get("metadata"), adapter.get("training"))
    return next((place["data_sha256"] for place in places if place and place.get("data_sha256")), None)


@dataclass
class TrainingSet:
    """The training images and their embeddings by the encoder of similarities."""

    names: list
    pictures: Images  # PIL, read on access
    hashes: tuple  # SHA-256 of the data set, one for each column of captions
    embeddings: np.ndarray  # [m, d]
    mirrored: np.ndarray  # [m, d], of the mirrored images
    sizes: list = ()  # (width, height) of each
    data_dir: str = "the data folder"
    clip_embeddings: np.ndarray = None  # [m, d], by CLIP where that is not the encoder of similarities
    masked: list = ()  # indices of the images with a mask
    subjects: np.ndarray = None  # [masked, d], embeddings of their subjects alone; see Subjects

    def is_of(self, adapter):
        """Whether `adapter`, as `describe` returns it, is known to have been trained on these images."""
        return data_hash(adapter) in self.hashes

    def not_of(self, adapter):
        """Why these cannot be taken for the images that `adapter` was trained on: words, or None if they can."""
        if self.is_of(adapter):
            return None
        if data_hash(adapter):
            return f"it was trained on other images, captions or sizes than {self.data_dir} has"
        return "which images it was trained on is unknown"

    def trained_on(self, adapter):
        """Indices of the images that the adapter's run did not hold out."""
        held_out = set(adapter.get("held_out", ())) if self.is_of(adapter) else set()
        return [i for i, name in enumerate(self.names) if name not in held_out]


@dataclass
class ImageSet:
    """Images to be scored, and what scorers may use."""

    images: list  # PIL images, prompt by prompt and seed by seed
    prompts: list  # the prompt of each image
    device: object = "cpu"
    clip: Clip | None = None
    encoder: Clip | Dinov2 | None = None  # of similarities
    training: TrainingSet | None = None  # never without `encoder`
    base: list = None  # the base image from the same noise for each; None for base images
    known: dict = field(default_factory=dict)  # {metric: {column: values}} scored before

    @functools.cached_property
    def embeddings(self):
        """Embeddings [n, d] by the encoder of similarities."""
        return self.encoder.embed(self.images)

    @functools.cached_property
    def looks(self):
        """(whether it is one flat colour, SHA-256 of its pixels) of each image."""
        return [
            (all(low == high for low, high in image.getextrema()), hashlib.sha256(image.tobytes()).hexdigest())
            for image in self.images
        ]

    @functools.cached_property
    def clip_embeddings(self):
        """CLIP embeddings [n, d]."""
        return self.embeddings if self.clip is self.encoder else self.clip.embed(self.images)


@dataclass
class Scorers:
    """The models that score images, and the training images; None for what is not wanted or missing."""

    device: object
    clip: Clip | None = None
    encoder: Clip | Dinov2 | None = None  # of similarities
    training: TrainingSet | None = None  # never without `encoder`

    def record(self, config):
        """What scored the images, for metrics.json: {"clip", "similarity", "lpips": {"model", "sha256"}, "training_images":
        {"folder", "sha256"}}, or None. Scores of other digests are not comparable."""
        models = dict(clip=self.clip, similarity=self.encoder)
        names = dict(clip=config["clip_model"], similarity=config["similarity_model"])
        names["similarity"] = names["clip"] if self.encoder is self.clip else names["similarity"]
        record = {
            key: model and dict(model=base_model_name(names[key]), sha256=model.digest) for key, model in models.items()
        }
        images = self.training and dict(folder=self.training.data_dir, sha256=self.training.hashes[0])
        return record | dict(lpips=dict(model="AlexNet v0.1", sha256=lpips_digest()), training_images=images)


def similarity_folder(config, clip_folder):
    """The folder of the similarity model. If the default one is unavailable, as without a network, CLIP's image encoder
    takes its place: a warning is printed, `config` names it, and None is returned."""
    try:
        return fetch_dinov2(config["similarity_model"], config["similarity_revision"])
    except UserError as problem:
        if config["similarity_model"] != DINOV2 or not clip_folder:
            raise
        print(
            f"warning: {problem.args[0]}. Similarities are those of CLIP's image encoder instead, which agrees less with "
            "people (--similarity-model clip asks for it)"
        )
        config["similarity_model"] = "clip"
        return None


def load_scorers(config, prompts, runs, device):
    """The Scorers; a note is printed for what is not wanted or missing."""
    clip_model, similarity_model = config["clip_model"], config["similarity_model"]
    if clip_model == "none":
        also = similarity_model in ("clip", "none")
        print(f"note: without a CLIP model {'only LPIPS is' if also else 'the CLIP score is not'} measured")
    clip_folder = None if clip_model == "none" else fetch_clip(clip_model, config["clip_revision"])
    data_dir, rows, folder = config["data_dir"], None, None
    if similarity_model == "none" or (similarity_model == "clip" and not clip_folder):
        pass
    elif (Path(data_dir) / "captions.jsonl").is_file():
        if similarity_model != "clip":
            folder = similarity_folder(config, clip_folder)
        rows = read_dataset(data_dir, training_resolution(config, runs))
    else:
        print(f"note: {data_dir} has no captions.jsonl; concept similarity is not measured")
    scorers = Scorers(device)
    if clip_folder:
        scorers.clip = clip = load_clip(clip_folder, device)
        check_prompt_lengths(prompts, clip.processor.tokenizer, clip.max_tokens, clip_model)
    if not rows:
        return scorers
    scorers.encoder = load_dinov2(folder, device) if folder else scorers.clip
    hashes = [rows.sha256]
    with contextlib.suppress(UserError):  # only some data sets have descriptions
        hashes.append(read_dataset(data_dir, rows.resolution, "description").sha256)
    embeddings, names = cached_training_embeddings(rows, scorers.encoder), [row.name for row in rows]
    scorers.training = TrainingSet(names, Images(rows), tuple(hashes), *embeddings, rows.sizes, str(data_dir))
    if scorers.clip and scorers.clip is not scorers.encoder:
        scorers.training.clip_embeddings, _ = cached_training_embeddings(rows, scorers.clip)
    if masked := [index for index in range(len(rows)) if rows.has_mask(index)]:
        scorers.training.masked = masked
        scorers.training.subjects, _ = cached_training_embeddings(rows, scorers.encoder, masked)
    return scorers


def training_resolution(config, runs):
    """The resolution at which training images are read, whatever size is generated.

    Images that kept their shapes have the one they were prepared for; others that of the first run that recorded
    one, limited to the prepared one.
    """
    prepared, kept_shapes = prepared_as(config["data_dir"])
    if kept_shapes:
        return prepared
    trained = [(run.adapter.get("training") or {}).get("resolution") for run in runs]
    resolution = next(filter(None, [*trained, prepared]), min(image_size(config["resolution"])))
    return min(resolution, prepared or resolution)


def training_notes(runs, training):
    """A sentence for each reason why the TrainingSet, or None, is not what adapters were trained on, naming them, and for
    those whose held-out images are unknown."""
    names, unknown = {}, []
    for run in runs if training else ():
        if reason := training.not_of(run.adapter):
            names.setdefault(reason, []).append(run.name)
        elif not run.adapter.get("training"):
            unknown.append(run.name)
    notes = [
        f"{', '.join(of_reason)}: {reason}. “Training images” here are those in {training.data_dir}; whether it learned "
        "or copies its own is not judged."
        for reason, of_reason in names.items()
    ]
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: without its config.json it is unknown which images in {training.data_dir} were held "
            "out; all of them count as trained on."
        )
    return notes


def scores_of(images, adapter):
    """The metrics.csv columns of every scorer: a dict an image of an ImageSet, None where it could not be measured."""
    columns = {}
    for key, metric in METRICS.items():
        if not metric.scorer:
            continue
        if key not in images.known or metric.of_adapter:
            names, values = metric.columns or (key,), metric.scorer(images, adapter)
            if values is None:
                values = [[None] * len(images.images)] * len(names)
            elif len(names) == 1:
                values = [values]
            images.known[key] = {
                name: np.asarray(of_images).tolist() for name, of_images in zip(names, values, strict=True)
            }
        columns |= images.known[key]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def score_runs(runs, prompts, seeds, scorers):
    """Scores every run and, where it was generated at several points, each of them, in `sweep`: {Point: Run}. Returns the
    LPIPS between the base images of each prompt, [prompts, seeds, seeds].

    Fills `rows` (a dict an image, base and LoRA of each prompt and seed in turn), `pairs`, `looks` and, of the runs
    themselves, `embeddings`. A few prompts are scored at a time, so that few images are in memory; base images that
    runs share are read and scored once.
    """
    families, base_pairs = [], []  # each run with its other points
    for run in runs:
        others = {point: images for point, images in sorted(run.points.items()) if not run.is_own(point)}
        parts = {p: Run(f"{run.name}, {p}", None, run.adapter, run.base, images) for p, images in others.items()}
        run.sweep = {point: parts.get(point, run) for point in sorted(run.points)}
        families.append((run, *parts.values()))
    scored = [part for family in families for part in family]
    for part in scored:
        part.rows, part.pairs, part.looks, part.embeddings = [], [], dict(base=[], lora=[]), {}
    chunk = max(1, AT_ONCE // len(seeds))
    for start in tqdm(range(0, len(prompts), chunk), desc="scores", leave=False, disable=len(prompts) <= chunk):
        some, span = prompts[start : start + chunk], slice(start * len(seeds), (start + chunk) * len(seeds))
        texts = [prompt for _, prompt in some for _ in seeds]
        for family in families:
            if family[0].base is not runs[0].base or family is families[0]:
                models = scorers.clip, scorers.encoder, scorers.training
                base = ImageSet(list(family[0].base[span]), texts, scorers.device, *models)
            if family is families[0]:
                base_pairs.append(prompt_pairs(base.images, len(seeds), scorers.device))
            for part in family:
                score(part, some, seeds, base, list(part.lora[span]), embedded=part is family[0])
    for part in scored:
        part.pairs = np.concatenate(part.pairs)
        part.embeddings = {name: np.concatenate(values) for name, values in part.embeddings.items()} or None
    return np.concatenate(base_pairs)


def score(run, prompts, seeds, base, images, embedded):
    """Appends the scores of a few prompts to those of `run`; see `score_runs`. `base` is the ImageSet of their base
    images, `images` are the adapter's."""
    lora = replace(base, images=images, base=base.images, known={})
    jobs = [(category, prompt, seed) for category, prompt in prompts for seed in seeds]
    for job, *models in zip(jobs, scores_of(base, run.adapter), scores_of(lora, run.adapter), strict=True):
        category, prompt, seed = job
        for model, columns in zip(("base", "lora"), models, strict=True):
            run.rows.append(dict(prompt=prompt, category=category, seed=seed, model=model) | columns)
    run.pairs.append(prompt_pairs(images, len(seeds), base.device))
    for model, of_model in run.looks.items():
        of_model += dict(base=base, lora=lora)[model].looks
    if base.training and embedded:
        mirrored = base.encoder.embed([ImageOps.mirror(image) for image in images])
        for name, values in dict(base=base.embeddings, lora=lora.embeddings, lora_mirrored=mirrored).items():
            run.embeddings.setdefault(name, []).append(values.reshape(len(prompts), len(seeds), -1))


def shape_warnings(runs, training):
    """A warning if no training image has the shape of the generated images: a list of sentences."""
    if not training:
        return []
    width, height = runs[0].lora[0].size
    if any(abs(w / h / (width / height) - 1) < 0.1 for w, h in training.sizes):
        return []
    return [
        f"The images are {width}x{height}, a shape that no training image has: resized to squares, they "
        "are less similar to the training images, and copies are harder to find."
    ]


def prompt_pairs(images, count, device):
    """LPIPS between the `count` images of each prompt: [prompts, count, count]."""
    chunks = [images[i : i + count] for i in range(0, len(images), count)]
    return np.stack([pairwise_lpips(chunk, device) for chunk in chunks])


def image_warnings(runs, prompts, seeds):
    """Warnings of flat images and of LoRA images that two runs share: sentences."""
    jobs = [(prompt, seed) for _, prompt in prompts for seed in seeds]
    warnings, owners = [], {}
    for index, run in enumerate(runs):
        for kind, name in (("lora", "LoRA"), *([("base", "base")] if index == 0 else [])):
            for (prompt, seed), (flat, _) in zip(jobs, run.looks[kind], strict=True):
                if flat:
                    warnings.append(
                        f"{run.name}: the {name} image of “{prompt}”, seed {seed}, is one flat "
                        "colour: NaN in half precision or a broken model?"
                    )
        for (prompt, seed), (_, digest) in zip(jobs, run.looks["lora"], strict=True):
            key = (prompt, seed, digest)
            if key in owners:
                warnings.append(
                    f"{owners[key]} and {run.name} have the same image of “{prompt}”, seed "
                    f"{seed}: were both scored on one adapter?"
                )
            owners.setdefault(key, run.name)
    return warnings
