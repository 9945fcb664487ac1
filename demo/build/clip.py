"""Stage clip: CLIPModel on all images, which scores what the base model draws."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from demo import world
from demo.build.config import EVALUATION_BATCH
from demo.build.data import NAMED, load_captions, load_codes, load_pictures
from demo.build.images import flip_some, to_bytes, to_signed, uniform
from demo.build.loop import save_half, train
from demo.build.tokenizers import special_tokens, tokenise, write_tokenizer
from demo.build.vae import load_vae

WINDOW = 32  # images that differ in little
_VALUES = 1 + max(map(len, world.ATTRIBUTES.values()))  # an attribute's, and none


def train_clip(config):
    """CLIPModel on all images, contrastive (Radford et al. 2021).

    A caption that is true of another image of the batch is no negative for it: world.parse says
    what a caption claims, and pairs in which all of that holds are left out of the sums. A part of each
    batch is drawn by `alike`.
    """
    started = time.time()
    torch.manual_seed(config["seed"])
    device = config["device"]
    parts = ("base", "fresh", "holographic")
    pictures = load_pictures(config, parts, device)
    captions = load_captions(config, parts)
    tokenizer = write_tokenizer(Path(config["clip_dir"]), world.WORDS)
    tokens = tokenise(tokenizer, captions, "longest").to(device, torch.int16)
    claims = load_codes(config, parts, "claims").to(device)
    facts = load_codes(config, parts, "facts").to(device)
    decode_some(load_vae(config), pictures, config["clip_vae_share"])
    model = new_model(config, tokenizer).to(device)
    named = facts[:, [list(world.ATTRIBUTES).index(name) for name in NAMED]].long()
    groups = round(config["clip_alike_share"] * config["clip_batch"] / WINDOW)
    others = config["clip_batch"] - groups * WINDOW

    def batch_loss():
        anywhere = torch.randint(len(pictures), (others,), device=device)
        chosen = torch.cat([anywhere, alike(named, groups)])
        each = config["captions_per_picture"]
        told = chosen * each + torch.randint(each, (len(chosen),), device=device)
        pixels = roughen(flip_some(to_signed(pictures[chosen]))).to(model.dtype)
        output = model(input_ids=tokens[told].long(), pixel_values=pixels)
        image_embeds, text_embeds = output.image_embeds.float(), output.text_embeds.float()
        similarity = model.logit_scale.float().exp().clamp(max=100) * image_embeds @ text_embeds.T
        return contrastive_loss(similarity, claims[told], facts[chosen])

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
    """Numbers of `groups` times `window` images that differ in little, int64.

    `facts` are integers from -1 on, [N, attributes]. The images are put in order by all attributes but
    one, which is drawn at random, and by chance where these are the same; each group is a window of that
    order. Among images drawn at random hardly two differ in one attribute alone, so that place and
    colour suffice to tell a cat from the dogs of the batch, and what a cat looks like is not learned.
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

    similarity [N, N], images by captions; claims and facts int8 [N, attributes], of which -1 in a
    claim holds for any fact. A true caption of another image counts neither for nor against it.
    """
    claim, fact = claims[None], facts[:, None]
    true = ((claim == -1) | (claim == fact)).all(-1)
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(true & ~own, -1e4)
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


@torch.no_grad()
def decode_some(vae, pictures, share):
    """Put in the place of a share of uint8 images what the VAE gives back of them, from latents
    with a little random error; in place."""
    device = pictures.device.type
    for i in range(0, round(share * len(pictures)), 4 * EVALUATION_BATCH):
        # Spread evenly over the parts, which lie one after the other
        chunk = (torch.arange(i, i + 4 * EVALUATION_BATCH, device=device) / share).long()
        chunk = chunk[chunk < len(pictures)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            latents = vae.encode(to_signed(pictures[chunk])).latent_dist.mean
            # In units of the latents' deviation, up to what a diffusion model gets wrong.
            error = 0.25 * torch.rand(len(latents), 1, 1, 1, device=device)
            latents = latents + error * torch.randn_like(latents) / vae.config.scaling_factor
            pictures[chunk] = to_bytes(vae.decode(latents).sample)


def roughen(pictures):
    """Shift, scale, blur, brighten and add noise to images in [-1, 1], each by its own amounts,
    so that the scorer judges what is shown and not how crisply."""
    count, device = len(pictures), pictures.device
    place = torch.zeros(count, 2, 3, device=device)
    place[:, 0, 0] = place[:, 1, 1] = 0.88 + 0.2 * torch.rand(count, device=device)
    place[:, :, 2] = 0.12 * torch.rand(count, 2, device=device) - 0.06
    grid = F.affine_grid(place, pictures.shape, align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[2:], mode="bilinear")
    blur, contrast, light, noise = uniform(4 * count, 1, device).split(count)
    pictures = torch.lerp(pictures, blurred, (1.5 * blur - 0.5).clamp(min=0))
    pictures = pictures * (0.85 + 0.3 * contrast) + 0.16 * (light - 0.5)
    pictures = pictures + 0.12 * noise**2 * torch.randn_like(pictures)
    return pictures.clamp(-1, 1)
