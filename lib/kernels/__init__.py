"""Faster training and generation: the same results, to rounding, from far fewer and larger kernels.

At batch 1 a GPU spends most of a plain training step waiting while Python launches about ten thousand small kernels
(bench/README.md). These modules launch fewer, all in one CUDA graph:

- lora: a LoRA or DoRA layer as two matrix products forward and five backward, and layers with one input as one layer;
- fused_projections: which layers those are in a UNet and a CLIP text encoder;
- channels_last: UNets and VAEs in the layout of tensor cores, with the Triton kernels of group_norm and of
  conv_epilogues (biases, sums, upsampling, concatenation), which read and write that layout once;
- transformer_blocks: transformers with the Triton kernels of layer_norm_geglu (sums with the layer norms that follow
  them, GEGLU, CLIP's activation), and the part that both halves of guidance share computed once;
- graphs: the kernels of a function, captured once as a CUDA graph and replayed;
- compile_ahead and compiling: for the first run on a machine, Triton's kernels compiled by other processes and cuDNN's
  attention in threads, while images are encoded and models load; and which attention is left to cuDNN;
- adamw8bit: bitsandbytes' AdamW with learning rate, loss scale and step number read on the GPU;
- pinned_staging: copies that the host does not wait for;
- cpu: one thread for small batches, and faster forms of GEGLU and upsampling.

lora, fused_projections and the shared part of guidance work on any device. If the GPU kernels are unavailable, a note
gives the reason and plain PyTorch is used.
"""
