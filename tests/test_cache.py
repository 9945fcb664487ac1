"""What is computed of the training images once and kept beside them: latents, embeddings, hashes."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_RUN as TINY
from conftest import call, make_processed, options, picture, tiny_vae
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file

from lib import cache, dataset
from lib.dataset import KEPT, read_dataset
from lib.errors import UserError
from lib.evaluation.metrics import clip_scores, similarity
from lib.training import latents, setup


@pytest.fixture
def data(tmp_path):
    return make_processed(tmp_path / "processed", 6)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(3)
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    return tmp_path / "model"


def encoded(data, model, monkeypatch, dtype=torch.float32):
    """(latents of the data set in `data`, names of the images that the VAE saw)."""
    seen, whole = [], setup.encode_latents

    def watched(vae, found, indices, device):
        seen.extend(found[i].name for i in indices)
        return whole(vae, found, indices, device)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "encode_latents", watched)
        rows = read_dataset(data, 64)
        return setup.image_latents(model, rows, dtype, Accelerator(cpu=True)), seen


def as_before(data, model):
    """Mean and deviation of each image by the plain code: the VAE once an image."""
    vae = latents_vae(model)
    found = []
    for path in sorted((data / "images").glob("*.png")):
        pixels = dataset.read_pixels(path, (64, 64))
        with torch.no_grad():
            latent = vae.encode(pixels[None].to(torch.float32) / 127.5 - 1.0).latent_dist
        scale = vae.config.scaling_factor
        found.append((latent.mean.float()[0] * scale, latent.std.float()[0] * scale))
    return found


def latents_vae(model):
    return AutoencoderKL.from_pretrained(model / "vae")


def equal(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for index, pair in enumerate(expected) for a, b in zip(found[index], pair, strict=True)
    )


def kept_files(data):
    return sorted((data / KEPT).glob("*/*"))


def test_latents_are_the_plain_codes_and_are_encoded_once(data, model, monkeypatch):
    expected = as_before(data, model)
    found, seen = encoded(data, model, monkeypatch)
    assert len(seen) == 6
    assert equal(found, expected)
    again, seen = encoded(data, model, monkeypatch)
    assert seen == []
    assert equal(again, expected)
    # Files that others can read, and nothing half beside them.
    files = kept_files(data)
    assert len(files) == 6
    for path in files:
        assert load_file(path)["mean"].shape == (4, 8, 8)
    assert sorted(p.name for p in (data / KEPT).iterdir()) == sorted([files[0].parent.name, "pictures.json"])


def test_only_new_pictures_are_encoded_whatever_they_are_called(data, model, monkeypatch):
    encoded(data, model, monkeypatch)
    images = data / "images"
    images.joinpath("image_01.png").unlink()
    images.joinpath("image_06.png").rename(images / "image_01.png")
    picture(77).save(images / "image_03.png")
    rows = (data / "captions.jsonl").read_text().splitlines()
    (data / "captions.jsonl").write_text("\n".join(rows[:5]) + "\n")
    found, seen = encoded(data, model, monkeypatch)
    assert seen == ["images/image_03.png"]
    assert equal(found, as_before(data, model))
    assert len(kept_files(data)) == 5
    # The same images in another order need no VAE.
    (data / "captions.jsonl").write_text("\n".join(rows[4::-1]) + "\n")
    found, seen = encoded(data, model, monkeypatch)
    assert seen == []
    assert equal(found, as_before(data, model)[::-1])


def test_another_vae_or_precision_has_latents_of_its_own(data, model, monkeypatch):
    encoded(data, model, monkeypatch)
    _, seen = encoded(data, model, monkeypatch, torch.bfloat16)
    assert len(seen) == 6
    torch.manual_seed(4)
    tiny_vae().save_pretrained(model / "vae")
    found, seen = encoded(data, model, monkeypatch)
    assert len(seen) == 6
    assert equal(found, as_before(data, model))
    assert len({path.parent for path in kept_files(data)}) == 3
    assert len(kept_files(data)) == 18


def zeroed(content):
    return content[:-64] + bytes(64)


def flipped(content):
    return content[:-7] + bytes([content[-7] ^ 16]) + content[-6:]


def cut(content):
    return content[:-1]


@pytest.mark.parametrize(
    "damage",
    [
        zeroed,
        flipped,
        cut,
        lambda content: b"",
        lambda content: b"\xff" * 300,
        lambda content: bytes(len(content)),
        lambda content: content.replace(b'"mean"', b'"none"'),
    ],
)
def test_damaged_latents_are_named_and_encoded_again(data, model, monkeypatch, capsys, damage):
    encoded(data, model, monkeypatch)
    path = kept_files(data)[2]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    found, seen = encoded(data, model, monkeypatch)
    assert len(seen) == 1
    assert "1 cached latents in" in capsys.readouterr().out
    assert equal(found, as_before(data, model))
    assert path.read_bytes() == whole


def test_an_interruption_costs_one_picture(data, model, monkeypatch):
    whole = setup.encode_latents

    def interrupted(*arguments):
        for number, some in enumerate(whole(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield some

    with monkeypatch.context() as patch:
        patch.setattr(setup, "encode_latents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup.image_latents(model, read_dataset(data, 64), torch.float32, Accelerator(cpu=True))
    assert len(kept_files(data)) == 4
    found, seen = encoded(data, model, monkeypatch)
    assert len(seen) == 2
    assert equal(found, as_before(data, model))


def test_a_full_disk_is_said_once_and_costs_nothing(data, model, monkeypatch, capsys):
    whole, room = Path.write_bytes, [2]

    def full(path, content):
        if ".safetensors" in path.name:
            room[0] -= 1
            if room[0] < 0:
                whole(path, content[:100])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        found, _ = encoded(data, model, monkeypatch)
    assert equal(found, as_before(data, model))
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert len(kept_files(data)) == 2  # and nothing half beside them
    assert len(encoded(data, model, monkeypatch)[1]) == 4


def test_latents_that_do_not_fit_into_memory_are_read_when_asked_for(data, model, monkeypatch):
    monkeypatch.setattr(latents, "IN_MEMORY", 5000)
    found, _ = encoded(data, model, monkeypatch)
    assert len(found.held) == 2
    assert equal(found, as_before(data, model))
    kept_files(data)[0].parent.rename(data / "elsewhere")
    with pytest.raises(UserError, match="is missing or damaged since training began"):
        equal(found, as_before(data, model))


def test_what_a_killed_run_left_goes(data, model, monkeypatch):
    encoded(data, model, monkeypatch)
    folder = kept_files(data)[0].parent
    old, new = folder / ".a.safetensors.77", folder / ".b.safetensors.78"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    picture(77).save(data / "images" / "image_03.png")
    encoded(data, model, monkeypatch)
    names = {path.name for path in kept_files(data)}
    assert len(names) == 7
    assert new.name in names
    assert {path.name for path in (data / KEPT).iterdir()} == {folder.name, "pictures.json"}


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(data, model, monkeypatch, capsys):
    (data / KEPT).write_text("a file where the folder would be")
    found, _ = encoded(data, model, monkeypatch)
    assert equal(found, as_before(data, model))
    assert capsys.readouterr().out.count("cannot be written") == 2  # latents and images.json


def test_pictures_are_read_again_only_where_they_changed(data, monkeypatch):
    read, whole = [], dataset.read_pixels
    monkeypatch.setattr(dataset, "read_pixels", lambda path, *rest: read.append(path.name) or whole(path, *rest))
    first = read_dataset(data, 64)
    assert len(read) == 6
    expected = hashlib.sha256()
    for path in sorted((data / "images").iterdir()):
        pixels = np.ascontiguousarray(whole(path, (64, 64)).numpy())
        expected.update(b"a holographic raincoat\0" + pixels.tobytes())
    assert first.sha256 == expected.hexdigest()
    read.clear()
    assert read_dataset(data, 64).sha256 == first.sha256
    assert read == []
    # Another image of the same size on disk, a little later.
    changed = data / "images" / "image_02.png"
    state, content = changed.stat(), changed.read_bytes()
    picture(50).save(changed)
    longer = max(len(content), changed.stat().st_size)
    changed.write_bytes(changed.read_bytes().ljust(longer, b"\0"))
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 10**7))
    assert read_dataset(data, 64).sha256 != first.sha256
    assert read_dataset(data, 32).sha256 != first.sha256
    (data / KEPT / "pictures.json").write_text('{"images": 3, "data": {}}')
    changed.write_bytes(content)
    assert read_dataset(data, 64).sha256 == first.sha256


def test_a_picture_edited_with_its_size_and_time_kept_is_read_again(tmp_path):
    data = make_processed(tmp_path / "processed", 3)
    path = data / "images" / "image_02.png"
    picture(2).save(path, "BMP")
    first, state = read_dataset(data, 64), path.stat()
    picture(50).save(path, "BMP")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    second = read_dataset(data, 64)
    assert second.sha256 != first.sha256
    assert second.key(1) != first.key(1)


@pytest.mark.parametrize("fact", [3, [], "words", [1, 2], [1, 2, "old"], [None] * 4])
def test_what_is_known_of_pictures_may_hold_anything(data, fact):
    first = read_dataset(data, 64)
    path = data / KEPT / "pictures.json"
    record = json.loads(path.read_text())
    record["pictures"]["images/image_02.png"] = fact
    path.write_text(json.dumps(record))
    assert read_dataset(data, 64).sha256 == first.sha256


def test_a_run_with_kept_latents_is_the_run_that_made_them(tiny_model, data, tmp_path):
    adapters = []
    for name in ("made", "kept", "other_seed"):
        config = TINY | dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path / name)
        done = call("train.py", *options(**config, seed=43 if name == "other_seed" else 42))
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / name).iterdir()
        adapters.append(load_file(folder / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert any(not torch.equal(adapters[0][key], adapters[2][key]) for key in adapters[0])
    assert len(kept_files(data)) == 6


def test_embeddings_of_training_pictures_are_kept(data, tiny_clip, tmp_path, monkeypatch, capsys):
    asked, whole = [], clip_scores.image_embeddings
    monkeypatch.setattr(
        clip_scores, "image_embeddings", lambda images, *rest: asked.append(len(images)) or whole(images, *rest)
    )
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    clip = clip_scores.load_clip(folder)

    def embedded():
        asked.clear()
        found = similarity.cached_training_embeddings(read_dataset(data, 64), clip)
        return [part.tolist() for part in found], sum(asked)

    rows = read_dataset(data, 64)
    plain = similarity.training_embeddings([rows.image(i) for i in range(6)], clip)
    first, count = embedded()
    assert count == 12
    assert first == [part.tolist() for part in plain]
    assert embedded() == (first, 0)
    (path,) = (data / KEPT).glob("embeddings_*.npz")
    content = bytearray(path.read_bytes())
    content[content.index(plain[0].tobytes()) + 9] ^= 1
    path.write_bytes(content)
    assert embedded() == (first, 12)
    assert "is damaged" in capsys.readouterr().out
    one = np.zeros((6, 16), np.float32)
    for write in (
        lambda: path.write_text("a text"),
        lambda: path.write_bytes(b""),
        lambda: np.save(path.open("wb"), one),
        lambda: np.savez(path.open("wb"), embeddings=np.array(1), mirrored=np.array(1), key="x"),
        lambda: np.savez(path.open("wb"), embeddings=one, key="x"),
    ):
        write()
        assert embedded() == (first, 12)
    picture(91).save(data / "images" / "image_04.png")
    assert embedded()[1] == 12


def test_a_file_is_known_by_its_whole_content_and_read_once(tmp_path, monkeypatch):
    path, reads, whole = tmp_path / "model.safetensors", [], cache.sha256_file
    monkeypatch.setattr(cache, "sha256_file", lambda path: reads.append(path) or whole(path))
    monkeypatch.setattr(cache, "CLOCK_TICK", 0)
    path.write_bytes(bytes(3 * 2**20))
    before = path.stat()
    (tmp_path / "link").symlink_to(path)
    time.sleep(0.02)  # more than a tick of the clock
    assert cache.content_digest(path) == hashlib.sha256(bytes(3 * 2**20)).hexdigest()
    assert cache.content_digest(tmp_path / "link") == cache.content_digest(path)
    assert len(reads) == 1
    # Another content of the same size, the same ends and, as after a copy that keeps it, the same time.
    changed = bytearray(3 * 2**20)
    changed[2**20 + 2**19] = 1
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.content_digest(path) == hashlib.sha256(changed).hexdigest()
    assert len(reads) == 2


def test_weights_hashed_ahead_are_read_once(tmp_path, monkeypatch):
    reads, begun, whole = [], threading.Event(), cache.sha256_file

    def slow(path):
        reads.append(os.path.basename(path))
        begun.set()
        time.sleep(0.2)
        return whole(path)

    monkeypatch.setattr(cache, "sha256_file", slow)
    monkeypatch.setattr(cache, "CLOCK_TICK", 0)
    path = tmp_path / "unet" / "model.fp16.safetensors"
    path.parent.mkdir()
    for name in (path.name, "model.safetensors"):  # in half precision alone, as it is loaded
        (path.parent / name).write_bytes(b"weights")
    cache.hash_ahead(tmp_path)
    cache.hash_ahead("owner/name")
    assert begun.wait(60)
    assert cache.content_digest(path) == hashlib.sha256(b"weights").hexdigest()
    assert reads == [path.name]


def test_a_process_forked_while_weights_are_hashed_does_not_wait_for_them(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    with cache._hashing:
        child = os.fork()
        if not child:
            os._exit(cache.content_digest(path) != hashlib.sha256(b"weights").hexdigest())
        deadline = time.monotonic() + 60
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.02)
    if not ended[0]:
        os.kill(child, 9)
    assert ended == (child, 0)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"[" * 10**5, b"\xff"])
def test_a_damaged_digest_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(cache, "CLOCK_TICK", -(10**12))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    expected = cache.content_digest(path)
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    record = Path(constants.HF_HOME) / "digests" / f"{name}.json"
    record.write_bytes(damage)
    assert cache.content_digest(path) == expected
    assert json.loads(record.read_text())["sha256"] == expected


def test_a_file_of_this_moment_is_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"1", b"2", b"3"):  # within one tick of a coarse clock all times are equal
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))
        assert cache.content_digest(path) == hashlib.sha256(content).hexdigest()


def test_a_vae_that_overflows_in_fp16_encodes_in_fp32(data, model, monkeypatch, capsys):
    """And nothing else does."""
    whole = AutoencoderKL.encode

    def encode(vae, batch):
        found = whole(vae, batch)
        if vae.dtype == torch.float16:
            found.latent_dist.mean.fill_(float("inf"))
        return found

    expected = as_before(data, model)
    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    found, _ = encoded(data, model, monkeypatch, torch.float16)
    assert "overflow in fp16" in capsys.readouterr().out
    for index, (mean, _) in enumerate(expected):  # of weights that were rounded to fp16
        torch.testing.assert_close(found[index][0], mean, rtol=2e-2, atol=2e-2)
