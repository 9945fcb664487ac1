"""What a run leaves in its folder: the adapter, snapshots of it, config.json and the loss curve."""

import contextlib
import json
import shutil
from collections import Counter

import torch
from PIL import Image

from lib import adapter_files, adapters
from lib.adapter_files.kohya import kohya_header, save_kohya
from lib.adapter_files.model_card import CARD, card_text
from lib.errors import UserError, one_line
from lib.files import write_marker
from lib.models import base_model_name
from lib.provenance import provenance
from lib.run_config import differences
from lib.training.loss_figure import loss_figure
from lib.training.parameters import set_views
from lib.training.protection import differences_text


def check_trained(models):
    """Raise UserError unless every lora_B is finite and has moved away from its start at zero.

    `models` is a dict by component.
    """
    for component, model in models.items():
        rows = adapters.factors(model)
        if not all(weight.isfinite().all() for weight in adapters.magnitudes(model).values()):
            raise UserError(
                f"the adapter did not train: magnitudes of the {component} are not finite; "
                "nothing was saved. Is the learning rate far too high?"
            )
        dead = [name for name, (_, b) in rows.items() if not (b.any() and b.isfinite().all())]
        if dead:
            raise UserError(
                f"the adapter did not train: {len(dead)} of {len(rows)} lora_B of the {component} are "
                f"zero or not finite ({adapters.some(dead)}); nothing was saved. Is the learning rate "
                "0 or far too high?"
            )


def finished_models(trained):
    """{component: model} with the float32 values that the optimizer holds, checked: what is saved."""
    for part in trained.values():
        set_views(part.parameters, part.saved())
    models = {name: part.model for name, part in trained.items()}
    check_trained(models)
    return models


def data_record(data, train_indices, held_out):
    """What config.json says of the data set: its hash, captions, and which images were trained on, of
    which sizes."""
    names = [row.name for row in data]
    return dict(
        sha256=data.sha256,
        captions=sorted({row.caption for row in data}),
        caption_counts=dict(sorted(Counter(data[i].caption for i in train_indices).items())),
        size_counts=dict(Counter("{}x{}".format(*data.sizes[i]) for i in train_indices).most_common()),
        trained_on=[names[i] for i in train_indices],
        held_out=[names[i] for i in sorted(held_out)],
    )


def write_adapter(folder, config, models, data, step, half=False):
    """Write the adapter in `models` after `step` steps; its header says what it was trained on."""
    captions = data["captions"]
    caption = captions[0] if len(captions) == 1 else f"{len(captions)} captions"
    targets = {name: config[f"{name}_targets"] for name in models}
    adapter_files.save_adapter(
        folder,
        models,
        config["rank"],
        config["alpha"],
        targets,
        dict(
            base_model=base_model_name(config["base_model"]),
            caption=caption,
            data_sha256=data["sha256"],
            steps=str(step),
            seed=str(config["seed"]),
        ),
        half,
    )


def note_replaced(folder, config, say):
    """Say, before a run with `config` begins anew, that the finished run in `folder` will be replaced, if there is
    one. (It cannot be trained on: the learning rate of every step depends on how many there are.)"""
    try:
        earlier = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        now = json.loads(json.dumps(config, default=str))
        differing = [f"{key}: {old} then, {new} now" for key, (old, new) in differences(earlier, now, ()).items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    what = one_line("; ".join(differing), 300) or "of the same configuration"
    say(
        f"note: {folder} holds a finished run ({what}). Training begins anew, and replaces it once the new run is "
        "whole; to keep both add --run-name with another name"
    )


@contextlib.contextmanager
def optimizer_values(trained):
    """{component: model} that hold, inside, the float32 values of the optimizer, not their copies in the
    type that the models compute with. Those are in the same place as before afterwards, where a recorded
    pass reads them."""
    for part in trained.values():
        set_views(part.parameters, part.saved())
    try:
        yield {name: part.model for name, part in trained.items()}
    finally:
        for part in trained.values():
            set_views(part.parameters, part.working)


def write_snapshot(folder, config, trained, data, step):
    """Keep the adapter after `step` steps in `folder`/snapshots/step_001000, in half precision.

    Not if some component's lora_B are still all zero, as after a step at the rate 0: such an adapter does
    nothing, and no reader takes it.
    """
    with optimizer_values(trained) as models:
        for name, model in models.items():
            if not any(b.any() for _, b in adapters.factors(model).values()):
                print(f"\nnote: no snapshot after step {step}: the {name} has not changed yet")
                return
        target = folder / "snapshots" / f"step_{step:06}"
        target.mkdir(parents=True, exist_ok=True)
        write_adapter(target, config, models, data, step, half=True)


def drop_later_snapshots(folder, step):
    """Remove the snapshots of a run that goes on after `step`, which lie behind it."""
    for place in (folder / "snapshots").glob("step_*"):
        if int(place.name.removeprefix("step_")) > step:
            shutil.rmtree(place)


def write_run(folder, config, models, journal, data, device, **figures):
    """Write a run into `folder`: its adapter, what others read of it, loss.png and, last, config.json.

    `data` is from `data_record`; `figures` are what else config.json says of the run, the base model's
    prediction_type and the mixed_precision that was computed in among it.
    """
    write_adapter(folder, config, models, data, config["max_steps"])
    loss_figure(journal.rows, config["run_name"]).savefig(folder / "loss.png")
    sizes = {name: sum(weight.numel() for weight in adapters.trained_weights(model)) for name, model in models.items()}
    write_for_others(folder, config, models, data, figures)
    record = dict(config=config, **provenance(device), data=data, parameters=sizes, **figures)
    if device.type == "cuda":
        record["peak_gib_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    write_marker(folder / "config.json", record)  # with it the folder is whole


def write_for_others(folder, config, models, data, figures):
    """Write what other programs and people read of a run: kohya's file and the model card.

    The arguments are those of `write_run`.
    """
    config = config | dict(mixed_precision=figures["mixed_precision"])
    predicts, width = figures["prediction_type"], models["unet"].config.cross_attention_dim
    header = kohya_header(config, data, width, predicts, preview_thumbnail(folder))
    layers = {name: adapters.factors(model) for name, model in models.items()}
    scales = {name: adapters.dora_scales(model) for name, model in models.items()}
    target = folder / f"{config['run_name']}.safetensors"
    save_kohya(target, layers, config["alpha"], header, scales)
    card = card_text(config, data, predicts, figures["protection"])
    (folder / CARD).write_text(card, encoding="utf-8")


def preview_thumbnail(folder):
    """The adapter's last preview of its caption, a PIL image, or None where none was drawn: the
    first square of the newest image in previews/. Never a training image, which may be private."""
    newest = max((folder / "previews").glob("step_*.webp"), default=None)
    if newest is None:
        return None
    with Image.open(newest, formats=("WEBP",)) as image:
        side = min(image.size)
        return image.convert("RGB").crop((0, 0, side, side))


def outcome_text(folder):
    """What the console says of the run that lies in `folder`."""
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = f"{folder}: {record['config']['max_steps']} steps"
    if record["skipped_steps"]:
        text += f", {record['skipped_steps']} skipped for fp16 overflow"
    text += f", {record['steps_a_second']:.2f} steps/s after {record['set_up_seconds']:.1f} s of set-up"
    if "peak_gib_reserved" in record:
        text += f", {record['peak_gib_reserved']} GiB reserved at most"
    if record["protection"]:
        text += f"\n{differences_text(record['protection']['differences'])}"
    text += f"\n  python inference.py --lora-dir {folder}"
    if (folder / "snapshots").is_dir():
        text += " --snapshots  # without that its last step alone"
    return text
