"""The sparse adapter operator alone: `python -m benchmarks.adapter [--csv FILE] [--widths 768] [--tokens 25216]`.

For the widths of ViT-S, B, L and H and batches of 8 to 1,024 images of 197 tokens it times the forward, the backward
and both, of the reference in eager PyTorch, of the same under torch.compile, and of our kernels; two groups with their
own experts, an adaptformer adapter (bottleneck 64, four experts, dense down, norm, dropout, skip).

`bytes` is what our kernels plan to move between memory and chip: 3 M D s forward (x and skip in, out out) and 5 M D s
backward (see kernels/sparse_adapter_bwd.py), for M tokens of width D and s bytes; `least_bytes` is 3 M D s for either.
`of_copy` is the time of a measured copy of `bytes` divided by the contender's time: 1 is a perfect score for ours. A
contender whose results are wrong is not timed. Without a GPU small sizes run, and ours is the reference.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_time, environment, interleaved, peak_memory
from mosa_fast.ops import backend, get_backend, sparse_adapter
from mosa_fast.ops.backends import unavailable_reason

WIDTHS = (384, 768, 1024, 1280)  # ViT-S, B, L, H
TOKENS = (1_576, 12_608, 25_216, 50_432, 201_728)  # 197 tokens times 8, 64, 128, 256, 1,024 images
IMAGE_TOKENS = 197
BOTTLENECK, EXPERTS = 64, 4
MODES = ("forward", "backward", "both")
FORWARD_PASSES, BACKWARD_PASSES, LEAST_PASSES = 3, 5, 3  # arrays of M D elements that go between memory and chip
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # relative RMS, against float32 products
COLUMNS = (
    *("device", "torch", "triton", "commit", "dtype", "width", "bottleneck", "tokens", "mode", "contender"),
    *("ms", "spread", "bytes", "least_bytes", "gb_per_s", "of_copy", "peak_mib"),
)


def arguments(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Random arguments of the operator; weights and activations require gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device) * scale
        return made.to(dtype).requires_grad_()

    owner = torch.randint(EXPERTS, (width, BOTTLENECK), generator=generator, device=device, dtype=torch.int32)
    samples = tokens // IMAGE_TOKENS
    return {
        "x": random(samples, IMAGE_TOKENS, width, dtype=dtype),
        "skip": random(samples, IMAGE_TOKENS, width, dtype=dtype),
        "norm_weight": random(width),
        "norm_bias": random(width),
        "down_weight": random(BOTTLENECK, width, scale=width**-0.5),
        "down_bias": random(1, BOTTLENECK),
        "up_weight": random(width, BOTTLENECK, scale=BOTTLENECK**-0.5),
        "up_bias": random(EXPERTS, width),
        "down_init": None,
        "down_owner": None,
        "up_owner": owner.to(torch.uint8),
        "experts": torch.tensor([[0, 1], [0, 3]], dtype=torch.int32, device=device),
        "scale": 0.1,
        "dropout": 0.1,
        "seed": torch.tensor([7], device=device),
    }


class Contender:
    """One implementation on one set of arguments: its forward, its backward, and both."""

    def __init__(self, name: str, values: dict[str, Any], operator: Callable[..., Tensor], backend_name: str) -> None:
        self.name, self.values, self.operator, self.backend_name = name, values, operator, backend_name
        self.leaves = [value for value in values.values() if isinstance(value, Tensor) and value.requires_grad]
        self.grad = torch.randn_like(values["x"])
        self.out: Tensor | None = None

    def forward(self) -> Tensor:
        """Run the forward and keep its graph."""
        with backend(self.backend_name):
            self.out = self.operator(**self.values)
        return self.out

    def backward(self) -> tuple[Tensor, ...]:
        """Run the backward of the forward before."""
        assert self.out is not None
        gradients = torch.autograd.grad(self.out, self.leaves, self.grad)
        self.out = None
        return gradients

    def both(self) -> list[Tensor]:
        """Forward and backward."""
        return [self.forward().detach(), *self.backward()]

    def run(self, mode: str) -> Callable[[], object]:
        """What is timed in a mode."""
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[mode]

    def prepare(self, mode: str) -> None:
        """What comes, untimed, before a run."""
        self.out = None
        if mode == "backward":
            self.forward()


def contenders(values: dict[str, Any], ours: str) -> list[Contender]:
    """Eager, compiled and ours, on the same arguments; ours is left out where it would be the reference again."""
    found = [
        Contender("eager", values, sparse_adapter, "reference"),
        Contender("compile", values, torch.compile(sparse_adapter, dynamic=False), "reference"),
    ]
    return found + ([Contender(ours, values, sparse_adapter, ours)] if ours != "reference" else [])


def wrong(contender: Contender, expected: list[Tensor], dtype: torch.dtype) -> float | None:
    """The largest relative RMS error over output and gradients if it is too large."""
    contender.grad.copy_(torch.ones_like(contender.grad))
    worst = 0.0
    for value, truth in zip(contender.both(), expected, strict=True):
        difference = torch.linalg.vector_norm(value.float() - truth.float()) / torch.linalg.vector_norm(truth.float())
        worst = max(worst, float(difference))
    return worst if not worst <= TOLERANCE[dtype] else None


def measure(width: int, tokens: int, dtype: torch.dtype, device: torch.device, ours: str, repeats: int) -> list[dict]:
    """All rows of one shape."""
    values = arguments(width, tokens, dtype, device)
    exact = {k: v.detach().float().requires_grad_() if _leaf(v) else v for k, v in values.items()}
    oracle = Contender("oracle", exact, sparse_adapter, "reference")
    oracle.grad = torch.ones_like(exact["x"])
    expected = oracle.both()
    del oracle, exact
    ready = {}
    for contender in contenders(values, ours):
        error = wrong(contender, expected, dtype)
        if error is None:
            ready[contender.name] = contender
        else:
            print(
                f"  {contender.name} is wrong by {error:.1e} at D = {width}, M = {tokens}: not timed", file=sys.stderr
            )
    del expected
    rows = []
    array = tokens * width * dtype.itemsize
    passes = {"forward": FORWARD_PASSES, "backward": BACKWARD_PASSES, "both": FORWARD_PASSES + BACKWARD_PASSES}
    for mode in MODES:
        timings = interleaved(
            {name: contender.run(mode) for name, contender in ready.items()},
            device,
            repeats=repeats,
            prepare=partial(_prepare, ready, mode),
        )
        planned = passes[mode] * array
        copied = copy_time(planned, device, repeats).median
        for name, timing in timings.items():
            ready[name].prepare(mode)
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "width": width,
                "bottleneck": BOTTLENECK,
                "tokens": tokens,
                "mode": mode,
                "contender": name,
                "ms": round(timing.median, 4),
                "spread": round(timing.spread, 3),
                "bytes": planned,
                "least_bytes": LEAST_PASSES * array * (2 if mode == "both" else 1),
                "gb_per_s": round(planned / timing.median / 1e6, 1),
                "of_copy": round(copied / timing.median, 3),
                "peak_mib": round(peak_memory(ready[name].run(mode), device), 1),
            }
            rows.append(environment(device) | row)
            print(f"{width:6}{tokens:8} {mode:9}{name:10}{row['ms']:10.3f} ms {row['gb_per_s']:8.1f} GB/s "
                  f"{row['of_copy']:7.3f} of a copy {row['peak_mib']:9.1f} MiB")  # fmt: skip
    return rows


def _prepare(ready: dict[str, Contender], mode: str, name: str) -> None:
    ready[name].prepare(mode)


def _leaf(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def profile(width: int, tokens: int, dtype: torch.dtype, device: torch.device, ours: str) -> None:
    """Run ours a few times and print the planned bytes, for a profiler to compare its counts with."""
    contender = Contender(ours, arguments(width, tokens, dtype, device), sparse_adapter, ours)
    for _ in range(3):
        contender.both()
    array = tokens * width * dtype.itemsize
    print(f"planned bytes: forward {FORWARD_PASSES * array}, backward {BACKWARD_PASSES * array}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", help="default: 384 768 1024 1280; 384 on a CPU")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="multiples of 394; default: 1576 to 201728; 1576 on a CPU"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; float32 on a CPU"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each contender")
    parser.add_argument("--csv", type=Path, help="write the rows here too")
    parser.add_argument("--profile", action="store_true", help="run ours alone, untimed, for a profiler")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    torch._dynamo.config.cache_size_limit = 64  # a compilation for every shape, on purpose
    ours = get_backend()
    if ours == "auto":
        ours = "triton" if gpu and unavailable_reason("triton") is None else "reference"
    widths = options.widths or (WIDTHS if gpu else WIDTHS[:1])
    tokens = options.tokens or (TOKENS if gpu else TOKENS[:1])
    if options.profile:
        profile(widths[0], tokens[0], dtype, device, ours)
        return
    rows = []
    for width in widths:
        for count in tokens:
            rows += measure(width, count, dtype, device, ours, options.repeats)
            if options.csv:  # after every shape: a run that is cut short leaves what it has
                with options.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
