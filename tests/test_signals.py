"""Signals, repeated, ignored or sent to a launcher too, and output that nobody reads."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, finish, forked, options
from training_runs import NAME, assert_equal_runs, send, start_training, succeeded, training

from lib import errors, files
from lib.training import checkpoints, processes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_finishes_the_step_and_saves(exact, uninterrupted, tmp_path, number, code):
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(number)})
    assert done.returncode == code
    assert "stopped after step 5" in done.stdout
    assert "Traceback" not in done.stderr
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 5
    assert "after step 5" in succeeded(training(tmp_path, config)).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(exact, tmp_path, monkeypatch, number, code):
    monkeypatch.setattr(processes, "SAME_SIGNAL", 0)
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(number, number)})
    assert done.returncode == code
    assert "stopped after" not in done.stdout
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 3


def test_a_signal_that_is_repeated_at_once_is_the_same_one(exact, tmp_path):
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(signal.SIGTERM, signal.SIGTERM)})
    assert done.returncode == 143
    assert "stopped after step 5" in done.stdout
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 5


def test_a_signal_to_a_launcher_and_its_workers_alike_saves(exact, tmp_path):
    """As a batch system sends it: the launcher hands it on, so that the workers get it twice, both
    times in the same long step."""
    config = exact | dict(
        output_dir=tmp_path,
        gradient_accumulation_steps=80,
        max_steps=1000,
        checkpoint_every=900,
        log_every=1,
        validation_count=0,
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = subprocess.Popen(
        [*launcher, ROOT / "train.py", *options(**config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = files.unfinished(tmp_path / NAME) / "log.jsonl"

    def workers():  # in process groups of their own
        return psutil.Process(started.pid).children(recursive=True)

    try:
        while started.poll() is None and not (log.exists() and '"step": 1,' in log.read_text()):
            time.sleep(0.05)
        for process in [*workers(), psutil.Process(started.pid)]:
            process.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=120)
    finally:
        for process in workers() if started.poll() is None else []:
            process.kill()
        started.kill()
    stopped = re.search(r"stopped after step (\d+), which is saved", out)
    assert stopped, out + err
    found = checkpoints.latest(files.unfinished(tmp_path / NAME))
    assert found[1]["step"] == int(stopped[1])


def test_a_signal_that_is_ignored_stays_so(exact, uninterrupted, tmp_path):
    """As `nohup` ignores SIGHUP."""
    config = exact | dict(output_dir=tmp_path)
    child = start_training(
        tmp_path, config, {4: send(signal.SIGHUP)}, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    succeeded(finish(child, tmp_path))
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_a_signal_in_the_last_step(exact, uninterrupted, tmp_path):
    config = exact | dict(output_dir=tmp_path)
    assert training(tmp_path, config, {8: send(signal.SIGTERM)}).returncode == 143
    assert "after step 9" in succeeded(training(tmp_path, config)).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step(tmp_path, number, code):
    done = finish(forked(lambda: errors.run_script(send(number)), tmp_path), tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("gone", ["pipe", "terminal"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(exact, uninterrupted, tmp_path, gone):
    """A `| tee` that has ended, or a terminal that was closed, from which no signal came."""

    def leave():
        reader, writer = os.pipe() if gone == "pipe" else os.openpty()
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
        with pytest.raises(OSError, match="Broken pipe|error"):
            os.write(1, b"said")
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))

    child = start_training(tmp_path, exact | dict(output_dir=tmp_path), prepare=leave)
    assert finish(child, tmp_path).returncode == 0
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_an_error_that_nobody_reads_ends_as_it_would(tmp_path):
    code = "import os; os.close(0); from lib.errors import UserError, run_script\n"
    code += "def main():\n    print('x' * 10**5)\n    raise UserError('wrong')\nrun_script(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 1


def test_signals_of_terminals_and_batch_systems_are_heeded():
    """Each is handled alike; the tests above send some of them."""
    assert {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2} <= set(errors.STOP_SIGNALS)
