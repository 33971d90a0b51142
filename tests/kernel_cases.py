"""What the kernels are checked on: one set of cases for Triton's interpreter, the emulation of CUDA C++, and a GPU.

The oracle is the reference in float64, on exactly the numbers that the kernels get; eager is the reference in the
kernels' own dtype. Errors are relative RMS, over the output and every gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from benchmarks.machine_code.calls import shape_of
from mosa_fast.ops import adapter_bank, backend, launching, sparse_adapter, sparse_lora
from mosa_fast.ops.arguments import AdapterBankCall, SparseAdapterCall, SparseLoRACall
from mosa_fast.ops.call import Call

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EAGER_FACTOR = 2.0  # kernels may be at most this much worse than eager PyTorch in the same dtype
# Below this luck decides: one rounding to 16 bits, or eight to 32.
EAGER_FLOOR = {torch.float32: 8 * 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def differentiable(call: type[Call]) -> tuple[str, ...]:
    """The arguments of an operator's public function that get a gradient."""
    return tuple(n.removesuffix("_tensor") for n, facts in call.TENSORS.items() if facts.gradient is not None)


DIFFERENTIABLE = differentiable(SparseAdapterCall)


@dataclass(frozen=True)
class Case:
    """Shapes and options of one check; experts are (down, up) pairs, one for each group."""

    name: str
    width: int = 96
    bottleneck: int = 16
    samples: int = 4
    tokens: int = 5
    experts: int = 3
    groups: tuple[tuple[int, int], ...] = ((0, 2), (1, 1))
    split_down: bool = True
    split_up: bool = True
    init: bool = True
    norm: bool = True
    skip: bool = True
    skip_dtype: torch.dtype | None = None  # None: x's
    add_input: bool = True
    fork: bool = False
    activation: str = "gelu"
    scale: float | Tensor = 0.7
    dropout: float = 0.0
    seed: int | tuple[int, ...] = 5
    offset: float = 0.0  # mean of x, in standard deviations
    shape: tuple[int, ...] = ()  # of a sample's tokens, instead of (tokens,)
    gradients: tuple[str, ...] = field(default=DIFFERENTIABLE)

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the operator: activations in `dtype`, weights in float32."""
        c = self
        sizes = {"...": (c.samples, *(c.shape or (c.tokens,))), "D": c.width, "r": c.bottleneck}
        experts = {"down_bias": c.experts if c.split_down else 1, "up_bias": c.experts if c.split_up else 1}
        given = {
            "skip": c.skip,
            "norm_weight": c.norm,
            "norm_bias": c.norm,
            "down_init": c.init,
            "down_owner": c.split_down,
            "up_owner": c.split_up,
        }
        arguments: dict[str, Any] = {
            "experts": torch.tensor(c.groups, dtype=torch.int32, device=device),
            "activation": c.activation,
            "scale": c.scale.to(device, copy=True) if isinstance(c.scale, Tensor) else c.scale,
            "dropout": c.dropout,
            "seed": torch.tensor(c.seed, device=device) if isinstance(c.seed, tuple) else c.seed,
            "add_input": c.add_input,
            "fork": c.fork,
            "eps": 1e-5,
        }
        for name, facts in SparseAdapterCall.TENSORS.items():
            if facts.shape is None or name in arguments:
                continue
            shape, generator = shape_of(facts, sizes | {"E": experts.get(name)}), generator_of(name, seed)
            if facts.dtype == torch.uint8:
                made = torch.randint(c.experts, shape, generator=generator, dtype=torch.int32).to(torch.uint8)
            else:
                made = torch.randn(shape, generator=generator)
                if name == "x":
                    made = (made + c.offset).to(dtype)
                elif name == "skip":
                    made = made.to(c.skip_dtype or dtype)
                else:
                    # Weights keep a row's size; vectors are small, around one for the norm's weight.
                    made *= shape[-1] ** -0.5 if facts.shape in (("r", "D"), ("D", "r")) else 0.2
                    made += name == "norm_weight"
            arguments[name] = made.to(device) if given.get(name, True) else None
        return arguments


def generator_of(name: str, seed: int) -> torch.Generator:
    """Random numbers of a tensor's own, so that the order of a call's tensors, or a new one, changes no other's."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)


NO_NORM = {"norm": False, "init": False}
CASES = [
    Case("default", dropout=0.1),
    Case("one_group", groups=((1, 0),)),
    Case("a_group_for_every_sample", groups=((0, 1), (2, 2), (-1, 0), (1, -1)), dropout=0.2),
    Case("merged", groups=((-1, -1),)),
    Case("one_projection_merged", groups=((-1, 2), (0, -1))),
    Case("ids_out_of_range_own_nothing", groups=((7, 300), (-2, 255))),
    Case("dense_down", split_down=False, init=False),
    Case("dense_up", split_up=False),
    Case("dense", split_down=False, split_up=False, init=False),
    Case("no_init", init=False, groups=((-1, 0), (2, 1))),
    Case("no_norm", **NO_NORM),
    Case("no_skip", skip=False),
    Case("input_not_added", add_input=False),
    Case("update_alone", add_input=False, skip=False),
    Case("skip_of_another_dtype", skip_dtype=torch.float32),
    Case("relu", activation="relu"),
    Case("silu", activation="silu", **NO_NORM),
    Case("dropout_without_norm", dropout=0.5, **NO_NORM),
    Case("dropout_of_a_later_part_of_the_batch", dropout=0.3, seed=(2**40 + 17, 6)),
    Case("trainable_scale", scale=torch.tensor(0.3)),
    Case("trainable_scale_without_norm", scale=torch.tensor([1.5]), groups=((-1, -1), (0, 1)), **NO_NORM),
    Case("fork", fork=True, samples=3, dropout=0.3),
    Case("fork_without_norm", fork=True, samples=2, **NO_NORM),
    Case("fork_of_three_groups", fork=True, groups=((0, 1), (2, -1), (1, 1)), scale=torch.tensor(0.3)),
    Case("fork_of_a_skip_alone", fork=True, add_input=False, skip_dtype=torch.float32, gradients=("skip",)),
    Case("x_needs_no_gradient", gradients=tuple(n for n in DIFFERENTIABLE if n != "x")),
    Case("only_x_needs_a_gradient", gradients=("x",)),
    Case("only_the_scale_needs_a_gradient", scale=torch.tensor(2.0), gradients=("scale",)),
    Case("one_token", samples=1, tokens=1, groups=((0, 1),)),
    Case("empty_batch", samples=0),
    Case("odd_widths", width=101, bottleneck=7, tokens=9),
    Case("bottleneck_of_one", bottleneck=1),
    Case("narrower_than_a_block", width=33, bottleneck=20),
    Case("one_expert", experts=1, groups=((0, 0), (-1, -1))),
    Case("255_experts", experts=255, bottleneck=8, groups=((254, 17), (-1, -1))),
    Case("feature_maps", shape=(2, 3)),
    Case("far_from_zero", offset=30.0),
    Case("a_mean_of_200_standard_deviations", offset=200.0, tokens=40, width=64),
    Case("several_segments_a_slice", samples=12, tokens=3, groups=((0, 1), (1, 2), (2, 0), (-1, 1), (0, -1), (1, 0))),
    Case(
        "more_groups_than_experts_and_ids_out_of_range",
        samples=6,
        groups=((7, 300), (-2, 255), (-1, 2), (2, -1), (0, 1), (1, 0)),
    ),
    Case("pieces_of_a_group", samples=2, tokens=90, width=64, groups=((0, 1),)),
]


class AnyCase(Protocol):
    """What a check needs of a case."""

    gradients: tuple[str, ...]

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the operator that it is a case of."""


def make(case: AnyCase, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of the operator."""
    return case.make(dtype, device, seed)


def operator_of(arguments: dict[str, Any]) -> tuple[Any, type[Call]]:
    """The operator that these are arguments of, and its call."""
    if "tasks" in arguments:
        return adapter_bank, AdapterBankCall
    return (sparse_lora, SparseLoRACall) if "columns" in arguments else (sparse_adapter, SparseAdapterCall)


def run(
    name: str,
    arguments: dict[str, Any],
    wanted: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output and gradients (None: all) with a backend, `dtype` (of everything; None: as it is), perhaps autocast."""
    operator, call = operator_of(arguments)
    wanted = differentiable(call) if wanted is None else wanted
    leaves = {}
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype).clone(memory_format=torch.preserve_format)
            leaves[key] = value.requires_grad_(key in wanted)
    device = arguments["x"].device.type
    with backend(name), torch.autocast(device, autocast, enabled=autocast is not None):
        out = operator(**arguments | leaves)
    results = {"out": out.detach()}
    leaves = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    if not leaves:
        return results
    generator = torch.Generator().manual_seed(99)
    grad = torch.randn(out.shape, generator=generator).to(device)
    grad = grad.to(out.dtype if dtype is None else kernel_out_dtype(arguments)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return results | dict(zip(leaves, gradients, strict=True))


def kernel_out_dtype(arguments: dict[str, Any]) -> torch.dtype:
    """Dtype of the output that the kernels give; the oracle gets the same rounded gradient."""
    if "columns" in arguments:
        return arguments["y"].dtype
    x, skip = arguments["x"], arguments["skip"]
    return x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype)


def error(value: Tensor, truth: Tensor) -> float:
    """Relative RMS error."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(case: AnyCase, dtype: torch.dtype, device: str, name: str = "triton", seed: int = 0) -> dict[str, float]:
    """Compare a backend with the oracle and with eager; return its errors."""
    arguments = make(case, dtype, device, seed)
    oracle = run("reference", arguments, case.gradients, torch.float64)
    eager = run("reference", arguments, case.gradients)
    with poisoned():
        ours = run(name, arguments, case.gradients)
    return compare(ours, eager, oracle, dtype)


def compare(ours: dict, eager: dict, oracle: dict, dtype: torch.dtype) -> dict[str, float]:
    """Assert shapes, dtypes and errors of every result; return the errors."""
    errors = {}
    for key, truth in oracle.items():
        assert ours[key].shape == truth.shape, key
        assert ours[key].dtype == eager[key].dtype, key
        assert ours[key].isfinite().all(), f"{key} is not finite: something was not written"
        if not truth.any():
            assert not ours[key].any(), f"{key} should be zero"
            continue
        errors[key], eagers = error(ours[key], truth), error(eager[key], truth)
        assert errors[key] < LIMITS[dtype], f"{key}: error {errors[key]:.2e}"
        floor = EAGER_FLOOR[dtype] * (2 if truth.numel() == 1 else 1)  # a single number has no others to make up for it
        allowed = max(EAGER_FACTOR * eagers, floor)
        assert errors[key] <= allowed, f"{key}: error {errors[key]:.2e}, eager {eagers:.2e}"
    return errors


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every output and every buffer of the kernels with NaN first: what is not written shows."""

    def filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    def filled_like(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan"))

    with mock.patch.multiple(launching, empty=filled, empty_like=filled_like):
        yield


def variant(case: Any, **changes: Any) -> Any:
    """The case with some fields changed."""
    return replace(case, **changes)
