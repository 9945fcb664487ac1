"""The header of kohya's file: how it was trained, in the keys that other programs show.

The keys ss_… and sshs_… are those of kohya's sd-scripts, modelspec.… those of https://github.com/Stability-AI/ModelSpec.
"""

import base64
import hashlib
import importlib.metadata
import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
from PIL import Image, ImageOps

from lib.cache import content_digest
from lib.models import base_model_name

# No trigger by themselves, nor at a trigger's ends.
FILLERS = set("a an and at by for from her his in is its of on or the their to with".split())


def kohya_header(config, data, result, width, thumbnail=None, note=""):
    """The header of kohya's file, a dict of strings, without hashes of the tensors.

    `config` is train.py's, `data` the data set's entry in config.json and `result` the rest of it, with `session`, a
    number, and `started` and `finished`, in seconds since 1970. `width` is that of the text encoder's states (1024:
    version 2; any other, including the miniature's: version 1), `thumbnail` a PIL image or None, `note` a sentence for
    the description. A base model in a local folder is named by that folder's name only. No image is named.
    """
    sizes = [tuple(map(int, size.split("x"))) for size in data["size_counts"]]
    buckets = {
        number: dict(resolution=size, count=count)
        for number, (size, count) in enumerate(zip(sizes, data["size_counts"].values(), strict=True))
    }
    captions, name = data["caption_counts"], config["run_name"]
    images = sum(captions.values())
    total_batch = config["batch_size"] * config["gradient_accumulation_steps"] * result["processes"]
    epochs = -(-config["max_steps"] * total_batch // images)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config["rank"],
        "ss_network_alpha": config["alpha"],
        "ss_network_args": json.dumps({"dora_wd": "True"} if config["dora"] else {}),
        "ss_output_name": name,
        "ss_session_id": result["session"],
        "ss_training_started_at": result["started"],
        "ss_training_finished_at": result["finished"],
        "ss_tag_frequency": json.dumps({name: tag_frequency(captions)}, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps({name: dict(n_repeats=1, img_count=images)}, ensure_ascii=False),
        "ss_num_train_images": images,
        "ss_num_validation_images": len(data["held_out"]),
        "ss_num_reg_images": 0,
        "ss_steps": config["max_steps"],
        "ss_max_train_steps": config["max_steps"],
        "ss_epoch": epochs,
        "ss_num_epochs": epochs,
        "ss_batch_size_per_device": config["batch_size"],
        "ss_total_batch_size": total_batch,
        "ss_gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "ss_gradient_checkpointing": config["gradient_checkpointing"],
        "ss_max_grad_norm": 0.0,  # gradients are not clipped
        "ss_learning_rate": config["unet_learning_rate"],
        "ss_unet_lr": config["unet_learning_rate"],
        "ss_text_encoder_lr": config["text_encoder_learning_rate"] if config["train_text_encoder"] else None,
        "ss_lr_warmup_steps": config["warmup_steps"],
        "ss_lr_scheduler": result["lr_scheduler"],
        "ss_optimizer": result["optimizer"]["name"],
        "ss_mixed_precision": result["mixed_precision"],
        "ss_resolution": f"({config['resolution']}, {config['resolution']})",
        "ss_enable_bucket": len(buckets) > 1,
        "ss_bucket_info": json.dumps(dict(buckets=buckets, mean_img_ar_error=0) if len(buckets) > 1 else None),
        "ss_seed": config["seed"],
        "ss_clip_skip": None,
        **base_model(config["base_model"], width),
        **modelspec(config, data, result, width == 1024, note),
    }
    if thumbnail is not None:
        header["modelspec.thumbnail"] = thumbnail_uri(thumbnail)
    return {"format": "pt"} | {key: str(value) for key, value in header.items()}


def base_model(name, width):
    """The entries on the base model; with the hashes of A1111 if it is one file."""
    entries = {
        "ss_base_model_version": "sd_v2" if width == 1024 else "sd_v1",
        "ss_v2": width == 1024,
        "ss_sd_model_name": base_model_name(name),
    }
    if Path(name).is_file():
        with open(name, "rb") as file:
            entries["ss_sd_model_hash"] = legacy_hash(file)
        entries["ss_new_sd_model_hash"] = content_digest(Path(name))
    return entries


def modelspec(config, data, result, second, note):
    """The entries modelspec.…; `second` for Stable Diffusion 2, the rest as for `kohya_header`."""
    architecture, predicts_v = "stable-diffusion-v1", result["prediction_type"] == "v_prediction"
    if second:
        architecture = "stable-diffusion-v2-" + ("768-v" if predicts_v else "512")
    trigger = trigger_phrase(data["caption_counts"])
    words = f" of {trigger}" if trigger else ""
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": "diffusers",
        "implementation_version": importlib.metadata.version("diffusers"),
        "title": config["run_name"],
        "description": f"A {'DoRA' if config['dora'] else 'LoRA'} of rank {config['rank']} for "
        f"{base_model_name(config['base_model'])}, trained for {config['max_steps']} steps on "
        f"{sum(data['caption_counts'].values())} images{words}. {note}".strip(),
        "date": datetime.fromtimestamp(result["finished"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": next(iter(data["size_counts"])),  # the most frequent
        "prediction_type": "v" if predicts_v else "epsilon",
    }
    if trigger:
        entries |= dict(trigger_phrase=trigger, tags=trigger, usage_hint=f"Use “{trigger}” in the prompt.")
    return {f"modelspec.{key}": value for key, value in entries.items()}


def tag_frequency(captions):
    """{tag: number of images} of {caption: number of images}: captions are split at commas, in lower case."""
    tags = {}
    for caption, count in captions.items():
        for tag in filter(None, map(str.strip, caption.lower().split(","))):
            tags[tag] = tags.get(tag, 0) + count
    return tags


def trigger_phrase(captions):
    """The words that prompt the concept, from {caption: number of images}, or None.

    The caption of more than half of the images, else the longest sequence of words that all captions share.
    """
    frequent = max(captions, key=captions.get)
    if 2 * captions[frequent] > sum(captions.values()):
        return frequent
    texts = [" ".join(re.findall(r"[\w'’-]+", caption)) for caption in captions]
    shortest = min(texts, key=len).split()
    lowered = [f" {text.lower()} " for text in texts]
    for length in range(len(shortest), 0, -1):
        for start in range(len(shortest) - length + 1):
            phrase = shortest[start : start + length]
            if FILLERS.isdisjoint((phrase[0].lower(), phrase[-1].lower())):
                phrase = " ".join(phrase)
                if all(f" {phrase.lower()} " in text for text in lowered):
                    return phrase
    return None


def thumbnail_uri(image, side=256):
    """A PIL image as a data: URI, a JPEG of side x side pixels."""
    buffer = io.BytesIO()
    small = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- hashes ----------------------------------------------------------------------------------------


def hashes(tensors, header):
    """The entries with hashes of a file of these tensors and this header, as kohya's sd-scripts compute them."""
    data = safetensors.torch.save(tensors, metadata={k: v for k, v in header.items() if k.startswith("ss_")})
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": legacy_hash(io.BytesIO(data)),
        "modelspec.hash_sha256": f"0x{digest}",
    }


def legacy_hash(file):
    """A1111's first kind of hash: eight digits of the SHA-256 of the 64 KiB from 1 MiB on, of an open binary file."""
    file.seek(0x100000)
    return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
