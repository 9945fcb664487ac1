"""Images of the base model and of adapters on it: one pipeline, each image from its own seed.

Previews: images drawn with the models of a run while it trains.
"""

import contextlib
import math
from collections import Counter, deque

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from lib import adapters
from lib.config import half_resolution, image_size
from lib.errors import UserError, memory_for
from lib.evaluation.choosing import Point
from lib.evaluation.prompts import check_prompt_lengths
from lib.kernels.channels_last import channels_last, missing_kernels
from lib.kernels.compiling import compile_attention, in_threads
from lib.kernels.cpu import computing_with, use_cpu_forms
from lib.kernels.fused_projections import fuse_projections
from lib.kernels.graphs import captured
from lib.kernels.pinned_staging import Throttle, to_device, to_host
from lib.kernels.transformer_blocks import shared_start
from lib.models import load_part, loading


def load_pipeline(folder, dtype, device, unet=None, text_encoder=None):
    """The base model of a folder as one pipeline: no safety checker, safetensors only.

    `unet` and `text_encoder` may be given, already on the device: they are drawn with as they are, and
    nothing is changed in them.
    """
    device = torch.empty(0, device=device).device  # with its number
    # Begun before the weights are read, since Triton takes longer to look at itself.
    tried = in_threads([lambda: missing_kernels(device)] if device.type == "cuda" else [], device)
    with loading(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with loading(folder / "scheduler"):
        # As Stable Diffusion's own configurations say; those saved by another scheduler do not.
        scheduler = PNDMScheduler.from_pretrained(folder / "scheduler", skip_prk_steps=True)
    # Timesteps stay on the CPU: read from the GPU, each would wait until it has finished its work.
    scheduler.set_timesteps = lambda steps, device=None: PNDMScheduler.set_timesteps(scheduler, steps)
    loaded = dict(vae=load_part(AutoencoderKL, folder, "vae", dtype))
    if unet is None:
        loaded["unet"] = load_part(UNet2DConditionModel, folder, "unet", dtype)
    if text_encoder is None:
        loaded["text_encoder"] = load_part(CLIPTextModel, folder, "text_encoder", dtype)
    for model in loaded.values():
        fuse_projections(model, device)
        model.to(device).eval().requires_grad_(False)
    tried()
    of_maps = [model for name, model in loaded.items() if name != "text_encoder"]
    channels_last(*of_maps)
    # One image at a time fills a GPU there, and what it takes fits better into a CPU's caches; a batch would need
    # more memory than the UNet does.
    loaded["vae"].enable_slicing()
    if device.type == "cpu":
        # In which it decodes faster there; the UNet does not.
        loaded["vae"].to(memory_format=torch.channels_last)
        for model in of_maps:
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


# GiB that drawing one image of 512x512 takes, guided; measured, see bench/README.md.
PICTURE_GIB = 0.2
SPARE_GIB = 1.5  # for the VAE and the scores
AHEAD = 4  # steps that the host may be ahead of the GPU: in so long it begins the next batch


def images_at_once(jobs, asked, resolution, device):
    """How many images to draw at once: `asked`, or for 0 what the free memory holds, at most 8
    (more draw no faster), or 4 on a CPU; evened out over as many batches as `jobs` images need.
    """
    if asked:
        most = asked
    elif device.type == "cpu":
        most = 4
    else:
        free = torch.cuda.mem_get_info(device)[0] / 2**30 - SPARE_GIB
        width, height = image_size(resolution)
        most = int(free / (PICTURE_GIB * (width * height / 512**2)))
        most = min(8, max(1, most))
    return math.ceil(jobs / math.ceil(jobs / most))


def latent_size(pipeline, resolution):
    """(h, w) of the latents of an image of `resolution`; see image_size."""
    width, height = image_size(resolution)
    return height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor


@torch.no_grad()
def record_unet(pipeline, pictures, size, guided):
    """Let the UNet predict up to so many `images` with latents of `size`, (h, w), at once by a CUDA graph, which
    always computes that many; what it makes of the text alone is computed once for all steps of a batch. `guided`
    says that each image is predicted twice, without the prompt and with it: then the second half of the samples of every
    call of that shape has to equal the first. Every other call goes to the UNet itself.

    A CPU, which records nothing, calls the UNet in the same way, for exactly that many.
    """
    unet, tokens, halves = pipeline.unet, pipeline.tokenizer.model_max_length, 1 + guided
    plain, device, dtype, given = unet.forward, unet.device, unet.dtype, {}
    latents = torch.zeros(pictures, unet.config.in_channels, *size, device=device, dtype=dtype)
    width = unet.config.cross_attention_dim
    states = torch.zeros(halves, pictures, tokens, width, device=device, dtype=dtype)
    when = torch.zeros((), dtype=torch.long, device=device)
    texts = getattr(unet, "text_keys_values", lambda states: states)  # see lib/kernels/fused_projections.py

    def make_texts():
        given["texts"] = texts(states.flatten(0, 1))
        return given["texts"]

    def make_prediction():
        with shared_start(unet) if guided else contextlib.nullcontext():
            found = plain(latents.repeat(halves, 1, 1, 1), when, given["texts"]).sample
        return found.unflatten(0, (halves, pictures))

    # In this order: predictions leave what was recorded before them as it is.
    prepare, predict = captured([make_texts, make_prediction], device)
    recorded = predict is not make_prediction

    def is_recorded(sample, timestep, text):
        count, rest = divmod(len(sample), halves)
        enough = count <= pictures if recorded else count == pictures
        same = sample.shape[1:] == latents.shape[1:] and text.shape[1:] == states.shape[2:]
        whole = torch.is_tensor(timestep) and not timestep.is_floating_point()
        return not rest and enough and same and whole and timestep.ndim == 0

    def forward(sample, timestep, encoder_hidden_states, *rest, return_dict=True, **others):
        inputs = sample, timestep, encoder_hidden_states
        more = (*rest, *others.values())
        if return_dict or any(value is not None for value in more) or not is_recorded(*inputs):
            return plain(*inputs, *rest, return_dict=return_dict, **others)
        count = len(sample) // halves
        latents[:count].copy_(sample[:count])
        if encoder_hidden_states is not given.get("states"):
            given["states"] = encoder_hidden_states
            states[:, :count].copy_(encoder_hidden_states.unflatten(0, (halves, count)))
            prepare()
        when.fill_(int(timestep))  # which lies on the CPU: a copy from there would wait for the GPU
        return (predict()[:, :count].clone().flatten(0, 1),)  # the next replay writes over it

    unet.forward = forward


def generation_memory(batch_size, resolution, advice=None):
    """What to say when the GPU's memory is too small for so many images of that size."""
    smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else f"--resolution {half_resolution(resolution)}"
    advice = advice or f"close what else uses the GPU (nvidia-smi lists it); {smaller} needs less"
    return memory_for(f"drawing {batch_size} images at once", advice)


@torch.no_grad()
def generate(pipeline, jobs, *, steps, guidance_scale, resolution, batch_size, title, advice=None):
    """An image for each (prompt, seed) of `jobs`, as PIL images in that order.

    The starting noise is drawn on the CPU from the image's own seed, so it depends neither on
    the device nor on the batch. `advice` is for a GPU whose memory is too small.
    """
    images, arriving = [], deque()
    width, height = image_size(resolution)
    shape = (pipeline.unet.config.in_channels, *latent_size(pipeline, resolution))
    guided, throttle = guidance_scale > 1, Throttle(pipeline.device, AHEAD)
    with (
        generation_memory(batch_size, resolution, advice),
        tqdm(total=len(jobs) * steps, desc=title, unit="step", leave=False) as bar,
    ):
        texts = text_states(pipeline, [prompt for prompt, _ in jobs], batch_size, guided)
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for _, s in batch]
            finished = min(start + batch_size, len(jobs)) * steps

            def progress(pipeline, step, timestep, tensors, finished=finished):
                throttle.step()
                # PNDM makes one call more than it has steps.
                bar.update(min(batch_size, finished - bar.n))
                return {}

            with_prompt, without = zip(*(texts[prompt] for prompt, _ in batch), strict=True)
            pictures = pipeline(
                prompt_embeds=torch.stack(with_prompt),
                negative_prompt_embeds=torch.stack(without) if guided else None,
                latents=to_device(torch.stack(noise), pipeline.device).to(pipeline.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                callback_on_step_end=progress,
                output_type="pt",
            ).images
            # To bytes on the GPU, which is idle while the CPU does it. They are waited for when it has
            # been given the next batch.
            pixels = (pictures.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            arriving.append(to_host(pixels))
            if len(arriving) > 1:
                images += as_images(*arriving.popleft())
        images += as_images(*arriving.popleft()) if arriving else []
    return images


def text_states(pipeline, prompts, at_once, guided):
    """{prompt: its hidden states [77, d] and, if `guided`, those of no prompt}, so many computed at once."""
    each, found = list(dict.fromkeys(prompts)), {}
    for start in range(0, len(each), at_once):
        some = each[start : start + at_once]
        states, others = pipeline.encode_prompt(some, pipeline.device, 1, guided)
        found |= zip(some, zip(states, others if guided else states, strict=True), strict=True)
    return found


def as_images(pixels, arrived):
    arrived.synchronize()
    return [Image.fromarray(picture) for picture in pixels.numpy()]


# Of PyTorch's ways to compute attention all but cuDNN's, which makes a plan for each size at its first use.
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def probe(pipeline, size=(16, 16)):
    """Outputs of the text encoder and of the UNet at one fixed input (for the UNet, latents of `size`,
    (h, w)), to tell models apart."""
    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    ids = torch.arange(77, device=pipeline.device)[None] % text_encoder.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (1, unet.config.in_channels, *size)
    latents = torch.randn(shape, generator=generator).to(pipeline.device, unet.dtype)
    with sdpa_kernel(UNPLANNED):
        states = text_encoder(ids)[0]
        # A fixed text for the UNet, so that it is not moved by the text encoder's adapter.
        text = torch.randn(states.shape, generator=generator).to(pipeline.device, unet.dtype)
        prediction = unet(latents, 500, text).sample
    return {"text_encoder": states.float(), "unet": prediction.float()}


def check_switch(pipeline, applied, adapter, base_probe):
    """UserError unless the adapter at scale 0 gives the base's outputs, and at 1 other ones."""
    applied.set_scale(0)
    off = probe(pipeline)
    applied.set_scale(1)
    on = probe(pipeline)
    for component in adapter.factors:
        base = base_probe[component]
        if not torch.allclose(off[component], base, rtol=1e-3, atol=1e-3 * base.abs().max().item()):
            raise UserError(f"{adapter.path}: switched off, the {component} is not the base model's")
        if torch.equal(on[component], base):
            raise UserError(
                f"{adapter.path}: switched on, the {component} gives what the base gives; the adapter does nothing"
            )


def ready_pipeline(config, plan, prompts, device):
    """(the base model, on which every adapter was tried and taken out again, a function that waits until it is
    ready to draw)"""
    planned, folder = plan
    pipeline = load_pipeline(folder, torch.float16 if device.type == "cuda" else torch.float32, device)
    limit = pipeline.tokenizer.model_max_length
    check_prompt_lengths(prompts, pipeline.tokenizer, limit, config["base_model"])
    base_probe = probe(pipeline)
    # Before the long part: does each fit, and does it do anything?
    for adapter in (adapter for _, steps in planned for adapter in steps.values()):
        applied = adapters.Applied(adapter, models_of(pipeline))
        check_switch(pipeline, applied, adapter, base_probe)
        applied.set_scale(0)
        del applied  # with its copies of the weights
    # What is compiled for one sample serves for more.
    size = latent_size(pipeline, config["resolution"])
    return pipeline, compile_attention(lambda: probe(pipeline, size), device)


def models_of(pipeline):
    """What an adapter may change."""
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def generate_runs(config, plan, pipeline, prompts, seeds):
    """Draw the base model's images once and every adapter's, into the planned runs; return these."""
    jobs = [(prompt, s) for _, prompt in prompts for s in seeds]
    how = {k: config[k] for k in ("steps", "guidance_scale", "resolution")}
    how["batch_size"] = images_at_once(len(jobs), config["batch_size"], config["resolution"], pipeline.device)
    with generation_memory(how["batch_size"], config["resolution"]):
        size = latent_size(pipeline, config["resolution"])
        record_unet(pipeline, how["batch_size"], size, config["guidance_scale"] > 1)
    base = generate(pipeline, jobs, **how, title="base")
    for run, steps in plan[0]:
        generate_points(
            run,
            steps,
            config["lora_scales"],
            pipeline,
            base,
            lambda title: generate(pipeline, jobs, **how, title=title),
        )
    return [run for run, _ in plan[0]]


def generate_points(run, steps, scales, pipeline, base, drawn):
    """Draw each adapter of `steps` ({step: Adapter}, the run's own at the end) at each of `scales`, and the
    run's own as it is; `drawn` is a function of a title that draws with what is in the pipeline."""
    own, found = list(steps)[-1], {}
    for step, adapter in steps.items():
        applied = adapters.Applied(adapter, models_of(pipeline))
        for scale in sorted({*scales, *([1.0] if step == own else [])} - {0.0}):
            applied.set_scale(scale)
            point = Point(step, scale)
            found[point] = drawn(run.name if point == (None, 1) else f"{run.name}, {point}")
        applied.set_scale(0)
        del applied  # with its copies of the weights
    run.base, run.lora = base, found[Point(own, 1.0)]
    if len(steps) > 1 or set(scales) != {1.0}:
        asked = [Point(step, scale) for step in steps for scale in sorted(set(scales))]
        run.points = {point: found.get(point, base) for point in asked}


# How images are drawn while a run trains: as inference.py draws them by default.
PREVIEW_STEPS = 28
PREVIEW_SEED = 42
NO_PREVIEWS = "--preview-every 0 draws no previews"


def preview_generator(folder, unet, trained, prompts, guidance_scale, sizes, dtype, device):
    """A function of a title that draws one image a prompt with models in training: PIL images, of the
    commonest of `sizes`, those of the images trained on. None where there are no prompts.

    `unet` and, if it is trained, `trained["text_encoder"]` (LoraParameters by component) are used as
    they lie in memory: no second UNet is loaded, only the VAE and a text encoder that is not trained.
    Nothing random is drawn but the noise, from a generator of its own. On a GPU the UNet's predictions
    are recorded as a CUDA graph beside those of the training, with memory of its own, and what the
    VAE takes is given back after each call.
    """
    if not prompts:
        return None
    own_text = trained["text_encoder"].model if "text_encoder" in trained else None
    jobs = [(prompt, PREVIEW_SEED) for prompt in prompts]
    resolution = "{}x{}".format(*Counter(sizes).most_common(1)[0][0])
    with memory_for("preparing the previews", NO_PREVIEWS):
        pipeline = load_pipeline(folder, dtype, device, unet, own_text)
        at_once = images_at_once(len(jobs), 0, resolution, pipeline.device)
        how = dict(steps=PREVIEW_STEPS, guidance_scale=guidance_scale, resolution=resolution, batch_size=at_once)
        record_unet(pipeline, at_once, latent_size(pipeline, resolution), guidance_scale > 1)

    threads = torch.get_num_threads()

    def pictures(title):
        for part in trained.values():
            part.refresh()  # the optimizer has stepped since the last pass
        with computing_with(threads):  # more than training does
            found = generate(pipeline, jobs, **how, title=title, advice=NO_PREVIEWS)
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    return pictures
