"""Layers."""

from mosa_fast.nn.projection import SparseProjection
from mosa_fast.nn.sparse_adapter import SparseAdapter

__all__ = ["SparseAdapter", "SparseProjection"]
