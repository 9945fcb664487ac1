"""Kernels compiled by other processes and threads while the models load, for the first run on a machine.

Triton's compiler is mostly Python, so threads take turns: the hundred kernels of a training took 17 s on 16 cores. These
processes fork from one that imports torch while the script does; they never use the GPU. `start` comes before the
script's imports, `begin` hands over what to compile and starts other work in threads, `wait` comes before the first
launch. The results reach the script through Triton's cache on disk. What is missing there is compiled at its launch, so
all of this saves time and changes nothing else.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
from importlib.metadata import version
from pathlib import Path

FEWEST_CORES = 4  # with fewer, the processes would slow down the script's own imports
KERNELS = "adamw8bit", "conv_epilogues", "group_norm", "layer_norm_geglu"


class _Work:
    """What this process has begun."""

    pool = None  # the processes, from `start` to `finish`
    record = None  # the file that says that this machine has compiled for the same purpose, and whether it was there
    known = False
    threads = ()  # of `begin`
    compiling = ()  # the kernels that the processes compile, as futures


def start(*purpose):
    """Start the processes, unless this machine has compiled for the same `purpose` before.

    `purpose` is what decides which kernels are needed: script, base model, precision, sizes. Versions, GPUs and the
    kernels' sources are added. Nothing starts without an NVIDIA GPU, and no processes on few cores, on Windows and in
    all but one process of a machine.
    """
    _Work.known = False
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():  # the second: in WSL
        return
    threading.Thread(target=_hash_triton, daemon=True).start()
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    described = json.dumps([purpose, version("torch"), _gpus(), sources]).encode()
    _Work.record = triton_cache() / f"compiled_{hashlib.sha256(described).hexdigest()[:16]}"
    _Work.known = _Work.record.exists()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if _Work.known or cores < FEWEST_CORES or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triton", *(f"{__package__}.{name}" for name in KERNELS)])
    forkserver.ensure_running()
    _Work.pool = ProcessPoolExecutor(cores, mp_context=context, initializer=_follow_parent)


def _hash_triton():
    """Triton's first launch hashes its own files, and threads that launch meanwhile would all do it. The result is
    cached in the process."""
    with contextlib.suppress(Exception):  # no Triton, or one that has no such function
        from triton.runtime.cache import triton_key

        triton_key()


def _gpus():
    """The driver's version and the GPUs' names, as far as they are known without CUDA."""
    lines = []
    for path in sorted(Path("/proc/driver/nvidia").glob("gpus/*/information")) + [Path("/proc/driver/nvidia/version")]:
        with contextlib.suppress(OSError):
            lines += [line for line in path.read_text().splitlines() if line.startswith(("Model", "NVRM"))]
    return lines


def compiled_before():
    """Whether this machine has compiled for `start`'s purpose in an earlier run."""
    return _Work.known


def triton_cache():
    """Triton's cache folder, without importing Triton."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _follow_parent():
    """Ends this process with the script, however that ends; Ctrl-C is the script's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()


def begin(device, work, jobs=None):
    """Begin `work()` in a thread, on a GPU. If there are processes, they first get the kernels that the functions from
    `jobs()` would launch. Errors are dropped: what failed shows at the real launch."""

    def run():
        import torch

        with contextlib.suppress(Exception), torch.cuda.device(device):
            if _Work.pool and jobs:
                _Work.compiling = [_Work.pool.submit(compile_one, *each) for each in specializations(jobs())]
            work()

    if device.type == "cuda":
        thread = threading.Thread(target=run)
        _Work.threads = *_Work.threads, thread
        thread.start()


def wait():
    """Wait for what has begun. What failed is tried again at its first launch, and fails there with its reason."""
    for thread in _Work.threads:
        thread.join()
    for future in _Work.compiling:
        future.exception()
    _Work.threads, _Work.compiling = (), ()


def finish():
    """End the processes, and record that this machine has compiled for `start`'s purpose."""
    if _Work.pool:
        _Work.pool.shutdown(wait=False, cancel_futures=True)
        _Work.pool = None
    if _Work.record and not _Work.known:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            _Work.record.parent.mkdir(parents=True, exist_ok=True)
            _Work.record.touch()


def specializations(jobs):
    """[the arguments of `compile_one`] for each kernel that `jobs` would compile. Nothing is compiled or launched."""
    from triton import knobs
    from triton.runtime import driver

    target, this_thread, found = driver.active.get_current_target(), threading.get_ident(), {}

    def record(*, fn, compile, **others):
        if threading.get_ident() != this_thread:
            return False
        options = _tuples(json.loads(compile["specialization_data"])["options"])
        kind = compile["signature"], compile["constants"], compile["configs"][0]
        found[fn.module, fn.name, compile["key"]] = fn.module, fn.name, *kind, options, target
        return True  # neither compiled nor launched

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = record
    try:
        for job in jobs:
            job()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found.values())


def _tuples(value):
    """A value from JSON with its lists as tuples, as Triton's options have them."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compile_one(module, name, signature, constants, attributes, options, target):
    """Compile one kernel into Triton's cache, as its launch would (Triton's JITFunction._do_compile)."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import driver

    source = ASTSource(getattr(importlib.import_module(module), name), signature, constants, attributes)
    kernel = triton.compile(source, target=target, options=make_backend(target).parse_options(options).__dict__)
    driver.active.launcher_cls(kernel.src, kernel.metadata)  # Triton 3.6 builds one in C for each kernel
