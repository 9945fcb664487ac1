"""What makes the scripts fast: the same numbers, to rounding, from far fewer and larger kernels.

At batch 1 a GPU spends most of a plain training step waiting for Python to launch some ten thousand
small kernels (see bench/README.md). Here are fewer of them, and one launch for all:

- lora: a LoRA or DoRA layer as two matrix products forward and five backward, and so are layers that
  read the same input, together;
- joined: which those are in a UNet and a CLIP text encoder;
- dora: the norms of all DoRA layers taken together;
- channels_last: convolutions in the layout of the tensor cores, with the Triton kernels of norms.py (group norm) and
  maps.py (biases, sums, upsampling, concatenation) around them, which read and write that layout once;
- blocks: transformers with the Triton kernels of rows.py, which are their sums with the layer norms that follow them,
  GEGLU and CLIP's activation;
- guided: what guidance would compute twice with the same result, computed once;
- attention: cuDNN's kernels compiled all at once, for the first run on a machine;
- graphs: everything a function launches, recorded once as a CUDA graph and replayed, with the kernels of memsets.py in
  the place of memsets, which hold a graph up;
- adamw8bit: bitsandbytes' AdamW with learning rate, loss scale and step number read on the GPU;
- on_cpu: forms of GEGLU and upsampling with which a CPU draws faster;
- staging: pinned memory for copies that nobody waits for;
- threads: a CPU's, as few as do.

Those of lora, joined, dora and guided work on any device; those for a GPU say it where they cannot be had, and plain PyTorch remains.
"""
