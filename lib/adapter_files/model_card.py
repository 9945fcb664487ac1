"""The model card of a run: README.md in the adapter's folder, in the Hugging Face Hub's format.

train.py writes it; inference.py adds the images and verdicts of an evaluation.
"""

import json
import re
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from lib.adapter_files.header import trigger_phrase
from lib.errors import UserError
from lib.files import locked, write_bytes, write_json
from lib.models import base_model_name, hub_id

CARD = "README.md"
MINIATURE = "demo/model"  # the embedded base model, which no other program has
# An evaluation replaces the text between these marks and leaves the rest of the card unchanged.
MARKS = ("<!-- evaluation: written by inference.py -->", "<!-- end of evaluation -->")
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


def code(text):
    """Any text as Markdown code, in which no character is markup."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


TEMPLATES.filters["code"] = code
TEMPLATES.filters["tojson"] = lambda text: json.dumps(text, ensure_ascii=False)


def card_text(config, data, prediction_type, protection=None, plain=None):
    """The card of a run that is not evaluated yet, as text.

    `config` is train.py's, with the `steps` trained if they are not max_steps; `data`, `protection` and `plain`
    (plain_lora) are config.json's entries. The card holds captions and the number and hash of the images, but no file
    name and no local folder.
    """
    captions = sorted(data["caption_counts"].items(), key=lambda pair: (-pair[1], pair[0]))
    name, base, repository = config["run_name"], hub_id(config["base_model"]), config["push_to_hub"]
    front = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora"],
        instance_prompt=trigger_phrase(data["caption_counts"]),
    )
    model = base_model_name(config["base_model"])
    single = model.endswith(".safetensors")
    source = json.dumps(base if base and not single else f"path/to/{model}", ensure_ascii=False)
    body = TEMPLATES.get_template("model_card.md").render(
        name=name,
        plain=plain and plain | dict(text=plain_lora_text(plain)),
        protected=protection and protected_text(protection),
        trigger=trigger_phrase(data["caption_counts"]),
        other=f"{name}_lora" if plain else name,
        config=config,
        captions=captions,
        images=sum(count for _, count in captions),
        held_out=len(data["held_out"]),
        sha256=data["sha256"],
        repository=repository,
        marks=MARKS,
        loader=f"{'from_single_file' if single else 'from_pretrained'}({source}",
        miniature=model == MINIATURE,
        base=f"[{base}](https://huggingface.co/{base})" if base else code(model),
        recipe=recipe(config, data["size_counts"], prediction_type, protection),
    )
    return f"---\n{front.to_yaml()}\n---\n{body}"


def recipe(config, size_counts, prediction_type, protection=None):
    """The table of a training configuration and its images' sizes: [(setting, value)]."""
    rates = f"UNet {config['unet_learning_rate']:g}"
    trained = "UNet " + ", ".join(config["unet_targets"])
    if config["train_text_encoder"]:
        rates += f", text encoder {config['text_encoder_learning_rate']:g}"
        trained += "; text encoder " + ", ".join(config["text_encoder_targets"])
    rates += f"; {config['warmup_steps']} warm-up steps"
    if "lr_scheduler" in config:
        rates += f", then a {config['lr_scheduler']} to 0"
    done, most = config.get("steps", config["max_steps"]), config["max_steps"]
    steps = f"{done}, batch {config['batch_size']}"
    if config["gradient_accumulation_steps"] > 1:
        steps += f" times {config['gradient_accumulation_steps']}"
    if done < most:
        steps += f"; early stopping ended the run of {most}"
    return [
        ("layers", trained),
        ("rank, alpha", f"{config['rank']}, {config['alpha']:g}"),
        ("learning rates", rates),
        ("steps", steps),
        *([("optimizer", config["optimizer"])] if "optimizer" in config else []),
        ("sizes, precision", f"{', '.join(size_counts)}; {config['mixed_precision'].replace('no', 'fp32')}"),
        ("prediction", prediction_type),
        *special(config, protection),
        ("seed", config["seed"]),
    ]


def special(config, protection):
    """Rows of `recipe` for settings other than the plain recipe's; `protection` as for `card_text`."""
    rows = []
    if config["dora"]:
        rows.append(("kind", "DoRA: LoRA's factors and a trained norm for each output"))
    if config["caption_from"] != "text":
        rows.append(("captions", f"each image's own {config['caption_from']}"))
    if config["mask_weight"] < 1:
        rows.append(("outside the masks", f"the loss has weight {config['mask_weight']:g}"))
    if protection:
        rows.append(("protected", f"{protection['listed']:,} listed prompts"))
    if tuple(config["loss_guidance_scale"]) != (1, 1):
        low, high = config["loss_guidance_scale"]
        scales = f"{low:g}" if low == high else f"uniform from {low:g} to {high:g}"
        rows.append(("loss", f"of the prediction at guidance {scales}"))
    return rows


def plain_lora_text(plain):
    """A phrase on the plain LoRA beside a DoRA; `plain` as for `card_text`."""
    return f"a plain LoRA of rank {plain['rank']}, whose change of the weights differs from the DoRA's by {plain['error']:.1%}"


def protected_text(protection):
    """Sentences on what a protected adapter leaves alone, with the figures of config.json's entry."""
    listed, held_out, concept = (
        f"{protection['differences'][kind]['keys_values']:.1%}" for kind in ("listed", "held_out", "concept")
    )
    among = f", many of them about {code(protection['noun'])}" if protection["noun"].strip() else ""
    return (
        "This adapter is built to leave other prompts unchanged: it changes only layers that read the prompt, and its "
        f"change is projected away from {protection['listed']:,} listed prompts{among}. The UNet's keys and values change "
        f"by at most {listed} for a listed prompt, by at most {held_out} for {protection['held_out']} similar prompts that "
        f"were not listed, and by {concept} for the concept."
    )


def update_card(folder, section, widget, files):
    """Write an evaluation into the card of the adapter folder `folder`, if train.py wrote one.

    `section` is Markdown, `widget` the Hub's gallery ([{"text", "output": {"url"}}]), `files` the images of both ({name
    in the folder: bytes}). Files are written atomically and listed in config.json as this project's own. If the card
    cannot be written, a note is printed and the evaluation continues.
    """
    folder = Path(folder)
    card = folder / CARD
    if not (card.is_file() and (folder / "config.json").is_file()):
        return  # not written by train.py
    try:
        text = card.read_text(encoding="utf-8")
        if not all(text.count(mark) == 1 for mark in MARKS):
            raise UserError("it lacks the marks around the evaluation")
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with locked(folder):
            # The list first: an interruption leaves no image that is not listed.
            record["files_written"] = sorted({*record["files_written"], *files})
            write_json(folder / "config.json", record)
            for name, content in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_bytes(folder / name, content)
            updated = ModelCard(text)
            updated.data.widget = widget
            marked = f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}"
            new = f"{MARKS[0]}\n{section}\n{MARKS[1]}"
            updated.text = re.sub(marked, lambda match: new, updated.text, flags=re.DOTALL)
            write_bytes(card, str(updated).encode())
    except (UserError, OSError, ValueError, KeyError, TypeError) as problem:
        print(f"note: the model card {card} was not updated: {problem}")
