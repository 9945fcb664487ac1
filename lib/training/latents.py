"""The pictures' latents: encoded once, kept in the training set's folder, read from there by later runs.

The VAE gives a distribution for each picture, of which training draws anew at every step, so its mean and its
deviation are kept, in float32. They lie in one safetensors file for each VAE, precision, kind of device and
size, which is mapped into memory: what a step does not read takes none. A picture is known by its bytes, so new ones
are encoded, and those that are no longer there dropped, whatever they are called.
"""

import hashlib
import json
from importlib.metadata import version

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lib.dataset import KEPT
from lib.errors import UserError
from lib.files import flush
from lib.kept import ahead, keep
from lib.models import model_digest

AT_ONCE = 4  # pictures that a GPU encodes at once; a CPU one, whose result depends on no other then


class Latents:
    """Mean and deviation of each picture's latent distribution, scaled as the UNet expects them.

    `latents[index]` is that pair, float32 [channels, h, w] each; both tensors are [n, channels, h, w].
    """

    def __init__(self, means, deviations):
        self.means, self.deviations = means, deviations

    def __len__(self):
        return len(self.means)

    def __getitem__(self, index):
        return self.means[index], self.deviations[index]

    def shape(self, index):
        return tuple(self.means[index].shape)


def kept_path(data, vae_folder, dtype, device):
    """Where the latents of a Dataset are kept, for what may change their numbers."""
    made_with = [model_digest(vae_folder), str(dtype), device.type, data.resolution]
    made_with += [version("torch"), version("diffusers")]
    key = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]
    return data.folder / KEPT / f"{key}.safetensors"


def checksums(means, deviations):
    """Sums over each picture's bits as whole numbers, int64 [n]: quick, and zeros or a flipped bit change it."""
    both = [x.view(torch.int32).sum(dim=(1, 2, 3), dtype=torch.int64) for x in (means, deviations)]
    return both[0] * 3 + both[1]


def read_kept(path):
    """{SHA-256 of a picture: its number} and the Latents of a file that `write_kept` wrote, without those that are
    damaged; both empty where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["pictures"])
            means, deviations, sums = (
                file.get_tensor(k) for k in ("means", "deviations", "checksums")
            )
        whole = (checksums(means, deviations) == sums).tolist()
        numbers = {n: i for i, (n, good) in enumerate(zip(names, whole, strict=True)) if good}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        if path.exists():
            print(f"note: {path} is damaged; the pictures are encoded again")
        return {}, Latents([], [])
    if not all(whole):
        print(f"note: {whole.count(False)} latents in {path} are damaged and encoded again")
    return numbers, Latents(means, deviations)


def latent_shape(vae, resolution):
    """[channels, h, w] of a picture's latents."""
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, side, side


@torch.no_grad()
def encode_latents(vae, data, indices, device):
    """Yield (mean, deviation), float32 [n, channels, h, w] each, of the pictures `indices` of a Dataset, a few at a
    time; the next are read meanwhile. UserError naming a picture of which the VAE makes NaN."""
    at_once = AT_ONCE if device.type == "cuda" else 1
    waiting = []
    bar = tqdm(indices, desc="latents", unit="picture", leave=False)
    for number, pixels in zip(indices, ahead(data.pixels, indices), strict=True):
        waiting.append((number, pixels))
        if len(waiting) < at_once and number != indices[-1]:
            continue
        batch = torch.stack([pixels for _, pixels in waiting])
        latent = vae.encode(batch.to(device, vae.dtype) / 127.5 - 1.0).latent_dist  # [-1, 1]
        finite = latent.mean.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            name = data[waiting[finite.index(False)][0]].name
            raise UserError(f"the VAE gives NaN for {name}; try --mixed-precision no")
        scale = vae.config.scaling_factor
        yield latent.mean.float().cpu() * scale, latent.std.float().cpu() * scale
        bar.update(len(waiting))
        waiting = []
    bar.close()


def write_kept(path, data, shape, kept, encode):
    """Write the latents of a Dataset, whose pictures have `shape`, to the file `path`: those in `kept`, which
    read_kept gave, and of the others what `encode`, a function of their indices, yields.

    The file is filled where it lies, so that their number costs no memory.
    """
    numbers, latents = kept
    count, size = len(data), int(np.prod(shape)) * 4
    tensors, place = {}, 0
    for name, dtype, dims, length in (
        ("checksums", "I64", [count], 8 * count),
        ("means", "F32", [count, *shape], count * size),
        ("deviations", "F32", [count, *shape], count * size),
    ):
        tensors[name] = dict(dtype=dtype, shape=dims, data_offsets=[place, place + length])
        place += length
    metadata = {"pictures": json.dumps([row.sha256 for row in data])}
    header = json.dumps({"__metadata__": metadata} | tensors).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place)

    def part(name, dtype):
        offset = 8 + len(header) + tensors[name]["data_offsets"][0]
        return torch.from_numpy(np.memmap(path, dtype, "r+", offset, tuple(tensors[name]["shape"])))

    sums, means = part("checksums", "<i8"), part("means", "<f4")
    deviations = part("deviations", "<f4")
    new = []
    for index, row in enumerate(data):
        if row.sha256 in numbers:
            means[index], deviations[index] = latents[numbers[row.sha256]]
        else:
            new.append(index)
    done = 0
    for mean, deviation in encode(new):
        places = new[done : done + len(mean)]
        means[places], deviations[places] = mean, deviation
        done += len(mean)
    sums[:] = checksums(means, deviations)
    del sums, means, deviations
    flush(path)


def arranged(kept, data):
    """The Latents of all pictures of a Dataset out of what read_kept gave, or None if some are missing there."""
    numbers, latents = kept
    if any(row.sha256 not in numbers for row in data):
        return None
    places = [numbers[row.sha256] for row in data]
    if places == list(range(len(latents))):
        return latents  # as they lie in the file
    return Reordered(latents, places)


class Reordered(Latents):
    """Latents by another numbering: picture `index` lies at `places[index]` in the file."""

    def __init__(self, latents, places):
        super().__init__(latents.means, latents.deviations)
        self.places = places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return super().__getitem__(self.places[index])

    def shape(self, index):
        return super().shape(self.places[index])


def make_latents(path, data, shape, kept, encode):
    """Encode what is missing in `kept`, write the file `path` anew and return the Latents of a Dataset; where it
    cannot be written, and where `path` is None, they are held in memory."""
    if path is not None:
        keep(path, lambda beside: write_kept(beside, data, shape, kept, encode))
        if (latents := arranged(read_kept(path), data)) is not None:
            return latents
    parts = list(encode(list(range(len(data)))))
    return Latents(*(torch.cat(part) for part in zip(*parts, strict=True)))
