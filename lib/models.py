"""Base models: fetched from the hub or found in a folder, checked, and loaded part by part."""

import contextlib
from pathlib import Path

import transformers

from lib.errors import UserError, one_line

# The scripts show bars of their own work; the libraries' bars for reading a file only blink.
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent  # demo/model lies in it


def fetch_base_model(name, revision=None, half=False):
    """The local folder of a Stable Diffusion pipeline, `name` being a folder or a hub id.

    From the hub only what is used is fetched: UNet, VAE, text encoder, tokenizer and scheduler,
    as safetensors, in half precision where `half` is set and the repository has such a variant.
    Raises UserError, naming the model and what to do, when it is not there or not whole.
    """
    parts = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }
    folder = fetch_model(name, revision, [f"{p}/{stem}" for p, stem in parts.items()], half,
                         ["model_index.json", "*/*.json", "tokenizer/merges.txt"])  # fmt: skip
    needed = ["model_index.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in parts]
    missing = [path for path in needed if not (folder / path).is_file()]
    missing += [
        f"{part}/{stem}.safetensors"
        for part, stem in parts.items()
        if not weight_files(folder / part, stem)
    ]
    # Without its vocabulary the tokenizer would load, and read every word as unknown.
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        words = ("tokenizer/vocab.json", "tokenizer/merges.txt")
        missing += [path for path in words if not (folder / path).is_file()]
    if missing:
        raise UserError(
            f"base model {name}: {', '.join(missing)} missing; it must be a folder in diffusers' "
            "layout with safetensors weights, such as pipeline.save_pretrained() writes"
        )
    return folder


def fetch_model(name, revision, stems, half, others):
    """The local folder of `name`: itself if it is a folder, else a hub snapshot of the weights
    `stems` (paths without .safetensors) and of files that match the patterns `others`."""
    for place in (Path(name), ROOT / name):  # demo/model lies beside the scripts
        if place.is_dir():
            return place
    if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"model {name}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = {entry.rfilename for entry in HfApi().model_info(name, revision=revision).siblings}
        wanted = list(others)
        for stem in stems:
            wanted += [f"{stem}{variant_suffix(files, stem, half)}"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as problem:  # offline, no such repository, a gated one: try the cache first
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            reason = str(problem).strip().splitlines()[0] if str(problem).strip() else "no answer"
            raise UserError(
                f"model {name} cannot be had: it is not in the cache and the hub says "
                f"«{type(problem).__name__}: {reason[:160]}»; connect to the network, or pass a "
                "local folder in its place"
            ) from None


def variant_suffix(files, stem, half):
    """The ending of the weights file to take: the fp16 variant where wanted and there."""
    if half and f"{stem}.fp16.safetensors" in files:
        return ".fp16.safetensors"
    return ".safetensors"


def weight_files(folder, stem="*"):
    """The safetensors files of one model folder, whole or in shards."""
    return sorted(folder.glob(f"{stem}*.safetensors"))


@contextlib.contextmanager
def loading(path):
    """Turn whatever a library raises on a damaged file into one line that names `path`."""
    try:
        yield
    except Exception as problem:
        line = one_line(problem, 200)
        raise UserError(f"{path} cannot be loaded: {type(problem).__name__}: {line}") from None


def load_part(cls, folder, part, dtype, **options):
    """`cls.from_pretrained` of one part of a base-model folder, refusing half-filled weights."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    plain = (folder / part / f"{stem}.safetensors").is_file() or list(
        (folder / part).glob(f"{stem}-*.safetensors")
    )
    with loading(folder / part):
        model, report = cls.from_pretrained(
            folder / part,
            torch_dtype=dtype,
            variant=None if plain else "fp16",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing or report.get("mismatched_keys"):
        wrong = missing or [str(key) for key in report["mismatched_keys"]]
        raise UserError(
            f"{folder / part}: {len(wrong)} weights are missing or of another shape, such as "
            f"{wrong[0]}; the folder is damaged or not a Stable Diffusion v1 model"
        )
    return model
