"""Launches the Triton kernel that prepares weights."""

from __future__ import annotations

from typing import Any

from mosa_fast.kernels.prepare_weights import prepare_weights_kernel
from mosa_fast.ops import launching, triton_launching, triton_tiles
from mosa_fast.ops.prepare_weights import Preparation, PreparedWeights
from mosa_fast.ops.triton_tiles import INTERPRETER, Tile

# Few rows of the down-projection a program, since a program goes along them for their sums.
TILE = Tile(rows=4, columns=256, stages=1)


def forward(call: Preparation, prepared: PreparedWeights) -> None:
    """Fill the prepared weights of all layers."""
    slots, (rank, width), (down_experts, up_experts) = call.slots, call.sizes, call.num_experts
    tile = INTERPRETER if triton_tiles.architecture_of(call.experts.device) == "cpu" else TILE
    ranks, columns = prepared.down.shape[-2:]
    up_columns = max(1, tile.rows * tile.columns // ranks)
    programs = slots.down * (ranks // tile.rows) + slots.up * launching.blocks(columns, up_columns)
    arguments: dict[str, Any] = {f"{name}_ptrs": tuple(tensors) or None for name, tensors in call.tensors.items()}
    arguments |= {f"prepared_{name}_ptr": tensor for name, tensor in prepared.tensors().items()}
    arguments |= {
        "experts_ptr": call.experts,
        "groups": call.experts.shape[1],
        "down_slots": slots.down,
        "up_slots": slots.up,
        "WIDTH": width,
        "BOTTLENECK": rank,
        "PADDED_WIDTH": columns,
        "BLOCK_BOTTLENECK": ranks,
        "DOWN_EXPERTS": down_experts,
        "UP_EXPERTS": up_experts,
        "BY_EXPERT": slots.by_expert,
        "PRODUCT": triton_launching.TRITON_DTYPES[call.product_dtype],
    }
    triton_launching.launch(prepare_weights_kernel, (programs, call.layers), tile, arguments)
