"""How every Triton kernel is launched: with what its parameters name, from one dictionary for each call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mosa_fast.ops.backends import interpreted
from mosa_fast.ops.call import Call
from mosa_fast.ops.triton_tiles import Tile

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
    """Launch a Triton kernel with the tile's sizes, warps and stages; of the arguments it takes what it names.

    The arguments get the tile's sizes: a copy of so many would take as long as the rest of this function.

    Triton works out anew for every launch which of its compiled kernels goes with the arguments, in 25 microseconds. So
    those that it hands out are kept here, by what it compiles for of the arguments, and launched themselves from then
    on. Triton's switches (to debug or to instrument kernels) count when a kernel is launched for the first time.
    """
    arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"] = tile.rows, tile.columns
    parameters = _parameters_of(kernel)
    values = parameters.take(arguments)
    if not KEEPS_COMPILED:
        kernel[grid](*values, **tile.options())
        return
    runtime, constants = values[: parameters.runtime], values[parameters.runtime :]
    key = (torch.cuda.current_device(), tile.warps, tile.stages, *map(_compiled_for, runtime), *constants)
    compiled = parameters.compiled.get(key)
    if compiled is None:
        parameters.compiled[key] = kernel[grid](*values, **tile.options())
    else:
        compiled[(*grid, 1, 1)[:3]](*values)


# Not where Triton interprets; nor for AMD's chips, where it compiles for the size of a tensor's memory as well.
KEEPS_COMPILED = not interpreted() and torch.version.hip is None


@dataclass(frozen=True)
class _Parameters:
    """A kernel's parameters: how to take them out of a dictionary, in order, and how many come before the constants.

    compiled: the kernels that Triton has compiled, by what for.
    """

    take: Callable[[dict[str, Any]], tuple[Any, ...]]
    runtime: int
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)


@cache
def _parameters_of(kernel: Any) -> _Parameters:
    constants = getattr(kernel, "constexprs", ())  # an interpreted kernel does not know its own
    return _Parameters(itemgetter(*kernel.arg_names), len(kernel.arg_names) - len(constants))


def _compiled_for(value: Any) -> Any:
    """What of an argument at run time Triton compiles for: kernels have it specialise no numbers."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value < 2**31
    if isinstance(value, tuple):
        return tuple(map(_compiled_for, value))
    return type(value)


def arguments(call: Call) -> dict[str, Any]:
    """What kernels of every operator take: tensors as `NAME_ptr`, sizes, and how products are computed."""
    named = _by_pointer("", call, vars(call))
    named |= {
        "rows_per_group": call.rows_per_group,
        "groups": call.groups,
        "WIDTH": call.width,
        "FORK": call.fork,
        "PRODUCT": TRITON_DTYPES[call.product_dtype],
        "PRECISION": product_precision() if call.product_dtype == torch.float32 else "ieee",
    }
    return named


def gradient_arguments(call: Call, gradients: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients as `grad_NAME_ptr`; None for those that are not wanted."""
    return _by_pointer("grad_", call, gradients)


def _by_pointer(prefix: str, call: Call, tensors: dict[str, Any]) -> dict[str, Any]:
    pointers = _pointers(prefix, *call.TENSORS)
    return dict(zip(pointers, map(tensors.get, call.TENSORS), strict=True))


@cache
def _pointers(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}_ptr" for name in names)


def product_precision() -> str:
    """Arithmetic of float32 products: exact, unless the user allowed TF32 in torch."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # the legacy allow_tf32 = True sets it too
    return "tf32" if allowed and not torch.version.hip else "ieee"
