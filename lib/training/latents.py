"""The images' latents: encoded once, kept in the training set's folder, read from there by later runs.

The VAE gives a distribution for each image, of which training draws anew at every step, so its mean and its
deviation are kept, in float32. Each image has a file of its own, in a folder for each VAE, precision, kind of device
and resolution: an interruption costs one image. An image is known by its bytes, so new ones are encoded, and those
that are no longer there dropped, whatever they are called.
"""

import contextlib
import hashlib
import json
import time
import zlib
from importlib.metadata import version

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

from lib.cache import first_process, prefetch
from lib.dataset import KEPT
from lib.errors import UserError
from lib.files import replacing
from lib.models import model_digest

AT_ONCE = 4  # images that a GPU encodes at once; a CPU one, whose result depends on no other then
IN_MEMORY = 2**30  # bytes of latents, 8,000 images of 512x512; those beyond it are read at every step


class Latents:
    """Mean and deviation of each image's latent distribution, scaled as the UNet expects them: `latents[index]` is
    that pair, float32 [channels, h, w] each.

    `folder` is where they are kept, a file each, and what is whole there is known at once; `missing` are the indices of
    the others, which `add` makes known.
    """

    def __init__(self, data, folder):
        names = [hashlib.sha256(data.key(index).encode()).hexdigest()[:32] for index in range(len(data))]
        self.folder, self.paths = folder, [folder / f"{name}.safetensors" for name in names]
        self.held, self.room, self.known_shapes, damaged = {}, IN_MEMORY, [None] * len(data), 0
        for index, pair in enumerate(prefetch(read_pair, self.paths)):
            if pair is not None:
                self.hold(index, pair)
            damaged += pair is None and self.paths[index].exists()
        if damaged and first_process():
            print(f"note: {damaged} latents in {folder} are damaged and encoded again")

    @property
    def missing(self):
        return [index for index, shape in enumerate(self.known_shapes) if shape is None]

    def hold(self, index, pair, on_disk=True):
        """Make an image's pair known, and hold it in memory if there is room or it is not on the disk."""
        self.known_shapes[index] = tuple(pair[0].shape)
        size = sum(part.nbytes for part in pair)
        if not on_disk or size <= self.room:
            self.held[index] = pair
            self.room -= size

    def add(self, encoded, write):
        """Make known what `encoded` yields, see `encode_latents`, and write it if this process is to. What cannot be
        written, for want of room perhaps, is said once and held in memory."""
        for some, means, deviations in encoded:
            for index, *pair in zip(some, means, deviations, strict=True):
                pair = tuple(part.clone() for part in pair)  # each without the others of its batch
                write = write and written(self.paths[index], pair)
                self.hold(index, pair, on_disk=write)
        if write:
            self.drop_others()

    def drop_others(self):
        """Remove from the folder what no image has any more, and beside it what earlier versions kept in one file."""
        keep, hour = {path.name for path in self.paths}, 3600
        others = [path for path in self.folder.iterdir() if path.name not in keep]
        for path in [*others, *self.folder.parent.glob("*.safetensors")]:
            with contextlib.suppress(OSError):
                # What another run is just writing has a hidden name.
                if path.name[0] != "." or time.time() - path.stat().st_mtime > hour:
                    path.unlink()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        pair = self.held.get(index) or read_pair(self.paths[index])
        if pair is None:
            raise UserError(
                f"{self.paths[index]} is gone or damaged since training began; the same command goes on from the last "
                "checkpoint"
            )
        return pair

    def shape(self, index):
        return self.known_shapes[index]

    def shapes(self):
        """The shapes that occur, sorted."""
        return sorted(set(self.known_shapes))


def kept_folder(data, vae_folder, dtype, device):
    """Where the latents of a Dataset are kept, for what may change their numbers."""
    made_with = [model_digest(vae_folder), str(dtype), device.type, data.resolution]
    made_with += [version("torch"), version("diffusers")]
    return data.folder / KEPT / hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]


def checksum(pair):
    """CRC-32 of the bytes of mean and deviation, int64 [1]: zeros or a flipped bit change it."""
    found = 0
    for part in pair:
        found = zlib.crc32(part.contiguous().numpy(), found)
    return torch.tensor([found])


def written(path, pair):
    """Whether an image's mean and deviation could be written to the file `path`; says why not."""
    tensors = dict(mean=pair[0], deviation=pair[1], checksum=checksum(pair))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(save(tensors))
        return True
    except OSError as problem:
        reason = problem.strerror or problem
        print(
            f"note: {path.parent} cannot be written ({reason}); latents are held in memory and encoded again next time"
        )
        return False


def read_pair(path):
    """(mean, deviation) that `written` wrote to the file `path`; None where there is none or it is damaged."""
    try:
        tensors = load(path.read_bytes())
        pair = tensors["mean"], tensors["deviation"]
        return pair if torch.equal(checksum(pair), tensors["checksum"]) else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None


@torch.no_grad()
def encode_latents(vae, data, indices, device):
    """Yield (some of the `indices` of images of a Dataset, their means and deviations, float32 [n, channels, h, w]
    each), a few of one size at a time; the next are read meanwhile. UserError naming an image of which the VAE
    makes NaN."""
    at_once = AT_ONCE if device.type == "cuda" else 1
    order = sorted(indices, key=lambda index: data.sizes[index])
    waiting = []
    with tqdm(order, desc="latents", unit="picture", leave=False) as bar:
        for place, pixels in enumerate(prefetch(data.pixels, order)):
            waiting.append(pixels)
            after = order[place + 1 : place + 2]
            if len(waiting) < at_once and after and data.sizes[after[0]] == data.sizes[order[place]]:
                continue
            some = order[place + 1 - len(waiting) : place + 1]
            batch = torch.stack(waiting).to(device, vae.dtype) / 127.5 - 1.0  # [-1, 1]
            latent = vae.encode(batch).latent_dist
            if vae.dtype == torch.float16 and not latent.mean.isfinite().all():
                # The VAE alone, which is gone before the training: its activations are what fp16 cannot hold.
                print("\nnote: the VAE overflows in fp16; it encodes in fp32 from here on")
                vae.float()
                latent = vae.encode(batch.float()).latent_dist
            finite = latent.mean.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                name = data[some[finite.index(False)]].name
                raise UserError(f"the VAE gives NaN for {name}, in fp32 too; is its file damaged?")
            scale = vae.config.scaling_factor
            yield some, latent.mean.float().cpu() * scale, latent.std.float().cpu() * scale
            bar.update(len(some))
            waiting = []


def latent_masks(data, latents, weight):
    """The loss weight of each cell of the latents, by index: float32 [1, h, w] from `weight` outside the subject to 1 on
    it; None if that is 1 everywhere."""
    found = sum(data.mask_path(index) is not None for index in range(len(data)))
    if weight == 1.0:
        if found and first_process():
            print(f"{data.folder}: {found} of {len(data)} images have a mask, which mask_weight 1 leaves unused")
        return None
    found = sum(map(data.has_mask, range(len(data))))
    if not found:
        raise UserError(
            f"mask_weight is {weight}, but no image in {data.folder} has a mask; give preprocess.py transparent "
            "images, or photo.mask.png beside photo.jpg"
        )
    if first_process():
        print(f"{data.folder}: {found} of {len(data)} images have a mask, outside which the loss counts {weight:g}")
    shapes = [latents.shape(index) for index in range(len(data))]
    masks = prefetch(lambda i: data.mask(i, shapes[i][:0:-1]), range(len(data)))
    return [weight + (1 - weight) * mask[None].float() / 255 for mask in masks]
