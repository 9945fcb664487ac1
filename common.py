"""What the scripts share around their own work: CONFIG and the command line, one-line errors,
base-model folders, and output folders that are replaced whole or not at all."""

import argparse
import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from PIL import Image, ImageOps

# The scripts show bars of their own work; the libraries' bars for reading a file only blink.
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent
PACKAGES = "torch diffusers transformers peft accelerate bitsandbytes lpips pillow".split()


class UserError(ValueError):
    """Something that the user can mend: a line that names what and how, and perhaps one of advice.

    What it quotes from a file may hold anything; control characters appear as Python spells them.
    """

    def __str__(self):
        lines = (
            "".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in self.args
        )
        return "\n  ".join(lines)


def one_line(problem, length):
    """The text of an exception in one line of at most `length` characters."""
    return " ".join(str(problem).split())[:length]


def run_script(main):
    """Call `main()`; a UserError becomes one line on stderr and exit status 1.

    SIGINT ends with 130 and SIGTERM with 143, as shells count.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Output that Windows sends to a file has 256 letters: «?» in place of the others, no error.
            stream.reconfigure(errors="replace")
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        main()
    except UserError as error:
        # Under `accelerate launch` most errors meet every process, some only one: each says its own.
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def memory_for(doing, advice):
    """Turn running out of GPU memory inside into two lines: what was being done, what to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory ran out while {doing}", advice) from None


@contextlib.contextmanager
def disk_for(folder):
    """Turn a disk that fills up while `folder` is being made into one line that names it."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        place = next(place for place in Path(os.path.realpath(folder)).parents if place.exists())
        raise UserError(
            f"{problem.filename or folder} cannot be written: {problem.strerror}; "
            f"{shutil.disk_usage(place).free:,} bytes free"
        ) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists every option)")


def parse_config(config, description, demo=None, argv=None):
    """CONFIG with the command line's overrides.

    Every key `some_key` is an option `--some-key VALUE`; booleans are `--some-key` and
    `--no-some-key`; tuples are comma-separated. With `demo` (a dict of a few of the same keys)
    there is also `--demo`, which puts those values under the ones typed on the command line.
    Raises UserError for an unknown option or a value of the wrong type.
    """
    spec = sys.modules["__main__"].__spec__  # of a module that was started with -m
    parser = _Parser(
        prog=f"-m {spec.name}" if spec else Path(sys.argv[0]).name,
        description=description,
        usage="python %(prog)s [--option VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if demo is not None:
        listed = ", ".join(f"{key}={value!r}" for key, value in demo.items())
        parser.add_argument(
            "--demo",
            action="store_true",
            help=f"use the embedded model: {listed}".replace("%", "%%"),
        )
    for key, value in config.items():
        option = "--" + key.replace("_", "-")
        shown = f"default: {value!r}".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=shown)
        elif isinstance(value, (tuple, list)):
            parser.add_argument(option, type=_tuple_of(type(value[0])), help=shown, metavar="A,B,…")
        else:
            kind = str if value is None else type(value)
            parser.add_argument(option, type=kind, help=shown, metavar=kind.__name__.upper())
    typed = vars(parser.parse_args(argv))
    swapped = demo if typed.pop("demo", False) else {}
    return config | swapped | typed


def _tuple_of(kind):
    def convert(text):
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    convert.__name__ = f"comma-separated {kind.__name__}"
    return convert


def check_range(config, key, low, high=float("inf")):
    """Raise UserError unless low <= config[key] <= high (NaN is never in range)."""
    if not low <= config[key] <= high:
        bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise UserError(f"{key} is {config[key]}, but must be {bound}")


def check_resolution(config):
    """Raise UserError unless config["resolution"] is a size that the VAE's 8x8 blocks tile."""
    check_range(config, "resolution", 8, 4096)
    if config["resolution"] % 8:
        raise UserError(f"resolution is {config['resolution']}, but must be a multiple of 8")


def half_resolution(resolution):
    """About half of a resolution, in whole blocks of the VAE."""
    return max(8, resolution // 16 * 8)


# ---- models -------------------------------------------------------------------------------


def fetch_base_model(name, revision=None, half=False):
    """The local folder of a Stable Diffusion pipeline, `name` being a folder or a hub id.

    From the hub only what is used is fetched: UNet, VAE, text encoder, tokenizer and scheduler,
    as safetensors, in half precision where `half` is set and the repository has such a variant.
    Raises UserError, naming the model and what to do, when it is not there, not whole or of another
    kind; for the last no weights are fetched.
    """
    parts = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }
    configs = ["model_index.json", "*/*.json", "tokenizer/merges.txt"]
    folder = fetch_model(name, revision, [], half, configs)
    needed = ["model_index.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in parts]
    # Without its vocabulary the tokenizer would load, and read every word as unknown.
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        needed += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    missing = [path for path in needed if not (folder / path).is_file()]
    if not missing:
        check_base_model(folder)
        weights = [f"{part}/{stem}" for part, stem in parts.items()]
        folder = fetch_model(name, revision, weights, half, configs)
    missing += [
        f"{part}/{stem}.safetensors"
        for part, stem in parts.items()
        if not weight_files(folder / part, stem)
    ]
    if missing:
        raise UserError(
            f"base model {name}: {', '.join(missing)} missing; it must be a folder in diffusers' "
            "layout with safetensors weights, such as pipeline.save_pretrained() writes"
        )
    return folder


# What the configuration files of a base model may state; what they leave out is the first of each.
SUPPORTED = {
    "model_index.json": {
        "text_encoder_2": (None, [None, None]),  # Stable Diffusion XL
        "image_encoder": (None, [None, None]),
    },
    "unet/config.json": {
        "_class_name": ("UNet2DConditionModel",),
        "in_channels": (4,),  # inpainting: 9, depth: 5, editing: 8
        "out_channels": (4,),
        "addition_embed_type": (None,),  # Stable Diffusion XL
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),  # distilled with its guidance, as latent consistency models
    },
    "vae/config.json": {
        "_class_name": ("AutoencoderKL",),
        "in_channels": (3,),
        "out_channels": (3,),
        "latent_channels": (4,),
    },
    "text_encoder/config.json": {
        "model_type": ("clip_text_model",),
        "max_position_embeddings": (77,),
    },
    "scheduler/scheduler_config.json": {
        "prediction_type": ("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": (False, None),  # the scheduler that draws has no such noise
    },
}


def check_base_model(folder):
    """UserError naming the configuration file and the key, unless the base model in `folder` is a Stable
    Diffusion of version 1 or 2 for text to image, whether it predicts noise or velocity."""

    def refuse(path, what):
        raise UserError(f"{folder / path}: {what}; supported are Stable Diffusion 1.x and 2.x for text to "
                        "image, predicting noise (epsilon) or velocity (v_prediction)")  # fmt: skip

    stated = {}
    for path, keys in SUPPORTED.items():
        try:
            stated[path] = json.loads((folder / path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise UserError(
                f"{folder / path} cannot be read as JSON: {one_line(problem, 100)}"
            ) from None
        if not isinstance(stated[path], dict):
            raise UserError(f"{folder / path} holds no JSON object")
        for key, allowed in keys.items():
            value = stated[path].get(key, allowed[0])
            if value not in allowed:
                refuse(path, f"{key} is {one_line(json.dumps(value), 60)}")
    width = stated["text_encoder/config.json"].get("hidden_size", 512)
    expected = stated["unet/config.json"].get("cross_attention_dim", 1280)
    if expected != width:
        what = f"cross_attention_dim is {expected}, but the text encoder's hidden_size is {width}"
        refuse("unet/config.json", what)
    blocks = stated["vae/config.json"].get("block_out_channels", [64])
    if not isinstance(blocks, list) or len(blocks) != 4:
        refuse("vae/config.json", f"block_out_channels is {blocks}, but must be 4 numbers")


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


# ---- the training set -------------------------------------------------------------------


def read_dataset(data_dir, resolution):
    """The rows of `data_dir`/captions.jsonl and their pictures.

    Returns [(file name, caption, pixels)], pixels uint8 [3, resolution, resolution]. File names are
    relative to `data_dir` or, as in the published study's data, to its images/ folder. Raises
    UserError naming the line or the picture that is wrong.
    """
    data_dir = Path(data_dir)
    listing = data_dir / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; run python preprocess.py first")
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{listing} cannot be read as UTF-8 text: {problem}") from None
    rows, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{where}: not of the form {{"file_name": …, "text": …}}') from None
        if not (isinstance(name, str) and isinstance(caption, str) and caption.strip()):
            raise UserError(f"{where}: file_name and text must be strings, and text not empty")
        try:
            caption.encode()  # JSON can spell half of a surrogate pair, which is no text
            places = (data_dir / name, data_dir / "images" / name)
            path = next((place for place in places if place.is_file()), None)
        except (OSError, ValueError):  # too long, a zero byte, half of a surrogate pair
            raise UserError(f"{where}: file_name cannot be a file's, or text is no text") from None
        if Path(name).is_absolute():
            raise UserError(f"{where}: {name} is an absolute path; name pictures from {data_dir}")
        if path is None:
            raise UserError(f"{where}: there is no {name} in {data_dir} or {data_dir / 'images'}")
        if data_dir.resolve() not in path.resolve().parents:
            raise UserError(f"{where}: {name} lies outside {data_dir}")
        if path.resolve() in seen:
            raise UserError(f"{where}: {name} was already named in line {seen[path.resolve()]}")
        seen[path.resolve()] = number
        rows.append((name, caption, read_pixels(path, resolution)))
    if not rows:
        raise UserError(f"{listing} names no pictures; run python preprocess.py first")
    return rows


def read_pixels(path, resolution):
    """A picture as uint8 [3, resolution, resolution], resized and centre-cropped if need be."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF")) as image:
            image = image.convert("RGB")
    # A decoder may raise almost anything on a damaged file.
    except Exception as problem:
        reason = one_line(problem, 100)
        raise UserError(
            f"{path} cannot be read as a picture: {reason}; run preprocess.py"
        ) from None
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def data_hash(rows):
    """SHA-256 over captions and pixels, in the order of the rows."""
    digest = hashlib.sha256()
    for _, caption, pixels in rows:
        digest.update(caption.encode() + b"\0" + pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- files --------------------------------------------------------------------------------


def real_folder(path):
    """The absolute `path` with all links followed: a folder is made and replaced where it really
    lies, on that disk, and a link to it stays a link.

    A link may point to a folder that is still to be made in one that exists; UserError naming the
    link if it points to nothing of the kind.
    """
    path = Path(path).absolute()
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            goal = Path(os.path.realpath(place))
            if goal.is_symlink() or not goal.parent.is_dir():
                raise UserError(
                    f"{place} is a link to {os.readlink(place)}, where no folder can be made; "
                    "mend the link, or name another output folder"
                )
    return Path(os.path.realpath(path))


def check_output_folder(folder, marker):
    """Raise UserError unless `folder` can be written and may be replaced.

    A folder that exists and holds files must hold `marker` too, the file by which an earlier
    output of the same script is known; any other is a person's own.
    """
    folder, real = Path(folder), real_folder(folder)
    if real.exists() and not real.is_dir():
        what = f"a link to the file {real}" if folder.is_symlink() else "a file"
        raise UserError(f"{folder} is {what}; name a folder for the output")
    if os.path.ismount(real):
        raise UserError(
            f"{folder} is where a disk is mounted, which cannot be replaced; name a folder in it"
        )
    if real.is_dir() and any(real.iterdir()) and written_files(real, marker) is None:
        raise UserError(
            f"{folder} holds files that this script did not write (it has no {marker} of its own); "
            "name another output folder, or move them away"
        )
    parent = next(place for place in real.parents if place.exists())
    try:
        probe = parent / f".{real.name}.probe{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as problem:
        raise UserError(f"{parent} cannot be written: {problem.strerror}") from None


def beside(final, ending):
    """The hidden path beside the real folder of `final` that is named after it and ends in `ending`."""
    final = real_folder(final)
    if not final.name:
        raise UserError(f"{final} is where a disk is mounted; name a folder in it")
    return final.with_name(f".{final.name}.{ending}")


def unfinished(final):
    """Where the output that will be the folder `final` is written."""
    return beside(final, "unfinished")


# The files of an output whose marker does not list them, because an earlier version wrote it.
UNLISTED = {
    "manifest.json": ("captions.jsonl", "contact_sheet.png", "images/image_*.png"),
    "config.json": ("log.jsonl", "loss.png", "pytorch_lora_weights.safetensors"),
    "metrics.json": (
        "metrics.csv", "summary.md", "report.html", "comparison_all.png", "success_cases.png",
        "failure_cases.png", "sweep.png", "sweep_pictures.png", "forest.png", "comparison.csv",
        "images/*/base_*.png", "images/*/lora_*.png",
    ),
}  # fmt: skip


def write_marker(path, record):
    """Write `record` (a dict with a key "config") and the names of all files in its folder as the JSON
    file `path`: with it the folder is an output that is whole, and may be replaced some day."""
    folder = Path(path).parent
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    write_json(path, record | {"files_written": sorted(written | {Path(path).name})})


def written_files(folder, marker):
    """What this project wrote into the output `folder`, the only files in it that may ever be removed:
    a set of names relative to it, or None if it holds no `marker` of ours."""
    try:
        record = json.loads((folder / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "config" not in record:
        return None
    if isinstance(record.get("files_written"), list):
        return {marker, *map(str, record["files_written"])}
    if not {"versions", "pillow"} & record.keys():
        return None
    found = (path for pattern in UNLISTED.get(marker, ()) for path in folder.glob(pattern))
    return {marker, *(path.relative_to(folder).as_posix() for path in found)}


def replace_folder(final, marker):
    """Put the finished folder `unfinished(final)` in the place of `final`. Of the folder that was there,
    the files that its `marker` lists go, once the new one is in its place; all else moves over."""
    final = real_folder(final)
    new, old = unfinished(final), beside(final, "old")
    for path in (*new.rglob("*"), new):
        flush(path)
    clear_away(old, final, marker)
    try:
        if final.exists():
            final.rename(old)
        new.rename(final)
    except OSError as problem:  # on Windows: a file in it is open in another program
        raise UserError(
            f"{final} cannot be replaced: {problem.strerror}. The new output is whole, in {new}: close what "
            "uses the old one and run the command again, which begins with putting it in its place"
        ) from None
    clear_away(old, final, marker)


def clear_away(old, final, marker):
    """Remove the folder `old`, an earlier output that `final` has replaced: first all that this
    project did not write moves to `final`, then what it did write goes, the list of it last."""
    if not old.is_dir():
        return
    written = written_files(old, marker) or set()
    try:
        move_others(old, final, written)
        for path in sorted(old.rglob("*"), reverse=True):  # a folder comes behind what is in it
            name = path.relative_to(old).as_posix()
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif name in written - {marker}:
                path.unlink()
        (old / marker).unlink(missing_ok=True)
        old.rmdir()
    except OSError as problem:
        print(f"note: {old}, the output before this one, cannot be cleared away yet: {problem}")


def move_others(source, target, written, inside=""):
    """Move what is in the folder `source` and not among the names `written` to the folder `target`,
    beside what is there; `inside` is where in the output `source` lies, with a slash at its end."""
    for path in sorted(source.iterdir()):
        name, goal = f"{inside}{path.name}", target / path.name
        is_folder = path.is_dir() and not path.is_symlink()
        ours = any(file.startswith(f"{name}/") for file in written)
        if is_folder and (ours or goal.is_dir()):
            move_others(path, goal, written, f"{name}/")
        elif is_folder or name not in written:
            numbers = itertools.count(1)
            while os.path.lexists(goal):
                goal = target / f"{path.name}.kept{next(numbers)}"
            if goal.name != path.name:
                print(f"note: your {name} is kept as {goal}")
            target.mkdir(parents=True, exist_ok=True)
            path.rename(goal)


def recover_folder(final, marker):
    """Mend what a run that was killed in replace_folder, or just before it, left.

    `marker` is the file that is written last: with it the new folder is whole and takes its place;
    without it, where `final` is missing, the old one comes back.
    """
    final = real_folder(final)
    old = beside(final, "old")
    if old.is_dir() and not final.exists():
        old.rename(final)
    if (unfinished(final) / marker).is_file():
        replace_folder(final, marker)
    clear_away(old, final, marker)


def fresh_folder(final):
    """An empty folder `unfinished(final)`, to be filled and then given to replace_folder."""
    new = unfinished(final)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


@contextlib.contextmanager
def locked(final):
    """Hold the output folder `final` against a second run; UserError naming the run that has it, or
    saying that its file system cannot lock.

    The lock is the operating system's, on a file beside the folder: it goes with its process,
    however that ends. Who holds it stands in a second file: on Windows a locked one cannot be read.
    """
    path, holder = beside(final, "lock"), beside(final, "lock.holder")
    lock = FileLock(path, timeout=0.1, poll_interval=0.02, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        try:
            owner = holder.read_text(encoding="utf-8")
        except OSError:
            owner = "another process"
        raise UserError(f"{final} is being written by {owner}; wait for it or stop it") from None
    except OSError as problem:
        raise UserError(
            f"{path} cannot be locked: {problem.strerror or problem}; where that is because the file system "
            "knows no locks, name an output folder on another one"
        ) from None
    try:
        owner = f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})"
        write_bytes(holder, owner.encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        # Before it is free: one who waits for a file that is gone begins again. On Windows, where an
        # open file cannot be removed, the lock does it itself.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()


def flush(path):
    """Wait until a file or folder is on the disk itself, where a power cut leaves it. (On Windows
    folders cannot be opened, and files only to write.)"""
    try:
        opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path, data):
    """Write a file so that it is there whole or, as before, not at all: beside it, flushed to the
    disk, then renamed. UserError with the path and the bytes needed if the disk is full."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(data)
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path} cannot be written: {problem.strerror}; {len(data):,} bytes needed, {free:,} free"
        ) from None


def write_json(path, value):
    """Write `value` as readable JSON, whole or not at all; NaN becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_file(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- provenance ---------------------------------------------------------------------------


def provenance(device):
    """Package versions, git commit and device, for the files that a run leaves behind."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = sys.version.split()[0]
    return {
        "versions": versions,
        "commit": code_commit(),
        "device": device_name(device),
    }


def code_commit():
    """The git commit of this code, with "-dirty" where files differ from it, or None."""
    try:
        commit = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # no git here
        return None
    return commit or None


def device_name(device):
    """What a person calls the device: the GPU's name, or the CPU and its threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
