"""The operator `mosa_fast::sparse_adapter` and its backward, registered with torch.library.

Schemas, fakes (shapes without data), autograd, and the choice of kernels by the backend's name. Tensors come first in
the schemas; what the reference takes as `scale: float | Tensor` is two arguments here, since schemas have no unions.
Nothing of a backend is imported before its first call. The reference needs none of this: autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosa_fast.ops.philox import dropout_threshold

TENSORS = (
    "x",
    "skip",
    "norm_weight",
    "norm_bias",
    "down_weight",
    "down_bias",
    "up_weight",
    "up_bias",
    "down_init",
    "down_owner",
    "up_owner",
    "experts",
    "scale_tensor",
    "seed",
)
PARAMETERS = ("norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias")
OPTIONS = ("activation", "scale", "dropout", "add_input", "fork", "eps", "product_dtype")
_TENSOR_SCHEMA = (
    "Tensor x, Tensor? skip, Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor down_bias, "
    "Tensor up_weight, Tensor up_bias, Tensor? down_init, Tensor? down_owner, Tensor? up_owner, Tensor experts, "
    "Tensor? scale_tensor, Tensor? seed"
)
_OPTION_SCHEMA = (
    "str activation, float scale, float dropout, bool add_input, bool fork, float eps, ScalarType product_dtype"
)


@torch.library.custom_op(
    "mosa_fast::sparse_adapter",
    mutates_args=(),
    schema=f"({_TENSOR_SCHEMA}, {_OPTION_SCHEMA}, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def sparse_adapter_op(*arguments: Any) -> tuple[Tensor, ...]:
    """Forward: out, and what backward needs (`stats`, `pre`, `vectors`; without rows unless `save`).

    out is `[N, ..., D]`, the others as `mosa_fast.kernels.sparse_adapter_fwd` describes them.
    """
    *inputs, save, backend = arguments
    skip = inputs[TENSORS.index("skip")]
    kernels = _kernels(backend)
    problem = _problem(kernels, inputs)
    with torch.cuda.device_of(problem.x):  # kernels run on the current device
        out, *saved = kernels.sparse_adapter_fwd(problem, None if skip is None else skip.contiguous(), save)
    return out.view(_out_shape(problem.x, problem.experts, problem.fork)), *saved


@sparse_adapter_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, save, _backend = arguments
    named = dict(zip(TENSORS + OPTIONS, inputs, strict=True))
    x, skip, experts = named["x"], named["skip"], named["experts"]
    bottleneck = named["down_weight"].shape[0]
    shape = _out_shape(x, experts, named["fork"])
    out = x.new_empty(shape, dtype=x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype))
    sums = torch.float32
    normed = save and named["norm_weight"] is not None
    return (
        out,
        x.new_empty((x.numel() // x.shape[-1] if normed else 0, 2), dtype=sums),
        x.new_empty((out.numel() // x.shape[-1] if save else 0, bottleneck), dtype=named["product_dtype"]),
        x.new_empty((experts.shape[0] if save else 0, 2, bottleneck), dtype=sums),
    )


@torch.library.custom_op(
    "mosa_fast::sparse_adapter_backward",
    mutates_args=(),
    schema=(
        f"({_TENSOR_SCHEMA}, Tensor grad_out, Tensor stats, Tensor pre, Tensor vectors, {_OPTION_SCHEMA}, "
        "bool need_x, ScalarType? skip_dtype, bool need_parameters, bool need_scale, str backend) -> Tensor[]"
    ),
)
def sparse_adapter_backward_op(*arguments: Any) -> list[Tensor]:
    """Backward: the gradients of x, of skip (forked only), of PARAMETERS and of scale, in that order.

    Only those that were asked for are in the list; a norm that is absent has no gradients. The skip itself is never
    read (None is passed): skip_dtype says that its gradient is wanted, and in what.
    """
    inputs, (grad_out, stats, pre, vectors), options, needs, backend = _split_backward(arguments)
    need_x, skip_dtype, need_parameters, need_scale = needs
    kernels = _kernels(backend)
    with torch.cuda.device_of(grad_out):  # kernels run on the current device
        gradients = kernels.sparse_adapter_bwd(
            _problem(kernels, [*inputs, *options]),
            grad_out.contiguous(),
            stats.contiguous(),
            pre.contiguous(),
            vectors.contiguous(),
            need_x=need_x,
            skip_dtype=skip_dtype,
            need_parameters=need_parameters,
            need_scale=need_scale,
        )
    return [gradient for gradient in vars(gradients).values() if gradient is not None]


@sparse_adapter_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs, _saved, _options, needs, _backend = _split_backward(arguments)
    named = dict(zip(TENSORS, inputs, strict=True))
    if needs[1] is not None:
        named["skip"] = named["x"].to(needs[1])
    return [torch.empty_like(named[name], memory_format=torch.contiguous_format) for name in _returned(inputs, needs)]


def _split_backward(arguments: Sequence[Any]) -> tuple[list[Any], list[Tensor], list[Any], list[Any], str]:
    """The backward operator's arguments: inputs, saved tensors, options, needs, backend."""
    flat, sizes, parts, start = list(arguments), (len(TENSORS), 4, len(OPTIONS), 4), [], 0
    for size in sizes:
        parts.append(flat[start : start + size])
        start += size
    return parts[0], parts[1], parts[2], parts[3], flat[-1]


def _returned(inputs: Sequence[Tensor | None], needs: Sequence[Any]) -> list[str]:
    """Names of the gradients that the backward operator returns, in order."""
    need_x, skip_dtype, need_parameters, need_scale = needs
    present = [name for name in PARAMETERS if inputs[TENSORS.index(name)] is not None] if need_parameters else []
    first = (["x"] if need_x else []) + (["skip"] if skip_dtype is not None else [])
    return first + present + (["scale_tensor"] if need_scale else [])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    count = len(TENSORS)
    *ctx.options, ctx.save, ctx.backend = inputs[count:]
    skip = inputs[TENSORS.index("skip")]
    ctx.skip_dtype = None if skip is None else skip.dtype
    kept = list(inputs[:count])
    kept[TENSORS.index("skip")] = None  # not needed again: do not keep it alive
    ctx.save_for_backward(*kept, *output[1:])


def _backward(ctx: Any, grad_out: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("sparse_adapter was called with save=False, so there is nothing to differentiate with")
    count = len(TENSORS)
    inputs, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needed = dict(zip(TENSORS, ctx.needs_input_grad[:count], strict=True))
    fork = ctx.options[OPTIONS.index("fork")]
    needs = [
        needed["x"],
        ctx.skip_dtype if needed["skip"] and fork else None,
        any(needed[name] for name in PARAMETERS) or needed["scale_tensor"],
        needed["scale_tensor"],
    ]
    gradients: dict[str, Tensor] = {}
    if any(need not in (False, None) for need in needs):
        returned = sparse_adapter_backward_op(*inputs, grad_out, *saved, *ctx.options, *needs, ctx.backend)
        gradients = dict(zip(_returned(inputs, needs), returned, strict=True))
    if needed["skip"] and not fork:
        gradients["skip"] = grad_out.to(ctx.skip_dtype)
    others = len(OPTIONS) + 2  # save, backend
    return *(gradients.get(name) if needed[name] else None for name in TENSORS), *[None] * others


def _second_backward(ctx: Any, *_gradients: Any) -> None:
    raise RuntimeError("sparse_adapter's kernels have no second derivative; use the reference backend for it")


sparse_adapter_op.register_autograd(_backward, setup_context=_setup_context)
sparse_adapter_backward_op.register_autograd(_second_backward)


def _out_shape(x: Tensor, experts: Tensor, fork: bool) -> tuple[int, ...]:
    return (x.shape[0] * (experts.shape[0] if fork else 1), *x.shape[1:])


def _kernels(backend: str) -> Any:
    """The module that serves a backend: it has Problem, sparse_adapter_fwd and sparse_adapter_bwd."""
    if backend == "triton":
        from mosa_fast.kernels import sparse_adapter

        return sparse_adapter
    if backend == "cuda":
        from mosa_fast.ops import cuda

        return cuda
    raise RuntimeError(f"backend {backend!r} has no sparse_adapter kernels")


def _problem(kernels: Any, inputs: Sequence[Any]) -> Any:
    """What kernels are called with: contiguous tensors, and dropout's threshold instead of a seed that is not used."""
    named = dict(zip(TENSORS + OPTIONS, inputs, strict=True))
    del named["skip"]
    for name, value in named.items():
        if isinstance(value, Tensor):
            named[name] = value.contiguous()
    if not named["dropout"]:
        named["seed"] = None
    return kernels.Problem(**named, dropout_threshold=dropout_threshold(named["dropout"]))
