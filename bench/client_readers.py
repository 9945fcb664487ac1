"""Reads adapters with one other program, whose packages are on PYTHONPATH; bench/clients.py starts it for each.

    python bench/client_readers.py READER JOB.json

JOB.json: {"base": a diffusers folder, "checkpoint": the same model in one file, "program": the folder of an installed
program, "inputs": a safetensors file, "image": {"prompt", "seed", "side", "sigma"}, "adapters": {name: path}, "output":
a folder}. Writes to the output folder
version.txt and, for "base" and each adapter, NAME.npz (the outputs for the inputs) and NAME.json: {"applied": count of
adapted layers} or {"error": why not}. This file imports nothing of this project, so that each reader works alone.
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np


def diffusers(job):
    """`load_lora_weights` of diffusers: a run's folder, or kohya's file."""
    import diffusers
    import torch

    yield f"diffusers {diffusers.__version__}"
    inputs = torch_inputs(job)
    for name, path in adapters_of(job):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            job["base"], safety_checker=None, torch_dtype=torch.float32
        )
        models = pipeline.unet, pipeline.text_encoder
        if path:
            place = Path(path)
            name_in_folder = "pytorch_lora_weights.safetensors" if place.is_dir() else place.name
            pipeline.load_lora_weights(place if place.is_dir() else place.parent, weight_name=name_in_folder)
        layers = [key for model in models for key, _ in model.named_modules() if key.endswith(".lora_A")]
        yield name, len(layers), outputs(*models, *inputs)


def lycoris(job):
    """LyCORIS' own merge of kohya's file into a diffusers model."""
    from importlib.metadata import version

    from lycoris.utils import merge
    from safetensors.torch import load_file

    yield f"LyCORIS {version('lycoris-lora')}"
    inputs = torch_inputs(job)
    for name, path in adapters_of(job):
        unet, text_encoder = models = load_models(job["base"])
        said = io.StringIO()
        if path:
            with contextlib.redirect_stdout(said):
                merge([text_encoder], unet, load_file(path))
        merged = re.search(r"(\d+) Modules been merged", said.getvalue())
        yield name, int(merged[1]) if merged else 0, outputs(*models, *inputs)


def invokeai(job):
    """InvokeAI's own patches of a diffusers model, from kohya's file."""
    from importlib.metadata import version

    import torch
    from invokeai.backend.patches.layer_patcher import LayerPatcher  # the next import needs it first
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict
    from safetensors.torch import load_file

    yield f"InvokeAI {version('invokeai')}"
    inputs = torch_inputs(job)
    unet, text_encoder = models = load_models(job["base"])
    for name, path in adapters_of(job):
        with contextlib.ExitStack() as patched:
            patch = lora_model_from_sd_state_dict(load_file(path)) if path else None
            for model, prefix in ((unet, "lora_unet_"), (text_encoder, "lora_te_")):
                if patch:
                    options = dict(prefix=prefix, dtype=torch.float32, force_direct_patching=True)
                    patched.enter_context(
                        LayerPatcher.apply_smart_model_patches(model=model, patches=[(patch, 1.0)], **options)
                    )
            yield name, len(patch.layers) if patch else 0, outputs(*models, *inputs)


def comfyui(job):
    """ComfyUI's `load_lora_for_models`, from a ComfyUI that is installed in job["program"]."""
    sys.path.insert(0, job["program"])
    sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from comfyui_version import __version__

    yield f"ComfyUI {__version__}"
    ids, latents, text = torch_inputs(job)
    model, clip = comfy.sd.load_checkpoint_guess_config(job["checkpoint"], output_vae=False)[:2]
    for name, path in adapters_of(job):
        changed, texts = model, clip
        if path:
            adapter = comfy.utils.load_torch_file(path, safe_load=True)
            changed, texts = comfy.sd.load_lora_for_models(model, clip, adapter, 1.0, 1.0)
        comfy.model_management.unload_all_models()
        comfy.model_management.load_models_gpu([changed, texts.patcher], force_full_load=True)
        encoder = texts.cond_stage_model.clip_l.transformer
        with torch.inference_mode():
            encoded = encoder(ids)[0].float().numpy()
            # The network itself: noise prediction without the scaling by sigma.
            predicted = changed.model.diffusion_model(latents, torch.tensor([500.0]), context=text).float().numpy()
        count = len(changed.patches) + len(texts.patcher.patches)
        yield name, count, {"text_encoder": encoded, "unet": predicted}


def stable_diffusion_cpp(job):
    """stable-diffusion.cpp through inferna: an image of one Euler step from a single file and kohya's file."""
    import inferna.sd as sd
    from inferna.sd import stable_diffusion as names

    version = sd.version() if callable(sd.version) else sd.version
    yield f"stable-diffusion.cpp {version.strip('+')}"
    said = []
    sd.set_log_callback(lambda level, line: said.append(line))
    settings = sd.SDContextParams(model_path=job["checkpoint"], n_threads=int(os.environ.get("OMP_NUM_THREADS", 2)))
    settings.rng_type = settings.sampler_rng_type = int(names.RngType.CPU)  # PyTorch's noise
    settings.lora_apply_mode = int(names.LoraApplyMode.AUTO)
    context = sd.SDContext(settings)
    request = job["image"]
    for name, path in adapters_of(job):
        said.clear()
        image = sd.SDImageGenParams(
            prompt=request["prompt"],
            seed=request["seed"],
            width=request["side"],
            height=request["side"],
            sample_steps=1,
            cfg_scale=1.0,
            sample_method=names.SampleMethod.EULER,
            scheduler=names.Scheduler.DISCRETE,
        )
        image.sample_params.custom_sigmas = [request["sigma"], 0.0]
        image.set_loras([{"path": path, "multiplier": 1.0}] if path else [])
        pixels = context.generate_with_params(image)[0].to_numpy().astype(np.float32)
        print(f"{name}:", *said, sep="\n")
        yield name, applied_layers(said), {"image": pixels}


def applied_layers(said):
    """How many layers stable-diffusion.cpp says it changed: tensors of text encoder, UNet and VAE in its log, of which
    each layer has three (down, up, alpha). None if the log does not say."""
    found = re.findall(r"\((\d+) / \d+\) LoRA tensors", "\n".join(said))
    return sum(map(int, found)) // 3 if found else None


# ---- what several readers need ---------------------------------------------------------------------


def adapters_of(job):
    """("base", None), then (name, path) of each adapter."""
    return [("base", None), *job["adapters"].items()]


def torch_inputs(job):
    """Token ids [1, 77], latents [1, 4, h, w] and states of a text [1, 77, width]."""
    import torch
    from safetensors.torch import load_file

    torch.set_grad_enabled(False)
    inputs = load_file(job["inputs"])
    return inputs["ids"], inputs["latents"], inputs["text"]


def load_models(folder):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float()
    return unet.eval(), CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()


def outputs(unet, text_encoder, ids, latents, text):
    """Both models' outputs. The UNet gets a fixed text, so that the text encoder's adapter does not change its output."""
    prediction = unet(latents, 500, text).sample
    return {"text_encoder": text_encoder(ids)[0].float().numpy(), "unet": prediction.float().numpy()}


READERS = {f.__name__: f for f in (diffusers, lycoris, invokeai, comfyui, stable_diffusion_cpp)}


def read_all(reader, job):
    """Run a reader for all adapters. One that it refuses does not keep the others from being read."""
    folder, left = Path(job["output"]), dict(job["adapters"])
    while True:
        asked = iter(READERS[reader](job | {"adapters": left}))
        name = "base"
        try:
            (folder / "version.txt").write_text(next(asked))
            for name, count, arrays in asked:
                np.savez(folder / f"{name}.npz", **arrays)
                (folder / f"{name}.json").write_text(json.dumps(dict(applied=count)))
                left.pop(name, None)
            return
        except Exception as problem:
            name = next(iter(left), "base") if (folder / "base.json").exists() else "base"
            line = " ".join(f"{type(problem).__name__}: {problem}".split())
            (folder / f"{name}.json").write_text(json.dumps(dict(error=line[:300])))
            if name == "base" or not left.pop(name, None) or not left:
                return


if __name__ == "__main__":
    read_all(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
