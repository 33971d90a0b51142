"""What the registered operator calls: one module for a backend."""

from mosa_fast.kernels.problem import Problem
from mosa_fast.kernels.sparse_adapter_bwd import sparse_adapter_bwd
from mosa_fast.kernels.sparse_adapter_fwd import sparse_adapter_fwd

__all__ = ["Problem", "sparse_adapter_bwd", "sparse_adapter_fwd"]
