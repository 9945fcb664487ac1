"""Another optimizer: one function changes, and training, resuming, the model card and the file headers follow."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line
from safetensors import safe_open
from training_runs import NAME, assert_equal_runs, kill, succeeded, training

import train
from lib.training import optimizer, updates


class GrowingSign(torch.optim.Optimizer):
    """Sign descent with all of its state in the parameter groups, as Prodigy keeps its estimate of the rate there."""

    def __init__(self, groups, betas):
        super().__init__(groups, dict(lr=1.0, betas=betas, d=1.0, seen=torch.zeros(())))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert isinstance(group["betas"], tuple)
            for p in group["params"]:
                group["seen"] = group["seen"] + p.grad.abs().mean()
                group["d"] += group["seen"].item()
                p -= group["lr"] * group["d"] * p.grad.sign()


OTHERS = {
    "torch.optim.adamw.AdamW": (
        lambda groups, config: torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.05),
        "AdamW, betas 0.8 and 0.95, weight decay 0.05",
    ),
    f"{__name__}.GrowingSign": (
        lambda groups, config: GrowingSign(groups, (0.8, 0.95)),
        "GrowingSign, betas 0.8 and 0.95",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_trains_resumes_bit_for_bit_and_is_named(exact, tmp_path, monkeypatch, name):
    make, words = OTHERS[name]
    config = exact | dict(gradient_accumulation_steps=1, max_steps=4, checkpoint_every=2, validation_count=0)
    killed = config | dict(output_dir=tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "make_optimizer", make)
        succeeded(training(tmp_path, config | dict(output_dir=tmp_path / "whole")))
        assert training(tmp_path, killed, {3: kill}).returncode < 0
    assert_one_line(training(tmp_path, killed), f"optimizer: {name} then, bitsandbytes.optim.adamw.AdamW8bit now")
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "make_optimizer", make)
        assert "after step 2" in succeeded(training(tmp_path, killed)).stdout
    folder = tmp_path / "killed" / NAME
    assert_equal_runs(folder, tmp_path / "whole" / NAME)
    assert json.loads((folder / "config.json").read_text())["optimizer"] == name
    card = (folder / "README.md").read_text()
    assert f"{words} |" in card and "8-bit" not in card
    with safe_open(folder / f"{NAME}.safetensors", "pt") as file:
        assert file.metadata()["ss_optimizer"] == name


def test_the_recipes_optimizer_in_words():
    record = optimizer.optimizer_record(train.CONFIG)
    assert record["name"] == "bitsandbytes.optim.adamw.AdamW8bit"
    assert record["settings"] == "8-bit AdamW, betas 0.9 and 0.999, weight decay 0.01"


def test_another_optimizer_on_a_gpu_has_plain_updates_with_a_note(capsys):
    part = SimpleNamespace(flat=torch.nn.Parameter(torch.zeros(5000)), learning_rate=1e-3)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    micro = SimpleNamespace(trained=dict(unet=part))
    made = updates.make_updates(micro, torch.optim.AdamW([part.flat]), gpu, None, 1, None)
    assert type(made) is updates.PlainUpdates
    assert "note: AdamW updates without a CUDA graph" in capsys.readouterr().out


def test_groups_with_different_settings_have_plain_updates():
    """The kernel of the captured update has one set of betas for all vectors."""
    parts = {name: SimpleNamespace(flat=torch.nn.Parameter(torch.zeros(5000))) for name in ("unet", "text_encoder")}
    groups = [dict(params=[part.flat], lr=1e-3) for part in parts.values()]
    eight_bit = optimizer.make_optimizer(groups, train.CONFIG)
    assert len(optimizer.eight_bit_states(eight_bit, parts)) == 2
    eight_bit.param_groups[1]["weight_decay"] = 0.5
    assert optimizer.eight_bit_states(eight_bit, parts) is None
