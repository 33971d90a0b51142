"""Operators: one file each, served by interchangeable backends."""

from mosa_fast.ops.adapted_mlp import adapted_mlp
from mosa_fast.ops.adapter_bank import adapter_bank
from mosa_fast.ops.backends import backend, get_backend, set_backend
from mosa_fast.ops.sparse_adapter import sparse_adapter
from mosa_fast.ops.sparse_lora import sparse_lora

__all__ = ["adapted_mlp", "adapter_bank", "backend", "get_backend", "set_backend", "sparse_adapter", "sparse_lora"]
