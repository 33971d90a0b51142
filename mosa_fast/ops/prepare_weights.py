"""The operator `prepare_weights`: what adapters' kernels read in place of master weights, for all layers at once.

A pass computes with the same weights in every block of tokens: those that a group's experts own, times the norm's
weight, in the dtype of the products. They are made once a pass, by one launch for all layers of one shape (the formulas
are in kernels/prepare_weights.py), and kept for backward. They have no gradient: `sparse_adapter` gives the gradients
of the master weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosa_fast.ops import launching
from mosa_fast.ops.registration import NAMESPACE, contiguous, define, launchers, library
from mosa_fast.ops.slots import Slots, padded_rank, padded_width, slots_of

NAME = "prepare_weights"
MOST_LAYERS = 40  # of one launch: it takes a pointer to each tensor, and CUDA takes 4 KB of arguments


class MasterWeights(NamedTuple):
    """One layer's weights, as `sparse_adapter` takes them, in its order."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_init: Tensor | None
    down_owner: Tensor | None
    up_owner: Tensor | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What layers have in common that can be prepared in one launch."""
        return tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in self)


class PreparedWeights(NamedTuple):
    """What the kernels read of one layer: see kernels/prepare_weights.py. D' and R' are padded, with zeros.

    Attributes:
        down: `[slots, R', D']` in the products' dtype: the down-projection's weights, with the norm's in them.
        up: `[slots, D', R']`, of the up-projection.
        vectors: float32 `[slots, 2, R']`: the down-projection's bias, with the norm's in it, and `down`'s row sums.
        up_bias: float32 `[slots, D']`.
        backend: whose kernels read them: each pads R' as its tiles are.
    """

    down: Tensor
    up: Tensor
    vectors: Tensor
    up_bias: Tensor
    backend: str

    def tensors(self) -> dict[str, Any]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in TENSORS}


TENSORS = PreparedWeights._fields[:-1]


class Preparation(NamedTuple):
    """A call of the operator.

    Attributes:
        tensors: for each field of MasterWeights those of all layers; none where layers have no such tensor.
        experts: int32 `[layers, V, 2]`.
        product_dtype: of the matrix products.
    """

    tensors: dict[str, list[Tensor]]
    experts: Tensor
    product_dtype: torch.dtype

    @classmethod
    def of(cls, lists: Iterable[Sequence[Tensor]], experts: Tensor, product_dtype: torch.dtype) -> Preparation:
        """With the tensors in the order of MasterWeights, each in one piece."""
        names = MasterWeights._fields
        tensors = {name: list(map(contiguous, tensors)) for name, tensors in zip(names, lists, strict=True)}
        return cls(tensors, contiguous(experts), product_dtype)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.tensors["down_weight"])

    @property
    def sizes(self) -> tuple[int, int]:
        """Bottleneck and width, r and D."""
        bottleneck, width = self.tensors["down_weight"][0].shape
        return bottleneck, width

    @property
    def num_experts(self) -> tuple[int, int]:
        """Of the down- and of the up-projection."""
        return self.tensors["down_bias"][0].shape[0], self.tensors["up_bias"][0].shape[0]

    @property
    def slots(self) -> Slots:
        """How many weights of each projection are prepared."""
        split = bool(self.tensors["down_owner"]), bool(self.tensors["up_owner"])
        return slots_of(self.experts.shape[1], *self.num_experts, *split)


def prepare_weights(
    layers: Sequence[MasterWeights], experts: Tensor, product_dtype: torch.dtype, backend: str
) -> list[PreparedWeights]:
    """Prepare the weights of several layers.

    Args:
        layers: of any shapes; neighbours of one shape share a launch.
        experts: int32 `[layers, V, 2]`, on the weights' device: the (down, up) expert of every layer and group.
        product_dtype: of the matrix products.
        backend: whose kernels will read them: "triton" or "cuda".
    """
    prepared: list[PreparedWeights] = []
    kinds = [layer.kind for layer in layers]  # compared in plain loops: torch.compile cannot trace groupby
    while len(prepared) < len(layers):
        start = len(prepared)
        stop = start + 1
        while stop < min(len(layers), start + MOST_LAYERS) and kinds[stop] == kinds[start]:
            stop += 1
        lists = [[t for t in tensors if t is not None] for tensors in zip(*layers[start:stop], strict=True)]
        results = _operator(*lists, experts[start:stop], product_dtype, backend)
        for down, up, vectors, up_bias in zip(*(result.unbind() for result in results), strict=True):
            prepared.append(PreparedWeights(down, up, vectors, up_bias, backend))
    return prepared


def results(call: Preparation, backend: str) -> PreparedWeights:
    """Memory for what is prepared, of all layers: `[layers, ...]`."""
    layouts = layouts_of(call.slots, *call.sizes, call.product_dtype, backend)
    device = call.experts.device
    down, up, vectors, up_bias = (launching.empty((call.layers, *shape), dtype, device) for shape, dtype in layouts)
    return PreparedWeights(down, up, vectors, up_bias, backend)


def layouts_of(
    slots: Slots, rank: int, width: int, product_dtype: torch.dtype, backend: str
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor that is prepared of one layer, in the order of PreparedWeights."""
    ranks, columns = padded_rank(rank, backend), padded_width(width)
    return (
        ((slots.down, ranks, columns), product_dtype),
        ((slots.up, columns, ranks), product_dtype),
        ((slots.down, 2, ranks), torch.float32),
        ((slots.up, columns), torch.float32),
    )


def _prepare(*arguments: Any) -> tuple[Tensor, ...]:
    *lists, experts, product_dtype, backend = arguments
    call = Preparation.of(lists, experts, product_dtype)
    prepared = results(call, backend)
    with torch.cuda.device_of(experts):  # kernels run on the current device
        launchers(NAME, backend).forward(call, prepared)
    return tuple(prepared.tensors().values())


def _without_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        prepared: tuple[Tensor, ...] = _operator(*arguments)
        return prepared


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *lists, experts, product_dtype, backend = arguments
    return tuple(results(Preparation.of(lists, experts, product_dtype), backend).tensors().values())


_lists = ", ".join(f"Tensor[] {name}" for name in MasterWeights._fields)
_tensors = ", ".join(f"Tensor {name}" for name in TENSORS)
define(NAME, f"({_lists}, Tensor experts, ScalarType product_dtype, str backend) -> ({_tensors})")
library.impl(NAME, _prepare, "CompositeExplicitAutograd")
library.impl(NAME, _without_gradient, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{NAME}", _fake, lib=library)
_operator = torch.ops.mosa_fast.prepare_weights.default
