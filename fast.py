"""What makes the scripts fast: the same numbers, to rounding, from far fewer and larger kernels.

At batch 1 a GPU spends most of a plain training step waiting for Python to launch some ten thousand
small kernels (see bench/README.md). Here are fewer of them, and one launch for all:

- `fuse_lora`: a LoRA layer as three matrix products forward and five backward;
- `channels_last`: convolutions in the layout of the tensor cores, with Triton kernels for what stands
  between them (group norm with its SiLU, GEGLU) that read and write that layout once;
- `compile_attention`: cuDNN's kernels compiled all at once, for the first run on a machine;
- `captured`: everything a function launches, recorded once as a CUDA graph and replayed.

The first works on any device; the others say it where they cannot be had, and plain PyTorch remains.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.overrides import TorchFunctionMode

import adapters
from common import one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # no NVIDIA build of torch
    triton = None


# ---- LoRA layers ---------------------------------------------------------------------------


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with W and its bias frozen.

    x [..., in], W [out, in], bias [out] or None, A [rank, in], B [out, rank], all of one type.
    The low-rank product is added to the large one where that is written (one rounding less than
    adding two results), and the backward pass likewise adds to the gradient of x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        out = F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, a, b, low = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_b = grad.T @ low
        if ctx.scale != 1:
            grad_low, grad_b = grad_low * ctx.scale, grad_b * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        return grad_x, None, None, grad_low.T @ rows, grad_b, None


def fuse_lora(model):
    """Compute every LoRA layer of `model` with LoraLinear from now on."""
    for layer in adapters.lora_layers(model).values():
        layer.forward = functools.partial(_lora_forward, layer)


def _lora_forward(layer, x):
    base, a, b = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    return LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, layer.scaling["default"])


# ---- channels last -------------------------------------------------------------------------

MOST_PARTS = 16  # into which a group's pixels are divided, to be summed in parallel

if triton:

    @triton.jit
    def _offsets(HW, C, GROUP: tl.constexpr):
        """Where this program's group of this program's picture begins, and its rows of pixels."""
        picture, group = tl.program_id(0) // (C // GROUP), tl.program_id(0) % (C // GROUP)
        return picture.to(tl.int64) * HW * C + group * GROUP, group * GROUP

    @triton.jit
    def _tile(row, begin, EACH, HW, start, C, column, GROUP: tl.constexpr, ROWS: tl.constexpr):
        """Where the values of ROWS pixels from `row` on lie, and which of them are this program's."""
        rows = row + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (rows < tl.minimum(begin + EACH, HW)) & (column < GROUP)
        return start + rows * C + column, inside

    @triton.jit
    def _normalised(x, mean, rstd, weight, bias, SILU):
        """(hat = x normalised, z = hat weight + bias or the SiLU of it, derivative of that)"""
        hat = (x - mean) * rstd
        z = hat * weight + bias
        sigmoid = tl.sigmoid(z)
        slope = tl.where(SILU != 0, sigmoid * (1 + z * (1 - sigmoid)), 1.0)
        return hat, tl.where(SILU != 0, z * sigmoid, z), slope

    @triton.jit(do_not_specialize=["SILU"])
    def _norm_sums(x, grad, statistics, weight, bias, sums, HW, EACH, C, SILU,
                   GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                   BACKWARD: tl.constexpr):  # fmt: skip
        """Two sums over a part of one group: of x - x0 and its square, x0 being the group's first value
        (the variance is a difference of the two, which are small only near the values themselves),
        or backward of w dz and w dz hat."""
        start, channel = _offsets(HW, C, GROUP)
        column = tl.arange(0, WIDTH)[None, :]
        if BACKWARD:
            mean = tl.load(statistics + tl.program_id(0) * 2)
            rstd = tl.load(statistics + tl.program_id(0) * 2 + 1)
            w = tl.load(weight + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
            b = tl.load(bias + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
        else:
            x0 = tl.load(x + start).to(tl.float32)
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        second = tl.zeros([ROWS, WIDTH], tl.float32)
        begin = tl.program_id(1) * EACH
        for row in range(begin, tl.minimum(begin + EACH, HW), ROWS):
            place, inside = _tile(row, begin, EACH, HW, start, C, column, GROUP, ROWS)
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            if BACKWARD:
                hat, _, slope = _normalised(value, mean, rstd, w, b, SILU)
                dz = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * w
                first += dz
                second += dz * hat
            else:
                value = tl.where(inside, value - x0, 0.0)
                first += value
                second += value * value
        part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(sums + part, tl.sum(tl.sum(first, 1), 0))
        tl.store(sums + part + 1, tl.sum(tl.sum(second, 1), 0))

    @triton.jit(do_not_specialize=["SILU"])
    def _norm_apply(x, grad, statistics, weight, bias, sums, HW, EACH, C, SILU, eps, out,
                    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                    PARTS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
        """The normalised x, after its SiLU, or backward the gradient of x; of a part of a group."""
        start, channel = _offsets(HW, C, GROUP)
        column = tl.arange(0, WIDTH)[None, :]
        w = tl.load(weight + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
        b = tl.load(bias + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
        part = tl.arange(0, PARTS)
        known = part < tl.num_programs(1)
        parts = (tl.program_id(0) * tl.num_programs(1) + part) * 2
        first = tl.sum(tl.load(sums + parts, mask=known, other=0.0), 0) / (HW * GROUP)
        second = tl.sum(tl.load(sums + parts + 1, mask=known, other=0.0), 0) / (HW * GROUP)
        if BACKWARD:
            mean = tl.load(statistics + tl.program_id(0) * 2)
            rstd = tl.load(statistics + tl.program_id(0) * 2 + 1)
        else:
            mean = tl.load(x + start).to(tl.float32) + first
            rstd = 1 / tl.sqrt(tl.maximum(second - first * first, 0.0) + eps)
            if tl.program_id(1) == 0:
                tl.store(statistics + tl.program_id(0) * 2, mean)
                tl.store(statistics + tl.program_id(0) * 2 + 1, rstd)
        begin = tl.program_id(1) * EACH
        for row in range(begin, tl.minimum(begin + EACH, HW), ROWS):
            place, inside = _tile(row, begin, EACH, HW, start, C, column, GROUP, ROWS)
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            hat, result, slope = _normalised(value, mean, rstd, w, b, SILU)
            if BACKWARD:
                dz = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * w
                result = rstd * (dz - first - hat * second)
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _geglu(x, grad, out, COUNT, HALF, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        """out = x[:, :HALF] gelu(x[:, HALF:]), or backward both halves of the gradient of x."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < COUNT
        left = place // HALF * 2 * HALF + place % HALF
        value = tl.load(x + left, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x + left + HALF, mask=inside, other=0.0).to(tl.float32)
        normal = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # the distribution's integral
        if BACKWARD:
            dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
            d_gate = dy * value * (normal + gate * density)
            tl.store(out + left, (dy * gate * normal).to(out.dtype.element_ty), mask=inside)
            tl.store(out + left + HALF, d_gate.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + place, (value * gate * normal).to(out.dtype.element_ty), mask=inside)


class GroupNormSilu(torch.autograd.Function):
    """Group norm (Wu & He 2018) of x [n, c, h, w] in channels-last layout, and its SiLU.

    weight and bias [c] are frozen. Sums are float32. Of the forward pass x is kept, and of each
    group its mean and deviation.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        x = x.contiguous(memory_format=torch.channels_last)
        statistics = x.new_empty(x.shape[0] * groups, 2, dtype=torch.float32)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.settings = groups, eps, silu
        return _group_norm(x, None, statistics, weight, bias, groups, eps, silu)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = _group_norm(x, grad, statistics, weight, bias, *ctx.settings)
        return grad_x, None, None, None, None, None


def _group_norm(x, grad, statistics, weight, bias, groups, eps, silu):
    """Launch the two kernels of either pass: sums of the parts of each group, then the result."""
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    width_of_tile = triton.next_power_of_2(group)
    rows_of_tile = max(1, 8192 // width_of_tile)
    # Enough programs to fill a GPU, each of whole tiles.
    parts = max(1, min(triton.cdiv(pixels, rows_of_tile), MOST_PARTS, 512 // (n * groups)))
    each = triton.cdiv(triton.cdiv(pixels, parts), rows_of_tile) * rows_of_tile
    grid = (n * groups, triton.cdiv(pixels, each))
    sums = x.new_empty(*grid, 2, dtype=torch.float32)
    inputs = (x, x if grad is None else grad, statistics, weight, bias, sums, pixels, each, channels, int(silu))  # fmt: skip
    # Compiled anew for each of these, so what does not need to be known beforehand is not here.
    known = dict(GROUP=group, WIDTH=width_of_tile, ROWS=rows_of_tile, BACKWARD=grad is not None, num_warps=8)  # fmt: skip
    out = torch.empty_like(x)
    _norm_sums[grid](*inputs, **known)
    _norm_apply[grid](*inputs, eps, out, PARTS=MOST_PARTS, **known)
    return out


class Geglu(torch.autograd.Function):
    """x[..., :half] gelu(x[..., half:]) (Shazeer 2020), keeping x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _run_geglu(x, None)

    @staticmethod
    def backward(ctx, grad):
        return _run_geglu(*ctx.saved_tensors, grad.contiguous())


def _run_geglu(x, grad):
    half, count = x.shape[-1] // 2, x.numel() // 2
    out = x.new_empty(*x.shape[:-1], half) if grad is None else torch.empty_like(x)
    grid = (triton.cdiv(count, 1024),)
    _geglu[grid](x, x if grad is None else grad, out, count, half, 1024, grad is not None)
    return out


def channels_last(model, training=False):
    """Put a UNet or VAE on a GPU into channels-last layout, with the kernels above; any other
    device is left as it is. Its own weights must be frozen; `training` says whether gradients will
    pass through it.

    Where Triton cannot be had (it needs a C compiler, and a GPU that it knows) that is said, and
    PyTorch's kernels remain.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return
    reason = _compile(model, training)
    if reason:
        print(f"note: no Triton kernels, so this is slower than it could be: {reason}")
        return
    _rebuild(model)


def _compile(model, training):
    """Compile what `model` will need, all at once; returns why that failed or gave wrong results, or
    None.

    At their first use, one after the other, the kernels would take longer than all else before the
    first step. Triton keeps them on disk for the next run.
    """
    place = next(model.parameters())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    of_each_size = {norm.num_channels // norm.num_groups: norm for norm in norms}.values()

    def launch(norm, backward):
        x = place.new_zeros(1, norm.num_channels, 16, 16).to(memory_format=torch.channels_last)
        statistics = x.new_zeros(norm.num_groups, 2, dtype=torch.float32)
        grad = x if backward else None
        _group_norm(x, grad, statistics, norm.weight, norm.bias, norm.num_groups, norm.eps, True)

    def launch_geglu(backward):
        x = place.new_zeros(16, 32)
        _run_geglu(x, x[:, :16].contiguous() if backward else None)

    passes = (False, True) if training else (False,)
    jobs = [functools.partial(launch, norm, b) for norm in of_each_size for b in passes]
    if any(isinstance(module, GEGLU) for module in model.modules()):
        jobs += [functools.partial(launch_geglu, backward) for backward in passes]

    begun = _failure(lambda: _in_threads(jobs, place.device))
    reason = missing_kernels(place.device)  # meanwhile
    problem = begun if isinstance(begun, str) else _failure(begun)
    return reason or problem


def _in_threads(jobs, device):
    """Start `jobs` in threads, all at once; returns a function that waits for the last of them."""

    def on_device(job):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            job()  # a thread begins with the first GPU as its own

    pool = ThreadPoolExecutor()
    started = [pool.submit(on_device, job) for job in jobs]

    def wait():
        pool.shutdown()  # until all have ended, also when one has failed
        try:
            for job in started:
                job.result()
        finally:
            started.clear()  # an error holds what its job worked on

    return wait


def _failure(work):
    """Why `work` failed, in one line, or what it returns: a compiler, a driver or an unknown GPU may
    raise anything, and training goes on without their kernels."""
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        return f"{type(problem).__name__}: {one_line(problem, 160)}"


def _rebuild(model):
    model.to(memory_format=torch.channels_last)
    silent = set()  # norms that are followed by a SiLU, which they now do themselves
    for module in model.modules():
        if _is_plain(module):
            silent |= {module.norm1, module.norm2}
            module.nonlinearity = torch.nn.Identity()
            _join_biases(module)
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            _project_rows(module)
        elif isinstance(getattr(module, "conv_act", None), torch.nn.SiLU):
            silent.add(module.conv_norm_out)
            module.conv_act = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(_norm_forward, module, module in silent)
        elif isinstance(module, GEGLU):
            module.forward = functools.partial(_geglu_forward, module)


def _is_plain(module):
    """Whether it is a residual block whose norms are followed by a SiLU and nothing else."""
    return (
        isinstance(module, ResnetBlock2D)
        and isinstance(module.nonlinearity, torch.nn.SiLU)
        and module.time_embedding_norm == "default"
        and not module.skip_time_act
    )


@torch.no_grad()
def _join_biases(block):
    """Add two biases of a residual block that meet anyway beforehand: each is a pass over the
    whole tensor. Its SiLU has moved into the norms; for the timestep it is put here."""
    projection, shortcut = block.time_emb_proj, block.conv_shortcut
    if projection is not None:
        inner = getattr(projection, "base_layer", projection)  # LoRA may be around it
        inner.bias += block.conv1.bias  # hidden = conv1(…) + time_emb_proj(…)
        block.conv1.bias = None
        projection.register_forward_pre_hook(lambda _, inputs: (F.silu(inputs[0]),))
    if shortcut is not None and shortcut.bias is not None:
        shortcut.bias += block.conv2.bias  # out = conv_shortcut(…) + conv2(…)
        block.conv2.bias = None


@torch.no_grad()
def _project_rows(transformer):
    """Make the 1x1 convolutions around a transformer the linear layers that they are, and leave out
    the copies to another layout before and after."""
    for name in ("proj_in", "proj_out"):
        convolution = getattr(transformer, name)
        if isinstance(convolution, torch.nn.Conv2d):
            sizes = convolution.in_channels, convolution.out_channels
            linear = torch.nn.Linear(*sizes, device="meta")
            linear.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
            linear.bias = convolution.bias
            setattr(transformer, name, linear)
    transformer.use_linear_projection = True
    transformer._get_output_for_continuous_inputs = functools.partial(_output_of_rows, transformer)


def _output_of_rows(transformer, hidden_states, residual, batch_size, height, width, inner_dim):
    rows = transformer.proj_out(hidden_states)
    return rows.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


def _norm_forward(norm, silu, x):
    pixels = x if x.ndim == 4 else x[..., None]  # the VAE's attention has them in a row
    out = GroupNormSilu.apply(pixels, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return out.view(x.shape)


def _geglu_forward(geglu, x):
    return Geglu.apply(geglu.proj(x))


@functools.cache
def missing_kernels(device):
    """Why the Triton kernels cannot be used on `device`, or None: they are tried on small input."""
    if triton is None:
        return "this torch came without Triton"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 5, 5, generator=generator).to(device)
    weight, bias = torch.randn(2, 32, generator=generator).to(device)

    def compare():
        close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
        norm = F.silu(F.group_norm(x, 8, weight, bias))
        right = close(GroupNormSilu.apply(x, weight, bias, 8, 1e-5, True), norm) and close(
            Geglu.apply(x[..., :4]), x[..., :2] * F.gelu(x[..., 2:4])
        )
        return None if right else "their results are wrong here"

    return _failure(compare)


# ---- attention -----------------------------------------------------------------------------


class _AttentionCalls(TorchFunctionMode):
    """Keeps the arguments of one of each kind of scaled_dot_product_attention; answers with zeros."""

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            return self.keep(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def keep(self, query, key, value, *others, **named):
        inputs = query, key, value
        layout = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        rest = (*enumerate(others), *named.items())
        rest = str([(key, x.shape if torch.is_tensor(x) else x) for key, x in rest])
        self.kinds[layout, rest] = inputs, others, named
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _attention_jobs(call, training):
    """A function for each attention kernel that `call()` will launch, which launches it."""
    with torch.no_grad(), _AttentionCalls() as seen:
        call()

    def forward(inputs, others, named):
        with torch.no_grad():
            F.scaled_dot_product_attention(*inputs, *others, **named)

    def forward_backward(inputs, others, named):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*inputs, *others, **named)
        # In this thread: autograd's own is one for all, where they would be compiled in turn.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(out, inputs, torch.zeros_like(out))

    works = (forward_backward, forward) if training else (forward,)
    return [functools.partial(work, *kind) for work in works for kind in seen.kinds.values()]


def compile_attention(call, device, training=False):
    """Begin to compile the attention kernels that `call()` will need; returns a function that waits
    for them. `training` says whether their gradients will be needed too.

    On recent GPUs PyTorch takes cuDNN's attention, of which the driver compiles a kernel for each
    size of layer at its first use on a machine; it keeps them on disk for the next run. Here they are
    compiled all at once, in threads. `call` is called once, without its attention.
    """
    if device.type != "cuda":
        return lambda: None

    def begin():
        jobs = _attention_jobs(call, training)
        torch.cuda.empty_cache()  # or what the call took would be held beside what comes
        return _in_threads(jobs, device)

    begun = _failure(begin)

    def wait():
        reason = begun if isinstance(begun, str) else _failure(begun)
        torch.cuda.empty_cache()
        if reason:
            print(f"note: the attention's kernels were not compiled beforehand: {reason}")

    return wait


# ---- CUDA graphs ---------------------------------------------------------------------------


def captured(functions, device):
    """`functions` recorded as CUDA graphs: a list of callables that run them.

    A function takes nothing and returns a tensor or None. It must read and write the same tensors
    whenever it is called, draw no random numbers on the GPU, and never wait for the GPU. With a GPU each
    is called twice here: once to let the libraries choose their kernels, once to be recorded, which computes
    nothing. The graphs share their memory, so what one returns is overwritten by the next replay of any.

    Without a GPU, or if one cannot be recorded, which is then said, they are the functions themselves.
    """
    if device.type != "cuda":
        return list(functions)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # the graphs take their memory from a pool of their own
    pool = torch.cuda.graph_pool_handle()
    try:
        return [_record(function, pool, stream) for function in functions]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        print("note: this GPU's work cannot be recorded as a CUDA graph, so Python launches every kernel, "
            f"which is several times slower: {one_line(problem, 160)}")  # fmt: skip
        return list(functions)


def _record(function, pool, stream):
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (W&B's, say) may meanwhile do as they like.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = function()

    def replay():
        graph.replay()
        return result

    return replay
