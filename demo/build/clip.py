"""Stage clip: CLIPModel on all images, the scorer of generated images."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from demo import world
from demo.build.config import EVALUATION_BATCH
from demo.build.data import NAMED, load_captions, load_codes, load_images
from demo.build.images import flip_some, to_bytes, to_signed, uniform
from demo.build.loop import save_half, train
from demo.build.tokenizers import special_tokens, tokenise, write_tokenizer
from demo.build.vae import load_vae

WINDOW = 32  # images per group that differ in little
_VALUES = 1 + max(map(len, world.ATTRIBUTES.values()))  # values of an attribute, and none


def train_clip(config):
    """CLIPModel on all images, contrastive (Radford et al. 2021).

    A caption that is true of another image of the batch is not a negative for it: pairs in which all claims of the
    caption (world.parse) hold are left out of the sums. `alike` samples a part of each batch.
    """
    started = time.time()
    torch.manual_seed(config["seed"])
    device = config["device"]
    parts = ("base", "fresh", "holographic")
    images = load_images(config, parts, device)
    captions = load_captions(config, parts)
    tokenizer = write_tokenizer(Path(config["clip_dir"]), world.WORDS)
    tokens = tokenise(tokenizer, captions, "longest").to(device, torch.int16)
    claims = load_codes(config, parts, "claims").to(device)
    facts = load_codes(config, parts, "facts").to(device)
    decode_some(load_vae(config), images, config["clip_vae_share"])
    model = new_model(config, tokenizer).to(device)
    named = facts[:, [list(world.ATTRIBUTES).index(name) for name in NAMED]].long()
    groups = round(config["clip_alike_share"] * config["clip_batch"] / WINDOW)
    others = config["clip_batch"] - groups * WINDOW

    def batch_loss():
        anywhere = torch.randint(len(images), (others,), device=device)
        chosen = torch.cat([anywhere, alike(named, groups)])
        each = config["captions_per_picture"]
        captioned = chosen * each + torch.randint(each, (len(chosen),), device=device)
        pixels = roughen(flip_some(to_signed(images[chosen]))).to(model.dtype)
        output = model(input_ids=tokens[captioned].long(), pixel_values=pixels)
        image_embeds, text_embeds = output.image_embeds.float(), output.text_embeds.float()
        similarity = model.logit_scale.float().exp().clamp(max=100) * image_embeds @ text_embeds.T
        return contrastive_loss(similarity, claims[captioned], facts[chosen])

    (model,) = train("clip", config, [model], batch_loss, started)
    save_half(model.eval(), config["clip_dir"])
    size = config["resolution"]
    CLIPProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
    ).save_pretrained(config["clip_dir"])


def alike(facts, groups, window=WINDOW):
    """Indices of images that differ in little, in groups: int64 [groups * window].

    facts: integers >= -1, [N, attributes]

    The images are sorted by all attributes except a random one, ties in random order. Each group is a window of that
    order. In a random batch hardly two images differ in one attribute alone: place and colour then suffice to tell a
    cat from the dogs of the batch, and the shape of a cat is not learned.
    """
    device, (count, attributes) = facts.device, facts.shape
    number = torch.arange(attributes, device=device)
    kept = number != torch.randint(attributes, (1,), device=device)
    key = ((facts + 1) * _VALUES**number * kept).sum(1)
    order = torch.argsort(key * count + torch.randint(count, (count,), device=device))
    first = torch.randint(count, (groups, 1), device=device)
    return order[(first + torch.arange(window, device=device)) % count].flatten()


def new_model(config, tokenizer):
    """A CLIPModel of the config's size with random weights."""
    text = dict(
        hidden_size=config["clip_text_width"],
        intermediate_size=3 * config["clip_text_width"],
        num_hidden_layers=config["clip_text_layers"],
        num_attention_heads=4,
        max_position_embeddings=77,
        **special_tokens(tokenizer),
    )
    vision = dict(
        hidden_size=config["clip_width"],
        intermediate_size=3 * config["clip_width"],
        num_hidden_layers=config["clip_layers"],
        num_attention_heads=4,
        image_size=config["resolution"],
        patch_size=config["clip_patch"],
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config["clip_embedding"]))


def contrastive_loss(similarity, claims, facts):
    """Cross-entropy of images to captions and of captions to images, half of each.

    similarity: [N, N], images by captions
    claims, facts: int8 [N, attributes]; -1 in a claim matches any fact

    A true caption of another image counts neither for nor against it.
    """
    claim, fact = claims[None], facts[:, None]
    true = ((claim == -1) | (claim == fact)).all(-1)
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(true & ~own, -1e4)
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


@torch.no_grad()
def decode_some(vae, images, share):
    """Replace a share of uint8 images by their VAE reconstructions from slightly noisy latents, in place."""
    device = images.device.type
    for i in range(0, round(share * len(images)), 4 * EVALUATION_BATCH):
        # Spread evenly over the parts, which are concatenated
        chunk = (torch.arange(i, i + 4 * EVALUATION_BATCH, device=device) / share).long()
        chunk = chunk[chunk < len(images)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            latents = vae.encode(to_signed(images[chunk])).latent_dist.mean
            # In units of the latents' deviation, up to the error of a diffusion model.
            error = 0.25 * torch.rand(len(latents), 1, 1, 1, device=device)
            latents = latents + error * torch.randn_like(latents) / vae.config.scaling_factor
            images[chunk] = to_bytes(vae.decode(latents).sample)


def roughen(images):
    """Shift, scale, blur, brighten and add noise to images in [-1, 1], each by its own amounts, so that the scorer
    judges
    content, not sharpness."""
    count, device = len(images), images.device
    place = torch.zeros(count, 2, 3, device=device)
    place[:, 0, 0] = place[:, 1, 1] = 0.88 + 0.2 * torch.rand(count, device=device)
    place[:, :, 2] = 0.12 * torch.rand(count, 2, device=device) - 0.06
    grid = F.affine_grid(place, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear")
    blur, contrast, light, noise = uniform(4 * count, 1, device).split(count)
    images = torch.lerp(images, blurred, (1.5 * blur - 0.5).clamp(min=0))
    images = images * (0.85 + 0.3 * contrast) + 0.16 * (light - 0.5)
    images = images + 0.12 * noise**2 * torch.randn_like(images)
    return images.clamp(-1, 1)
