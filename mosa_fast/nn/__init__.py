"""Layers."""

from mosa_fast.nn.projection import SparseProjection
from mosa_fast.nn.sparse_adapter import SparseAdapter
from mosa_fast.nn.sparse_lora import SparseLoRA

__all__ = ["SparseAdapter", "SparseLoRA", "SparseProjection"]
