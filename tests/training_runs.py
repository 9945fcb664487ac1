"""Training runs in forks of the test process, which tests kill, signal and compare."""

import os
import signal
import socket
import sys

import torch
from conftest import finish, forked, options
from safetensors.torch import load_file

import train
from lib import adapter_files, errors

NAME = "lora_weights_rank_32"


def start_training(folder, config, at=None, prepare=lambda: None):
    """train.py with `config` in a fork; `at` is {step: what to call when that step begins}."""

    def work():
        prepare()
        factor = train.learning_rate_factor

        def watched(step, *rest):
            (at or {}).get(step, lambda: None)()
            return factor(step, *rest)

        train.learning_rate_factor = watched
        sys.argv = ["train.py", *options(**config)]
        errors.run_script(lambda: train.main(train.CONFIG, train.__doc__))

    return forked(work, folder)


def training(folder, config, at=None):
    return finish(start_training(folder, config, at), folder)


def send(*numbers):
    """Send these signals to the process itself, one after another."""

    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


kill = send(signal.SIGKILL)


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_equal_runs(a, b):
    """Two finished run folders hold the same weights, bit for bit, and the same log."""
    ours, theirs = load_file(a / adapter_files.WEIGHTS), load_file(b / adapter_files.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


def training_in_two(folder, config, at=None, other=None):
    """`training` in two processes, of which the second may have `other` settings: how both ended."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    children = []
    for rank, mine in enumerate((config, config | (other or {}))):
        places = dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)

        def prepare(places=places):
            os.environ.update({name: str(value) for name, value in places.items()})

        children.append(start_training(folder / str(rank), mine, at, prepare))
    return [finish(child, folder / str(rank)) for rank, child in enumerate(children)]
