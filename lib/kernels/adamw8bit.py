"""bitsandbytes' blockwise 8-bit AdamW as a Triton kernel whose inputs are all on the GPU.

bitsandbytes' own kernel gets the learning rate and step number from the host. Before its launch the loss scaler copies
the overflow flag to the host, and the GPU idles meanwhile. Here a small kernel decides whether a step counts.
The update kernel is always launched, and changes nothing if the step does not count. If the kernels are unavailable,
`missing_kernels` gives the reason and bitsandbytes is used.
"""

import functools
import math

import torch

from lib.kernels.compiling import failure, tl, triton

BLOCK = 256  # elements that share the maximum to which their codes are relative
# Why a run ends, in outcome[3]. The kernel has the numbers themselves, as it cannot read these names.
NOT_FINITE, LOSS_NOT_FINITE, OVERFLOWS = 1, 2, 3
HALTED = -1  # like any other value there, it halts the updates

if triton:

    @triton.jit(do_not_specialize=["loss", "loss_sum", "scale", "tracker", "interval", "most"])
    def _decide(
        largest,  # []
        loss,  # []
        loss_sum,  # []
        outcome,  # int32 [4]: updates, skipped steps, consecutive overflows, why the run ends
        scale,  # [], written if SCALED
        tracker,  # int32 [], written if SCALED
        control,  # [4], written
        growth,
        backoff,
        interval,
        most,
        LOG1: tl.constexpr,  # log2(beta1)
        LOG2: tl.constexpr,  # log2(beta2)
        SCALED: tl.constexpr,
    ):
        """See `decide`; one program."""
        updates, skipped = tl.load(outcome), tl.load(outcome + 1)
        row, problem = tl.load(outcome + 2), tl.load(outcome + 3)
        going = problem == 0
        this_loss = tl.load(loss)
        finite = tl.load(largest) < float("inf")  # false for NaN
        loss_finite = tl.abs(this_loss) < float("inf")
        inverse = 1.0
        if SCALED:
            row = tl.where(finite, 0, row + 1)
            problem = tl.where(loss_finite, tl.where(row > most, 3, 0), 2)
            problem = tl.where(finite, 0, problem)
            before, good = tl.load(scale), tl.load(tracker) + 1
            inverse = (1.0 / before.to(tl.float64)).to(tl.float32)
            grown = before * growth
            grows = (good == interval) & (grown < float("inf"))
            after = tl.where(finite, tl.where(grows, grown, before), before * backoff)
            tl.store(scale, after, mask=going)
            good = tl.where(finite & (good != interval), good, 0)
            tl.store(tracker, good, mask=going)
            tl.store(outcome + 1, skipped + tl.where(finite, 0, 1), mask=going)
            tl.store(outcome + 2, row, mask=going)
        else:
            problem = tl.where(finite & loss_finite, 0, 1)
        tl.store(outcome + 3, problem, mask=going)
        counts = going & (problem == 0)
        tl.store(loss_sum, tl.load(loss_sum) + this_loss, mask=counts)
        applies = counts & finite
        updates += tl.where(applies, 1, 0)
        tl.store(outcome, updates)
        # In float64: the first corrections are small differences from 1.
        number = updates.to(tl.float64)
        tl.store(control, tl.where(applies, 1.0, 0.0))
        tl.store(control + 1, inverse)
        tl.store(control + 2, (1.0 - tl.exp2(number * LOG1)).to(tl.float32))
        tl.store(control + 3, tl.sqrt(1.0 - tl.exp2(number * LOG2)).to(tl.float32))

    @triton.jit
    def _nearest(x, qmap, SIGNED: tl.constexpr):
        """The index of the value of `qmap` [256], ascending, that is nearest to x, |x| <= 1.

        `qmap` is bitsandbytes' dynamic map: seven decades of evenly spaced values, each decade with twice as many as
        the one below, and their negatives if SIGNED. A formula gives an index that is off by at most one. The midpoints
        to its neighbours correct it. A search would read the map seven times.
        """
        size = tl.abs(x)
        decade = tl.minimum(tl.maximum(tl.floor(tl.log2(size) * 0.30102999566398120) + 7, 0), 6)
        count = tl.exp2(decade if SIGNED else decade + 1)
        place = (size * tl.exp2((6 - decade) * 3.3219280948873623) - 0.1) * (count / 0.9)
        place = (count - 1 + tl.minimum(tl.maximum(place, 0), count - 1)).to(tl.int32)
        pivot = tl.where(x < 0, 126 - place, 128 + place) if SIGNED else place
        value = tl.load(qmap + pivot)
        above = (value + tl.load(qmap + pivot + 1)) * 0.5
        below = (value + tl.load(qmap + tl.maximum(pivot - 1, 0))) * 0.5
        nearest = tl.where((x > value) & (x > above), pivot + 1, pivot)
        return tl.maximum(tl.where((x <= value) & (x < below), pivot - 1, nearest), 0)

    # g = grad / scale
    # m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g²
    # p = (p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)) (1 - lr decay)
    @triton.jit(do_not_specialize=["COUNT", "rate"])
    def _adamw(
        p,  # [COUNT]
        grad,  # [COUNT], still scaled
        state1,  # uint8 [COUNT]: codes of m / absmax1
        state2,  # uint8 [COUNT]: codes of v / absmax2
        absmax1,  # [blocks]
        absmax2,  # [blocks]
        qmap1,  # [256]: the values of the codes
        qmap2,  # [256]
        rate,  # []
        control,  # [4]: whether to update, 1 / scale, 1 - beta1^t, sqrt(1 - beta2^t)
        COUNT,
        beta1,
        beta2,
        eps,
        decay,
        BLOCK: tl.constexpr,
    ):
        """See `update`; one block per program."""
        block = tl.program_id(0)
        place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        count = tl.where(tl.load(control) != 0, COUNT, 0)  # 0 to update nothing
        inside, any_inside = place < count, count > 0
        inverse, correction1 = tl.load(control + 1), tl.load(control + 2)
        correction2, lr = tl.load(control + 3), tl.load(rate)

        g = tl.load(grad + place, mask=inside, other=0.0) * inverse
        code1 = tl.load(state1 + place, mask=inside, other=0).to(tl.int32)
        code2 = tl.load(state2 + place, mask=inside, other=0).to(tl.int32)
        s1 = tl.load(qmap1 + code1) * tl.load(absmax1 + block)
        s2 = tl.load(qmap2 + code2) * tl.load(absmax2 + block)
        s1 = tl.where(inside, s1 * beta1 + (1.0 - beta1) * g, 0.0)
        s2 = tl.where(inside, s2 * beta2 + (1.0 - beta2) * g * g, 0.0)

        value = tl.load(p + place, mask=inside, other=0.0)
        value -= lr * correction2 / correction1 * (s1 / (tl.sqrt(s2) + correction2 * eps))
        tl.store(p + place, value * (1.0 - lr * decay), mask=inside)

        largest1, largest2 = tl.max(tl.abs(s1), axis=0), tl.max(s2, axis=0)
        tl.store(absmax1 + block, largest1, mask=any_inside)
        tl.store(absmax2 + block, largest2, mask=any_inside)
        # A block of zeros has codes too.
        code1 = _nearest(s1 / tl.where(largest1 > 0, largest1, 1.0), qmap1, True)
        code2 = _nearest(s2 / tl.where(largest2 > 0, largest2, 1.0), qmap2, False)
        # A mean gradient keeps its sign, however small it is.
        turned = (tl.load(qmap1 + code1) < 0) != (s1 < 0)
        code1 = tl.where(turned, tl.where(s1 > 0, code1 + 1, code1 - 1), code1)
        tl.store(state1 + place, code1.to(tl.uint8), mask=inside)
        tl.store(state2 + place, code2.to(tl.uint8), mask=inside)


def decide(largest, loss, loss_sum, outcome, scaling, most_overflows, betas, control):
    """Decide on the GPU whether a step updates, is skipped or ends the run; tensors are changed in place.

    `largest` [] is the gradient's largest absolute value and `loss` [] the step's loss. `outcome`, int32 [4], counts
    updates, skipped steps and consecutive overflows. Its last element is 0 or why the run ends: NOT_FINITE,
    LOSS_NOT_FINITE or OVERFLOWS (more than `most_overflows` consecutive ones). Once that is not 0, nothing changes any
    more. `scaling` is None or (scale [] float32, growth tracker [] int32, growth factor, backoff factor, growth
    interval) of a torch.amp.GradScaler, updated as torch._amp_update_scale_ does. The loss of a step that does not end
    the run is added to `loss_sum`. `update` reads `control`, float32 [4].
    """
    scale, tracker, *numbers = scaling or (control, outcome, 1.0, 1.0, 1)
    logs = [math.log2(max(beta, 1e-300)) for beta in betas]
    tensors = largest, loss, loss_sum, outcome, scale, tracker, control
    _decide[(1,)](*tensors, *numbers, most_overflows, *logs, scaling is not None, num_warps=1)


def update(p, grad, state, rate, control, betas, eps, decay):
    """One step of AdamW (Loshchilov & Hutter 2019) on the vector `p`, float32 [n], in place.

    `grad` [n] is still scaled, `state` is bitsandbytes' of p with 8-bit moments (Dettmers et al. 2022), `rate` [] the
    learning rate. `control` from `decide` holds whether to update, the inverse of the loss scale, and the bias
    corrections of both moments.
    """
    grid = (triton.cdiv(p.numel(), BLOCK),)
    tensors = (state[key] for key in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"))
    _adamw[grid](p, grad, *tensors, rate, control, p.numel(), *betas, eps, decay, BLOCK)


@functools.cache
def missing_kernels(device):
    """Why these kernels cannot be used on `device`, or None. They are compared with bitsandbytes on a small input."""
    if triton is None:
        return "this build of torch has no Triton"
    return failure(lambda: None if agrees(device) else "their results are wrong on this device")


def agrees(device, count=5000, steps=3):
    """Whether `steps` updates of a vector of `count` elements, the last block not full, match bitsandbytes'.

    Nearly all codes are the same: bitsandbytes rounds some values between two codes differently, and on a CPU a few
    others.
    """
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(1 + steps, count, generator=generator, dtype=torch.float32).to(device)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    rate, scale, betas, eps, decay = 0.01, 1024.0, (0.9, 0.999), 1e-8, 0.1
    settings = dict(lr=rate, betas=betas, eps=eps, weight_decay=decay)
    optimizer, states = AdamW8bit([theirs], **settings), AdamW8bit([ours], **settings)
    states.init_state(states.param_groups[0], ours, 0, 0)
    state = states.state[ours]
    numbers = torch.tensor([rate, 0.0, 0.0, scale], dtype=torch.float32, device=device)
    rate, loss, loss_sum, scale = numbers
    tracker, control = torch.zeros((), dtype=torch.int32, device=device), numbers.new_zeros(4)
    outcome = torch.zeros(4, dtype=torch.int32, device=device)
    for gradient in gradients:
        theirs.grad = gradient
        optimizer.step()
        scaled = gradient * scale
        scaling = scale, tracker, 2.0, 0.5, 2  # the scale grows meanwhile
        decide(scaled.abs().max(), loss, loss_sum, outcome, scaling, 1, betas, control)
        update(ours.data, scaled, state, rate, control, betas, eps, decay)
    agree = (ours - theirs).norm() < 0.01 * (theirs - start).norm()
    for key, tensor in optimizer.state[theirs].items():
        if key.startswith("state"):
            agree &= (tensor != state[key]).float().mean() < 0.05
        elif key.startswith("absmax"):
            agree &= torch.allclose(tensor, state[key], rtol=0.02)
    return bool(agree) and outcome.tolist() == [steps, 0, 0, 0]
