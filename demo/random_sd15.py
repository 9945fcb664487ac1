"""Write full-size models with random weights, to measure speed and memory without the real ones.

    python -m demo.random_sd15 OUTPUT_DIR

OUTPUT_DIR becomes a Stable Diffusion v1.5 folder with its exact architecture in half precision (UNet 859.5 million
parameters, text encoder 123.1, VAE 83.7), OUTPUT_DIR/clip a ViT-B/32 scorer (151.3), OUTPUT_DIR/adapter a LoRA adapter
of rank 32 that is not zero. A step costs as much as with the real model; the images are noise. The tokenizers know only
single bytes.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel

from demo.build.tokenizers import byte_tokenizer
from lib import adapter_files, adapters

BEGIN, END = 49406, 49407  # as in CLIP's vocabulary
TARGETS = {  # target layers of the adapter, those of train.py
    "unet": ("to_k", "to_q", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "v_proj"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    folder = parser.parse_args().output_dir
    torch.manual_seed(0)
    ends = dict(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=END + 1,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                max_position_embeddings=77,
                **ends,
            )
        )
        clip = CLIPModel(CLIPConfig(text_config=ends))
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(folder / "tokenizer", BEGIN),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)
    clip.save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    CLIPProcessor(images, byte_tokenizer(folder / "clip", BEGIN)).save_pretrained(folder / "clip")
    for name, model in dict(unet=unet, text_encoder=text_encoder, vae=vae, clip=clip).items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    models = {"unet": unet, "text_encoder": text_encoder}
    for name, model in models.items():
        adapters.add_lora(model, 32, 32.0, TARGETS[name])
        for _, b in adapters.factors(model).values():
            torch.nn.init.normal_(b.data, std=0.02)
    (folder / "adapter").mkdir(exist_ok=True)
    adapter_files.save_adapter(folder / "adapter", models, 32, 32.0, TARGETS, {"base_model": str(folder)})


if __name__ == "__main__":
    main()
