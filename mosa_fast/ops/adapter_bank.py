"""The operator `adapter_bank`: public function, checks, the memory that its kernel fills, and dispatch to a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_fast.ops import launching, reference
from mosa_fast.ops.arguments import AdapterBankCall
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.call import check_device, check_norm, check_targets, describe, product_dtype
from mosa_fast.ops.evaluation_operator import EvaluationOperator


def adapter_bank(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    tasks: Tensor,
    *,
    columns: Sequence[tuple[int, int]] | None = None,
    activation: str = "gelu",
    add_input: bool = True,
    eps: float = 1e-6,
    overwrite_skip: bool = False,
) -> Tensor:
    """N tasks' dense adapters, each sample through its own task's: `(x) + (skip) + up_t(act(down_t(norm_t(x))))`.

    Bottleneck adapters, or low-rank pairs on the targets of a linear as in `sparse_lora`: these have no norm, no biases
    and the activation "identity", x is what the linear reads, skip what it gives, and x is not added. A factor on an
    adapter's output is part of its up-projection. An adapter with a smaller bottleneck than others is padded with
    zeros, which add nothing.

    For evaluation: there is no gradient. The arithmetic is in `mosa_fast.ops.reference`. Products run in autocast's
    dtype when it is on, else in x's; sums and statistics in float32 (float64 when x is). The reference shares products
    among neighbours of one task, so that a batch should be sorted by task; it waits for the device to read `tasks`.

    Args:
        x: `[B, ..., D]`, float16, bfloat16, float32 or float64; the first dimension counts samples.
        skip: `[B, ..., O]`, added to the output, any floating dtype. None: nothing is added.
        norm_weight, norm_bias: `[N, D]`, the adapters' LayerNorms; both None: no norm.
        down_weight: `[N, r, D]`. up_weight: `[N, O, r]`.
        down_bias: `[N, r]`; None: zero. up_bias: likewise `[N, O]`.
        tasks: int32 `[B]`, the task of each sample, 0 to N - 1. Values are not checked (that would wait for the
            device): one that is out of range reads other memory.
        columns: T half-open ranges of the output's columns, in ascending order; no two overlap. None: one, all of them.
        activation: "gelu" (exact), "relu", "silu" or "identity".
        add_input: add x to the output, which then is as wide.
        eps: of the norms.
        overwrite_skip: skip is not needed any more, so that the output may take its memory: a pass over it less.

    Returns:
        `[B, ..., O]` (O is D without skip), in the promoted dtype of what is added, of x where nothing is; it shares
        memory with no argument but perhaps with skip, where that may be overwritten.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the backend that was asked for cannot serve; or a gradient was asked for.
    """
    out_width = (x if skip is None else skip).shape[-1]
    call = AdapterBankCall(
        x=x,
        skip=skip,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        tasks=tasks,
        columns=tuple(column for start_and_stop in columns or [(0, out_width)] for column in start_and_stop),
        activation=activation,
        add_input=add_input,
        eps=float(eps),
        product_dtype=product_dtype(x),
    )
    _check(call)
    overwrite = overwrite_skip and skip is not None and skip.dtype == call.out_dtype
    return _operator(call, resolve_backend(x.device, x.dtype, call.NAME), overwrite)


def result(call: AdapterBankCall) -> Tensor:
    """Memory for the output, `[B, ..., O]`."""
    return launching.empty((*call.x.shape[:-1], call.out_width), call.out_dtype, call.x.device)


_operator = EvaluationOperator(AdapterBankCall, result, reference.adapter_bank)


def _check(call: AdapterBankCall) -> None:
    """What a call's shapes and dtypes alone do not say."""
    call.check()
    c, samples = call, call.x.shape[0]
    if c.tasks.dtype != torch.int32 or c.tasks.shape != (samples,):
        raise ValueError(f"tasks must be int32 [{samples}], one for each sample of x, got {describe(c.tasks)}")
    check_device("tasks", c.tasks, c.x)
    check_norm(c.norm_weight, c.norm_bias)
    if c.add_input and c.out_width != c.width:
        raise ValueError(
            f"x is {c.width} wide and cannot be added to an output of {c.out_width}: add_input must be False"
        )
    check_targets(c.ranges, "the output", c.out_width, c.down_weight, c.up_weight)
    known = (*reference.ACTIVATIONS, reference.IDENTITY)
    if c.activation not in known:
        raise ValueError(f"activation must be one of {', '.join(known)}, got {c.activation!r}")
