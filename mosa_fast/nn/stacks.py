"""Layers that hold what N tasks have at one place of a model, and give every sample its own task's; for evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from mosa_fast.nn.sparse_adapter import SparseAdapter
from mosa_fast.nn.sparse_lora import SparseLoRA
from mosa_fast.ops import adapter_bank
from mosa_fast.ops.reference import IDENTITY

NOT_TOLD = "a bank's layer was not told the tasks of its samples: call the bank itself, as in bank(images, tasks=names)"


class _Pass(threading.local):
    """What the layers know of the pass that runs in this thread: threads share the layers, and not their passes.

    A plain attribute of a thread, where a ContextVar would do as well: torch.compile cannot trace the latter's set.
    """

    tasks: Tensor | None = None


_PASS = _Pass()


@contextmanager
def told(tasks: Tensor) -> Iterator[None]:
    """Inside this context the stacks that this thread calls know the tasks of the samples, int32 `[B]`."""
    before = _PASS.tasks
    try:
        _PASS.tasks = tasks
        yield
    finally:
        _PASS.tasks = before


class TaskStack(nn.Module):
    """Tensors of N tasks, stacked `[N, ...]` in buffers; smaller ones are padded.

    Attributes:
        shapes: of every task's own tensors, by name.
    """

    NAMES: ClassVar[tuple[str, ...]]  # of the buffers
    PADDING: ClassVar[Mapping[str, float]] = {}  # where it is not zero

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[dict[str, torch.Size]] = []
        for name in self.NAMES:
            self.register_buffer(name, None)

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a task, as the last one; it has the same names as the others."""
        self.shapes.append({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            self._stack(name, [*self._rows(name), tensor.detach()])

    def remove(self, index: int) -> None:
        """Take a task out; those after it move up."""
        removed = self.shapes.pop(index)
        for name in removed:
            rows = self._rows(name)
            del rows[index]
            self._stack(name, rows)

    def _rows(self, name: str) -> list[Tensor]:
        stacked = getattr(self, name)
        return [] if stacked is None else list(stacked)

    def _stack(self, name: str, rows: Sequence[Tensor]) -> None:
        """Make the buffer of these rows, which may be padded or not."""
        if not rows:
            setattr(self, name, None)
            return
        sizes = [shapes[name] for shapes in self.shapes]
        largest = [max(size) for size in zip(*sizes, strict=True)]
        stacked = rows[0].new_full((len(rows), *largest), self.PADDING.get(name, 0.0))
        for row, size, place in zip(rows, sizes, stacked, strict=True):
            own = tuple(slice(length) for length in size)
            place[own] = row[own]
        setattr(self, name, stacked)

    def _tasks_of(self, x: Tensor) -> Tensor:
        """The task of every row of x's first dimension: samples, or windows of samples, one sample after the other."""
        tasks = _PASS.tasks
        if tasks is None:
            raise RuntimeError(NOT_TOLD)
        windows = x.shape[0] // max(1, tasks.shape[0])
        return tasks if windows == 1 else tasks.repeat_interleave(windows)


class AdapterStack(TaskStack):
    """N tasks' merged adapters: a SparseAdapter of a block, in evaluation.

    Args:
        like: an adapter of the kind that they are.
    """

    NAMES = ("norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias")
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, like: SparseAdapter) -> None:
        super().__init__()
        self.activation = like.activation
        self.eps = 1.0 if like.norm is None else like.norm.eps

    def append_layer(self, adapter: SparseAdapter) -> None:
        """Add a task's adapter, which is merged; the factor on its output becomes part of its up-projection."""
        down, up, norm = adapter.down, adapter.up, adapter.norm
        assert down.bias is not None
        assert up.bias is not None
        tensors = {
            "down_weight": down.weight,
            "down_bias": down.bias[0],
            "up_weight": adapter.scale * up.weight,
            "up_bias": adapter.scale * up.bias[0],
        }
        self.append(tensors if norm is None else tensors | {"norm_weight": norm.weight, "norm_bias": norm.bias})

    def forward(self, x: Tensor, skip: Tensor | None = None, *, add_input: bool = True) -> Tensor:
        """As SparseAdapter's: `[B, ..., D]` to the same."""
        return adapter_bank(
            x,
            skip,
            self.norm_weight,
            self.norm_bias,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self._tasks_of(x),
            activation=self.activation,
            add_input=add_input,
            eps=self.eps,
        )


class LoRAStack(TaskStack):
    """N tasks' merged low-rank pairs on one linear: a SparseLoRA, in evaluation.

    Args:
        like: one of the kind that they are, on the same targets.
    """

    NAMES = ("down_weight", "up_weight")
    down_weight: Tensor  # [N, targets, r, D]
    up_weight: Tensor

    def __init__(self, like: SparseLoRA) -> None:
        super().__init__()
        self.columns = like.columns

    def append_layer(self, lora: SparseLoRA) -> None:
        """Add a task's pairs, which are merged; the factor on their output becomes part of the up-projections."""
        down = lora.down.weight.unflatten(0, (len(self.columns), -1))
        self.append({"down_weight": down, "up_weight": lora.scale * lora.up.weight})

    def forward(self, x: Tensor, y: Tensor, experts: None = None) -> Tensor:
        """As SparseLoRA's: what the linear reads `[B, ..., D]` and gives, `[B, ..., O]`; there are no experts.

        The result may take the memory of y, which nobody but the linear's wrapper has.
        """
        return adapter_bank(
            x,
            y,
            None,
            None,
            self.down_weight.flatten(1, 2),
            None,
            self.up_weight,
            None,
            self._tasks_of(x),
            columns=self.columns,
            activation=IDENTITY,
            add_input=False,
            overwrite_skip=True,
        )


class LinearStack(TaskStack):
    """N tasks' classification heads, of different numbers of classes."""

    NAMES = ("weight", "bias")
    weight: Tensor
    bias: Tensor
    PADDING: ClassVar[Mapping[str, float]] = {"bias": -torch.inf}

    def append_layer(self, linear: nn.Linear) -> None:
        """Add a task's head."""
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        self.append({"weight": linear.weight, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ..., D]` to `[B, ..., most classes]`, -inf past a task's own."""
        tasks = self._tasks_of(x)
        rows = x.reshape(x.shape[0], -1, x.shape[-1]).to(self.weight.dtype)  # heads may be float32 after half precision
        logits = torch.baddbmm(self.bias[tasks].unsqueeze(1), rows, self.weight[tasks].mT)
        return logits.view(*x.shape[:-1], -1)
