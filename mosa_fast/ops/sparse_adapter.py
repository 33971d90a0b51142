"""The operator `sparse_adapter`: public function, checks, what its kernels fill, and dispatch to a backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mosa_fast.ops import launching, reference
from mosa_fast.ops.arguments import AdaptedMLPCall, SparseAdapterCall
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.call import check_device, check_experts, check_norm, check_scale, describe, product_dtype
from mosa_fast.ops.prepare_weights import TENSORS, MasterWeights, PreparedWeights, layouts_of, prepare_weights
from mosa_fast.ops.registration import Operator


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
    prepared: PreparedWeights | None = None,
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
        dropout: probability, in [0, 1), of dropping a hidden activation; rounded to a multiple of 1 / 65,536.
        seed: of the dropout: an int, or an int64 tensor of one element (the key) or two (the key and the global
            index of the first sample, see `mosa_fast.ops.philox.dropout_keep`).
        add_input: add x to the output.
        fork: False: the N samples are V equal consecutive groups and out has the shape of x. True: every group
            reads all of x, and out is `[V * N, ..., D]`, group after group.
        eps: of the norm.
        prepared: what `prepare_weights` made of these very weights and experts, so that many layers share a launch.
            None, or made for another backend than the one that serves: it is made here. The reference does without.

    Returns:
        The promoted dtype of x and skip.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the backend that was asked for cannot serve.
    """
    seed = as_tensor(seed, x.device)
    check_seed(seed, x)
    check_scale(scale, x)
    given: dict[str, Tensor] = {} if prepared is None else prepared.tensors()
    call = SparseAdapterCall(
        x=x,
        skip=skip,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        down_init=down_init,
        down_owner=down_owner,
        up_owner=up_owner,
        experts=experts,
        scale_tensor=scale if isinstance(scale, Tensor) else None,
        seed=seed if dropout > 0 else None,
        prepared_down=given.get("down"),
        prepared_up=given.get("up"),
        prepared_vectors=given.get("vectors"),
        prepared_up_bias=given.get("up_bias"),
        activation=activation,
        scale=1.0 if isinstance(scale, Tensor) else float(scale),
        dropout=float(dropout),
        add_input=add_input,
        fork=fork,
        eps=float(eps),
        product_dtype=product_dtype(x),
    )
    check_adapter(call)
    if call.activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {call.activation!r}")
    backend = resolve_backend(x.device, x.dtype, call.NAME)
    if backend == "reference":
        return reference.sparse_adapter(call)
    if prepared is None or prepared.backend != backend:
        call = _with_prepared_weights(call, backend)
    else:
        _check_prepared(call, prepared)
    return _operator(call, backend)


def results(call: SparseAdapterCall, save: bool) -> tuple[Tensor, ...]:
    """Memory for what the forward gives: its output, and what backward needs, which has no rows unless `save`.

    Returns:
        out: `[N, ..., D]` (`[V * N, ..., D]` forked), the promoted dtype of x and skip.
        stats: float32 `[T, 2]`, mean and 1 / std of every row of x; without rows where there is no norm.
        pre: `[M, r]` in the product dtype, the down-projection without its biases.
    """
    c, device = call, call.x.device
    normed = save and c.norm_weight is not None
    return (
        launching.empty((c.out_samples, *c.x.shape[1:]), c.out_dtype, device),
        launching.empty((c.in_rows if normed else 0, 2), torch.float32, device),
        launching.empty((c.out_rows if save else 0, c.bottleneck), c.product_dtype, device),
    )


_operator = Operator(SparseAdapterCall, ("stats", "pre"), results)


def _with_prepared_weights(call: SparseAdapterCall, backend: str) -> SparseAdapterCall:
    """The call of a layer that prepares its own weights."""
    masters = MasterWeights(*(getattr(call, name) for name in MasterWeights._fields))
    (prepared,) = prepare_weights([masters], call.experts.unsqueeze(0), call.product_dtype, backend)
    return replace(call, **{f"prepared_{name}": tensor for name, tensor in prepared.tensors().items()})


def _check_prepared(call: SparseAdapterCall, prepared: PreparedWeights) -> None:
    rank, width = call.down_weight.shape
    layouts = layouts_of(call.slots, rank, width, call.product_dtype, prepared.backend)
    for name, (shape, dtype) in zip(TENSORS, layouts, strict=True):
        tensor: Tensor = getattr(prepared, name)
        if tensor.shape != shape or tensor.dtype != dtype:
            wanted = describe(torch.empty(shape, dtype=dtype, device="meta"))
            raise ValueError(
                f"prepared must be made for such a call: its {name} must be {wanted}, got {describe(tensor)}"
            )
        check_device(f"prepared's {name}", tensor, call.x)


def as_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as operators take it: a number becomes int64 `[1]`."""
    if isinstance(seed, Tensor):
        return seed if seed.ndim == 1 else seed.reshape(-1)
    # full, not tensor: a fill on the device neither waits for it nor breaks a graph that is being captured.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_seed(seed: Tensor, x: Tensor) -> None:
    """Raise a ValueError unless a seed is one or two int64 on x's device."""
    if seed.dtype != torch.int64 or seed.shape not in ((1,), (2,)):
        raise ValueError(f"seed must be int64 [1] or [2], got {describe(seed)}")
    check_device("seed", seed, x)


def check_adapter(call: SparseAdapterCall | AdaptedMLPCall) -> None:
    """Check a call's tensors, and what their shapes and dtypes alone do not say of an adapter.

    Raises:
        ValueError: one does not fit; the message names it.
    """
    call.check()
    check_norm(call.norm_weight, call.norm_bias)
    for name, bias, owner in (
        ("down_bias", call.down_bias, call.down_owner),
        ("up_bias", call.up_bias, call.up_owner),
    ):
        if owner is None and bias.shape[0] != 1:
            raise ValueError(f"{name} must be [1, {bias.shape[1]}] for a dense projection, got {describe(bias)}")
        check_experts(name, bias.shape[0])
    if not 0.0 <= call.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {call.dropout}")
