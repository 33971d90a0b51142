"""Runs specs: every contender in turns, their checks, their memory, and a file of rows."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapter import BACKWARD_PASSES, FORWARD_PASSES
from benchmarks.cases import CASES, CONFIG, TOLERANCE, Contender, Spec, UnavailableError, free_memory
from benchmarks.models import VIEWS
from benchmarks.timing import Timing, copy_time, environment, interleaved, peak_memory

KEY = ("case", "backbone", "images", "tokens", "precision", "contender")
MEASURED = ("ms", "low", "high", "images_per_s", "saved_mib", "peak_mib", "state_mib", "reason")
MIB = 2**20
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Specs in order of importance, and the minutes they may take; what does not fit is left out, with a message."""

    specs: tuple[Spec, ...]
    minutes: float


def _gpu_specs() -> tuple[Spec, ...]:
    base = "vit_base_patch16_224"
    first = [
        Spec("step", base, 128, "bf16", compiled=True),
        Spec("operator", base, 128, "bf16", compiled=True, repeats=30),
        Spec("step", base, 128, "fp32", repeats=5),
        Spec("operator", base, 128, "fp32", compiled=True, repeats=30),
        Spec("block", base, 128, "bf16", compiled=True, repeats=20),
        Spec("evaluation", base, 128, "bf16", compiled=True),
        Spec("evaluation", base, 128, "fp32", repeats=5),
    ]
    batches = [Spec("operator", base, images, "bf16", repeats=20) for images in (8, 32, 512)]
    tokens = [Spec("operator", base, 32, "bf16", tokens=count, repeats=20) for count in (50, 577, 1370)]
    return (*first, *batches, *tokens)


def _quick_specs() -> tuple[Spec, ...]:
    tiny = "vit_tiny_patch16_224"
    return (
        Spec("step", "vit_base_patch16_224", 1, "fp32", repeats=5),
        Spec("operator", tiny, 8, "fp32", compiled=True, repeats=10),
        Spec("block", tiny, 4, "fp32", repeats=10),
        Spec("evaluation", tiny, 4, "fp32", repeats=5),
        *(Spec("operator", tiny, images, "fp32", repeats=7) for images in (2, 32)),
        *(Spec("operator", tiny, 8, "fp32", tokens=count, repeats=7) for count in (50, 577)),
    )


SUITES = {"quick": Suite(_quick_specs(), 2), "gpu": Suite(_gpu_specs(), 8)}


def run_suite(suite: Suite, device: torch.device, cases: Iterable[str] | None = None) -> dict[str, Any]:
    """All rows, with what they depend on."""
    started = time.perf_counter()
    torch._dynamo.config.cache_size_limit = 64  # every block, shape and route is compiled, on purpose
    rows: list[Row] = []
    left_out = []
    for spec in suite.specs:
        if cases is not None and spec.case not in cases:
            continue
        # A spec takes about as long as the longest before it, and the last must not run over.
        if time.perf_counter() - started > 0.85 * 60 * suite.minutes:
            left_out.append(asdict(spec))
            print(
                f"{spec.case} {spec.images} x {spec.tokens} {spec.precision}: left out, no time left", file=sys.stderr
            )
            continue
        rows += measure(spec, device)
    return {
        "environment": environment(device) | {"threads": torch.get_num_threads()},
        "machine": machine(device),
        "config": asdict(CONFIG),
        "seconds": round(time.perf_counter() - started, 1),
        "left_out": left_out,
        "rows": rows,
    }


def measure(spec: Spec, device: torch.device) -> list[Row]:
    """The rows of one spec: one a contender, with times, or with the reason why there are none."""
    ready: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    makers = CASES[spec.case](spec, device)
    for name, make in makers.items():
        try:
            contender = make()
            contender.run()  # compiles, and shows what does not run
            ready[name] = contender
        except UnavailableError as error:
            reasons[name] = str(error)
        except Exception as error:  # a contender that breaks must not take the others' numbers with it
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    timings = interleaved({name: c.run for name, c in ready.items()}, device, repeats=spec.repeats, warmup=2)
    rows = []
    for name in makers:
        row: Row = {field: getattr(spec, field) for field in KEY[:-1]} | {"contender": name}
        row |= dict.fromkeys(MEASURED)
        if name in ready:
            reasons |= _add_measurements(row, ready[name], timings[name], spec, device)
        row["reason"] = reasons.get(name)
        rows.append(row)
        print(line(row), flush=True)
    del makers, ready
    free_memory()
    return rows


def _add_measurements(
    row: Row, contender: Contender, timing: Timing, spec: Spec, device: torch.device
) -> dict[str, str]:
    """Fill the row in, unless the results are wrong: a wrong contender has no numbers."""
    try:
        wrong = contender.wrong(TOLERANCE[spec.precision])
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        return {contender.name: f"wrong: {wrong}"}
    row |= {
        "ms": round(timing.median, 4),
        "low": round(timing.low, 4),
        "high": round(timing.high, 4),
        "images_per_s": round(spec.images / timing.median * 1e3, 2),
        "saved_mib": None if spec.case == "evaluation" or contender.compiled else round(saved(contender), 2),
        "peak_mib": round(peak_memory(contender.run, device), 1) if device.type == "cuda" else None,
        "state_mib": None if contender.state_bytes is None else round(contender.state_bytes / MIB, 2),
    }
    return {}


def saved(contender: Contender) -> float:
    """MiB of distinct activations that a run keeps for its backward; the same on every device."""
    storages: dict[int, int] = {}
    kept = []  # alive, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.run()
    return sum(storages.values()) / MIB


def machine(device: torch.device) -> dict[str, float]:
    """What the roofline is made of: measured speed of copying and of multiplying matrices, GB/s and TFLOP/s."""
    gpu = device.type == "cuda"
    nbytes, size = (2**32, 8192) if gpu else (2**28, 1024)
    found = {"copy_gb_per_s": round(nbytes / copy_time(nbytes, device).median / 1e6, 1)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and not gpu:
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timing = interleaved({"product": partial(torch.matmul, a, b)}, device, repeats=10)["product"]
        found[f"{name}_tflop_per_s"] = round(2 * size**3 / timing.median / 1e9, 3)
    return found


def operator_work(row: Row, width: int) -> tuple[float, float]:
    """Operations and planned bytes of the operator's forward and backward (kernels' plan; h and out are float32).

    Four products of `2 M D r` operations forward and backward towards x, two more pairs for the weights: `12 M D r`.
    Bytes: `FORWARD_PASSES` arrays (h, skip, out) and `BACKWARD_PASSES` (h and grad_out twice, grad_x).
    """
    elements = VIEWS * row["images"] * row["tokens"] * width
    skip_bytes = 4 if row["precision"] == "fp32" else 2
    return 12.0 * elements * CONFIG.bottleneck, elements * (4 * (FORWARD_PASSES - 1 + BACKWARD_PASSES) + skip_bytes)


def line(row: Row) -> str:
    """A row to read while the suite runs."""
    start = f"{row['case']:11}{row['images']:5} x {row['tokens']:<5}{row['precision']:5}{row['contender']:26}"
    if row["ms"] is None:
        return f"{start} not timed: {row['reason']}"
    return f"{start}{row['ms']:10.2f} ms  [{row['low']:.2f}, {row['high']:.2f}]  {row['images_per_s']:10.1f} images/s"


def write(results: dict[str, Any], path: Path) -> None:
    """JSON at `path`, and its rows as CSV beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*results["environment"], *KEY, *MEASURED))
        writer.writeheader()
        writer.writerows(results["environment"] | row for row in results["rows"])


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines with ratios new / old for rows that both have, and whether any is slower beyond the spread.

    Slower beyond the spread: the new first quartile is above the old third one. A row that had a time and has none
    now counts as well.

    Raises:
        ValueError: the results are of different devices.
    """
    devices = [results["environment"]["device"] for results in (new, old)]
    if devices[0] != devices[1]:
        raise ValueError(f"the results are of different devices: {devices[0]} and {devices[1]}")
    before = {tuple(row[field] for field in KEY): row for row in old["rows"]}
    lines, slower = [], False
    for row in new["rows"]:
        past = before.get(tuple(row[field] for field in KEY))
        if past is None or past["ms"] is None:
            continue
        name = " ".join(str(row[field]) for field in KEY)
        if row["ms"] is None:
            lines.append(f"{name}: {past['ms']:.3f} ms -> not timed ({row['reason']})")
            slower = True
            continue
        regressed = row["low"] > past["high"]
        slower |= regressed
        verdict = "SLOWER" if regressed else "faster" if row["high"] < past["low"] else "within the spread"
        lines.append(f"{name}: {past['ms']:.3f} -> {row['ms']:.3f} ms, {row['ms'] / past['ms']:.3f}, {verdict}")
    return lines, slower
