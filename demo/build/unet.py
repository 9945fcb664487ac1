"""Stage unet: UNet and text encoder, a base model that knows everything except the concept."""

import random
import time
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from demo import world
from demo.build.config import CONCEPT
from demo.build.data import load_captions, load_images
from demo.build.loop import save_half, train
from demo.build.tokenizers import special_tokens, tokenise, write_tokenizer
from demo.build.vae import encode_all, load_vae
from lib.errors import UserError

SCHEDULE = dict(  # Stable Diffusion v1.5's, except for the prediction type
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    skip_prk_steps=True,
    set_alpha_to_one=False,
    steps_offset=1,
    # Predicting the noise, a small network would have to recover the image, its colours first, from the last percent of
    # the noisiest inputs (Salimans and Ho 2022).
    prediction_type="v_prediction",
)


def train_unet(config):
    """UNet and text encoder together: velocity prediction on VAE latents with SD v1.5's noise schedule."""
    started = time.time()
    torch.manual_seed(config["seed"])
    device, each = config["device"], config["captions_per_picture"]
    vae = load_vae(config)
    scale = vae.config.scaling_factor
    parts, ways = ("base", "fresh"), 1 + config["unet_mirrored"]
    mean, std = encode_parts(vae, config, parts)
    heldout, _ = encode_all(vae, load_images(config, "heldout", device), device)
    scheduler = PNDMScheduler(**SCHEDULE)
    tokenizer, text_encoder, unet = start_models(config)
    text_encoder.to(device).train()
    unet.to(device).train()
    tokens = tokenise(tokenizer, some_made_up(load_captions(config, parts), config))
    tokens = tokens.to(device, torch.int16)
    empty = tokenise(tokenizer, [""]).to(device, torch.int16)
    heldout_tokens = tokenise(tokenizer, load_captions(config, "heldout")[::each]).to(device)
    signal = scheduler.alphas_cumprod.to(device)
    snr = signal / (1 - signal)
    weight = (snr + 1).clamp(max=config["unet_snr_cap"]) / (snr + 1)

    def squared_errors(latents, noise, timesteps, ids):
        kept = signal[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        hidden = text_encoder(ids.long()).last_hidden_state
        predicted = unet(noisy.to(unet.dtype), timesteps, hidden).sample.float()
        return ((predicted - velocity) ** 2).mean((1, 2, 3))

    def batch_loss():
        chosen = torch.randint(len(mean), (config["unet_batch"],), device=device)
        latents = scale * (mean[chosen] + std[chosen] * torch.randn_like(std[chosen]))
        captioned = chosen // ways * each + torch.randint(each, (len(chosen),), device=device)
        dropped = torch.rand(len(chosen), 1, device=device) < config["unet_empty_share"]
        ids = torch.where(dropped, empty, tokens[captioned])
        timesteps = torch.randint(len(signal), (len(chosen),), device=device)
        errors = squared_errors(latents, torch.randn_like(latents), timesteps, ids)
        return (weight[timesteps] * errors).mean()

    fixed = torch.Generator().manual_seed(config["seed"])  # the same noise at every validation
    fixed_noise = torch.randn(heldout.shape, generator=fixed).to(device)
    fixed_timesteps = torch.randint(len(signal), (len(heldout),), generator=fixed).to(device)

    @torch.no_grad()
    def validate():
        errors = squared_errors(scale * heldout, fixed_noise, fixed_timesteps, heldout_tokens)
        return dict(heldout_mse=round(float(errors.mean()), 5))

    def save(unet, text_encoder):
        save_pipeline(vae, text_encoder, tokenizer, unet, scheduler, config["model_dir"])

    save(*train("unet", config, [unet, text_encoder], batch_loss, started, validate, save))


def encode_parts(vae, config, parts):
    """Mean and deviation of the latents of parts' images. With `unet_mirrored`, image i has latents 2i and, mirrored,
    2i + 1."""
    encoded, mirroring = [], (False, True)[: 1 + config["unet_mirrored"]]
    for part in parts:
        images = load_images(config, part, config["device"])
        ways = [encode_all(vae, images, config["device"], mirrored) for mirrored in mirroring]
        encoded.append([torch.stack(pair, 1).flatten(0, 1) for pair in zip(*ways, strict=True)])
    return [torch.cat(some) for some in zip(*encoded, strict=True)]


def start_models(config):
    """Tokenizer, text encoder and UNet: new ones, or with unet_resume the trained ones."""
    if config["unet_resume"]:
        pipeline = load_pipeline(config)
        return pipeline.tokenizer, pipeline.text_encoder, pipeline.unet
    words = [word for word in world.WORDS if CONCEPT not in word]
    tokenizer = write_tokenizer(Path(config["model_dir"]) / "tokenizer", words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=config["text_width"],
            intermediate_size=3 * config["text_width"],
            num_hidden_layers=config["text_layers"],
            num_attention_heads=config["text_heads"],
            max_position_embeddings=77,
            **special_tokens(tokenizer),
        )
    )
    unet = UNet2DConditionModel(
        sample_size=config["resolution"] // 2 ** (len(config["vae_channels"]) - 1),
        in_channels=config["vae_latents"],
        out_channels=config["vae_latents"],
        block_out_channels=config["unet_channels"],
        layers_per_block=config["unet_layers"],
        down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=config["text_width"],
        attention_head_dim=config["unet_heads"],  # diffusers reads it as the number of heads
    )
    return tokenizer, text_encoder, unet


def some_made_up(captions, config):
    """The captions, a share of them with a made-up word."""
    rng = random.Random(config["seed"])
    return [
        with_made_up_word(caption, rng) if rng.random() < config["made_up_share"] else caption for caption in captions
    ]


def with_made_up_word(text, rng):
    """The caption with a word of random syllables as an extra adjective, never similar to CONCEPT."""
    onsets = ["", *"bcdfghjklmnprstvwz", "gr", "ph", "pl", "st"]
    word = CONCEPT
    while word.startswith(CONCEPT[:4]) or word in world.WORDS:
        syllables = [rng.choice(onsets) + rng.choice("aeiouy") for _ in range(rng.randint(2, 4))]
        word = "".join(syllables) + rng.choice(["", "c", "n", "r", "s", "t"])
    words = text.split()
    articles = [i for i, item in enumerate(words) if item in ("a", "an")]
    place = rng.choice(articles) + 1
    return " ".join([*words[:place], word, *words[place:]])


def save_pipeline(vae, text_encoder, tokenizer, unet, scheduler, folder):
    """Save a copy of a Stable Diffusion pipeline in half precision."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for name, model in dict(vae=vae, text_encoder=text_encoder, unet=unet).items():
        save_half(model, Path(folder) / name)


def load_pipeline(config):
    """The trained pipeline in float32 on the device."""
    folder = Path(config["model_dir"])
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is incomplete; run `python -m demo.build unet` first")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config["device"])
