"""Which settings make two runs the same, also where CONFIG gained a key between them."""

import json

import pytest
from conftest import ROOT

import train
from lib import run_config
from lib.errors import UserError
from lib.evaluation.metrics.scores import Run
from lib.evaluation.runs import group_runs
from lib.training import checkpoints, run_folder

KEY, BEFORE, CHANGED = "min_snr_gamma", None, 5.0


@pytest.fixture
def added(monkeypatch):
    """CONFIG gains a key: (a configuration from before, one with the value that does the same, one with another)."""
    monkeypatch.setattr(run_config, "ADDED", run_config.ADDED | {KEY: BEFORE})
    earlier = json.loads(json.dumps(train.CONFIG))
    return earlier, earlier | {KEY: BEFORE}, earlier | {KEY: CHANGED}


def run_of(name, seed, config):
    training = config | dict(seed=seed, data_sha256="x")
    return Run(name, None, {"metadata": {"seed": str(seed)}, "training": training}, [], [])


def test_seeds_from_before_and_after_a_new_key_are_one_experiment(added):
    earlier, same, changed = added
    runs = [run_of("a_seed1", 1, earlier), run_of("a_seed2", 2, same), run_of("b_seed3", 3, changed)]
    assert [[run.name for run in group] for group in group_runs(runs).values()] == [["a_seed1", "a_seed2"], ["b_seed3"]]
    with pytest.raises(UserError, match=f"a_seed1 and a_seed2 .* differ in {KEY}"):
        group_runs([run_of("a_seed1", 1, earlier), run_of("a_seed2", 2, changed)])


def test_a_run_that_was_interrupted_before_a_new_key_continues(added, tmp_path):
    earlier, same, changed = added
    state = dict(identity=earlier, step=3)
    assert checkpoints.continued(state, same, tmp_path, print) == []
    with pytest.raises(UserError, match=f"differs from this one in {KEY}: None then, 5.0 now"):
        checkpoints.continued(state, changed, tmp_path, print)


def test_the_note_about_a_finished_run_names_what_really_differs(added, tmp_path):
    earlier, same, changed = added
    (tmp_path / "config.json").write_text(json.dumps(dict(config=earlier)))
    printed = []
    for config in (same, changed):
        run_folder.note_replaced(tmp_path, config, printed.append)
    assert "of the same configuration" in printed[0]
    assert f"({KEY}: None then, 5.0 now)" in printed[1]


def test_every_key_that_a_published_run_lacks_has_its_earlier_value():
    """A key of CONFIG that is missing in ADDED would part all earlier runs from new ones."""
    paths = sorted((ROOT / "lora_weights" / "study").rglob("config.json"))
    assert paths
    for path in paths:
        config = json.loads(path.read_text())["config"]
        known = run_config.with_added(config).keys() | set(run_config.WITHOUT_EFFECT)
        assert train.CONFIG.keys() <= known, f"lib/run_config.py: ADDED lacks {train.CONFIG.keys() - known}"


def test_keys_without_effect_are_keys():
    assert set(run_config.WITHOUT_EFFECT) <= train.CONFIG.keys()
    assert run_config.ADDED.keys() - {"optimizer"} <= train.CONFIG.keys()
