"""Input that is damaged, malicious or no input at all."""

import json
import os
import pickle
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, assert_one_line, call, finish, forked, make_processed, options, picture
from training_runs import NAME, succeeded

import train
from lib import adapter_files, adapters, dataset, models
from lib.errors import UserError
from lib.evaluation import generation


def large_png(path):
    """A PNG of 40 bytes that says it is 60,000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("{outside}/one.png", "a coat", "outside"),  # an absolute path
        ("../outside/one.png", "a coat", "outside"),
        ("images/loop.png", "a coat", "loop.png is a link to loop.png, which is not there"),
        ("images", "a coat", "there is no images"),
        ("", "a coat", "there is no"),
        ("images/../images/image_01.png", "a coat", "already named in line 1"),
        ("images/other.png", "a coat", "already named in line 1"),  # a link to it
        ("x" * 300, "a coat", "cannot be a file's"),
        ("images/image_01.png\0", "a coat", ""),
        ("images/\ud800.png", "a coat", ""),
        ("images/new.png", "half \ud800", "no text"),
        ("images/new.png", "", "not empty"),
        ("images/new.png", " \n", "not empty"),
        ("images/new.png", None, "must be strings"),
        ("images/new.png", ["a coat"], "must be strings"),
        (7, "a coat", "must be strings"),
        ("images/large.png", "a coat", "large.png cannot be read"),
        ("a\nb\x1b[2J", "a coat", "there is no a\\nb\\x1b[2J in"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, words):
    data = make_processed(tmp_path / "data", 2)
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(5).save(outside / "one.png")
    picture(6).save(data / "images" / "new.png")
    large_png(data / "images" / "large.png")
    (data / "images" / "loop.png").symlink_to("loop.png")
    (data / "images" / "other.png").symlink_to("image_01.png")
    if isinstance(name, str):
        name = name.replace("{outside}", str(outside))
    with (data / "captions.jsonl").open("a") as file:
        file.write(json.dumps(dict(file_name=name, text=text)) + "\n")
    with pytest.raises(UserError) as error:
        dataset.read_dataset(data, 64)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert "large" in words or "line 3" in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"\n\n", b"[" * 100_000, b"null"])
def test_a_listing_that_is_none(tmp_path, content):
    (tmp_path / "captions.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.jsonl"):
        dataset.read_dataset(tmp_path, 64)


def test_a_picture_whose_name_is_not_utf_8_is_skipped(tmp_path):
    (tmp_path / "data").mkdir()
    picture(1).save(tmp_path / "data" / "one.png")
    picture(2).save(os.fsdecode(bytes(tmp_path / "data") + b"/caf\xe9.png"), "PNG")
    folders = dict(data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    done = succeeded(call("preprocess.py", *options(**folders, resolution=64)))
    assert "caf?.png: its name is not UTF-8" in done.stdout


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scheduler/scheduler_config.json", b"{"),
        ("scheduler/scheduler_config.json", b"[]"),
        ("tokenizer/tokenizer.json", b"{"),
        ("tokenizer", None),
        ("unet/config.json", b"{}"),
        ("unet/config.json", b"not json"),
        ("unet/diffusion_pytorch_model.safetensors", b"x" * 100),
        ("text_encoder/config.json", b"{"),
        ("text_encoder/model.safetensors", b""),
        ("vae/config.json", b'{"_class_name": "UNet2DConditionModel"}'),
    ],
)
def test_a_damaged_base_model_is_named(tiny_model, processed_data, tmp_path, file, content):
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    if content is None:
        shutil.rmtree(broken / file)
        (broken / file).mkdir()
    else:
        (broken / file).write_bytes(content)
    config = TINY_RUN | dict(base_model=broken, data_dir=processed_data, output_dir=tmp_path / "out")
    done = call("train.py", *options(**config))
    assert_one_line(done, broken, Path(file).parts[0])
    assert not (tmp_path / "out" / NAME).exists()


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_pickles_and_code_beside_the_weights_are_never_read(tiny_model, processed_data, uninterrupted, tmp_path):
    proof = tmp_path / "proof"
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    adapter = tmp_path / "adapter"
    shutil.copytree(uninterrupted, adapter)
    pickles = [
        model / "unet/diffusion_pytorch_model.bin",
        model / "vae/diffusion_pytorch_model.bin",
        model / "text_encoder/pytorch_model.bin",
        adapter / "pytorch_lora_weights.bin",
    ]
    for path in pickles:
        torch.save(Evil(proof), path)
    code = f"from pathlib import Path\nPath({str(proof)!r}).touch()\n"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (model / part / "evil.py").write_text(code)
        for config in model.glob(f"{part}/*config.json"):
            stated = json.loads(config.read_text())
            kinds = "AutoModel AutoConfig AutoTokenizer".split()
            config.write_text(json.dumps(stated | {"auto_map": dict.fromkeys(kinds, "evil.CLIPTextModel")}))

    def work():
        def refuse(*arguments, **named):
            raise AssertionError("a pickle was read")

        torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
        config = TINY_RUN | dict(base_model=model, data_dir=processed_data, output_dir=tmp_path / "runs")
        sys.argv = ["train.py", *options(**config, checkpoint_every=2)]
        train.main(train.CONFIG, train.__doc__)
        pipeline = generation.load_pipeline(model, torch.float32, "cpu")
        models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        adapters.Applied(adapter_files.read_adapter(adapter), models)

    succeeded(finish(forked(work, tmp_path), tmp_path))
    assert not proof.exists()
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors missing"):
        models.fetch_base_model(str(model))
    (adapter / adapter_files.WEIGHTS).unlink()
    with pytest.raises(UserError):
        adapter_files.read_adapter(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save(Evil(proof), adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        adapter_files.read_adapter(adapter)
    assert not proof.exists()
    torch.load(pickles[0], weights_only=False)  # the trap itself works
    assert proof.exists()
