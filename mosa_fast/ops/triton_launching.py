"""How every Triton kernel is launched: with what its parameters name, from one dictionary for each call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mosa_fast.ops.call import Call
from mosa_fast.ops.triton_tiles import Tile

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
    """Launch a Triton kernel with the tile's sizes, warps and stages; of the arguments it takes what it names.

    The arguments get the tile's sizes: a copy of so many would take as long as the rest of this function.
    """
    arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"] = tile.rows, tile.columns
    kernel[grid](*_parameters_of(kernel)(arguments), **tile.options())


@cache
def _parameters_of(kernel: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What takes a kernel's parameters, in order, out of a dictionary."""
    return itemgetter(*kernel.arg_names)


def arguments(call: Call) -> dict[str, Any]:
    """What kernels of every operator take: tensors as `NAME_ptr`, sizes, and how products are computed."""
    named: dict[str, Any] = dict(zip(_pointers("", *call.TENSORS), call.tensors().values(), strict=True))
    named |= {
        "rows_per_group": call.rows_per_group,
        "groups": call.groups,
        "WIDTH": call.width,
        "FORK": call.fork,
        "PRODUCT": TRITON_DTYPES[call.product_dtype],
        "PRECISION": product_precision(),
    }
    return named


def gradient_arguments(call: Call, gradients: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients as `grad_NAME_ptr`; None for those that are not wanted."""
    return dict(zip(_pointers("grad_", *call.TENSORS), map(gradients.get, call.TENSORS), strict=True))


@cache
def _pointers(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}_ptr" for name in names)


def product_precision() -> str:
    """Arithmetic of float32 products: exact, unless the user allowed TF32 in torch."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # the legacy allow_tf32 = True sets it too
    return "tf32" if allowed and not torch.version.hip else "ieee"
