"""The latents of the images: encoded once, cached in the training set's folder, read by later runs.

The VAE returns a distribution per image, from which training samples at every step, so its mean and standard deviation
are cached, in float32. Each image has its own file, so an interruption costs one image. There is a folder per VAE,
precision, kind of device and resolution. Images are identified by their bytes, not their names: new ones are encoded,
and the files of removed ones deleted.
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

AT_ONCE = 4  # images that a GPU encodes together; a CPU encodes one, so that its result depends on no other
IN_MEMORY = 2**30  # bytes of latents, 8,000 images of 512x512; the rest is read at every step


class Latents:
    """Mean and standard deviation of each image's latent distribution, scaled as the UNet expects: `latents[index]` is
    that pair, float32 [channels, h, w] each.

    Intact files in `folder` are available at once; `missing` are the indices of the others, for `add`.
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
            print(f"note: {damaged} cached latents in {folder} are damaged and will be encoded again")

    @property
    def missing(self):
        return [index for index, shape in enumerate(self.known_shapes) if shape is None]

    def hold(self, index, pair, on_disk=True):
        """Add an image's pair, kept in memory if there is room or it is not on disk."""
        self.known_shapes[index] = tuple(pair[0].shape)
        size = sum(part.nbytes for part in pair)
        if not on_disk or size <= self.room:
            self.held[index] = pair
            self.room -= size

    def add(self, encoded, write):
        """Add the pairs of `encoded`, from `encode_latents`, and `write` them. After a failed write, as on a full disk, a
        note is printed and the rest stays in memory."""
        for some, means, deviations in encoded:
            for index, *pair in zip(some, means, deviations, strict=True):
                pair = tuple(part.clone() for part in pair)  # copies, without the rest of the batch
                write = write and written(self.paths[index], pair)
                self.hold(index, pair, on_disk=write)
        if write:
            self.drop_others()

    def drop_others(self):
        """Remove the files of images that are gone."""
        keep, hour = {path.name for path in self.paths}, 3600
        for path in [path for path in self.folder.iterdir() if path.name not in keep]:
            with contextlib.suppress(OSError):
                # A file that another run is writing has a hidden name.
                if path.name[0] != "." or time.time() - path.stat().st_mtime > hour:
                    path.unlink()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        pair = self.held.get(index) or read_pair(self.paths[index])
        if pair is None:
            raise UserError(
                f"{self.paths[index]} is missing or damaged since training began; the same command continues from the "
                "last checkpoint"
            )
        return pair

    def shape(self, index):
        return self.known_shapes[index]

    def shapes(self):
        """The distinct shapes, sorted."""
        return sorted(set(self.known_shapes))


def kept_folder(data, vae_folder, dtype, device):
    """The cache folder of a Dataset's latents. Its name hashes everything that may change their numbers."""
    made_with = [model_digest(vae_folder), str(dtype), device.type, data.resolution]
    made_with += [version("torch"), version("diffusers")]
    return data.folder / KEPT / hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]


def checksum(pair):
    """CRC-32 of the bytes of mean and deviation, int64 [1]; detects zero-filled files and flipped bits."""
    crc = 0
    for part in pair:
        crc = zlib.crc32(part.contiguous().numpy(), crc)
    return torch.tensor([crc])


def written(path, pair):
    """Write an image's mean and deviation to the file `path`; False, with a note, if that fails."""
    tensors = dict(mean=pair[0], deviation=pair[1], checksum=checksum(pair))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors))
        return True
    except OSError as problem:
        reason = problem.strerror or problem
        print(
            f"note: {path.parent} cannot be written ({reason}); latents stay in memory and are encoded again next time"
        )
        return False


def read_pair(path):
    """(mean, deviation) from a file of `written`; None if it is missing or damaged."""
    try:
        tensors = load(path.read_bytes())
        pair = tensors["mean"], tensors["deviation"]
        return pair if torch.equal(checksum(pair), tensors["checksum"]) else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None


@torch.no_grad()
def encode_latents(vae, data, indices, device):
    """Yield (some of `indices`, their means, their deviations), float32 [n, channels, h, w] each, a few images of one size
    at a time. The next are read meanwhile. Raises UserError naming an image for which the VAE returns NaN."""
    at_once = AT_ONCE if device.type == "cuda" else 1
    order = sorted(indices, key=lambda index: data.sizes[index])
    waiting = []
    with tqdm(order, desc="latents", unit="image", leave=False) as bar:
        for place, pixels in enumerate(prefetch(data.pixels, order)):
            waiting.append(pixels)
            after = order[place + 1 : place + 2]
            if len(waiting) < at_once and after and data.sizes[after[0]] == data.sizes[order[place]]:
                continue
            some = order[place + 1 - len(waiting) : place + 1]
            batch = torch.stack(waiting).to(device, vae.dtype) / 127.5 - 1.0  # [-1, 1]
            latent = vae.encode(batch).latent_dist
            if vae.dtype == torch.float16 and not latent.mean.isfinite().all():
                # Only the VAE, which is freed before training.
                print("\nnote: the VAE's activations overflow in fp16; it encodes in fp32 from here on")
                vae.float()
                latent = vae.encode(batch.float()).latent_dist
            finite = latent.mean.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                name = data[some[finite.index(False)]].name
                raise UserError(f"the VAE returns NaN for {name}, in fp32 too; is the file damaged?")
            scale = vae.config.scaling_factor
            yield some, latent.mean.float().cpu() * scale, latent.std.float().cpu() * scale
            bar.update(len(some))
            waiting = []


def latent_masks(data, latents, weight):
    """The loss weight of each latent cell, by index: float32 [1, h, w], 1 on the subject and `weight` outside; None if
    `weight` is 1."""
    if weight == 1.0:
        count = sum(data.mask_path(index) is not None for index in range(len(data)))
        if count and first_process():
            print(f"{data.folder}: {count} of {len(data)} images have a mask, unused at mask_weight 1")
        return None
    count = sum(map(data.has_mask, range(len(data))))
    if not count:
        raise UserError(
            f"mask_weight is {weight}, but no image in {data.folder} has a mask; add them to data/ as transparent "
            "images or photo.mask.png next to photo.jpg, and run preprocess.py"
        )
    if first_process():
        print(f"{data.folder}: {count} of {len(data)} images have a mask, outside which the loss counts {weight:g}")
    shapes = [latents.shape(index) for index in range(len(data))]
    masks = prefetch(lambda i: data.mask(i, shapes[i][:0:-1]), range(len(data)))
    return [weight + (1 - weight) * mask[None].float() / 255 for mask in masks]
