"""Distance functions as CUDA kernels, generated from the Python functions.

`statements` traces a function of tensors for one point, operation by operation, and translates it to C. One thread then
marches one ray with every intermediate value in a register. In PyTorch the same march goes through memory for each of
about 500 operations per step.
"""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

STEPS, SHADOW_STEPS = 48, 12  # at most, of a ray and of a shadow ray

_OPERATIONS = {  # of aten, in C
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "rsub": "{1} - {0}",
    "neg": "-{0}",
    "abs": "fabsf({0})",
    "sqrt": "sqrtf({0})",
    "sin": "sinf({0})",
    "cos": "cosf({0})",
    "atan2": "atan2f({0}, {1})",
    "minimum": "fminf({0}, {1})",
    "maximum": "fmaxf({0}, {1})",
    "clamp_min": "fmaxf({0}, {1})",
    "clamp_max": "fminf({0}, {1})",
    "clamp": "fminf(fmaxf({0}, {1}), {2})",
    "where": "{0} ? {1} : {2}",
    "square": "{0} * {0}",
    "pow": "powf({0}, {1})",
    "lt": "{0} < {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "le": "{0} <= {1}",
    "scalar_tensor": "{0}",
    "full_like": "{1}",
}

# A thread block processes a row: its `lanes` rays or points share the row's parameters p.
_KERNELS = """
#define ROW \\
  extern __shared__ float p[]; \\
  for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) p[i] = table[blockIdx.x * WIDTH + i]; \\
  __syncthreads(); \\
  int i = blockIdx.x * blockDim.x + threadIdx.x;

__device__ void distance_at(const float* p, float x, float y, float z, float* distance,
                            float* slot) {
  STATEMENTS
}

extern "C" __global__ void nearest(const float* table, const float* x, const float* y,
                                   const float* z, float* distance, float* slot) {
  ROW
  distance_at(p, x[i], y[i], z[i], distance + i, slot + i);
}

// With soft = 0 `value` is whether the ray meets a surface at t; otherwise the light that passes.
extern "C" __global__ void march(const float* table, const float* ox, const float* oy,
                                 const float* oz, const float* dx, const float* dy,
                                 const float* dz, const float* near, const float* far, float* t,
                                 float* value, int soft) {
  ROW
  float at = near[i], end = far[i], light = 1.0f, distance, slot;
  bool alive = at < end, hit = false;
  for (int step = 0; alive && step < (soft ? SHADOW_STEPS : STEPS); ++step) {
    distance_at(p, ox[i] + at * dx[i], oy[i] + at * dy[i], oz[i] + at * dz[i], &distance, &slot);
    if (soft) {
      float passed = soft * distance / fmaxf(at, 0.02f);
      light = fminf(light, fminf(fmaxf(passed, 0.0f), 1.0f));
      alive = light > 0.01f;
      if (alive) at += fminf(fmaxf(distance, 0.025f), 0.22f);
    } else {
      hit = distance < 0.0009f * fmaxf(at, 0.5f);
      alive = !hit;
      if (alive) at += distance;
    }
    alive = alive && at < end;
  }
  t[i] = at;
  value[i] = soft ? light : (float)hit;
}
"""


def statements(function, width):
    """C statements for function(table [1, width], x, y, z) -> (distance, slot), each [1, 1]."""
    point = torch.ones(1, 1)
    graph = make_fx(function)(torch.ones(1, width), point, point.clone(), point.clone()).graph
    graph.eliminate_dead_code()
    names, lines = {}, []
    inputs = iter(("table", "x", "y", "z"))

    def text(value):
        if isinstance(value, torch.fx.Node):
            return names[value]
        return repr(float(value)) + "f"

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = next(inputs)
        elif node.op == "output":
            distance, slot = node.args[0]
            lines.append(f"*distance = {text(distance)};\n  *slot = {text(slot)};")
        elif node.target.__name__ == "getitem":
            names[node] = f"p[{node.args[1]}]"
        elif (name := node.target.__name__.split(".")[0]) != "split":
            if name == "pow" and node.args[1] == 2:
                name = "square"  # a fast power needs a positive base
            names[node] = f"v{len(lines)}"
            kind = "bool" if name in ("lt", "gt", "ge", "le") else "float"
            value = _OPERATIONS[name].format(*(text(value) for value in node.args))
            lines.append(f"{kind} {names[node]} = {value};")
    return "\n  ".join(lines)


class DistanceKernels:
    """`nearest` and `march` on a GPU, for a function(table [R, width], x, y, z).

    Compilation takes some seconds. Without a CUDA toolkit it raises the error of PyTorch's NVRTC interface.
    """

    def __init__(self, function, width):
        sizes = dict(WIDTH=width, STEPS=STEPS, SHADOW_STEPS=SHADOW_STEPS)
        head = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
        source = head + _KERNELS.replace("STATEMENTS", statements(function, width))
        self._shared = 4 * width  # bytes
        self._nearest, self._march = (
            torch.cuda._compile_kernel(source, name, nvcc_options=["--use_fast_math"]) for name in ("nearest", "march")
        )

    def _run(self, kernel, table, arrays, *numbers):
        rows, lanes = arrays[0].shape
        results = torch.empty(2, rows, lanes, device=table.device)
        inputs = [table.contiguous(), *(array.contiguous() for array in arrays)]
        if rows:
            arguments = [*inputs, results[0], results[1], *numbers]
            kernel((rows, 1, 1), (lanes, 1, 1), arguments, shared_mem=self._shared)
        return results

    def __call__(self, table, x, y, z):
        """Distance to the nearest surface and its slot at points [R, T]: two [R, T]."""
        return tuple(self._run(self._nearest, table, [x, y, z]))

    def march(self, table, o, d, near, far, soft=0):
        """The same as tracing.march."""
        t, value = self._run(self._march, table, [*o, *d, near, far], int(soft))
        return (t, value) if soft else (t, value > 0.5)
