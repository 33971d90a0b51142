"""What an adapter inside its MLP's products adds to them on a GPU, by its operations and bytes.

The operator is plain PyTorch, and so it is counted as the step without adapters is (`step.py`), on tensors without
data: its forward and backward, less those of the frozen MLP alone. To that comes a launch for every operation more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from benchmarks.machine_code.calls import mlp_call
from benchmarks.machine_code.cases import IMAGES, KINDS, VIEWS
from benchmarks.machine_code.chips import Chip
from benchmarks.machine_code.step import DEPTH, PRECISION, Count, Utilisation, count_step
from mosa_fast.ops import adapted_mlp_reference
from mosa_fast.ops.adapted_mlp import OPERATOR
from mosa_fast.ops.arguments import AdaptedMLPCall

Row = dict[str, Any]


def mlp_rows(chips: Iterable[Chip], utilisation: Utilisation) -> Iterator[Row]:
    """A row for each chip, kind of call and number of tokens of ViT-B at r = 64.

    Microseconds of a layer: `products`, those of the adapter; `passes` over tensors; `dropout`, to draw its numbers and
    apply them; `launches`; and all together. `tax`: of a layer in every block to the step without adapters.
    """
    for chip, kind, images in product(chips, PRECISION, (IMAGES // 2, IMAGES)):
        whole = count_adapted(kind, images, chip, utilisation)
        dry = count_adapted(kind, images, chip, utilisation, dropout=0.0)
        frozen = count_frozen(kind, images, chip, utilisation)
        times = {
            "products_us": whole.products - frozen.products,
            "passes_us": dry.seconds - dry.products - (frozen.seconds - frozen.products),
            "dropout_us": whole.seconds - dry.seconds,
            "launches_us": (whole.launches - frozen.launches) * chip.launch,
        }
        times["layer_us"] = layer = sum(times.values())
        bare = count_step(chip, PRECISION[kind], images, VIEWS, utilisation).seconds
        call = mlp_call(VIEWS * images)
        row = {"kind": kind, "chip": chip.name, "width": call.width, "bottleneck": call.bottleneck}
        row |= {"rows": call.out_rows} | {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
        yield row | {"tax": round(DEPTH * layer / bare, 4)}


def count_adapted(kind: str, images: int, chip: Chip, utilisation: Utilisation, **options: Any) -> Count:
    """The operator's forward and backward, towards x and all weights."""
    with FakeTensorMode():
        call = _call(kind, images, **options)
        out, *saved = OPERATOR.results(call, True)
        grad, needed = torch.empty_like(out), [getattr(call, name) is not None for name in OPERATOR.differentiable]
        gradients = OPERATOR.gradients(call, grad, needed, None)
        with Count(chip, utilisation) as counted:
            adapted_mlp_reference.forward(call, out, saved)
            adapted_mlp_reference.backward(call, grad, saved, gradients)
    return counted


def count_frozen(kind: str, images: int, chip: Chip, utilisation: Utilisation) -> Count:
    """The same of what timm computes there."""
    with FakeTensorMode():
        c = _call(kind, images)
        x, grad = c.x.requires_grad_(), torch.empty_like(c.x)
        with Count(chip, utilisation) as counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                normed = F.layer_norm(x, (c.width,), c.mlp_norm_weight, c.mlp_norm_bias, c.eps)
                hidden = F.gelu(F.linear(normed, c.fc1_weight, c.fc1_bias))
                out = x + F.linear(hidden, c.fc2_weight, c.fc2_bias)
            out.backward(grad)
    return counted


def _call(kind: str, images: int, **options: Any) -> AdaptedMLPCall:
    """Under a FakeTensorMode on a CPU: autocast does not know the meta device."""
    types = {name: KINDS[kind][name] for name in ("dtype", "product_dtype") if name in KINDS[kind]}
    call = mlp_call(VIEWS * images, **types, **options)
    given = {name: getattr(call, name) for name in call.TENSORS if getattr(call, name) is not None}
    on_cpu: dict[str, Any] = {name: torch.empty_like(tensor, device="cpu") for name, tensor in given.items()}
    return replace(call, **on_cpu)
