"""The calls that matter, and what the model says of them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton

from benchmarks.machine_code.ahead_of_time import compile_launch, launches, preparing
from benchmarks.machine_code.calls import adapter_call
from benchmarks.machine_code.chips import Chip
from benchmarks.machine_code.model import estimate
from benchmarks.machine_code.step import DEPTH
from benchmarks.machine_code.traffic import traffic
from mosa_fast.ops.arguments import SparseAdapterCall

VIEWS, TOKENS = 2, 197
IMAGES = 128  # a view: M = 50,432
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": torch.bfloat16},
    "fork": {"dtype": torch.bfloat16, "fork": True},
    # timm's residual stream stays float32, a branch's output is in the products' type
    "autocast": {"dtype": torch.float32, "product_dtype": torch.bfloat16, "skip_dtype": torch.bfloat16},
}
KINDS["autocast fork"] = KINDS["autocast"] | {"fork": True}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An adapter of the default share (dense down-projection, split up-projection), with norm, GELU and dropout."""

    kind: str
    width: int
    bottleneck: int
    images: int = IMAGES  # of each view; a fork reads those of one

    def call(self) -> SparseAdapterCall:
        """The operator's, on tensors without data."""
        samples = self.images * (1 if "fork" in self.kind else VIEWS)
        return adapter_call(self.width, self.bottleneck, split="up", samples=samples, **KINDS[self.kind])


def all_cases() -> list[Case]:
    """ViT-S, B and L; and ViT-B with one view's tokens, where 1.5 waves of programs fill the chip."""
    cases = [Case(kind, width, r) for kind, width, r in product(KINDS, (384, 768, 1024), (16, 64))]
    return cases + [replace(case, images=IMAGES // 2) for case in cases if case.width == 768 and case.bottleneck == 64]


def checked_cases() -> list[Case]:
    """Those that CI compares."""
    return [Case(kind, 768, 64) for kind in ("plain", "autocast", "fork")]


def count(cases: Iterable[Case], chips: Iterable[Chip], workers: int | None = None) -> Iterator[list[Row]]:
    """Each case's rows on each chip, one for each kernel, in order.

    Args:
        cases: what to compile.
        chips: for what.
        workers: processes, of one thread each; None: as many as there are cores.
    """
    work = list(product(cases, chips))
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn"), _one_thread) as pool:
        yield from pool.map(_rows, work)


def rows_of(case: Case, chip: Chip) -> list[Row]:
    """A case's rows on a chip.

    `layers` is how many layers a launch is for; `layer_us` and `ratio_to_copy` are of one layer's forward and backward
    together, with its part of the launches for all of them.
    """
    call = case.call()
    of_layer = launches(call, chip.architecture, chip.multiprocessors)
    of_model = preparing(call, DEPTH, chip.architecture)
    rows: list[Row] = []
    for launch in (*of_model, *of_layer):
        compiled = compile_launch(launch, chip.architecture)
        layers = DEPTH if launch in of_model else 1
        rows.append(estimate(launch, compiled, traffic(call, launch), chip).row() | {"layers": layers})
    layer, copy = sum(row["us"] / row["layers"] for row in rows), sum(row["copy_us"] for row in rows)
    shared = {
        "kind": case.kind,
        "chip": chip.name,
        "width": case.width,
        "bottleneck": case.bottleneck,
        "rows": call.out_rows,
    }
    together = {"layer_us": round(layer, 1), "ratio_to_copy": round(layer / copy, 3), "triton": triton.__version__}
    return [shared | row | together for row in rows]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _rows(work: tuple[Case, Chip]) -> list[Row]:
    return rows_of(*work)
