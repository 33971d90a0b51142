"""Block sizes, warps and pipeline stages of each kernel: a table, a default, and an opt-in search.

A tile is looked up by (kernel, D, r, product dtype, architecture) and never by the number of tokens, so a last short
batch neither compiles nor searches. Unknown shapes and chips get `default_tile`. With MOSA_FAST_AUTOTUNE=1 the first
call of a key times every candidate on the real arguments and the winner is kept in a JSON file (`cache_file()`), which
later runs read instead of searching.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton

if TYPE_CHECKING:
    from mosa_fast.kernels.problem import Problem

ENVIRONMENT_VARIABLE = "MOSA_FAST_AUTOTUNE"
KERNELS = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: rows (tokens) and columns (of D) of a block, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None  # a cap for each thread, for more programs on a multiprocessor; None: the compiler's

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap}


@dataclass(frozen=True)
class Key:
    """What a tile may depend on. dtype: of the products. architecture: "sm_90", "gfx942", "cpu" (interpreter)."""

    kernel: str
    width: int
    bottleneck: int
    dtype: torch.dtype
    architecture: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel}/D{self.width}/r{self.bottleneck}/{dtype}/{self.architecture}"


# What differs from the default, found by search on the chip it names. Empty until a GPU has been measured.
TABLE: dict[Key, Tile] = {}


def default_tile(key: Key) -> Tile:
    """The tile for a key that the table does not have."""
    block_bottleneck = max(16, triton.next_power_of_2(key.bottleneck))
    if key.architecture == "cpu":
        return Tile(rows=16, columns=64, warps=4, stages=1)
    return Tile(rows=128, columns=64, warps=8, stages=3)


def architecture(device: torch.device) -> str:
    """The name of the chip's instruction set, as the table's keys spell it."""
    if device.type != "cuda":
        return "cpu"
    return _architecture_of(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _architecture_of(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def choose(kernel: str, problem: Problem, run: Callable[[Tile], None]) -> Tile:
    """The tile for a kernel of this problem; `run` launches it with a given tile, and may be called many times."""
    device = problem.x.device
    key = Key(kernel, problem.width, problem.bottleneck, problem.product_dtype, architecture(device))
    if os.environ.get(ENVIRONMENT_VARIABLE) == "1" and device.type == "cuda":
        found = _searched().get(str(key))
        if found is not None:
            return found
        if not torch.cuda.is_current_stream_capturing():
            return search(key, run)
    return TABLE.get(key) or default_tile(key)


def candidates(key: Key) -> list[Tile]:
    """The tiles that a search times: the default and its neighbours."""
    first = TABLE.get(key) or default_tile(key)
    found = [first]
    for rows in (first.rows // 2, first.rows, first.rows * 2):
        for columns in (first.columns // 2, first.columns, first.columns * 2):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    tile = Tile(rows, columns, warps, stages)
                    if min(rows, columns) >= 16 and tile not in found:
                        found.append(tile)
    return found


def search(key: Key, run: Callable[[Tile], None]) -> Tile:
    """Time every candidate and keep the fastest in the cache file; one that does not fit the chip is passed over."""
    times: dict[Tile, float] = {}
    for tile in candidates(key):
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
    best = min(times, key=lambda tile: times[tile])
    _searched()[str(key)] = best
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved[str(key)] = asdict(best)
    # Another process may write at the same time: a rename is whole or not at all.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(saved, indent=1, sort_keys=True))
    partial.replace(path)
    return best


def cache_file() -> Path:
    """Where found tiles are kept: one file for each version of Triton, whose code generation they depend on."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mosa_fast" / f"tuning-triton-{triton.__version__}.json"


@lru_cache
def _searched() -> dict[str, Tile]:
    """What the cache file holds, read once a process."""
    path = cache_file()
    return {key: Tile(**tile) for key, tile in json.loads(path.read_text()).items()} if path.exists() else {}
