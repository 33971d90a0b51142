"""A training step of ViT-B/16 without adapters, by its operations and bytes: what the adapters' tax is a part of.

The model runs on tensors without data. A product takes its operations at a part of the chip's peak, or its bytes at the
bandwidth of DRAM, whichever is longer; everything else its bytes, as eager PyTorch moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine_code.chips import Chip
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.config import Precision
from mosa_fast.training.precision import autocast, input_dtype, store_frozen

BACKBONE, DEPTH = "vit_base_patch16_224", 12
PRECISION: dict[str, Precision] = {"plain": "bf16-true", "autocast": "bf16-mixed"}  # by kind of call
ATTENTION = "_scaled_dot_product"  # how its operations' names begin
MOVES_NOTHING = ("device", "_unsafe_view")  # and views


@dataclass(frozen=True)
class Utilisation:
    """Which part of the chip's peak is reached."""

    products: float = 0.55
    attention: float = 0.25


@dataclass
class Count(TorchDispatchMode):
    """Sums the time of every operation that runs inside.

    Attributes:
        products: the seconds of those that are products.
        launches: how many move anything.
    """

    chip: Chip
    utilisation: Utilisation
    seconds: float = 0.0
    operations: float = 0.0
    products: float = 0.0
    launches: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = [r.alias_info for r in func._schema.returns]
        if name in MOVES_NOTHING or any(alias is not None and not alias.is_write for alias in aliases):
            return result
        given = {n: value for n, value in (kwargs or {}).items() if n not in _outputs(func)}
        read = [tensor for tensor in tree_leaves((args, given)) if isinstance(tensor, Tensor)]
        written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written)) / self.chip.dram
        operations = _operations(name, read)
        reached = self.utilisation.attention if name.startswith(ATTENTION) else self.utilisation.products
        peak = 2 * self.chip.tensor * self.chip.multiprocessors * self.chip.clock * reached
        seconds = max(moved, operations / peak)
        self.seconds += seconds
        self.operations += operations
        self.launches += 1
        if operations:
            self.products += seconds
        return result


def _outputs(func: Any) -> set[str]:
    """Names of the arguments that an operation only writes."""
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _operations(name: str, read: Sequence[Tensor]) -> float:
    """Operations of a product; other operations have none that count."""
    if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = read[-2:]
        return 2.0 * a.numel() * b.shape[-1]
    if name.startswith(ATTENTION):
        query = next(tensor for tensor in read if tensor.ndim == 4)
        products = 5 if name.endswith("backward") else 2
        return 2.0 * products * query.numel() * query.shape[-2]
    return 0.0


def count_step(
    chip: Chip, precision: Precision, images: int, views: int, utilisation: Utilisation = Utilisation()
) -> Count:
    """Count the forward and backward of a step; gradients reach the first block's output, and both views share it."""
    with torch.device("meta"):
        model: Any = timm.create_model(BACKBONE, num_classes=200)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    store_frozen(model, precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # autocast does not know the meta device

        def fork(block: nn.Module, inputs: Any, x: Tensor) -> Tensor:
            return repeat_batch(x, views).detach().requires_grad_()

        model.blocks[0].register_forward_hook(fork)
        with Count(chip, utilisation) as counted:
            with autocast(precision, torch.device("cpu")):
                logits = model(torch.empty(images, 3, 224, 224, dtype=input_dtype(precision)))
            logits.float().sum().backward()
    return counted
