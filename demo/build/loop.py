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

    AdamW with warm-up and cosine decay over the time budget. On a GPU the models compute in bfloat16, the optimiser
    updates float32 weights, and the whole step is one CUDA graph.

    batch_loss(): samples a batch and returns its loss
    validate(): returns a dict for the log
    checkpoint(*copies): saves
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
    rate = torch.zeros((), device=config["device"])  # a tensor: the graph reads it
    total = torch.zeros((), device=config["device"])  # of losses since the last log line
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
            # A short average at first, so that the initial weights fade.
            decay = min(config["ema_decay"] ** 10, step / (step + 90))
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
            if on_gpu:
                torch.cuda.synchronize()  # otherwise the clock runs ahead of the GPU
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
    """The replay of `step` as a CUDA graph, or `step` itself if it cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # learning rate 0; cuDNN chooses its algorithms
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph, running eagerly: {error}", flush=True)
        return step
    return graph.replay


def save_half(model, folder):
    """Save a copy of a model in half precision.

    The folder that the model was loaded from is removed from its config. transformers loads in the dtype that a config
    names; float32 there makes all folders load alike on a CPU, where half precision is slow or missing.
    """
    copy.deepcopy(model).half().save_pretrained(folder)
    path = Path(folder) / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("_name_or_path", None)
    if "dtype" in saved:
        saved["dtype"] = "float32"
    write_json(path, saved)
