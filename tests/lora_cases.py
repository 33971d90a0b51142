"""What sparse_lora's kernels are checked on; `kernel_cases.py` has the checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_cases import differentiable, generator_of
from torch import Tensor

from benchmarks.machine_code.calls import shape_of
from mosa_fast.ops.arguments import SparseLoRACall

DIFFERENTIABLE = differentiable(SparseLoRACall)
FIRST_AND_LAST = ((0, 2), (1, 1))


@dataclass(frozen=True)
class LoRACase:
    """Shapes and options of one check; experts: for each target the (down, up) pairs of the groups."""

    name: str
    width: int = 96
    out_width: int = 192
    columns: tuple[tuple[int, int], ...] = ((0, 64), (128, 192))
    rank: int = 4
    samples: int = 4
    tokens: int = 5
    experts: tuple[tuple[tuple[int, int], ...], ...] = (((0, 2), (1, 1)), ((2, 0), (0, 1)))
    num_experts: int = 3
    split_down: bool = True
    split_up: bool = True
    init: bool = True
    y_dtype: torch.dtype | None = None  # None: x's
    fork: bool = False
    scale: float | Tensor = 0.7
    shape: tuple[int, ...] = ()  # of a sample's tokens, instead of (tokens,)
    gradients: tuple[str, ...] = field(default=DIFFERENTIABLE)

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the operator: activations in `dtype`, weights in float32."""
        sizes = {
            "...": (self.samples, *(self.shape or (self.tokens,))),
            "D": self.width,
            "O": self.out_width,
            "R": len(self.columns) * self.rank,
            "r": self.rank,
            "W": sum(stop - start for start, stop in self.columns),
        }
        given = {"down_init": self.init, "down_owner": self.split_down, "up_owner": self.split_up}
        dtypes = {"x": dtype, "y": self.y_dtype or dtype}
        arguments: dict[str, Any] = {
            "experts": torch.tensor(self.experts, dtype=torch.int32, device=device),
            "columns": self.columns,
            "num_experts": self.num_experts,
            "scale": self.scale.to(device, copy=True) if isinstance(self.scale, Tensor) else self.scale,
            "fork": self.fork,
        }
        for name, facts in SparseLoRACall.TENSORS.items():
            if facts.shape is None or name in arguments:
                continue
            shape, generator = shape_of(facts, sizes), generator_of(name, seed)
            if facts.dtype == torch.uint8:
                made = torch.randint(self.num_experts, shape, generator=generator, dtype=torch.int32).to(torch.uint8)
            else:
                made = torch.randn(shape, generator=generator).to(dtypes.get(name, torch.float32))
                made *= 1.0 if name in dtypes else shape[-1] ** -0.5
            arguments[name] = made.to(device) if given.get(name, True) else None
        return arguments


ONE = {"columns": ((0, 192),), "experts": (((0, 2), (1, 1)),)}
CASES = [
    LoRACase("q_and_v_of_a_fused_qkv"),
    LoRACase("all_of_a_fused_qkv", columns=((0, 64), (64, 128), (128, 192)), experts=(((0, 2), (1, 1)),) * 3),
    LoRACase("narrower_keys", columns=((64, 96), (96, 128)), out_width=128),
    LoRACase("a_whole_linear", **ONE),
    LoRACase("columns_that_no_block_fits", columns=((7, 30), (41, 100)), out_width=103, width=33, rank=5),
    LoRACase("columns_in_the_middle", columns=((64, 128),), experts=(((0, 2), (1, 1)),)),
    LoRACase("one_column", columns=((3, 4), (5, 6)), out_width=6),
    LoRACase("one_group", experts=(((1, 0),), ((0, 2),))),
    LoRACase(
        "a_group_for_every_sample", experts=(((0, 1), (2, 2), (-1, 0), (1, -1)), ((2, 0), (-1, -1), (1, 1), (0, 2)))
    ),
    LoRACase("merged", experts=(((-1, -1),), ((-1, -1),))),
    LoRACase("one_projection_merged", experts=(((-1, 2), (0, -1)), ((1, -1), (-1, 0)))),
    LoRACase("ids_out_of_range_own_nothing", experts=(((7, 300), (-2, 255)), ((0, 1), (1, 9)))),
    LoRACase("dense_down", split_down=False, init=False),
    LoRACase("dense_up", split_up=False),
    LoRACase("dense", split_down=False, split_up=False, init=False, num_experts=1),
    LoRACase("no_init", init=False),
    LoRACase("y_of_another_dtype", y_dtype=torch.float32),
    LoRACase("trainable_scale", scale=torch.tensor(0.3)),
    LoRACase("fork", fork=True, samples=3),
    LoRACase("fork_of_three_groups", fork=True, experts=(((0, 1), (2, -1), (1, 1)),) * 2, scale=torch.tensor([1.5])),
    LoRACase("fork_of_y_alone", fork=True, gradients=("y",)),
    LoRACase("x_needs_no_gradient", gradients=tuple(n for n in DIFFERENTIABLE if n != "x")),
    LoRACase("only_x_needs_a_gradient", gradients=("x",)),
    LoRACase("only_y_needs_a_gradient", gradients=("y",)),
    LoRACase("only_the_scale_needs_a_gradient", scale=torch.tensor(2.0), gradients=("scale",)),
    LoRACase("one_token", samples=1, tokens=1, experts=(((0, 1),), ((1, 2),))),
    LoRACase("empty_batch", samples=0),
    LoRACase("rank_of_one", rank=1),
    LoRACase("rank_of_a_tile", rank=16, **ONE),
    LoRACase("255_experts", num_experts=255, experts=(((254, 17), (-1, -1)), ((3, 254), (0, -1)))),
    LoRACase("feature_maps", shape=(2, 3)),
    LoRACase(
        "several_segments_a_slice",
        samples=12,
        tokens=3,
        experts=(((0, 1), (1, 2), (2, 0), (-1, 1), (0, -1), (1, 0)),) * 2,
    ),
    LoRACase("pieces_of_a_group", samples=2, tokens=90, width=64, experts=(((0, 1),), ((2, 1),))),
]
