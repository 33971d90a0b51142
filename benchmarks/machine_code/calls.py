"""Calls of the operators on tensors that have sizes and types but no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mosa_fast.ops.arguments import AdaptedMLPCall, AdapterBankCall, SparseAdapterCall, SparseLoRACall
from mosa_fast.ops.call import Call, TensorFacts


def shape_of(facts: TensorFacts, sizes: Mapping[Any, Any]) -> tuple[int, ...]:
    """A tensor's shape, with numbers in place of letters."""
    assert facts.shape is not None
    shape: list[int] = []
    for letter in facts.shape:
        size = sizes.get(letter, letter)
        shape += size if isinstance(size, tuple) else [size]
    return tuple(shape)


def without_data(
    kind: type[Call], sizes: dict[str, Any], dtypes: dict[str, torch.dtype], absent: Sequence[str], **given: Any
) -> Any:
    """A call on tensors of these sizes, by their letters, that have no data; float32 unless `dtypes` or facts say."""
    for name, facts in kind.TENSORS.items():
        if name not in given:
            dtype = facts.dtype or dtypes.get(name, torch.float32)
            left_out = name in absent or facts.shape is None
            given[name] = None if left_out else torch.empty(shape_of(facts, sizes), dtype=dtype, device="meta")
    return kind(**given)


def adapter_call(
    width: int = 768,
    bottleneck: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = 2,
    experts: int = 4,
    product_dtype: torch.dtype | None = None,
    activation: str = "gelu",
    dropout: float = 0.1,
    split: str = "both",
    norm: bool = True,
    fork: bool = False,
    scale_tensor: bool = False,
    samples: int | None = None,
    tokens: int = 197,
    skip_dtype: torch.dtype | None = None,
) -> SparseAdapterCall:
    """A call of sparse_adapter: by default the costliest one, both projections split, norm, gelu and dropout.

    Args:
        split: the projections that are: "both", "up", "down" or "none".
        samples: of x; None: two a group.
        skip_dtype: None: x's.
    """
    down, up = split in ("both", "down"), split in ("both", "up")
    absent = (() if down else ("down_init", "down_owner")) + (() if up else ("up_owner",))
    return without_data(
        SparseAdapterCall,
        {"...": (samples or 2 * groups, tokens), "D": width, "r": bottleneck, "V": groups},
        {"x": dtype, "skip": skip_dtype or dtype},
        absent if norm else (*absent, "norm_weight", "norm_bias"),
        down_bias=torch.empty(experts if down else 1, bottleneck, device="meta"),
        up_bias=torch.empty(experts if up else 1, width, device="meta"),
        scale_tensor=torch.empty(1, device="meta") if scale_tensor else None,
        seed=torch.empty(2, dtype=torch.int64, device="meta") if dropout else None,
        activation=activation,
        scale=0.1,
        dropout=dropout,
        add_input=True,
        fork=fork,
        eps=1e-6,
        product_dtype=product_dtype or dtype,
    )


def mlp_call(
    samples: int,
    width: int = 768,
    bottleneck: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = 2,
    experts: int = 4,
    product_dtype: torch.dtype | None = None,
    dropout: float = 0.1,
    tokens: int = 197,
) -> AdaptedMLPCall:
    """A training call of adapted_mlp: a split up-projection, norm, no LayerScale; norm2 has the stream's type."""
    product_dtype = product_dtype or dtype
    sizes = {"...": (samples, tokens), "D": width, "H": 4 * width, "r": bottleneck, "E": experts, "V": groups}
    frozen = dict.fromkeys(("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), product_dtype)
    return without_data(
        AdaptedMLPCall,
        sizes,
        frozen | dict.fromkeys(("x", "mlp_norm_weight", "mlp_norm_bias"), dtype),
        ("layer_scale", "down_init", "down_owner"),
        down_bias=torch.empty(1, bottleneck, device="meta"),
        scale_tensor=None,
        seed=torch.empty(2, dtype=torch.int64, device="meta") if dropout else None,
        scale=0.1,
        dropout=dropout,
        fork=False,
        eps=1e-6,
        input_gradient=True,
        product_dtype=product_dtype,
    )


def lora_call(
    width: int = 768,
    out_width: int = 2304,
    columns: tuple[int, ...] = (0, 768, 1536, 2304),
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = 2,
    experts: int = 4,
    product_dtype: torch.dtype | None = None,
    split: bool = True,
    fork: bool = False,
    scale_tensor: bool = False,
) -> SparseLoRACall:
    """A call of sparse_lora: by default q and v of ViT-B's fused qkv, both projections split."""
    targets, trained = len(columns) // 2, sum(columns[1::2]) - sum(columns[::2])
    product_dtype = product_dtype or dtype
    sizes = {"...": (2 * groups, 197), "D": width, "O": out_width, "W": trained, "r": rank, "R": targets * rank}
    return without_data(
        SparseLoRACall,
        sizes | {"T": targets, "V": groups},
        {"x": dtype, "y": product_dtype},  # under autocast a linear gives the products' dtype
        () if split else ("down_init", "down_owner", "up_owner"),
        scale_tensor=torch.empty(1, device="meta") if scale_tensor else None,
        columns=columns,
        num_experts=experts,
        scale=1.0,
        fork=fork,
        product_dtype=product_dtype,
    )


def bank_call(
    width: int = 768,
    bottleneck: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out_width: int | None = None,
    columns: tuple[int, ...] | None = None,
    pairs: bool = False,
    product_dtype: torch.dtype | None = None,
    activation: str = "gelu",
    add_input: bool = True,
) -> AdapterBankCall:
    """A call of adapter_bank with 64 tasks: by default adapters with norm and gelu; or low-rank pairs on a linear."""
    product_dtype = product_dtype or dtype
    samples, out_width = 128, out_width or width
    columns = columns or (0, out_width)
    sizes = {"...": (samples, 197), "D": width, "O": out_width, "N": 64, "r": bottleneck}
    sizes |= {"R": len(columns) // 2 * bottleneck, "W": sum(columns[1::2]) - sum(columns[::2])}
    return without_data(
        AdapterBankCall,
        sizes,
        {"x": dtype, "skip": product_dtype},  # under autocast a linear gives the products' dtype
        ("norm_weight", "norm_bias", "down_bias", "up_bias") if pairs else (),
        tasks=torch.empty(samples, dtype=torch.int32, device="meta"),
        columns=columns,
        activation="identity" if pairs else activation,
        add_input=add_input and not pairs,
        eps=1e-6,
        product_dtype=product_dtype,
    )
