"""Base models: fetched from the hub or read from a folder, checked, and loaded part by part."""

import contextlib
import hashlib
import json
import re
from pathlib import Path, PurePath

import torch
import transformers

from lib.cache import content_digest
from lib.config import image_size
from lib.errors import UserError, one_line
from lib.files import describe_content
from lib.provenance import ROOT

# The scripts have progress bars of their own.
transformers.utils.logging.disable_progress_bar()

# The parts of a base model that have weights, and the stems of their files.
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def fetch_base_model(name, revision=None, half=False, resolution=None):
    """The local folder of a Stable Diffusion pipeline.

    `name` is a folder, a hub id or a safetensors file of a whole model, which is converted (lib/single_file.py). From the
    hub only the files in use are fetched: UNet, VAE, text encoder, tokenizer and scheduler as safetensors, in half
    precision if `half` is set and the repository has that variant. Raises UserError, naming the model and what to do, if
    it is missing, incomplete, of another kind or does not support `resolution` pixels. In the last two cases no weights
    are fetched.
    """
    configs = ["model_index.json", "*/*.json", "tokenizer/merges.txt"]
    if Path(name).suffix.lower() in (".safetensors", *PICKLES) and not Path(name).is_dir():
        name = folder_of_file(Path(name))
    folder = fetch_model(name, revision, [], half, configs)
    needed = ["model_index.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in PARTS]
    # Without its vocabulary the tokenizer would load and take every word for unknown.
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        needed += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    missing = [path for path in needed if not (folder / path).is_file()]
    if not missing:
        check_base_model(folder, resolution)
        weights = [f"{part}/{stem}" for part, stem in PARTS.items()]
        folder = fetch_model(name, revision, weights, half, configs)
    missing += [f"{part}/{stem}.safetensors" for part, stem in PARTS.items() if not weight_files(folder / part, stem)]
    if missing:
        raise UserError(
            f"base model {name}: {', '.join(missing)} missing; a base model is a folder in diffusers' layout with "
            "safetensors weights, as pipeline.save_pretrained() writes it"
        )
    return folder


PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def folder_of_file(path):
    """The folder converted from a base model in one file. Raises UserError if the file is missing or a pickle."""
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"base model {path} is a pickle, which can run any program when opened; use the model's .safetensors file"
        )
    if not path.is_file():
        raise UserError(f"base model {path}: no such file")
    from lib.single_file import converted

    return str(converted(path))


# Supported values in the configuration files of a base model; the first is the default of a missing key.
SUPPORTED = {
    "model_index.json": {
        "text_encoder_2": (None, [None, None]),  # Stable Diffusion XL
        "image_encoder": (None, [None, None]),
    },
    "unet/config.json": {
        "_class_name": ("UNet2DConditionModel",),
        "addition_embed_type": (None,),  # Stable Diffusion XL
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),  # distilled with its guidance, as latent consistency models
    },
    "vae/config.json": {"_class_name": ("AutoencoderKL",), "in_channels": (3,), "out_channels": (3,)},
    "text_encoder/config.json": {"model_type": ("clip_text_model",), "max_position_embeddings": (77,)},
    "scheduler/scheduler_config.json": {
        "prediction_type": ("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": (False, None),  # zero terminal SNR, which the sampler does not have
    },
}


def check_base_model(folder, resolution=None):
    """UserError, naming the configuration file and the key, unless `folder` holds a Stable Diffusion 1.x or 2.x for text
    to image, predicting noise or velocity, whose VAE supports `resolution` pixels."""

    def refuse(path, problem):
        raise UserError(
            f"{folder / path}: {problem}; supported are Stable Diffusion 1.x and 2.x for text to image, predicting noise "
            "(epsilon) or velocity (v_prediction)"
        )

    stated = {}
    for path, keys in SUPPORTED.items():
        try:
            stated[path] = json.loads((folder / path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise UserError(f"{folder / path} cannot be read as JSON: {one_line(problem, 100)}") from None
        if not isinstance(stated[path], dict):
            raise UserError(f"{folder / path} is not a JSON object")
        for key, allowed in keys.items():
            value = stated[path].get(key, allowed[0])
            if value not in allowed:
                refuse(path, f"{key} is {one_line(json.dumps(value), 60)}")
    width = stated["text_encoder/config.json"].get("hidden_size", 512)
    expected = stated["unet/config.json"].get("cross_attention_dim", 1280)
    if expected != width:
        problem = f"cross_attention_dim is {expected}, but the text encoder's hidden_size is {width}"
        refuse("unet/config.json", problem)
    latents = stated["vae/config.json"].get("latent_channels", 4)
    for key in ("in_channels", "out_channels"):  # in: 9 for inpainting, 5 with depth, 8 for editing
        channels = stated["unet/config.json"].get(key, 4)
        if channels != latents:
            refuse("unet/config.json", f"{key} is {channels}, but the VAE's latents have {latents}")
    blocks = stated["vae/config.json"].get("block_out_channels", [64])
    if not isinstance(blocks, list) or len(blocks) not in (4, 5):
        refuse("vae/config.json", f"block_out_channels is {blocks}, but must be 4 numbers or 5")
    pixels = 2 ** (len(blocks) - 1)
    if resolution and any(side % pixels for side in image_size(resolution)):
        raise UserError(
            f"resolution is {resolution}, but must be a multiple of {pixels}, the pixels a side for each latent of "
            f"{folder / 'vae'}"
        )


def is_hub_form(name):
    """Whether `name` has the form of a hub id, owner/name."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def hub_id(name):
    """The base model `name` if it is a hub id and not a local folder or file, else None."""
    there = Path(name).exists() or (ROOT / name).exists()
    return str(name) if is_hub_form(name) and not there else None


def base_model_name(name):
    """A base model's public name: its hub id, the embedded model's path in the project, or the last part of a local path."""
    embedded = not Path(name).is_absolute() and (ROOT / name).is_dir()
    if hub_id(name) or embedded:
        return str(name)
    last = PurePath(name).name
    return last if last.strip(".") else Path(name).resolve().name


def fetch_model(name, revision, stems, half, others):
    """The local folder of `name`: itself if it is a folder, else a hub snapshot with the weights `stems` (paths without
    .safetensors) and the files that match the patterns `others`."""
    for place in (Path(name), ROOT / name):  # demo/model is relative to the scripts
        if place.is_dir():
            return place
    if not is_hub_form(name):
        raise UserError(f"model {name}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import HfApi, snapshot_download

    from lib.adapter_files.hub import odd_token

    try:
        files = {entry.rfilename for entry in HfApi().model_info(name, revision=revision).siblings}
        halves = [half and f"{stem}.fp16.safetensors" in files for stem in stems]
        weights = [f"{s}{'.fp16' if fp16 else ''}.safetensors" for s, fp16 in zip(stems, halves, strict=True)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*others, *weights]))
    except Exception as problem:  # offline, or a missing or gated repository: perhaps it is in the cache
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else "no answer"
            if wrong := odd_token():
                raise UserError(f"model {name} is unavailable: {wrong}") from None
            raise UserError(
                f"model {name} is unavailable: it is not in the cache, and the hub answers “{type(problem).__name__}: "
                f"{reason[:160]}”; connect to the network or use a local folder"
            ) from None


def weight_files(folder, stem=""):
    """The safetensors files of a model's folder, in one piece or in shards."""
    return sorted(folder.glob(f"{stem}*.safetensors"))


def is_half(path):
    """Whether a weights file is of the fp16 variant, in one piece or in shards."""
    return ".fp16." in path.name or ".fp16-" in path.name


def loaded_weights(folder, stem, half):
    """The weight files of a model's folder that are loaded. If both precisions are there, as after two fetches, `half`
    selects the fp16 variant."""
    pattern = re.compile(rf"{stem}(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
    paths = [path for path in weight_files(folder, stem) if pattern.fullmatch(path.name)]
    return [path for path in paths if is_half(path) == half] or paths


def digest_of(files):
    """SHA-256 of the contents of files, in their order, whatever their paths."""
    return hashlib.sha256(" ".join(map(content_digest, files)).encode()).hexdigest()


def model_digest(folder):
    """SHA-256 of the JSON and weight files in a model's folder."""
    return digest_of([*sorted(folder.glob("*.json")), *weight_files(folder)])


def base_model_digest(folder, half):
    """SHA-256 of the files of a base model's folder that are loaded, in `half` precision or not. Other files do not count."""
    files = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)]
    files += [f"tokenizer/{name}" for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    paths = [folder / name for name in files if (folder / name).is_file()]
    for part, stem in PARTS.items():
        paths += loaded_weights(folder / part, stem, half)
    return digest_of(paths)


@contextlib.contextmanager
def loading(path):
    """Turns any error of a library about a damaged file into one line that names `path`."""
    try:
        yield
    except Exception as problem:
        line = one_line(problem, 200)
        raise UserError(f"{path} cannot be loaded: {type(problem).__name__}: {line}") from None


def load_part(cls, folder, part, dtype, **options):
    """`cls.from_pretrained` for one part of a base model's folder. Raises UserError if weights are missing."""
    files = loaded_weights(folder / part, PARTS[part], dtype == torch.float16)
    for path in files:
        if reason := describe_content(path):
            raise UserError(f"{path} cannot be read as safetensors: {reason}")
    with loading(folder / part):
        model, report = cls.from_pretrained(
            folder / part,
            torch_dtype=dtype,
            variant="fp16" if all(map(is_half, files)) else None,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing or report.get("mismatched_keys"):
        wrong = missing or [str(key) for key in report["mismatched_keys"]]
        raise UserError(
            f"{folder / part}: {len(wrong)} weights are missing or have another shape, such as {wrong[0]}; the folder is "
            "damaged or not a Stable Diffusion 1.x or 2.x model"
        )
    return model
