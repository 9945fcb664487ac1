"""The model card of a run: README.md in the adapter's folder, in the form that the Hugging Face Hub
reads. train.py writes it, inference.py puts the images and verdicts of an evaluation into it."""

import json
import re
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from lib.errors import UserError
from lib.files import locked, write_bytes, write_json
from lib.models import base_model_name, hub_id

CARD = "README.md"
# An evaluation writes what is between these anew, and leaves all else of the card alone.
MARKS = ("<!-- evaluation: written by inference.py -->", "<!-- end of evaluation -->")
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


def code(text):
    """Anybody's words as Markdown's code: nothing in them has a meaning there."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


TEMPLATES.filters["code"] = code
TEMPLATES.filters["tojson"] = lambda text: json.dumps(text, ensure_ascii=False)


def card_text(config, data, prediction_type, protection=None):
    """The card of a run that was not evaluated yet, as text.

    `config` is train.py's, `data` what config.json says of the data set, `protection` what it says of that. Captions are told, and the
    number and hash of the images, but no file's name and no folder of this machine.
    """
    captions = sorted(data["caption_counts"].items(), key=lambda pair: (-pair[1], pair[0]))
    name, base, repository = config["run_name"], hub_id(config["base_model"]), config["push_to_hub"]
    front = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora"],
        instance_prompt=captions[0][0],
    )
    known = base_model_name(config["base_model"])
    if known.endswith(".safetensors"):
        loader = f"from_single_file({json.dumps(f'path/to/{known}', ensure_ascii=False)}"
    else:
        loader = f"from_pretrained({json.dumps(base or f'path/to/{known}', ensure_ascii=False)}"
    body = TEMPLATES.get_template("model_card.md").render(
        name=name,
        config=config,
        captions=captions,
        pictures=sum(count for _, count in captions),
        held_out=len(data["held_out"]),
        sha256=data["sha256"],
        repository=repository,
        marks=MARKS,
        loader=loader,
        base=f"[{base}](https://huggingface.co/{base})" if base else code(known),
        recipe=recipe(config, data["size_counts"], prediction_type, protection),
    )
    return f"---\n{front.to_yaml()}\n---\n{body}"


def recipe(config, size_counts, prediction_type, protection=None):
    """[(what, how)] of a training configuration and of its images' sizes, in words."""
    rates = f"UNet {config['unet_learning_rate']:g}"
    trained = "UNet " + ", ".join(config["unet_targets"])
    if config["train_text_encoder"]:
        rates += f", text encoder {config['text_encoder_learning_rate']:g}"
        trained += "; text encoder " + ", ".join(config["text_encoder_targets"])
    rates += f"; {config['warmup_steps']} warm-up steps"
    if "lr_scheduler" in config:
        rates += f", then a {config['lr_scheduler']} to 0"
    steps = f"{config['max_steps']}, batch {config['batch_size']}"
    if config["gradient_accumulation_steps"] > 1:
        steps += f" times {config['gradient_accumulation_steps']}"
    return [
        ("layers", trained),
        ("rank, alpha", f"{config['rank']}, {config['alpha']:g}"),
        ("learning rates", rates),
        ("steps", steps),
        *([("optimizer", config["optimizer"])] if "optimizer" in config else []),
        ("sizes, precision", f"{', '.join(size_counts)}; {config['mixed_precision']}"),
        ("prediction", prediction_type),
        *special(config, protection),
        ("seed", config["seed"]),
    ]


def special(config, protection):
    """What of a configuration goes beyond the plain recipe, as rows of `recipe`; `protection` as for `card_text`."""
    rows = []
    if config["dora"]:
        rows.append(("kind", "DoRA: each output's norm is trained beside LoRA's factors"))
    if config["caption_from"] != "text":
        rows.append(("captions", f"each image's own {config['caption_from']}"))
    if config["mask_weight"] < 1:
        rows.append(("outside the masks", f"the loss counts {config['mask_weight']:g} times"))
    if protection:
        rows += protected_rows(protection)
    if tuple(config["loss_guidance_scale"]) != (1, 1):
        low, high = config["loss_guidance_scale"]
        scales = f"{low:g}" if low == high else f"drawn evenly from {low:g} to {high:g}"
        rows.append(("loss", f"of the prediction at guidance {scales}"))
    return rows


def protected_rows(protection):
    """What config.json says of a protection, as rows of `recipe`."""
    listed, others, concept = (
        f"{protection['differences'][kind]['keys_values']:.1%}" for kind in ("listed", "held_out", "concept")
    )
    noun = " ".join(protection["noun"].replace("|", "/").split())
    kinds = f", {noun} among them in many ways" if noun else ""
    return [
        ("leaves alone", f"{protection['listed']:,} listed prompts{kinds}, and prompts like them"),
        (
            "largest change of what the UNet reads of a prompt (keys and values, half precision)",
            f"listed prompts {listed}, {protection['held_out']} others like them {others}, what is taught {concept}",
        ),
    ]


def update_card(folder, section, widget, files):
    """Put an evaluation into the card of the adapter folder `folder`, if it has one of ours.

    `section` is Markdown, `widget` what the Hub shows ([{"text", "output": {"url"}}]), `files` the
    images that both name ({name in the folder: bytes}). Every file is written beside and then
    renamed, and named in config.json as this project's own. A card that cannot be written is said
    and does not stop the evaluation.
    """
    folder = Path(folder)
    card = folder / CARD
    if not (card.is_file() and (folder / "config.json").is_file()):
        return  # a file, or a folder that train.py did not write
    try:
        text = card.read_text(encoding="utf-8")
        if not all(text.count(mark) == 1 for mark in MARKS):
            raise UserError("the marks around its evaluation are gone")
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with locked(folder):
            # First the list, so that no image is ever left that nobody claims.
            record["files_written"] = sorted({*record["files_written"], *files})
            write_json(folder / "config.json", record)
            for name, content in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_bytes(folder / name, content)
            found = ModelCard(text)
            found.data.widget = widget
            pattern = re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1])
            new = f"{MARKS[0]}\n{section}\n{MARKS[1]}"
            found.text = re.sub(pattern, lambda match: new, found.text, flags=re.DOTALL)
            write_bytes(card, str(found).encode())
    except (UserError, OSError, ValueError, KeyError, TypeError) as problem:
        print(f"note: the model card {card} was not updated: {problem}")
