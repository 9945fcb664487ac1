"""What makes the scripts fast: the same numbers, to rounding, from far fewer and larger kernels.

At batch 1 a GPU spends most of a plain training step waiting for Python to launch some ten thousand
small kernels (see bench/README.md). Here are fewer of them, and one launch for all:

- lora: a LoRA or DoRA layer as two matrix products forward and five backward, and so are layers that
  read the same input, together;
- joined: which those are in a UNet and a CLIP text encoder;
- dora: the norms of all DoRA layers taken together;
- channels_last: convolutions in the layout of the tensor cores, with the Triton kernels of norms.py and
  large_maps.py between them, which read and write that layout once, and those of rows.py, which are a
  transformer's sums with the layer norms that follow them, and CLIP's activation;
- attention: cuDNN's kernels compiled all at once, for the first run on a machine;
- graphs: everything a function launches, recorded once as a CUDA graph and replayed;
- adamw8bit: bitsandbytes' AdamW with learning rate, loss scale and step number read on the GPU;
- staging: pinned memory for copies that nobody waits for;
- threads: a CPU's, as few as do.

The first three work on any device; those for a GPU say it where they cannot be had, and plain PyTorch remains.
"""
