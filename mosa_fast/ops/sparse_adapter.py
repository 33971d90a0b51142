"""The operator `sparse_adapter`: public signature, argument checks, and dispatch to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_fast.ops import reference
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.registration import sparse_adapter_op


def sparse_adapter(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_init: Tensor | None,
    down_owner: Tensor | None,
    up_owner: Tensor | None,
    experts: Tensor,
    *,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    add_input: bool = True,
    fork: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """A mixture of sparse adapters: `(x) + (skip) + scale * up_e(drop(act(down_e(norm(x)))))`.

    The arithmetic and the meaning of the experts are in `mosa_fast.ops.reference` (paper, sections 3.2 and 3.3).
    Products run in autocast's dtype when it is on, else in x's; sums and statistics in float32 (float64 when x is).

    Args:
        x: `[N, ..., D]`, float16, bfloat16, float32 or float64; the first dimension counts samples.
        skip: added to the output; the shape of x, any floating dtype. None: nothing is added.
        norm_weight, norm_bias: `[D]`, the adapter's LayerNorm; both None: no norm.
        down_weight: `[r, D]`. up_weight: `[D, r]`.
        down_bias: `[E, r]` when the down-projection is split, `[1, r]` when it is dense. up_bias: likewise `[*, D]`.
        down_init: `[r, D]`, W0 of the down-projection, used where an expert owns nothing; None: zero.
        down_owner, up_owner: uint8, the weights' shapes: the expert that owns each weight. None: dense.
        experts: int32 `[V, 2]`, the (down, up) expert of each group; -1 is merged. Ids are not checked (that would
            wait for the device): one that is out of range owns nothing.
        activation: "gelu" (exact), "relu" or "silu".
        scale: a number, or a one-element tensor, which gets a gradient.
        dropout: probability, in [0, 1), of dropping a hidden activation.
        seed: of the dropout: an int, or an int64 tensor of one element (the key) or two (the key and the global
            index of the first sample, see `mosa_fast.ops.philox.dropout_keep`).
        add_input: add x to the output.
        fork: False: the N samples are V equal consecutive groups and out has the shape of x. True: every group
            reads all of x, and out is `[V * N, ..., D]`, group after group.
        eps: of the norm.

    Returns:
        The promoted dtype of x and skip.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the backend that was asked for cannot serve.
    """
    seed = _as_tensor(seed, x.device)
    _check_tensors(x, skip, norm_weight, norm_bias, down_weight, up_weight, down_init, down_owner, up_owner)
    _check_bias("down_bias", down_bias, down_owner, down_weight.shape[0], x)
    _check_bias("up_bias", up_bias, up_owner, up_weight.shape[0], x)
    _check_routing(x, experts, seed, fork)
    _check_options(x, activation, scale, dropout)
    tensors = (
        x,
        skip,
        norm_weight,
        norm_bias,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        down_init,
        down_owner,
        up_owner,
        experts,
    )
    name = resolve_backend(x.device, x.dtype)
    if name == "reference":
        return reference.sparse_adapter(
            *tensors,
            activation=activation,
            scale=scale,
            dropout=dropout,
            seed=seed,
            add_input=add_input,
            fork=fork,
            eps=eps,
        )
    scale_tensor = scale if isinstance(scale, Tensor) else None
    out, *_saved = sparse_adapter_op(
        *tensors,
        scale_tensor,
        seed if dropout > 0 else None,
        activation,
        1.0 if isinstance(scale, Tensor) else float(scale),
        float(dropout),
        add_input,
        fork,
        float(eps),
        reference.compute_dtype(x),
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, scale_tensor)),
        name,
    )
    return out


def _as_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed.reshape(-1)
    # full, not tensor: a fill on the device neither waits for it nor breaks a graph that is being captured.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _check_tensors(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    down_init: Tensor | None,
    down_owner: Tensor | None,
    up_owner: Tensor | None,
) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [N, ..., D], got {_describe(x)}")
    if skip is not None:
        if skip.shape != x.shape or not skip.is_floating_point():
            raise ValueError(f"skip must be floating point {_shape(x.shape)} as x is, got {_describe(skip)}")
        _check_device("skip", skip, x)
    width, bottleneck = x.shape[-1], down_weight.shape[0]
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} is None, but the other is not: give both or neither")
    _check_parameter("down_weight", down_weight, (bottleneck, width), x)
    _check_parameter("up_weight", up_weight, (width, bottleneck), x)
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("down_init", down_init, (bottleneck, width)),
    ):
        if tensor is not None:
            _check_parameter(name, tensor, shape, x)
    for name, owner, shape in (
        ("down_owner", down_owner, (bottleneck, width)),
        ("up_owner", up_owner, (width, bottleneck)),
    ):
        if owner is not None:
            if owner.shape != shape or owner.dtype != torch.uint8:
                raise ValueError(f"{name} must be uint8 {_shape(shape)}, got {_describe(owner)}")
            _check_device(name, owner, x)


def _check_bias(name: str, bias: Tensor, owner: Tensor | None, features: int, x: Tensor) -> None:
    if bias.ndim != 2 or bias.shape[0] < 1 or bias.shape[1] != features:
        raise ValueError(f"{name} must be [E, {features}], got {_describe(bias)}")
    if owner is None and bias.shape[0] != 1:
        raise ValueError(f"{name} must be [1, {features}] for a dense projection, got {_describe(bias)}")
    _check_parameter(name, bias, tuple(bias.shape), x)


def _check_routing(x: Tensor, experts: Tensor, seed: Tensor, fork: bool) -> None:
    if experts.dtype != torch.int32 or experts.ndim != 2 or experts.shape[1] != 2 or experts.shape[0] < 1:
        raise ValueError(f"experts must be int32 [V, 2], got {_describe(experts)}")
    if not fork and x.shape[0] % experts.shape[0]:
        raise ValueError(f"experts has {experts.shape[0]} groups, which do not divide the {x.shape[0]} samples of x")
    if seed.dtype != torch.int64 or seed.shape not in ((1,), (2,)):
        raise ValueError(f"seed must be int64 [1] or [2], got {_describe(seed)}")
    _check_device("experts", experts, x)
    _check_device("seed", seed, x)


def _check_options(x: Tensor, activation: str, scale: float | Tensor, dropout: float) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(f"scale must be a number or a one-element floating point tensor, got {_describe(scale)}")
        _check_device("scale", scale, x)


def _check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point {_shape(shape)}, got {_describe(tensor)}")
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {_shape(tensor.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
