"""Generation: images of the base model and of adapters on it, with one pipeline and a seed for each image.

`inference.py` generates with adapters from files (`prepare_pipeline`, `generate_runs`). `train.py` generates previews
with the models in training (`preview_generator`).
"""

import contextlib
import functools
import importlib
import math
from collections import Counter, deque

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from lib import adapters
from lib.config import half_resolution, image_size
from lib.errors import UserError, memory_for
from lib.evaluation.image_files import SavedImages, image_names, write_images
from lib.evaluation.prompts import check_prompt_lengths
from lib.files import unfinished
from lib.kernels import compile_ahead
from lib.kernels.channels_last import channels_last, compile_models_ahead
from lib.kernels.cpu import computing_with, use_cpu_forms
from lib.kernels.fused_projections import fuse_projections
from lib.kernels.graphs import captured
from lib.kernels.pinned_staging import Throttle, to_device, to_host
from lib.kernels.transformer_blocks import shared_start
from lib.models import load_part, loading


def load_pipeline(folder, dtype, device, unet=None, text_encoder=None):
    """The base model in `folder` as a pipeline: safetensors only, no safety checker.

    A given `unet` or `text_encoder`, already on the device, is used as it is and not modified.
    """
    device = torch.empty(0, device=device).device  # with its index
    with loading(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with loading(folder / "scheduler"):
        # skip_prk_steps as in Stable Diffusion's own configuration; one saved by another scheduler lacks it.
        scheduler = PNDMScheduler.from_pretrained(folder / "scheduler", skip_prk_steps=True)
    # Timesteps stay on the CPU: reading one from the GPU would wait for all queued work.
    scheduler.set_timesteps = lambda steps, device=None: PNDMScheduler.set_timesteps(scheduler, steps)
    loaded = dict(vae=load_part(AutoencoderKL, folder, "vae", dtype))
    if unet is None:
        loaded["unet"] = load_part(UNet2DConditionModel, folder, "unet", dtype)
    if text_encoder is None:
        loaded["text_encoder"] = load_part(CLIPTextModel, folder, "text_encoder", dtype)
    for model in loaded.values():
        fuse_projections(model, device)
        model.to(device).eval().requires_grad_(False)
    convolutional = [model for name, model in loaded.items() if name != "text_encoder"]
    channels_last(*convolutional)
    # One image fills a GPU and fits a CPU's caches better. A batch would need more memory than the UNet does.
    loaded["vae"].enable_slicing()
    if device.type == "cpu":
        loaded["vae"].to(memory_format=torch.channels_last)  # faster on a CPU for the VAE, not for the UNet
        for model in convolutional:
            use_cpu_forms(model)
    pipeline = StableDiffusionPipeline(
        **dict(unet=unet, text_encoder=text_encoder) | loaded,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def models_of(pipeline):
    """The models that an adapter may change."""
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


IMAGE_GIB = 0.2  # GPU memory for one guided image of 512x512; measured, see bench/README.md
SPARE_GIB = 1.5  # for the VAE and the scores
AHEAD = 4  # steps that the host may run ahead of the GPU: time enough to start the next batch


def choose_batch_size(count, asked, resolution, device):
    """The batch size for `count` images: `asked` or, if that is 0, what the free memory holds, at most 8 (more is no
    faster), on a CPU 4. It is evened out over the batches needed.
    """
    if asked:
        most = asked
    elif device.type == "cpu":
        most = 4
    else:
        free = torch.cuda.mem_get_info(device)[0] / 2**30 - SPARE_GIB
        width, height = image_size(resolution)
        most = int(free / (IMAGE_GIB * (width * height / 512**2)))
        most = min(8, max(1, most))
    return math.ceil(count / math.ceil(count / most))


def latent_size(pipeline, resolution):
    """(h, w) of the latents of an image of `resolution`; see image_size."""
    width, height = image_size(resolution)
    return height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor


@torch.no_grad()
def capture_unet(pipeline, batch_size, size, guided):
    """Replaces the UNet's forward pass by a CUDA graph of fixed batch size, for latents of `size`, (h, w).

    A smaller batch is padded. What the UNet computes from the text alone is computed once a batch, not once a step.
    `guided`: each image is predicted twice, without and with the prompt, so both halves of the samples must be equal.
    Calls of any other shape go to the UNet itself. On a CPU, which captures nothing, the same path runs the UNet
    directly, for exactly `batch_size` images.
    """
    unet, tokens, halves = pipeline.unet, pipeline.tokenizer.model_max_length, 1 + guided
    plain, device, dtype, current = unet.forward, unet.device, unet.dtype, {}
    latents = torch.zeros(batch_size, unet.config.in_channels, *size, device=device, dtype=dtype)
    states = torch.zeros(  # [halves, batch, 77, d]
        halves, batch_size, tokens, unet.config.cross_attention_dim, device=device, dtype=dtype
    )
    time = torch.zeros((), dtype=torch.long, device=device)
    texts = getattr(unet, "text_keys_values", lambda states: states)  # see lib/kernels/fused_projections.py

    def make_texts():
        current["texts"] = texts(states.flatten(0, 1))
        return current["texts"]

    def make_prediction():
        with shared_start(unet) if guided else contextlib.nullcontext():
            prediction = plain(latents.repeat(halves, 1, 1, 1), time, current["texts"]).sample
        return prediction.unflatten(0, (halves, batch_size))

    # In this order: a replay overwrites only the outputs of graphs captured after it.
    prepare, predict = captured([make_texts, make_prediction], device)
    is_graph = predict is not make_prediction

    def fits(sample, timestep, text):
        count, rest = divmod(len(sample), halves)
        enough = count <= batch_size if is_graph else count == batch_size
        same = sample.shape[1:] == latents.shape[1:] and text.shape[1:] == states.shape[2:]
        whole = torch.is_tensor(timestep) and not timestep.is_floating_point()
        return not rest and enough and same and whole and timestep.ndim == 0

    def forward(sample, timestep, encoder_hidden_states, *rest, return_dict=True, **others):
        inputs = sample, timestep, encoder_hidden_states
        more = (*rest, *others.values())
        if return_dict or any(value is not None for value in more) or not fits(*inputs):
            return plain(*inputs, *rest, return_dict=return_dict, **others)
        count = len(sample) // halves
        latents[:count].copy_(sample[:count])
        if encoder_hidden_states is not current.get("states"):
            current["states"] = encoder_hidden_states
            states[:, :count].copy_(encoder_hidden_states.unflatten(0, (halves, count)))
            prepare()
        time.fill_(int(timestep))  # the timestep is on the CPU; a copy from there would wait for the GPU
        return (predict()[:, :count].clone().flatten(0, 1),)  # cloned: the next replay overwrites it

    unet.forward = forward


def generation_memory(batch_size, resolution, advice=None):
    """A context that reports a lack of memory with advice for this batch size and resolution."""
    smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else f"--resolution {half_resolution(resolution)}"
    advice = advice or f"close what else uses the GPU (nvidia-smi lists it); {smaller} needs less"
    return memory_for(f"generating {batch_size} images at once", advice)


def generate(pipeline, jobs, **settings):
    """A list of what `generated` yields."""
    return list(generated(pipeline, jobs, **settings))


@torch.no_grad()
def generated(pipeline, jobs, *, steps, guidance_scale, resolution, batch_size, title, advice=None, on_step=None):
    """Yields an image for each (prompt, seed) of `jobs`, as PIL images in that order, batch by batch.

    The starting noise comes from a CPU generator with the image's own seed: it depends neither on the device nor on
    the batch. `title` names the progress bar, None shows none; `advice` is for a GPU whose memory is too small.
    `on_step(n)` is called after n of the len(jobs) * steps steps; an error that it raises ends the generation.
    """
    arriving = deque()
    width, height = image_size(resolution)
    shape = (pipeline.unet.config.in_channels, *latent_size(pipeline, resolution))
    guided, throttle = guidance_scale > 1, Throttle(pipeline.device, AHEAD)
    with (
        generation_memory(batch_size, resolution, advice),
        tqdm(total=len(jobs) * steps, desc=title, unit="step", leave=False, disable=title is None) as bar,
    ):
        texts = text_states(pipeline, [prompt for prompt, _ in jobs], batch_size, guided)
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]
            before, count = start * steps, len(batch)

            def progress(pipeline, step, timestep, tensors, before=before, count=count):
                throttle.step()
                done = before + min(step + 1, steps) * count  # PNDM calls once more than there are steps
                bar.update(done - bar.n)
                if on_step:
                    on_step(done)
                return {}

            with_prompt, without = zip(*(texts[prompt] for prompt, _ in batch), strict=True)
            pixels = pipeline(
                prompt_embeds=torch.stack(with_prompt),
                negative_prompt_embeds=torch.stack(without) if guided else None,
                latents=to_device(torch.stack(noise), pipeline.device).to(pipeline.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                callback_on_step_end=progress,
                output_type="pt",
            ).images  # [batch, 3, height, width] in [0, 1]
            # Converted to bytes on the GPU and fetched after the next batch was started, so that the GPU never idles.
            pixels = (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            arriving.append(to_host(pixels))
            if len(arriving) > 1:
                yield from as_images(*arriving.popleft())
        while arriving:
            yield from as_images(*arriving.popleft())


def text_states(pipeline, prompts, batch_size, guided):
    """{prompt: (its hidden states [77, d], those of the empty prompt)}; the second is only used if `guided`."""
    distinct, states = list(dict.fromkeys(prompts)), {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        with_prompt, without = pipeline.encode_prompt(batch, pipeline.device, 1, guided)
        states |= zip(batch, zip(with_prompt, without if guided else with_prompt, strict=True), strict=True)
    return states


def as_images(pixels, arrived):
    """PIL images of bytes [batch, height, width, 3], once the event `arrived` has happened."""
    arrived.synchronize()
    return [Image.fromarray(image) for image in pixels.numpy()]


@torch.no_grad()
def probe(pipeline):
    """The outputs of text encoder and UNet for one fixed input, to tell models apart."""
    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    ids = torch.arange(77, device=pipeline.device)[None] % text_encoder.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, unet.config.in_channels, 16, 16), generator=generator).to(pipeline.device, unet.dtype)
    states = text_encoder(ids)[0]
    # A fixed text, so that the text encoder's adapter does not change the UNet's output.
    text = torch.randn(states.shape, generator=generator).to(pipeline.device, unet.dtype)
    prediction = unet(latents, 500, text).sample
    return {"text_encoder": states.float(), "unet": prediction.float()}


def check_switch(pipeline, applied, adapter, base_probe):
    """UserError unless scale 0 restores the base model's outputs and scale 1 changes them."""
    applied.set_scale(0)
    off = probe(pipeline)
    applied.set_scale(1)
    on = probe(pipeline)
    for component in adapter.factors:
        base = base_probe[component]
        if not torch.allclose(off[component], base, rtol=1e-3, atol=1e-3 * base.abs().max().item()):
            raise UserError(f"{adapter.path}: at scale 0 the {component} differs from the base model's")
        if torch.equal(on[component], base):
            raise UserError(
                f"{adapter.path}: the adapter does nothing: with it the {component} computes the same as without"
            )


def prepare_pipeline(config, plan, folder, prompts, device):
    """(the base model in `folder` as a pipeline, what of `plan` fits it).

    Every adapter of `plan` (see `plan_runs`) has been applied, tested and removed again. Of several runs, those with an
    adapter that does not fit are left out with a note; UserError if none is left.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    # Before the weights are read: Triton takes longer to start. A kernel compiled for one image serves any batch.
    sizes = [image_size(config["resolution"])]
    compile_models_ahead(folder, {"unet": False, "vae": False}, dtype, device, sizes)
    pipeline = load_pipeline(folder, dtype, device)
    limit = pipeline.tokenizer.model_max_length
    check_prompt_lengths(prompts, pipeline.tokenizer, limit, config["base_model"])
    base_probe, fitting = probe(pipeline), []
    for run, steps in plan:
        try:
            for adapter in steps.values():
                # The Applied, which holds copies of the weights, is freed at once.
                if part := check_adapter(pipeline, adapter, base_probe)[1]:
                    print(f"note: {adapter.path} {part}")
            fitting.append((run, steps))
        except UserError as problem:
            if len(plan) == 1:
                raise
            print(f"note: {run.name} is skipped: {problem}")
    if plan and not fitting:
        raise UserError(
            f"{config['lora_dir']}: none of its {len(plan)} adapters can be used with {config['base_model']}; see the "
            "notes above"
        )
    compile_ahead.finish()
    return pipeline, fitting


def check_adapter(pipeline, adapter, base_probe):
    """Merges an adapter at scale 0, which leaves the base model's weights, and tests it: (its Applied, a phrase for the
    user if it adapts a part of the layers). UserError if it does not fit or does nothing. `base_probe` is the base
    model's `probe`."""
    applied = adapters.Applied(adapter, models_of(pipeline))
    try:
        check_switch(pipeline, applied, adapter, base_probe)
    finally:
        applied.set_scale(0)
    parts = adapters.adapted_parts(adapter, models_of(pipeline))
    return applied, f"adapts only {', '.join(parts)}; the rest is the base model's" if parts else ""


def generate_runs(config, plan, pipeline, prompts, seeds, pool):
    """Generates the base model's images, once, and every adapter's, into the unfinished folders of the runs of `plan`;
    those that are there already are kept. Threads of `pool` meanwhile import what the verdicts and charts need."""
    jobs = [(prompt, seed) for _, prompt in prompts for seed in seeds]
    settings = {key: config[key] for key in ("steps", "guidance_scale", "resolution")}
    batch_size = choose_batch_size(len(jobs), config["batch_size"], config["resolution"], pipeline.device)
    with generation_memory(batch_size, config["resolution"]):
        size = latent_size(pipeline, config["resolution"])
        capture_unet(pipeline, batch_size, size, config["guidance_scale"] > 1)
    for package in ("scipy.stats", "matplotlib.figure"):  # now that Python will mostly wait for the GPU
        pool.submit(importlib.import_module, package)

    def generate_all(run, kind, title):
        images = SavedImages(unfinished(run.target), image_names(prompts, seeds, kind))
        if missing := images.missing():
            some = [jobs[place] for place in missing]
            write_images(images, missing, generated(pipeline, some, **settings, batch_size=batch_size, title=title))
        return images

    print(f"images are written to {unfinished(plan[0][0].target)} as they are generated")
    base = generate_all(plan[0][0], "base", "base")
    for run, steps in plan:
        run.base = base
        generate_points(run, steps, config["lora_scales"], pipeline, functools.partial(generate_all, run))


def generate_points(run, steps, scales, pipeline, generate_all):
    """Generates the images of one run, whose base images are there: its own adapter's and those of each adapter in
    `steps` at each of `scales`.

    `steps` is {step: Adapter}, the run's own last. `generate_all` is a function of the first part of the files' names
    and a title that generates every image with the current weights.
    """
    from lib.evaluation.choosing import Point  # here: previews need no metrics

    own, images = list(steps)[-1], {}
    for step, adapter in steps.items():
        applied = adapters.Applied(adapter, models_of(pipeline))
        for scale in sorted({*scales, *([1.0] if step == own else [])} - {0.0}):
            applied.set_scale(scale)
            point = Point(step, scale)
            kind = "lora" if point == (own, 1) else point.file_stem
            images[point] = generate_all(kind, run.name if point == (None, 1) else f"{run.name}, {point}")
        applied.set_scale(0)
        del applied  # frees its copies of the weights
    run.lora = images[Point(own, 1.0)]
    if len(steps) > 1 or set(scales) != {1.0}:
        asked = [Point(step, scale) for step in steps for scale in sorted(set(scales))]
        run.points = {point: images.get(point, run.base) for point in asked}


# Previews are generated as inference.py does by default.
PREVIEW_STEPS = 28
PREVIEW_SEED = 42
NO_PREVIEWS = "--preview-every 0 generates no previews"


def preview_generator(folder, unet, trained, prompts, guidance_scale, sizes, dtype, device):
    """A function of a title that generates one image a prompt with the models in training, as PIL images; None if
    there are no prompts. The images have the commonest of `sizes`, those of the training images.

    `unet` and, if it is trained, `trained["text_encoder"]` (LoraParameters by component) are used in place. Only the
    VAE and an untrained text encoder are loaded. The noise comes from a generator of its own, so training's random
    numbers are unchanged. On a GPU the UNet is captured as a CUDA graph beside training's, with its own memory, and
    the VAE's memory is released after each call.
    """
    if not prompts:
        return None
    own_text = trained["text_encoder"].model if "text_encoder" in trained else None
    jobs = [(prompt, PREVIEW_SEED) for prompt in prompts]
    resolution = "{}x{}".format(*Counter(sizes).most_common(1)[0][0])
    with memory_for("preparing the previews", NO_PREVIEWS):
        pipeline = load_pipeline(folder, dtype, device, unet, own_text)
        batch_size = choose_batch_size(len(jobs), 0, resolution, pipeline.device)
        settings = dict(
            steps=PREVIEW_STEPS, guidance_scale=guidance_scale, resolution=resolution, batch_size=batch_size
        )
        capture_unet(pipeline, batch_size, latent_size(pipeline, resolution), guidance_scale > 1)

    threads = torch.get_num_threads()

    def generate_previews(title):
        for part in trained.values():
            part.refresh()  # the optimizer has stepped since the last forward pass
        with computing_with(threads):  # more than training uses
            images = generate(pipeline, jobs, **settings, title=title, advice=NO_PREVIEWS)
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        return images

    return generate_previews
