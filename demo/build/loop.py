"""The training loop of the three models."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import torch

from demo.build.journal import record_run, run_name
from lib.files import write_json


def train(stage, config, models, batch_loss, started, validate=None, checkpoint=None):
    """Train `models` until STAGE_minutes after `started`; returns copies with averaged weights.

    The loop of all three stages: AdamW with warm-up, and a cosine decay over the time budget.
    `batch_loss()` draws a batch and returns its loss; `validate()` returns a dict for the log;
    `checkpoint(*copies)` saves. On a GPU the models compute in bfloat16 beside float32 weights
    that the optimiser keeps, and the whole step is one CUDA graph.
    """
    budget = 60 * config[f"{stage}_minutes"]
    on_gpu = config["device"] == "cuda"
    parameters = [parameter for model in models for parameter in model.parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    average = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    if on_gpu:
        for model in models:
            model.bfloat16()
    rate = torch.zeros((), device=config["device"])  # a tensor, so that a graph can read it
    total = torch.zeros((), device=config["device"])  # of the losses since the last log line
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.99), weight_decay=config["weight_decay"], fused=on_gpu, capturable=on_gpu
    )

    def one_step():
        loss = batch_loss()
        gradients = torch.autograd.grad(loss, parameters)
        torch._foreach_copy_([weight.grad for weight in weights], list(gradients))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        total.add_(loss.detach())

    def averaged():
        copies = [copy.deepcopy(model).float() for model in models]
        targets = [parameter.data for model in copies for parameter in model.parameters()]
        torch._foreach_copy_(targets, average)
        return copies

    run_step = as_graph(one_step) if on_gpu and config["cuda_graph"] else one_step
    total.zero_()
    name = run_name(stage, config)
    log = (Path(config["work_dir"]) / f"{name}.jsonl").open("w")
    step, logged, first = 0, 0, time.time()
    next_log, next_checkpoint = first, first + 60 * config["checkpoint_minutes"]
    while (now := time.time()) < started + budget or step < 2:
        left = max(started + budget - now, 0) / max(started + budget - first, 1e-9)
        warm = min((step + 1) / config["warmup_steps"], 1)
        rate.fill_(config[f"{stage}_learning_rate"] * warm * (0.5 - 0.5 * np.cos(np.pi * left)))
        run_step()
        step += 1
        if step % 10 == 0:
            # A short average at first: the initial weights must not linger in it.
            decay = min(config["ema_decay"] ** 10, step / (step + 90))
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
            if on_gpu:
                torch.cuda.synchronize()  # or the clock runs ahead of the work
        if time.time() >= next_log:
            entry = dict(step=step, minutes=round((time.time() - started) / 60, 2))
            entry |= dict(loss=round(float(total) / (step - logged), 5))
            entry |= validate() if validate else {}
            print(stage, json.dumps(entry), flush=True)
            print(json.dumps(entry), file=log, flush=True)
            total.zero_()
            logged, next_log = step, time.time() + config["log_seconds"]
        if checkpoint and time.time() >= next_checkpoint:
            checkpoint(*averaged())
            next_checkpoint = time.time() + 60 * config["checkpoint_minutes"]
    record_run(stage, config, started, step, name)
    return averaged()


def as_graph(step):
    """`step` as the replay of a CUDA graph, or itself where it cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # at a learning rate of 0; chooses cuDNN's algorithms
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph, step by step instead: {error}", flush=True)
        return step
    return graph.replay


def save_half(model, folder):
    """Save a model's weights in half precision, leaving the model as it is.

    The config does not name the folder that the model was loaded from. One that names a dtype is what transformers loads by; float32 there makes the folders load
    alike on a CPU, where half precision is slow or missing.
    """
    copy.deepcopy(model).half().save_pretrained(folder)
    path = Path(folder) / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("_name_or_path", None)
    if "dtype" in saved:
        saved["dtype"] = "float32"
    write_json(path, saved)
