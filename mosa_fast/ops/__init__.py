"""Operators: one file each, served by interchangeable backends."""

from mosa_fast.ops.backends import backend, get_backend, set_backend
from mosa_fast.ops.sparse_adapter import sparse_adapter
from mosa_fast.ops.sparse_lora import sparse_lora

__all__ = ["backend", "get_backend", "set_backend", "sparse_adapter", "sparse_lora"]
