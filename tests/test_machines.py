"""Several processes: on two machines, on images of several shapes, and with what does not fit together; and a GPU that is
not used."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import EXACT, ROOT, TINY_RUN, assert_one_line, call, options
from safetensors.torch import load_file
from test_buckets import mixed
from test_preprocess import prepare
from test_train import relative_difference, weights
from training_runs import NAME, assert_equal_runs, kill, succeeded, training, training_in_two

import train
from lib import adapter_files, files
from lib.training import processes

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2".split()


@contextlib.contextmanager
def two_machines():
    """(how a command begins on each of two machines, their environments, the first one's address, a port).

    Two network namespaces with a cable between them; where these cannot be had (they need root) two launchers on
    this machine, which is said.
    """
    names = [f"machine_{os.getpid()}_{number}" for number in range(2)]
    cables = [f"cable{os.getpid() % 10**6}_{number}" for number in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {cables[0]} type veth peer name {cables[1]}"]
    for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
        commands += [
            f"ip link set {cable} netns {name}",
            f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev {cable}",
            f"ip -n {name} link set {cable} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        try:
            for command in commands:
                subprocess.run(command.split(), check=True, capture_output=True, timeout=20)
            begins = [["ip", "netns", "exec", name] for name in names]
            # gloo otherwise takes the address that the machine's own name has, which is its loopback here.
            environments = [{"GLOO_SOCKET_IFNAME": cable} for cable in cables]
            found = begins, environments, "10.77.0.1", 29500
        except (OSError, subprocess.SubprocessError) as problem:
            print(f"no network namespaces ({problem}): two launchers on one machine in their place")
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            found = [[], []], [{}, {}], "127.0.0.1", port
        yield found
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def test_two_machines_go_on_bit_for_bit(tiny_model, processed_data, tmp_path):
    """What two processes of one began; one machine writes."""
    config = EXACT | dict(base_model=tiny_model, data_dir=processed_data, gradient_accumulation_steps=1)
    whole, killed = (config | dict(output_dir=tmp_path / name) for name in ("whole", "killed"))
    for done in training_in_two(tmp_path / "whole", whole):
        succeeded(done)
    training_in_two(tmp_path / "killed", killed, {5: kill})
    with two_machines() as (begins, environments, address, port):
        launchers = [
            subprocess.Popen(
                [
                    *begin,
                    sys.executable,
                    *LAUNCH,
                    "--main_process_ip",
                    address,
                    "--main_process_port",
                    str(port),
                    "--machine_rank",
                    str(rank),
                    str(ROOT / "train.py"),
                    *options(**killed),
                ],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
            for rank, (begin, environment) in enumerate(zip(begins, environments, strict=True))
        ]
        try:
            said = [launcher.communicate(timeout=150)[0] for launcher in launchers]
        finally:
            for launcher in launchers:
                launcher.kill()
    for launcher, text in zip(launchers, said, strict=True):
        assert launcher.returncode == 0, text
        assert f"continuing {NAME} after step 3" in text
    assert [text.count("pytorch_lora_weights") + text.count("9 steps") for text in said][1] == 0
    assert json.loads((tmp_path / "killed" / NAME / "config.json").read_text())["processes"] == 2
    assert_equal_runs(tmp_path / "whole" / NAME, tmp_path / "killed" / NAME)


def test_machines_that_do_not_share_their_folders_are_told_so(tiny_model, processed_data, tmp_path):
    config = EXACT | dict(base_model=tiny_model, data_dir=processed_data, gradient_accumulation_steps=1)
    config |= dict(output_dir=tmp_path)
    training_in_two(tmp_path, config, {5: kill})
    before = sorted(path.name for path in files.unfinished(tmp_path / NAME).iterdir())
    for other, words in (
        (dict(output_dir=tmp_path / "elsewhere"), "checkpoint (step 3 in process 0, none there)"),
        (dict(unet_learning_rate=2e-3), "unet_learning_rate (0.001 in process 0, 0.002 there)"),
    ):
        for done in training_in_two(tmp_path, config, other=other):
            line = done.stderr.replace("error in process 1: ", "error: ")
            done.stderr = line
            assert_one_line(done, "process 1 trains something else", words, "shared folder")
    assert sorted(path.name for path in files.unfinished(tmp_path / NAME).iterdir()) == before


BUCKETED = TINY_RUN | dict(resolution=64, max_steps=8, checkpoint_every=3, validation_count=3)


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    prepare(mixed(folder / "data"), folder / "out", resolution=64, buckets=True, processes=1)
    return folder / "out"


@pytest.fixture(scope="module")
def in_two(tiny_model, buckets, tmp_path_factory):
    """A run on buckets in two processes."""
    folder = tmp_path_factory.mktemp("in_two")
    config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets)
    for done in training_in_two(folder, config | dict(output_dir=folder)):
        succeeded(done)
    return folder, config


def logged(folder):
    return [json.loads(line) for line in (folder / NAME / "log.jsonl").read_text().splitlines()]


def test_two_processes_on_buckets_agree_with_one_of_twice_the_batch(in_two, tmp_path):
    folder, config = in_two
    succeeded(training(tmp_path, config | dict(output_dir=tmp_path, batch_size=2)))
    assert relative_difference(weights(tmp_path), weights(folder)) < 0.01
    for one, two in zip(logged(tmp_path), logged(folder), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "validation_loss", "validation_losses"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["step"], key)


def test_two_processes_on_buckets_go_on_bit_for_bit(in_two, tmp_path):
    folder, config = in_two
    config = config | dict(output_dir=tmp_path)
    training_in_two(tmp_path, config, {5: kill})
    first, second = map(succeeded, training_in_two(tmp_path, config))
    assert "after step 3" in first.stdout
    assert second.stdout == ""
    assert_equal_runs(tmp_path / NAME, folder / NAME)
    ours = load_file(tmp_path / NAME / adapter_files.WEIGHTS)
    assert any(weight.abs().max() > 0 for key, weight in ours.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (dict(ACCELERATE_USE_FSDP="true", FSDP_SHARDING_STRATEGY="1"), "FSDP"),
        (dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_MIXED_PRECISION="bf16"), "DeepSpeed, mixed_precision bf16"),
        (
            dict(ACCELERATE_MIXED_PRECISION="fp8", ACCELERATE_DYNAMO_BACKEND="INDUCTOR"),
            "torch.compile, mixed_precision fp8",
        ),
        (dict(ACCELERATE_USE_MEGATRON_LM="true"), "Megatron-LM"),
        (dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"), "gradient_accumulation_steps 4 (--gradient-acc"),
        # The defaults of a launcher.
        (dict(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO", ACCELERATE_USE_CPU="False"), None),
        (dict(ACCELERATE_MIXED_PRECISION="fp16"), None),
    ],
)
def test_unused_settings_of_a_launcher_are_named(monkeypatch, capsys, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.only_processes(train.CONFIG)
    printed = capsys.readouterr().out
    assert (f"asks for {words}" in printed) if words else printed == ""
    assert not [name for name in processes.UNUSED | processes.IN_CONFIG if name in os.environ]


def test_a_launcher_with_another_projects_settings_trains(tiny_model, processed_data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path, max_steps=2)
    assert "asks for FSDP, mixed_precision fp8" in succeeded(call("train.py", *options(**config))).stdout


def test_an_apple_gpu_is_named_and_left_alone(tiny_model, processed_data, tmp_path, monkeypatch):
    """accelerate alone would train on it."""
    for question in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, question, lambda: True)
    common = options(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path, **TINY_RUN)
    done = call("train.py", *common)
    assert done.returncode == 0, done.stderr
    assert "Apple's GPU (MPS) is not used" in done.stdout
    assert json.loads((tmp_path / NAME / "config.json").read_text())["device"].startswith("CPU")
