"""The arguments of every operator, stated once (how the fields are read: `call.py`).

To add an argument, add a field here, a parameter to the operator's public function, and a parameter to each kernel that
reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mosa_fast.ops import philox
from mosa_fast.ops.call import Call, tensor
from mosa_fast.ops.slots import Slots, slots_of


@dataclass(frozen=True)
class MixtureCall(Call):
    """What the operators with a mixture of adapters share: x, and the adapter's weights.

    scale_tensor, if given, stands in for scale, since schemas have no unions. seed is None where nothing is dropped.
    """

    x: Annotated[Tensor, tensor("... D", gradient="input")]
    norm_weight: Annotated[Tensor | None, tensor("D", gradient="weight")]
    norm_bias: Annotated[Tensor | None, tensor("D", gradient="weight")]
    down_weight: Annotated[Tensor, tensor("r D", gradient="weight")]
    down_bias: Annotated[Tensor, tensor("E r", gradient="weight")]
    up_weight: Annotated[Tensor, tensor("D r", gradient="weight")]
    up_bias: Annotated[Tensor, tensor("E D", gradient="weight")]
    down_init: Annotated[Tensor | None, tensor("r D")]
    down_owner: Annotated[Tensor | None, tensor("r D", torch.uint8)]
    up_owner: Annotated[Tensor | None, tensor("D r", torch.uint8)]
    experts: Annotated[Tensor, tensor("V 2", torch.int32)]
    scale_tensor: Annotated[Tensor | None, tensor(None, gradient="scale")]
    seed: Annotated[Tensor | None, tensor(None, torch.int64)]

    @property
    def bottleneck(self) -> int:
        """The bottleneck, r."""
        return self.down_weight.shape[0]


@dataclass(frozen=True)
class SparseAdapterCall(MixtureCall, name="sparse_adapter"):
    """A call of `mosa_fast.ops.sparse_adapter`, whose docstring says what the arguments mean.

    prepared_*: what kernels read in place of the weights (`mosa_fast.ops.prepare_weights`); the reference, and the
    gradients of the weights, go by the weights themselves.
    """

    skip: Annotated[Tensor | None, tensor("... D", gradient="input", only_added=True)]
    prepared_down: Annotated[Tensor | None, tensor(None)]
    prepared_up: Annotated[Tensor | None, tensor(None)]
    prepared_vectors: Annotated[Tensor | None, tensor(None)]
    prepared_up_bias: Annotated[Tensor | None, tensor(None)]
    activation: str
    scale: float
    dropout: float
    add_input: bool
    fork: bool
    eps: float
    product_dtype: torch.dtype

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the output."""
        return self.x.dtype if self.skip is None else torch.promote_types(self.x.dtype, self.skip.dtype)

    @property
    def slots(self) -> Slots:
        """How many weights of each projection are prepared, and for whom."""
        split = self.down_owner is not None, self.up_owner is not None
        return slots_of(self.groups, self.down_bias.shape[0], self.up_bias.shape[0], *split)

    @property
    def dropout_threshold(self) -> int:
        """An activation is dropped where its random 16-bit number is below this one."""
        return philox.dropout_threshold(self.dropout)

    @property
    def dropout_scale(self) -> float:
        """What a kept activation is multiplied by."""
        return philox.dropout_scale(self.dropout)


@dataclass(frozen=True)
class AdaptedMLPCall(MixtureCall, name="adapted_mlp"):
    """A call of `mosa_fast.ops.adapted_mlp`, whose docstring says what the arguments mean.

    input_gradient: x will get a gradient, so that what it needs is kept.
    """

    mlp_norm_weight: Annotated[Tensor, tensor("D")]
    mlp_norm_bias: Annotated[Tensor, tensor("D")]
    fc1_weight: Annotated[Tensor, tensor("H D")]
    fc1_bias: Annotated[Tensor, tensor("H")]
    fc2_weight: Annotated[Tensor, tensor("D H")]
    fc2_bias: Annotated[Tensor, tensor("D", only_added=True)]
    layer_scale: Annotated[Tensor | None, tensor("D")]
    scale: float
    dropout: float
    fork: bool
    eps: float
    input_gradient: bool
    product_dtype: torch.dtype

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP, H."""
        return self.fc1_weight.shape[0]

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the output: of x plus a product."""
        return torch.promote_types(self.x.dtype, self.product_dtype)


class TargetsCall(Call):
    """What the operators on several targets share. Each target has columns of the output, and ranks, of its own.

    columns: first and last but one column of every target, one pair after the other.
    """

    down_weight: Tensor
    up_weight: Tensor
    columns: tuple[int, ...]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The columns of every target, half-open."""
        return list(zip(self.columns[::2], self.columns[1::2], strict=True))

    @property
    def rank(self) -> int:
        """The rank of one target, r, or the bottleneck; of a bank, the largest of the tasks'."""
        return self.up_weight.shape[-1]

    @property
    def ranks(self) -> int:
        """The ranks of all targets, R = T r."""
        return self.down_weight.shape[-2]


@dataclass(frozen=True)
class SparseLoRACall(TargetsCall, name="sparse_lora"):
    """A call of `mosa_fast.ops.sparse_lora`, whose docstring says what the arguments mean.

    scale_tensor, if given, stands in for scale.
    """

    x: Annotated[Tensor, tensor("... D", gradient="input")]
    y: Annotated[Tensor, tensor("... O", gradient="input", only_added=True)]
    down_weight: Annotated[Tensor, tensor("R D", gradient="weight")]
    up_weight: Annotated[Tensor, tensor("W r", gradient="weight")]
    down_init: Annotated[Tensor | None, tensor("R D")]
    down_owner: Annotated[Tensor | None, tensor("R D", torch.uint8)]
    up_owner: Annotated[Tensor | None, tensor("W r", torch.uint8)]
    experts: Annotated[Tensor, tensor("T V 2", torch.int32)]
    scale_tensor: Annotated[Tensor | None, tensor(None, gradient="scale")]
    columns: tuple[int, ...]
    num_experts: int
    scale: float
    fork: bool
    product_dtype: torch.dtype


@dataclass(frozen=True)
class AdapterBankCall(TargetsCall, name="adapter_bank"):
    """A call of `mosa_fast.ops.adapter_bank`, whose docstring says what the arguments mean.

    Every sample is a group, since it has a task of its own.
    """

    x: Annotated[Tensor, tensor("... D")]
    skip: Annotated[Tensor | None, tensor("... O", only_added=True)]
    norm_weight: Annotated[Tensor | None, tensor("N D")]
    norm_bias: Annotated[Tensor | None, tensor("N D")]
    down_weight: Annotated[Tensor, tensor("N R D")]
    down_bias: Annotated[Tensor | None, tensor("N R")]
    up_weight: Annotated[Tensor, tensor("N W r")]
    up_bias: Annotated[Tensor | None, tensor("N W")]
    tasks: Annotated[Tensor, tensor(None, torch.int32)]
    columns: tuple[int, ...]
    activation: str
    add_input: bool
    eps: float
    product_dtype: torch.dtype

    fork = False  # no argument

    @property
    def groups(self) -> int:
        """The number of samples, B."""
        return self.x.shape[0]

    @property
    def out_width(self) -> int:
        """The width of the output, O."""
        return self.width if self.skip is None else self.skip.shape[-1]

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the output."""
        if self.skip is None:
            return self.x.dtype
        return torch.promote_types(self.x.dtype, self.skip.dtype) if self.add_input else self.skip.dtype
