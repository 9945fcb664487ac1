"""The models behind the page: one pipeline, the adapters in use, and the images generated last."""

import contextlib
import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from lib import adapter_files, adapters
from lib.errors import UserError, memory_for
from lib.evaluation.generation import (
    capture_unet,
    check_adapter,
    choose_batch_size,
    generate,
    generation_memory,
    latent_size,
    prepare_pipeline,
    probe,
)
from lib.evaluation.runs import adapter_notes
from lib.models import fetch_base_model

CACHED_IMAGES = 256
LOADED_ADAPTERS = 2  # a page shows no more; each holds a copy of the weights that it changes
ADVICE = "ask for fewer seeds, or start play.py with a smaller --resolution or --batch-size"


class Loaded(NamedTuple):
    """An adapter in memory, merged into the pipeline at the scale last set."""

    path: Path
    applied: adapters.Applied
    fingerprint: str
    notes: list


class Studio:
    """Generates what a page asks for. Only one thread may call `generate`.

    Between two calls the pipeline holds the base model's weights.
    """

    def __init__(self, config, device):
        self.config, self.device = config, device
        self.choices()  # a folder without adapters is refused before the base model is loaded
        folder = fetch_base_model(config["base_model"], config["revision"], device.type == "cuda", config["resolution"])
        self.pipeline, _ = prepare_pipeline(config, [], folder, [], device)
        self.base_probe = probe(self.pipeline)
        self.uncaptured, self.captured, self.batch_sizes = self.pipeline.unet.forward, None, {}
        self.loaded, self.cache = OrderedDict(), Cache(CACHED_IMAGES)  # {files: Loaded}, oldest first
        if device.type == "cpu":
            print("no CUDA GPU found: generating on the CPU, in fp32")

    # ---- adapters ------------------------------------------------------------------------------

    def choices(self):
        """{name: path} of the adapters that can be chosen, as they are on the disk now. Raises UserError if there are
        none."""
        found = {}
        for folder in filter(None, (self.config["lora_dir"], self.config["second_lora_dir"])):
            for name, path in adapter_files.find_adapters(folder):
                if path.resolve() not in [known.resolve() for known in found.values()]:
                    found[str(path) if name in found else name] = path
        return found

    def second(self):
        """The name of the first adapter of `second_lora_dir`, None without."""
        if not self.config["second_lora_dir"]:
            return None
        path = adapter_files.find_adapters(self.config["second_lora_dir"])[0][1].resolve()
        return next(name for name, other in self.choices().items() if other.resolve() == path)

    def load(self, name):
        """The Loaded of an adapter, at scale 0, read again if its files have changed."""
        try:
            path = self.choices().get(name)
        except UserError:  # the folder itself is gone
            path = None
        if path is None:
            raise UserError(f"{name} is no longer in {self.config['lora_dir']}. Choose another adapter.")
        files = adapter_files.adapter_files(path)
        try:
            key = tuple((str(file), *stamp(file)) for _, *pair in files for file in filter(None, pair))
        except OSError as problem:
            raise UserError(f"{path} cannot be read: {problem.strerror}. Choose another adapter.") from None
        if key not in self.loaded:
            while len(self.loaded) >= LOADED_ADAPTERS:
                self.loaded.popitem(last=False)
            with memory_for(f"loading {name}", ADVICE):
                self.loaded[key] = self.read(name, path)
        self.loaded.move_to_end(key)
        return self.loaded[key]

    def read(self, name, path):
        """Reads an adapter and merges it at scale 0. Raises UserError if it does not fit the base model or does
        nothing."""
        adapter = adapter_files.read_adapter(path)
        applied, part = check_adapter(self.pipeline, adapter, self.base_probe)
        notes = adapter_notes(name, adapter, self.config["base_model"]) + ([f"{name} {part}"] if part else [])
        return Loaded(path, applied, adapters.fingerprint(adapter), notes)

    # ---- images --------------------------------------------------------------------------------

    def generate(self, asked, say):
        """Generates the images that `asked` (see lib/play/asked.py) lacks in the cache; returns, a column each, their
        PNGs in the order of the seeds and the Loaded adapter, None for the base model.

        `say(**event)` receives `status`, `notes` and `seeds` once, and each `image` as it is ready. It may raise to
        stop.
        """
        say(status="reading the adapters")
        loaded = [self.load(name) if name else None for name, _ in asked.columns]
        notes = [note for entry in loaded if entry for note in entry.notes]
        notes = [*cut_off(self.pipeline.tokenizer, asked.prompt), *dict.fromkeys(notes)]
        say(notes=notes, seeds=list(map(str, asked.seeds)))  # as text: JavaScript rounds numbers from 2^53
        sheet = []
        for column, (entry, (name, scale)) in enumerate(zip(loaded, asked.columns, strict=True)):
            entry = entry if scale else None  # at scale 0 it is the base model
            model = (entry.fingerprint, scale) if entry else None
            images = {}

            def ready(seed, png, column=column, images=images, model=model):
                images[seed] = png
                digest = self.cache.put((model, seed, asked.prompt, asked.steps, asked.guidance_scale), png)
                say(image=dict(column=column, seed=str(seed), url=f"images/{digest}.png"))

            for seed in asked.seeds:
                if png := self.cache.get((model, seed, asked.prompt, asked.steps, asked.guidance_scale)):
                    ready(seed, png)
            missing = [seed for seed in asked.seeds if seed not in images]
            if missing:
                with contextlib.ExitStack() as weights:
                    if entry:
                        weights.callback(entry.applied.set_scale, 0)
                        entry.applied.set_scale(scale)
                    self.generate_missing(asked, missing, name or "base model", ready, say)
            sheet.append([images[seed] for seed in asked.seeds])
        return sheet, loaded

    def generate_missing(self, asked, seeds, title, ready, say):
        """Generates the images of `seeds` with the current weights and calls `ready(seed, png)` for each."""
        batch_size = self.prepare(asked.guidance_scale > 1, len(asked.seeds))
        for start in range(0, len(seeds), batch_size):
            batch = seeds[start : start + batch_size]
            count = len(batch)
            what = f"{title}, seed{'s' if count > 1 else ''} {', '.join(map(str, batch))}"

            def on_step(done, what=what, count=count):
                say(status=f"{what}: step {done // count} of {asked.steps}")

            images = generate(
                self.pipeline,
                [(asked.prompt, seed) for seed in batch],
                steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                resolution=self.config["resolution"],
                batch_size=batch_size,
                title=None,
                advice=ADVICE,
                on_step=on_step,
            )
            for seed, image in zip(batch, images, strict=True):
                ready(seed, as_png(image))

    def prepare(self, guided, count):
        """The batch size for `count` images, for which the UNet is captured as a CUDA graph if it is not yet.

        One graph at a time is kept: another number of seeds, or guidance that is switched off, takes another one.
        """
        if count not in self.batch_sizes:
            asked = self.config["batch_size"] or (1 if self.device.type == "cpu" else 0)
            self.batch_sizes[count] = choose_batch_size(count, asked, self.config["resolution"], self.device)
        batch_size = self.batch_sizes[count]
        if self.captured != (guided, batch_size):
            self.captured, self.pipeline.unet.forward = None, self.uncaptured
            with generation_memory(batch_size, self.config["resolution"], ADVICE):
                size = latent_size(self.pipeline, self.config["resolution"])
                capture_unet(self.pipeline, batch_size, size, guided)
            self.captured = guided, batch_size
        return batch_size


class Cache:
    """The images generated last, as PNGs under the settings that made them; safe in any thread."""

    def __init__(self, most):
        self.most, self.images, self.lock = most, OrderedDict(), threading.Lock()

    def get(self, key):
        with self.lock:
            return self.images[key][1] if key in self.images else None

    def put(self, key, png):
        """Adds an image, or marks it as used; returns the digest under which `find` finds it."""
        digest = hashlib.sha256(png).hexdigest()
        with self.lock:
            self.images[key] = digest, png
            self.images.move_to_end(key)
            if len(self.images) > self.most:
                self.images.popitem(last=False)
        return digest

    def find(self, digest):
        """The PNG with this digest, None if it is no longer cached."""
        with self.lock:
            return next((png for known, png in self.images.values() if known == digest), None)


def stamp(path):
    """What changes when a file is written again."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def as_png(image):
    """A PIL image as PNG, the same bytes for the same pixels."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def cut_off(tokenizer, prompt):
    """[] or one note: the end of the prompt that the text encoder does not read."""
    limit, ids = tokenizer.model_max_length, tokenizer(prompt, verbose=False).input_ids
    if len(ids) <= limit:
        return []
    rest = tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True).strip()
    return [f"The prompt has {len(ids)} tokens, of which the text encoder reads {limit}. Cut off: “{rest}”"]
