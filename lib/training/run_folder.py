"""The files of a run: the adapter, snapshots of it, config.json, the model card and the loss curve."""

import contextlib
import json
import secrets
import shutil
import time
from collections import Counter

import numpy as np
import torch
from PIL import Image

from lib import adapter_files, adapters
from lib.adapter_files.header import kohya_header
from lib.adapter_files.kohya import save_kohya
from lib.adapter_files.model_card import CARD, card_text, plain_lora_text, protected_text
from lib.errors import UserError, one_line
from lib.files import write_marker
from lib.images import empty_figure
from lib.models import base_model_name
from lib.provenance import provenance
from lib.run_config import differences
from lib.training.parameters import set_views
from lib.training.protection import differences_text

# The plain LoRA beside a DoRA is this close to it, unless that takes more than this many times its rank.
PLAIN_ERROR, PLAIN_RANKS = 0.02, 2


# ---- the adapter -----------------------------------------------------------------------------------


def check_trained(models):
    """Raise UserError unless every lora_B of `models`, {component: model}, is finite and no longer zero."""
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
                f"the adapter did not train: {len(dead)} of {len(rows)} lora_B of the {component} are zero or not "
                f"finite ({adapters.some(dead)}); nothing was saved. Is the learning rate 0 or far too high?"
            )


def finished_models(trained):
    """{component: model} with the optimizer's float32 values, checked, ready to be saved."""
    for part in trained.values():
        set_views(part.parameters, part.saved())
    models = {name: part.model for name, part in trained.items()}
    check_trained(models)
    return models


@contextlib.contextmanager
def optimizer_values(trained):
    """Context with {component: model} that hold the optimizer's float32 values.

    Afterwards the parameters are again the working copies that a captured pass reads.
    """
    for part in trained.values():
        set_views(part.parameters, part.saved())
    try:
        yield {name: part.model for name, part in trained.items()}
    finally:
        for part in trained.values():
            set_views(part.parameters, part.working)


def write_adapter(folder, config, models, data, step, half=False):
    """Write the adapter in `models` after `step` steps. Its header states what it was trained on."""
    captions = data["captions"]
    header = dict(
        base_model=base_model_name(config["base_model"]),
        caption=captions[0] if len(captions) == 1 else f"{len(captions)} captions",
        data_sha256=data["sha256"],
        steps=str(step),
        seed=str(config["seed"]),
    )
    targets = {name: config[f"{name}_targets"] for name in models}
    adapter_files.save_adapter(folder, models, config["rank"], config["alpha"], targets, header, half)


def write_snapshot(folder, config, trained, data, step):
    """Write the adapter after `step` steps to `folder`/snapshots/step_001000, in half precision.

    No snapshot is written if all lora_B of a component are zero, as after a step at learning rate 0: such an adapter
    has no effect, and no reader accepts it.
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
    """Remove the snapshots after `step` when a run resumes from there."""
    for place in (folder / "snapshots").glob("step_*"):
        if int(place.name.removeprefix("step_")) > step:
            shutil.rmtree(place)


# ---- the finished run ------------------------------------------------------------------------------


def data_record(data, train_indices, held_out):
    """The data set in config.json: its hash, captions, image sizes, and which images were trained on."""
    names = [row.name for row in data]
    return dict(
        sha256=data.sha256,
        captions=sorted({row.caption for row in data}),
        caption_counts=dict(sorted(Counter(data[i].caption for i in train_indices).items())),
        size_counts=dict(Counter("{}x{}".format(*data.sizes[i]) for i in train_indices).most_common()),
        trained_on=[names[i] for i in train_indices],
        held_out=[names[i] for i in sorted(held_out)],
    )


def note_replaced(folder, config, say):
    """Note, before a new run starts, that it will replace the finished run in `folder`, and how the two differ.

    A finished run cannot be trained further: the learning rate of every step depends on the total number of steps.
    """
    try:
        earlier = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        now = json.loads(json.dumps(config, default=str))
        differing = [f"{key}: {old} then, {new} now" for key, (old, new) in differences(earlier, now, ()).items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    what = one_line("; ".join(differing), 300) or "of the same configuration"
    say(
        f"note: {folder} holds a finished run ({what}). Training starts over and replaces it once the new run is "
        "complete; to keep both, add --run-name with another name"
    )


def write_run(folder, config, models, log, data, device, result):
    """Write a finished run to `folder`: its adapter, the files for other programs, loss.png and, last, config.json.

    `log` are the rows of log.jsonl, `data` is from `data_record`, `result` the rest of what config.json states.
    """
    write_adapter(folder, config, models, data, result["steps"])
    loss_figure(log, config["run_name"], config["max_steps"]).savefig(folder / "loss.png")
    sizes = {name: sum(weight.numel() for weight in adapters.trained_weights(model)) for name, model in models.items()}
    result = result | dict(plain_lora=write_for_others(folder, config, models, data, result))
    result |= dict(optimizer=result["optimizer"]["name"])
    record = dict(config=config, **provenance(device), data=data, parameters=sizes, **result)
    if device.type == "cuda":
        record["peak_gib_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    write_marker(folder / "config.json", record)  # now the folder is complete


def write_for_others(folder, config, models, data, result):
    """Write kohya's file, of a DoRA also a plain LoRA, and the model card of a run. Returns the entry `plain_lora` of
    config.json, None but for a DoRA. The arguments are those of `write_run`."""
    name, optimizer = config["run_name"], result["optimizer"]
    layers = {part: adapters.factors(model) for part, model in models.items()}
    scales = {part: adapters.dora_scales(model) for part, model in models.items()}
    note = protected_text(result["protection"]) if result["protection"] else ""
    files, plain = [(config, layers, scales, note)], None
    if config["dora"]:
        layers, rank, error = adapters.closest_lora(models, PLAIN_RANKS * config["rank"], PLAIN_ERROR)
        plain = dict(file=f"{name}_lora.safetensors", rank=rank, error=round(error, 4))
        as_plain = dict(run_name=f"{name}_lora", rank=rank, alpha=float(rank), dora=False)
        note += f" It approximates the DoRA {name}, from whose change of the weights its own differs by {error:.1%}."
        files.append((config | as_plain, layers, None, note.strip()))
    about = result | dict(session=secrets.randbits(32), finished=round(time.time(), 3))
    width, thumbnail = models["unet"].config.cross_attention_dim, preview_thumbnail(folder)
    for settings, weights, norms, note in files:
        header = kohya_header(settings, data, about, width, thumbnail, note)
        save_kohya(folder / f"{settings['run_name']}.safetensors", weights, settings["alpha"], header, norms)
    card = config | dict(optimizer=optimizer["settings"])
    card |= {key: result[key] for key in ("mixed_precision", "lr_scheduler", "steps")}
    text = card_text(card, data, result["prediction_type"], result["protection"], plain)
    (folder / CARD).write_text(text, encoding="utf-8")
    return plain


def preview_thumbnail(folder):
    """The last preview of the caption, a PIL image: the first square of the newest image in previews/, or None.

    Never a training image, which may be private.
    """
    newest = max((folder / "previews").glob("step_*.webp"), default=None)
    if newest is None:
        return None
    with Image.open(newest, formats=("WEBP",)) as image:
        side = min(image.size)
        return image.convert("RGB").crop((0, 0, side, side))


def outcome_text(folder):
    """The console's summary of the finished run in `folder`."""
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = f"{folder}: {record['steps']} steps"
    if record["steps"] < (most := record["config"]["max_steps"]):
        text += f" of {most} (early stopping: held-out images show no noticeable gain)"
    if record["skipped_steps"]:
        text += f", {record['skipped_steps']} skipped for fp16 overflow"
    text += f", {record['steps_a_second']:.2f} steps/s after {record['set_up_seconds']:.1f} s of set-up"
    if "peak_gib_reserved" in record:
        text += f", {record['peak_gib_reserved']} GiB reserved at most"
    if record["protection"]:
        text += f"\n{differences_text(record['protection']['differences'])}"
    name, plain = record["config"]["run_name"], record["plain_lora"]
    text += f"\n  {name}.safetensors is for ComfyUI"
    if plain:
        text += f" and Forge; {plain['file']} for other programs: {plain_lora_text(plain)}"
    else:
        text += ", A1111, Forge, InvokeAI and others"
    text += f"; {CARD} says how\n  python inference.py --lora-dir {folder}"
    if (folder / "snapshots").is_dir():
        text += " --snapshots  # without it the last step alone"
    return text


# ---- the loss curve --------------------------------------------------------------------------------

HELD_OUT, TRAINED, RAW = "#c4572e", "#2f5ea8", "#b9c4d6"


def loss_figure(log, title, max_steps=None):
    """A matplotlib figure of held-out loss, training loss and learning rate over the steps.

    `log` are the rows of log.jsonl. The held-out loss, at fixed noise and timesteps, is the one to look at. Its lowest
    point is marked. The training loss depends mostly on the sampled timesteps, so its running mean is plotted over it.
    If the run ended before `max_steps`, its end is marked too.
    """
    held_out = [(r["step"], r["validation_loss"]) for r in log if "validation_loss" in r]
    trained = [row for row in log if "loss" in row]
    figure = empty_figure(8, 7 if held_out else 5, dpi=120)
    figure.suptitle(title, fontsize=12)
    heights = [3, 2, 1] if held_out else [3, 1]
    panels = list(figure.subplots(len(heights), height_ratios=heights, sharex=True))
    if max_steps and trained and trained[-1]["step"] < max_steps:
        draw_end(panels, trained[-1]["step"], max_steps)
    if held_out:
        draw_held_out(panels[0], held_out)
    draw_trained(panels[-2], trained)
    panels[-1].plot([r["step"] for r in trained], [r["learning_rate"] for r in trained], color="#555555")
    panels[-1].set(xlabel="step", ylabel="learning rate")
    panels[-1].set_ylim(bottom=0)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def draw_held_out(axes, held_out):
    """The held-out loss and its lowest point, in a range of its own, because it may change little."""
    steps, losses = zip(*held_out, strict=True)
    step, lowest = min(held_out, key=lambda pair: pair[1])
    axes.plot(steps, losses, "o-", color=HELD_OUT, markersize=4, linewidth=1.8)
    axes.plot(step, lowest, "o", markersize=13, markerfacecolor="none", markeredgecolor=HELD_OUT, markeredgewidth=1.6)
    # Below the curve, where nothing else is, and on the side that has room.
    right = step - steps[0] > (steps[-1] - steps[0]) / 2
    axes.annotate(
        f"lowest: {lowest:.4f} after step {step:,}",
        (step, lowest),
        (0, -16),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        color=HELD_OUT,
    )
    axes.margins(y=0.22)
    axes.set(ylabel="held-out loss")
    axes.set_title("loss of held-out images, at fixed noise and timesteps", fontsize=9, loc="left")


def draw_end(panels, step, max_steps):
    """The end of a run that ended early."""
    for axes in panels:
        axes.axvline(step, color="#555555", linewidth=1, linestyle="--")
    panels[0].set_title(f"early stopping after step {step:,} of {max_steps:,}", fontsize=9, loc="right")


def draw_trained(axes, trained):
    """The training loss and its running mean."""
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    kernel = np.ones(max(min(5, len(losses)), len(losses) // 20))
    running = np.convolve(losses, kernel, "same") / np.convolve(np.ones(len(losses)), kernel, "same")
    axes.plot(steps, losses, color=RAW, linewidth=0.8, label="training loss")
    axes.plot(steps, running, color=TRAINED, linewidth=1.8, label="its running mean")
    axes.set(ylabel="training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2)
