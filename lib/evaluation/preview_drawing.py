"""Previews: pictures drawn with the models of a run while it trains."""

from collections import Counter

import torch

from lib.errors import memory_for
from lib.evaluation.drawing import draw, latent_size, load_pipeline, pictures_at_once, record_unet
from lib.kernels.threads import computing_with

# How pictures are drawn while a run trains: as inference.py draws them by default.
PREVIEW_STEPS = 28
PREVIEW_SEED = 42
NO_PREVIEWS = "--preview-every 0 draws no previews"


def preview_drawer(folder, unet, trained, prompts, guidance_scale, sizes, dtype, device):
    """A function of a title that draws one picture a prompt with models in training: PIL pictures, of the
    commonest of `sizes`, those of the pictures trained on. None where there are no prompts.

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
        at_once = pictures_at_once(len(jobs), 0, resolution, pipeline.device)
        how = dict(steps=PREVIEW_STEPS, guidance_scale=guidance_scale, resolution=resolution, batch_size=at_once)
        record_unet(pipeline, at_once, latent_size(pipeline, resolution), guidance_scale > 1)

    threads = torch.get_num_threads()

    def pictures(title):
        for part in trained.values():
            part.refresh()  # the optimizer has stepped since the last pass
        with computing_with(threads):  # more than training does
            found = draw(pipeline, jobs, **how, title=title, advice=NO_PREVIEWS)
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    return pictures
