"""Adapters in files: diffusers' and kohya's formats, the model card, the Hugging Face Hub."""

from lib.adapter_files.read_write import COMPONENTS, WEIGHTS, adapter_files, find_adapters, read_adapter, save_adapter

__all__ = ["COMPONENTS", "WEIGHTS", "adapter_files", "find_adapters", "read_adapter", "save_adapter"]
