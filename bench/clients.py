#!/usr/bin/env python3
"""Do other programs read this project's adapter files, and to the same effect? (no GPU needed)

    make clients                                   # or: python bench/clients.py
    python bench/clients.py --comfyui ~/ComfyUI    # also in the ComfyUI of that folder
    python bench/clients.py --only diffusers,invokeai --update-readme

Adapters of random weights, one of each kind that the scripts write, are given to each program. Its packages go into a
folder of their own in .venv-clients/, over those of .venv; versions are pinned in PROGRAMS below. A program gets a
random base model with Stable Diffusion v1.5's layer names: a narrow one, or the full size where its shapes are fixed.

Each cell is ‖E' - E‖ / ‖E‖: E is what the adapter changes in the outputs of UNet and text encoder (the larger error of
the two counts), or in an image of one sampling step, by our own code (lib/adapters.py), E' the same by the program.
0 is the same effect, 1 as far off as no effect. What cannot be installed or is refused is a row that says so.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.original_names import original_unet, original_vae
from lib import adapter_files, adapters
from lib.adapter_files import kohya
from lib.errors import UserError, one_line, run_script
from lib.files import write_json
from lib.single_file import write_tokenizer
from lib.training.run_folder import PLAIN_ERROR, PLAIN_RANKS

WORK = ROOT / ".venv-clients"
RECIPE = {"unet": ("to_k", "to_q", "to_v", "to_out.0"), "text_encoder": ("q_proj", "v_proj")}
# name: (column, rank, alpha, targets, DoRA)
KINDS = {
    "lora": ("LoRA", 4, 4.0, RECIPE, False),
    "alpha": ("alpha 2, rank 4", 4, 2.0, RECIPE, False),
    "unet_only": ("UNet alone", 4, 4.0, {"unet": RECIPE["unet"]}, False),
    "protected": ("protected", 4, 4.0, RECIPE | {"unet": ("attn2.to_k", "attn2.to_v")}, False),
    "dora": ("DoRA", 4, 4.0, RECIPE, True),
}
NOT_TRIED = "not tried"
PLAIN = "dora_lora"  # the plain LoRA that train.py writes beside a DoRA
COLUMNS = {kind: settings[0] for kind, settings in KINDS.items()} | {PLAIN: "DoRA, its plain file"}
CHANGE = 0.3  # ‖B A‖ / ‖W‖ of each adapted layer
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
)
IMAGE = dict(prompt="a holographic raincoat", seed=42, side=64, timestep=500)
BEGIN, END = 49406, 49407  # as in CLIP's vocabulary


@dataclass
class Program:
    """A reader of bench/client_readers.py, the packages that it needs over those of .venv, and what it is given."""

    reader: str
    packages: str = ""
    file: str = "kohya"  # or folder: diffusers' format
    size: str = "narrow"  # or full
    python: tuple = (3, 11)  # the oldest that its packages support
    known: tuple = ()  # kinds that it is known to read wrongly or to refuse


OLD_DIFFUSERS = (
    "diffusers==0.27.2 transformers==4.38.2 tokenizers==0.15.2 huggingface_hub==0.25.2 peft==0.9.0 accelerate==0.27.2"
)
# Text encoders whose layers are still named text_model.…
OLD_TRANSFORMERS = "transformers==5.5.4 tokenizers==0.22.2 huggingface_hub==1.33.0 diffusers==0.40.0"
PROGRAMS = {
    "diffusers, folder": Program("diffusers", "diffusers peft transformers tokenizers huggingface_hub", "folder"),
    "diffusers, kohya's file": Program(
        "diffusers", "diffusers peft transformers tokenizers huggingface_hub", known=("dora",)
    ),
    "diffusers of 2024, folder": Program(
        "diffusers", OLD_DIFFUSERS, "folder", known=("lora", "alpha", "protected", "dora")
    ),
    "diffusers of 2024, kohya's file": Program("diffusers", OLD_DIFFUSERS, known=("dora",)),
    "LyCORIS": Program(
        "lycoris", f"lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2 {OLD_TRANSFORMERS}", known=("dora",)
    ),
    "InvokeAI": Program(
        "invokeai",
        f"invokeai==6.14.2 {OLD_TRANSFORMERS} pydantic-settings==2.16.3 python-dotenv==1.2.4 "
        "einops==0.8.2 blake3==1.0.11 gguf==0.19.0 picklescan==1.0.5 onnx==1.23.2 onnxruntime==1.32.0 ml_dtypes==0.6.0 "
        "deprecated==1.3.1 wrapt==2.5.2 spandrel==0.4.2 opencv-python-headless==5.0.0.93 compel==2.5.1",
        known=("dora",),
    ),
    "stable-diffusion.cpp": Program(
        "stable_diffusion_cpp",
        "inferna==0.7.0 numpy==2.4.6 pillow==13.0.0",
        size="full",
        python=(3, 12),
        known=("dora",),
    ),
    "ComfyUI": Program("comfyui", "einops==0.8.2 torchsde==0.2.6 trampoline==0.1.2 sentencepiece==0.2.1", size="full"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="folder of an installed ComfyUI, which no registry has")
    parser.add_argument("--only", default=",".join(READERS), help="names of readers, separated by commas")
    parser.add_argument("--update-readme", action="store_true", help="put the table into bench/README.md")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(READERS):
        raise UserError(f"--only: no reader {', '.join(sorted(unknown))}; choose from {', '.join(READERS)}")
    chosen = {name: p for name, p in PROGRAMS.items() if p.reader in options.only.split(",")}
    torch.set_grad_enabled(False)
    with tqdm(chosen.items(), unit="program") as bar:
        for name, program in bar:
            bar.set_description(name)
            row = row_of(name, program, options.comfyui)
            write_json(row_file(name), row)  # so that --only keeps the other programs' rows
    rows = {name: json.loads(row_file(name).read_text()) for name in PROGRAMS if row_file(name).is_file()}
    text = table(rows)
    print(f"\n{text}")
    (WORK / "table.md").write_text(text, encoding="utf-8")
    for name in chosen:
        for kind in [kind for kind, text in rows[name][1].items() if text == "refused"]:
            print(f"{name}, {COLUMNS[kind]}: {result(WORK / 'results' / slug(name), kind)['error']}")
    if options.update_readme:
        update_readme(text)
    if wrong := [f"{name}: {what}" for name, program in chosen.items() for what in unexpected(program, *rows[name])]:
        raise UserError(f"not as PROGRAMS expects: {'; '.join(wrong)}")


READERS = list(dict.fromkeys(program.reader for program in PROGRAMS.values()))


# ---- one program ----------------------------------------------------------------------------------


def row_file(name):
    return WORK / "results" / f"{slug(name)}.json"


def slug(name):
    return "".join(c if c.isalnum() else "_" for c in name)


def row_of(name, program, comfyui):
    """A program's row: (its version, {kind: text of the cell}). A reason in place of a version if it did not run."""
    (WORK / "results").mkdir(parents=True, exist_ok=True)
    if program.reader == "comfyui" and comfyui is None:
        return f"{NOT_TRIED}: --comfyui names its folder", {}
    python = interpreter(program.python)
    if python is None:
        return f"{NOT_TRIED}: needs Python {program.python[0]}.{program.python[1]} or newer on PATH", {}
    try:
        packages = installed(program, python)
    except UserError as problem:
        return str(problem), {}
    files = made_files(program.size)
    output = WORK / "results" / slug(name)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    given = {k: paths[program.file] for k, paths in files.adapters.items() if program.file in paths}
    job = dict(
        base=str(files.base),
        checkpoint=str(files.checkpoint) if files.checkpoint else None,
        program=str(comfyui.resolve()) if comfyui else None,
        inputs=str(files.inputs),
        image=IMAGE | dict(sigma=sigma(IMAGE["timestep"])),
        adapters={kind: str(path) for kind, path in given.items()},
        output=str(output),
    )
    (output / "job.json").write_text(json.dumps(job, indent=2))
    environment = dict(
        os.environ, PYTHONPATH=str(packages), HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore"
    )
    command = [*python, str(ROOT / "bench" / "client_readers.py"), program.reader, str(output / "job.json")]
    with open(output / "log.txt", "w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=output)
    version = output / "version.txt"
    version = version.read_text() if version.is_file() else name
    base = result(output, "base")
    if "error" in base:
        where = f"; see {output.relative_to(ROOT)}/log.txt" if done.returncode else ""
        return f"{version}: failed ({base['error']}{where})", {}
    with np.load(output / "base.npz") as theirs:
        for part, array in theirs.items():
            if (distance := relative(array, files.expected["base"][part])) > 0.02:
                return f"{version}: its {part} of the base model itself differs from ours by {distance:.2g}", {}
    return version, {kind: cell(output, kind, path, files.expected) for kind, path in given.items()}


def interpreter(oldest):
    """The command of a Python of at least version `oldest`: this one, one on PATH, or None."""
    if sys.version_info >= oldest:
        return [sys.executable]
    for minor in range(oldest[1], 20):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return [path]
    return None


def installed(program, python):
    """The folder with a program's packages, installed from the package registry if it is not there yet."""
    folder = WORK / "packages" / f"{program.reader}_{digest(program.packages)}"
    if folder.is_dir():
        return folder
    asked = [*python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", version, "--target", str(unfinished)]
    command += ["--ignore-requires-python"]  # pip would compare the Python that it runs in
    done = subprocess.run([*command, *program.packages.split()], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(f"could not be installed ({one_line(errors[0] if errors else 'pip failed', 160)})")
    unfinished.rename(folder)
    return folder


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result(folder, name):
    """What a reader wrote of an adapter: {"applied"} or {"error"}."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"error": "no result"}


def relative(theirs, ours):
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


def cell(output, kind, path, expected):
    """The table's text for an adapter: its error, and the number of layers if the program applied another number."""
    found = result(output, kind)
    if "error" in found:
        return "refused"
    with np.load(output / f"{kind}.npz") as theirs, np.load(output / "base.npz") as before:
        errors, floors, unasked = [], [], []
        for part in theirs.files:
            change = expected[kind][part]
            if change.any():
                errors.append(relative(theirs[part] - before[part], change))
                # How far the base model's outputs differ, rounded to 8 bits in an image.
                floors.append(np.linalg.norm(before[part] - expected["base"][part]) / np.linalg.norm(change))
            elif not np.allclose(theirs[part], before[part], rtol=0, atol=1e-3):
                unasked.append(part)
    keys = load_file(path / "pytorch_lora_weights.safetensors" if path.is_dir() else path)
    layers = sum(key.endswith(("lora_down.weight", "lora_A.weight")) for key in keys)
    right = all(error < max(0.05, 2 * floor) for error, floor in zip(errors, floors, strict=True))
    text = f"{max(errors):.1g}" if right else f"**{max(errors):.2f}**"
    if found["applied"] not in (None, layers):
        text += f" ({found['applied']} of {layers} layers)"
    return text + (f" (also changes the {', '.join(unasked)})" if unasked else "")


def unexpected(program, version, cells):
    """What a row has that PROGRAMS does not expect: kinds that are now read wrongly, or rightly."""
    if not cells:
        return [] if version.startswith(NOT_TRIED) else [version]
    wrong = {kind for kind, text in cells.items() if text.startswith("**") or text == "refused" or "(" in text}
    return [COLUMNS[kind] for kind in sorted(wrong ^ set(program.known))]


def table(rows):
    """The rows as a markdown table."""
    lines = [f"| program | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, (version, cells) in rows.items():
        form = name.partition(", ")[2]
        label = f"{version}, {form}" if cells and form else version if cells else f"{name}: {version}"
        lines.append(f"| {label} | {' | '.join(cells.get(kind, '–') for kind in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def update_readme(text):
    """Replace the table between the marks in bench/README.md."""
    path = ROOT / "bench" / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition("<!-- clients -->\n")
    _, end, after = rest.partition("<!-- /clients -->")
    path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


# ---- what the programs are given ----------------------------------------------------------------------


@dataclass
class Files:
    """A base model, adapters, inputs, and what our own code makes of them."""

    base: Path  # diffusers' folder
    checkpoint: Path | None  # the same model in one file, under the original code's names; full size only
    inputs: Path
    adapters: dict  # kind -> {"kohya": file, "folder": folder}
    expected: dict  # kind -> {"text_encoder", "unet", "image": what the adapter changes}; "base" -> these outputs


@functools.cache
def made_files(size):
    """Base model, inputs, an adapter of each kind and what it changes, for narrow or full-size layers."""
    folder, inputs = WORK / "models" / size, WORK / "models" / f"{size}_inputs.safetensors"
    if not (folder / "model_index.json").is_file():
        make_base(folder, size)
    checkpoint = folder / "original.safetensors" if size == "full" else None
    if checkpoint and not checkpoint.is_file():
        write_checkpoint(folder, checkpoint)
    written = {}
    for kind in KINDS:
        written |= write_adapters(WORK / "adapters" / size, kind, load_models(folder))
    models = load_models(folder)
    generator = torch.Generator().manual_seed(0)
    width = models["unet"].config.cross_attention_dim
    given = {
        "ids": torch.randint(BEGIN, (1, 77), generator=generator),
        "latents": torch.randn(1, 4, 8, 8, generator=generator),
        "text": torch.randn(1, 77, width, generator=generator),
    }
    save_file(given, inputs)
    base = our_outputs(folder, models, given)
    expected = {"base": base}
    for kind, paths in written.items():
        merged = adapters.Applied(adapter_files.read_adapter(paths.get("folder", paths["kohya"])), models)
        expected[kind] = {name: array - base[name] for name, array in our_outputs(folder, models, given).items()}
        merged.set_scale(0)
    return Files(folder, checkpoint, inputs, written, expected)


def load_models(folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float().eval()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()
    return {"unet": unet, "text_encoder": text_encoder}


def write_adapters(folder, kind, models):
    """Write an adapter of random weights as train.py writes a run: {kind: {"folder": folder, "kohya": file}}, and for
    a DoRA also {PLAIN: {"kohya": file}}."""
    _, rank, alpha, targets, dora = KINDS[kind]
    torch.manual_seed(0)
    models = {name: models[name] for name in targets}
    for name, model in models.items():
        for layer in adapters.add_lora(model, rank, alpha, targets[name], dora).values():
            weight = layer.get_base_layer().weight
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.data.normal_()
            b.data *= CHANGE * weight.norm() / (b @ a).norm()  # ‖B A‖ = CHANGE ‖W‖
        for magnitude in adapters.magnitudes(model).values():
            magnitude.data *= 1 + 0.05 * torch.randn_like(magnitude)
    run = folder / kind
    run.mkdir(parents=True, exist_ok=True)
    adapter_files.save_adapter(run, models, rank, alpha, targets, {})
    layers = {name: adapters.factors(model) for name, model in models.items()}
    scales = {name: adapters.dora_scales(model) for name, model in models.items()}
    kohya.save_kohya(run / f"{kind}.safetensors", layers, alpha, {}, scales)
    written = {kind: {"folder": run, "kohya": run / f"{kind}.safetensors"}}
    if dora:
        plain, rank, _ = adapters.closest_lora(models, PLAIN_RANKS * rank, PLAIN_ERROR)
        written[PLAIN] = {"kohya": run / f"{PLAIN}.safetensors"}
        kohya.save_kohya(written[PLAIN]["kohya"], plain, float(rank), {})
    return written


def our_outputs(folder, models, given):
    """The outputs of both models for `given`; at full size also the image of `our_image`."""
    unet, text_encoder = models["unet"], models["text_encoder"]
    found = {
        "text_encoder": text_encoder(given["ids"])[0].numpy(),
        "unet": unet(given["latents"], 500, given["text"]).sample.numpy(),
    }
    return found | ({"image": our_image(folder, unet, text_encoder)} if folder.name == "full" else {})


def our_image(folder, unet, text_encoder):
    """One Euler step from noise at IMAGE's timestep to 0, decoded: float32 [side, side, 3] of whole numbers in [0, 255]."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").float().eval()
    ids = tokenizer(IMAGE["prompt"], padding="max_length", return_tensors="pt").input_ids
    side, spread = IMAGE["side"] // 8, sigma(IMAGE["timestep"])
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(IMAGE["seed"])) * spread
    predicted = unet(latents / (spread**2 + 1) ** 0.5, IMAGE["timestep"], text_encoder(ids)[0]).sample
    pixels = vae.decode((latents - spread * predicted) / vae.config.scaling_factor).sample
    return ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()


def sigma(timestep):
    """The noise level of a timestep: noise over signal."""
    signal = PNDMScheduler(**SCHEDULER).alphas_cumprod[timestep].item()
    return ((1 - signal) / signal) ** 0.5


def make_base(folder, size):
    """A model of random weights with Stable Diffusion v1.5's layer names: its own sizes, or narrow ones."""
    if size == "full":
        command = [sys.executable, "-m", "demo.random_sd15", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for part in ("clip", "adapter", "tokenizer"):
            shutil.rmtree(folder / part)
        name_text_model(folder)
        write_tokenizer(folder / "tokenizer")  # CLIP's own vocabulary, as stable-diffusion.cpp has it
        return
    torch.manual_seed(0)
    widths = dict(block_out_channels=(32, 64, 96, 96), attention_head_dim=8)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, **blocks),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=END + 1, bos_token_id=BEGIN, eos_token_id=END, **text)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77),
        unet=UNet2DConditionModel(sample_size=8, cross_attention_dim=64, **widths),
        scheduler=PNDMScheduler(**SCHEDULER, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    name_text_model(folder)
    shutil.rmtree(folder / "tokenizer")  # older versions read vocab.json and merges.txt alone
    write_tokenizer(folder / "tokenizer")


def name_text_model(folder):
    """Name the text encoder's weights text_model.…, as in Stable Diffusion v1.5's own file and in transformers 4."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v.clone() for k, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def write_checkpoint(folder, path):
    """The model in `folder` as one file under the original code's names."""
    unet, vae, text = (
        load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")
    )
    tensors = original_unet(unet, 2) | original_vae(vae)
    tensors |= {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


if __name__ == "__main__":
    run_script(main)
