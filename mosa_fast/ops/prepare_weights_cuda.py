"""Launches the CUDA C++ kernel that prepares weights, layer by layer."""

from __future__ import annotations

from torch import Tensor

from mosa_fast.ops import extension
from mosa_fast.ops.prepare_weights import Preparation, PreparedWeights
from mosa_fast.ops.sparse_adapter_cuda import DTYPES


def forward(call: Preparation, prepared: PreparedWeights) -> None:
    """Fill the prepared weights of all layers."""
    slots, (rank, width), (down_experts, up_experts) = call.slots, call.sizes, call.num_experts
    sizes = extension.zeros("sizes") | {
        "width": width,
        "bottleneck": rank,
        "groups": call.experts.shape[1],
        "down_experts": down_experts,
        "up_experts": up_experts,
        "product_dtype": DTYPES.index(call.product_dtype),
        "by_expert": int(slots.by_expert),
        "down_slots": slots.down,
        "up_slots": slots.up,
    }
    for layer in range(call.layers):
        arrays: dict[str, Tensor | None] = {n: tensors[layer] for n, tensors in call.tensors.items() if tensors}
        arrays |= {f"prepared_{name}": tensor[layer] for name, tensor in prepared.tensors().items()}
        arrays["experts"] = call.experts[layer]
        extension.run("prepare", arrays, sizes, extension.zeros("numbers"))
