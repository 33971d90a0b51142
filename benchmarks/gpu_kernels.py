"""`python -m benchmarks.gpu_kernels kernels|tiles|products [--out FILE.json]`: on a GPU, what the model leaves open.

`kernels`: each launch of the adapter's forward and backward by itself, beside what `benchmarks.machine_code` expects.
`tiles`: the kernels that go through the rows of x, with the table's tile and with those that the model prefers on an
H200, whose memory is faster but not its L2 cache; a tile that does not compile or does not fit has a reason in place of
a time. `products`: cuBLAS at the widths that an MLP has with an adapter inside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import CASES
from benchmarks.machine import environment
from benchmarks.results import markdown_table
from benchmarks.spec import Spec
from benchmarks.timing import Work, interleaved
from mosa_fast.config import Precision
from mosa_fast.ops.triton_tiles import Tile

BACKBONE, WIDTH = "vit_base_patch16_224", 768
IMAGES = (64, 128)  # a view: M = 25,216 and 50,432
KINDS: dict[str, Precision] = {"plain": "bf16-true", "autocast": "bf16-mixed"}  # as the model calls them
BY_ROWS = {"forward": "sparse_adapter_fwd_kernel", "backward_input": "sparse_adapter_bwd_input_kernel"}
# By kind and kernel; the first one is the table's.
TILES = {
    ("plain", "forward"): (Tile(64, 32, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 16, 3)),
    ("plain", "backward_input"): (Tile(64, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 16, 3)),
    ("autocast", "forward"): (Tile(64, 64, 8, 2), Tile(128, 32, 8, 3), Tile(128, 64, 16, 2)),
    ("autocast", "backward_input"): (Tile(32, 64, 8, 3), Tile(64, 32, 8, 3), Tile(128, 32, 8, 3)),
}
HIDDEN = (3072, 3136, 3200)  # the MLP alone; with one adapter of r = 64 in it; with one for each of two views
Row = dict[str, Any]


@dataclass(frozen=True)
class Launched:
    """One launch of a kernel: running it again computes the same again."""

    kernel: str
    tile: Any
    run: Callable[[], object]


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Keep what is launched meanwhile."""
    from mosa_fast.ops import triton_launching

    launch, found = triton_launching.launch, list[Launched]()

    def record(kernel: Any, grid: tuple[int, ...], tile: Any, arguments: dict[str, Any]) -> None:
        launch(kernel, grid, tile, arguments)
        found.append(Launched(kernel.fn.__name__, tile, partial(launch, kernel, grid, tile, dict(arguments))))

    with mock.patch.object(triton_launching, "launch", record):
        yield found


@contextmanager
def other_tile(of: str, tile: Tile) -> Iterator[None]:
    """This tile for one kernel of `BY_ROWS`."""
    from mosa_fast.ops import triton_tiles

    choose = triton_tiles.choose

    def chosen(kernel: str, *arguments: Any, **options: Any) -> Any:
        return tile if kernel == of else choose(kernel, *arguments, **options)

    with mock.patch.object(triton_tiles, "choose", chosen):
        yield


def launches(spec: Spec, device: torch.device) -> list[Launched]:
    """Those of an adapter's forward and backward."""
    make = CASES["operator"](spec, device)["ours, triton"]
    if isinstance(make, str):
        raise RuntimeError(make)
    work = make().work["all"]
    with recorded() as found:
        work.run()
    return found


def time_kernels(spec: Spec, kind: str, device: torch.device, model: dict[tuple[Any, ...], Row]) -> list[Row]:
    """A row for each launch, with what the model expects of its kernel."""
    found = launches(spec, device)
    timings = interleaved(
        {str(index): Work(launch.run) for index, launch in enumerate(found)}, device, repeats=spec.repeats
    )
    m = 2 * spec.images * spec.tokens
    rows = []
    for launch, timing in zip(found, timings.values(), strict=True):
        expected = model.get((kind, m, launch.kernel), {})
        row = {"kind": kind, "rows": m, "kernel": launch.kernel, "us": round(timing.median * 1e3, 2)}
        row |= {"low": round(timing.low * 1e3, 2), "high": round(timing.high * 1e3, 2)}
        rows.append(row | {"model_us": expected.get("us"), "bound": expected.get("bound")})
    return rows


def time_tiles(
    spec: Spec, kind: str, device: torch.device, tiles: Mapping[tuple[str, str], Sequence[Tile]] = TILES
) -> list[Row]:
    """A row for each kernel and tile: its time, or why it has none."""
    rows: list[Row] = []
    works: dict[str, Work] = {}
    for of, tile in [(name, tile) for name in BY_ROWS for tile in tiles[kind, name]]:
        kernel = BY_ROWS[of]
        row: Row = {"kind": kind, "rows": 2 * spec.images * spec.tokens, "kernel": kernel, "tile": str(tile)}
        try:
            with other_tile(of, tile):
                found = launches(spec, device)
        except Exception as error:  # the compiler's errors have no common class; another candidate may do
            row["reason"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        else:
            works[str(len(rows))] = Work(next(launch.run for launch in found if launch.kernel == kernel))
        rows.append(row)
    for index, timing in interleaved(works, device, repeats=spec.repeats).items() if works else ():
        rows[int(index)]["us"] = round(timing.median * 1e3, 2)
    return rows


def time_products(m: int, width: int, hidden: tuple[int, ...], device: torch.device, repeats: int = 30) -> list[Row]:
    """Of tokens `[m, width]` with `[hidden, width]`, and back: a row for each; TFLOP/s."""
    dtype = torch.bfloat16
    tokens = torch.randn(m, width, device=device, dtype=dtype)
    works = {}
    for size in hidden:
        weight, inner = (torch.randn(rows, size, device=device, dtype=dtype) for rows in (width, m))
        works[f"N = {size}"] = Work(partial(torch.matmul, tokens, weight))
        works[f"K = {size}"] = Work(partial(torch.matmul, inner, weight.T))
    timings = interleaved(works, device, repeats=repeats)
    rows: list[Row] = []
    for name, timing in timings.items():
        operations = 2.0 * m * width * int(name.split()[-1])
        row = {"product": name, "rows": m, "us": round(timing.median * 1e3, 2)}
        rows.append(row | {"tflop_per_s": round(operations / timing.median / 1e9, 1)})
    return rows


def expected(device: torch.device) -> dict[tuple[Any, ...], Row]:
    """The model's rows of ViT-B at r = 64 for this GPU, by kind, M and kernel; none for another GPU."""
    from benchmarks.machine_code.results import RESULTS, read

    name = torch.cuda.get_device_name(device)  # "NVIDIA H100 80GB HBM3"
    return {
        (row["kind"], row["rows"], row["kernel"]): row
        for row in read(RESULTS)["rows"]
        if row["chip"] in name and (row["width"], row["bottleneck"]) == (WIDTH, 64)
    }


def show(rows: list[Row]) -> str:
    """As a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(columns, [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kernels", description="Times what the model leaves open."
    )
    parser.add_argument("part", choices=("kernels", "tiles", "products"))
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU, and torch sees none")
    device = torch.device("cuda")
    rows: list[Row] = []
    if options.part == "products":
        rows = time_products(2 * max(IMAGES) * 197, WIDTH, HIDDEN, device)
    else:
        model = expected(device)
        for kind, precision in KINDS.items():
            for images in IMAGES:
                spec = Spec("operator", BACKBONE, images, precision, repeats=30)
                if options.part == "kernels":
                    rows += time_kernels(spec, kind, device, model)
                else:
                    rows += time_tiles(spec, kind, device)
    print(show(rows))
    if options.out is not None:
        options.out.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
