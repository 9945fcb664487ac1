"""Saved images: a new folder each, complete or not there, never one that exists."""

import datetime
import io
import itertools
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from lib.errors import UserError, disk_for
from lib.evaluation.prompts import slugs
from lib.files import flush, write_bytes, write_json
from lib.images import strip
from lib.provenance import provenance

NAMES = ("base", "lora", "second")  # of the columns' files, as in the folders of inference.py


def save(asked, sheet, loaded, config, device, now=None):
    """Writes the images of `sheet`, of the models `loaded` (see Studio.generate): <model>_<seed>.png each, pair.png, which
    shows them side by side, and settings.json. Returns their folder, a new one in `output_dir`.

    Raises UserError if it cannot be written.
    """
    now = now or datetime.datetime.now()
    output_dir = Path(config["output_dir"])
    name = f"{now:%Y-%m-%d_%H%M%S}_{slugs([('', asked.prompt)])[0]}"
    temporary = None
    try:
        with disk_for(output_dir / name):
            output_dir.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".unfinished", dir=output_dir))
            temporary.chmod(0o755)  # mkdtemp's is the user's alone
            write(temporary, asked, sheet, loaded, config, device, now)
            return move(temporary, output_dir / name)
    except OSError as problem:
        raise UserError(f"{problem.filename or output_dir} cannot be written: {problem.strerror}") from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def write(folder, asked, sheet, loaded, config, device, now):
    """Writes the files of a saved folder."""
    columns, images = {}, []
    for stem, (name, scale), pngs, adapter in zip(NAMES, asked.columns, sheet, loaded, strict=False):
        title = f"{name}, scale {scale:g}" if name else "base model"
        while title in columns:  # an adapter beside itself
            title += " "
        columns[title] = [Image.open(io.BytesIO(png)) for png in pngs]
        model = dict(adapter=str(adapter.path), fingerprint=adapter.fingerprint, scale=scale) if adapter else {}
        for seed, png in zip(asked.seeds, pngs, strict=True):
            write_bytes(folder / f"{stem}_{seed}.png", png)
            images.append(dict(file=f"{stem}_{seed}.png", seed=seed, **model))
    rows = [f"seed {seed}: “{asked.prompt}”" for seed in asked.seeds]
    pair = strip(columns, rows, side=next(iter(columns.values()))[0].width)
    pair.save(folder / "pair.png")
    keys = ("base_model", "revision", "resolution", "batch_size")
    settings = dict(
        prompt=asked.prompt,
        seeds=list(asked.seeds),
        steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        **{key: config[key] for key in keys},
        images=images,
        saved=now.isoformat(timespec="seconds"),
        provenance=provenance(device),
    )
    write_json(folder / "settings.json", settings)
    flush(folder / "pair.png")


def move(temporary, target):
    """Renames a folder to `target`, or to the first free `target`-2, -3, …; returns its new path."""
    for number in itertools.count(1):
        goal = target if number == 1 else target.with_name(f"{target.name}-{number}")
        try:
            if not goal.exists():
                temporary.rename(goal)  # fails if another process has filled `goal` meanwhile
                return goal
        except OSError:
            if not goal.exists():
                raise
    return None
