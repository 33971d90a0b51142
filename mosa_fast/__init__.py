"""mosa_fast: Mixture of Sparse Adapters (MoSA) for vision transformers.

Importing this package imports no other library: each public name brings in what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mosa_fast.version import __version__ as __version__

if TYPE_CHECKING:
    from mosa_fast.adapters.adapter_file import save_adapter
    from mosa_fast.adapters.bank import AdapterBank
    from mosa_fast.adapters.fold import fold, merge
    from mosa_fast.adapters.model import AdaptedModel, adapt, load_adapter
    from mosa_fast.adapters.summary import summary
    from mosa_fast.config import MoSAConfig
    from mosa_fast.nn.sparse_adapter import SparseAdapter
    from mosa_fast.nn.sparse_lora import SparseLoRA
    from mosa_fast.ops.backends import backend, set_backend

_HOMES = {
    "AdaptedModel": "mosa_fast.adapters.model",
    "AdapterBank": "mosa_fast.adapters.bank",
    "adapt": "mosa_fast.adapters.model",
    "fold": "mosa_fast.adapters.fold",
    "merge": "mosa_fast.adapters.fold",
    "load_adapter": "mosa_fast.adapters.model",
    "save_adapter": "mosa_fast.adapters.adapter_file",
    "summary": "mosa_fast.adapters.summary",
    "MoSAConfig": "mosa_fast.config",
    "SparseAdapter": "mosa_fast.nn.sparse_adapter",
    "SparseLoRA": "mosa_fast.nn.sparse_lora",
    "backend": "mosa_fast.ops.backends",
    "set_backend": "mosa_fast.ops.backends",
}
__all__ = [
    "AdaptedModel",
    "AdapterBank",
    "MoSAConfig",
    "SparseAdapter",
    "SparseLoRA",
    "adapt",
    "backend",
    "fold",
    "load_adapter",
    "merge",
    "save_adapter",
    "set_backend",
    "summary",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
