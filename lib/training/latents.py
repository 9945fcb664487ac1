"""The pictures' latents: encoded once, kept in the training set's folder, read from there by later runs.

The VAE gives a distribution for each picture, of which training draws anew at every step, so its mean and its
deviation are kept, in float32. They lie in one safetensors file for each VAE, precision, kind of device and
resolution, which is mapped into memory: what a step does not read takes none. A picture is known by its bytes, so new ones
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
    """Mean and deviation of each picture's latent distribution, scaled as the UNet expects them: `latents[index]` is
    that pair, float32 [channels, h, w] each.

    `groups` is {shape: (means, deviations)}, [n, *shape] each, and `places` says for each index in which group, by its
    shape, and where in it the picture lies.
    """

    def __init__(self, groups, places):
        self.groups, self.places = groups, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        shape, place = self.places[index]
        means, deviations = self.groups[shape]
        return means[place], deviations[place]

    def shape(self, index):
        return self.places[index][0]

    def shapes(self):
        """The shapes that occur, sorted."""
        return sorted({shape for shape, _ in self.places})


def group_name(shape):
    """What the tensors of a group of latents are called by in the file: 4x64x64."""
    return "x".join(map(str, shape))


def kept_path(data, vae_folder, dtype, device):
    """Where the latents of a Dataset are kept, for what may change their numbers."""
    made_with = [model_digest(vae_folder), str(dtype), device.type, data.resolution]
    made_with += [version("torch"), version("diffusers")]
    key = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]
    return data.folder / KEPT / f"{key}.safetensors"


def checksums(means, deviations):
    """Sums over each picture's bits as whole numbers, int64 [n]: quick, and zeros or a flipped bit change it."""
    both = [part.flatten(1).view(torch.int64).sum(dim=1) for part in (means, deviations)]
    return both[0] * 3 + both[1]


def read_kept(path):
    """(places, groups) of a file that `write_kept` wrote: {key of a picture: (shape, its place)}, without those that
    are damaged, and {shape: (means, deviations)}; both empty where there is none."""
    places, groups, damaged = {}, {}, 0
    try:
        with safe_open(path, framework="pt") as file:
            for name, keys in json.loads(file.metadata()["pictures"]).items():
                shape = tuple(int(side) for side in name.split("x"))
                pair = file.get_tensor(f"{name}.means"), file.get_tensor(f"{name}.deviations")
                whole = (checksums(*pair) == file.get_tensor(f"{name}.checksums")).tolist()
                for place, (key, good) in enumerate(zip(keys, whole, strict=True)):
                    if good:
                        places[key] = shape, place
                groups[shape] = pair
                damaged += whole.count(False)
    except (
        OSError,
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ):
        if path.exists():
            print(f"note: {path} is damaged; the pictures are encoded again")
        return {}, {}
    if damaged:
        print(f"note: {damaged} latents in {path} are damaged and encoded again")
    return places, groups


def latent_shape(vae, size):
    """(channels, h, w) of the latents of a picture of `size`, (width, height) in pixels."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, size[1] // factor, size[0] // factor


@torch.no_grad()
def encode_latents(vae, data, indices, device):
    """Yield (some of the `indices` of pictures of a Dataset, their means and deviations, float32 [n, channels, h, w]
    each), a few of one size at a time; the next are read meanwhile. UserError naming a picture of which the VAE
    makes NaN."""
    at_once = AT_ONCE if device.type == "cuda" else 1
    order = sorted(indices, key=lambda index: data.sizes[index])
    waiting = []
    with tqdm(order, desc="latents", unit="picture", leave=False) as bar:
        for place, pixels in enumerate(ahead(data.pixels, order)):
            waiting.append(pixels)
            after = order[place + 1 : place + 2]
            if (
                len(waiting) < at_once
                and after
                and data.sizes[after[0]] == data.sizes[order[place]]
            ):
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


def layout(data, shape_of):
    """(places, tensors, header, length) of the file of a Dataset's latents, in the format of safetensors: [(shape, place
    in its group)], {name: what the header says of a tensor}, the bytes before the tensors and the number of theirs.
    `shape_of` is a function of a size."""
    places, keys, tensors, end = [], {}, {}, 0
    for index, size in enumerate(data.sizes):
        mine = keys.setdefault(shape_of(size), [])
        places.append((shape_of(size), len(mine)))
        mine.append(data.key(index))
    for shape, mine in keys.items():
        name, numbers = group_name(shape), len(mine) * int(np.prod(shape))
        for part, dtype, dims, length in (
            ("checksums", "I64", [len(mine)], 8 * len(mine)),
            ("means", "F32", [len(mine), *shape], 4 * numbers),
            ("deviations", "F32", [len(mine), *shape], 4 * numbers),
        ):
            offsets = [end, end + length]
            tensors[f"{name}.{part}"] = dict(dtype=dtype, shape=dims, data_offsets=offsets)
            end += length
    pictures = {group_name(shape): mine for shape, mine in keys.items()}
    header = json.dumps({"__metadata__": {"pictures": json.dumps(pictures)}} | tensors).encode()
    header += b" " * (-len(header) % 8)
    return places, tensors, len(header).to_bytes(8, "little") + header, end


def write_kept(path, data, shape_of, kept, encode):
    """Write the latents of a Dataset to the file `path`: those in `kept`, which read_kept gave, and of the others what
    `encode`, a function of their indices, yields.

    The file is filled where it lies, so that their number costs no memory.
    """
    known, groups = kept
    places, tensors, header, length = layout(data, shape_of)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + length)
    new = {}
    for name, tensor in tensors.items():
        dtype, start = {"I64": "<i8", "F32": "<f4"}[tensor["dtype"]], tensor["data_offsets"][0]
        mapped = np.memmap(path, dtype, "r+", len(header) + start, tuple(tensor["shape"]))
        new[name] = torch.from_numpy(mapped)
    missing = []

    def put(index, mean, deviation):
        shape, place = places[index]
        name = group_name(shape)
        new[f"{name}.means"][place], new[f"{name}.deviations"][place] = mean, deviation

    for index in range(len(data)):
        if data.key(index) in known:
            shape, place = known[data.key(index)]
            put(index, *(part[place] for part in groups[shape]))
        else:
            missing.append(index)
    for some, means, deviations in encode(missing):
        for index, mean, deviation in zip(some, means, deviations, strict=True):
            put(index, mean, deviation)
    for name in {name.rpartition(".")[0] for name in new}:
        new[f"{name}.checksums"][:] = checksums(new[f"{name}.means"], new[f"{name}.deviations"])
    new.clear()
    del mapped
    flush(path)


def arranged(kept, data):
    """The Latents of all pictures of a Dataset out of what read_kept gave, or None if some are missing there."""
    known, groups = kept
    keys = [data.key(index) for index in range(len(data))]
    return Latents(groups, [known[key] for key in keys]) if known.keys() >= set(keys) else None


def make_latents(path, data, shape_of, kept, encode):
    """Encode what is missing in `kept`, write the file `path` anew and return the Latents of a Dataset; where it
    cannot be written, and where `path` is None, they are held in memory."""
    if path is not None:
        keep(path, lambda beside: write_kept(beside, data, shape_of, kept, encode))
        if (latents := arranged(read_kept(path), data)) is not None:
            return latents
    found = {}
    for some, means, deviations in encode(list(range(len(data)))):
        found |= {i: pair for i, *pair in zip(some, means, deviations, strict=True)}
    groups, places = {}, []
    for index in range(len(data)):
        mine = groups.setdefault(tuple(found[index][0].shape), [])
        places.append((tuple(found[index][0].shape), len(mine)))
        mine.append(found.pop(index))
    stacked = {
        shape: tuple(torch.stack(part) for part in zip(*pairs, strict=True))
        for shape, pairs in groups.items()
    }
    return Latents(stacked, places)


def latent_masks(data, latents, weight):
    """The loss weight of each cell of the latents, by index: float32 [1, h, w] from `weight` outside the subject to 1 on
    it; None if that is 1 everywhere."""
    if weight == 1.0:
        return None
    if not any(data.mask_path(index).is_file() for index in range(len(data))):
        raise UserError(
            f"mask_weight is {weight}, but no picture in {data.folder} has a mask; give preprocess.py transparent "
            "pictures, or photo.mask.png beside photo.jpg"
        )
    shapes = [latents.shape(index) for index in range(len(data))]
    masks = ahead(lambda i: data.mask(i, shapes[i][:0:-1]), range(len(data)))
    return [weight + (1 - weight) * mask[None].float() / 255 for mask in masks]
