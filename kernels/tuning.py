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
    input_dtype: torch.dtype
    fork: bool = False

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.input_dtype, self.dtype))
        fork = "/fork" if self.fork else ""
        return f"{self.kernel}/D{self.width}/r{self.bottleneck}/{dtypes}/{self.architecture}{fork}"


# By (D, r, dtype, architecture): what a search found better than the default on the chip. Empty until one was measured.
TABLE: dict[Key, Tile] = {}

# By kernel and kind of call, then by bytes of a product's element and r padded to a power of two, at least 64. These
# are the largest tiles found that compile without spills for sm_80 and sm_90, every option on; no clock has seen them.
# Large, since each program reads all weights again: at 128 rows of D = 768 in bfloat16 they are 0.4 MB from L2 beside
# 0.6 MB of activations. One program of 8 warps a multiprocessor then hides memory behind its pipeline. Exact float32
# products run without tensor cores and want small tiles.
TILES: dict[tuple[str, str], dict[tuple[int, int], Tile]] = {
    ("forward", "plain"): {
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(128, 32, 8, 2),
        (2, 256): Tile(64, 32, 8, 2),
        (4, 64): Tile(32, 32, 4, 2),
        (4, 128): Tile(32, 16, 8, 2),
        (4, 256): Tile(16, 16, 8, 2),
    },
    ("backward_input", "plain"): {
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(64, 64, 8, 2),
        (2, 256): Tile(32, 32, 8, 2),
        (4, 64): Tile(32, 16, 4, 2),
        (4, 128): Tile(16, 16, 8, 2),
        (4, 256): Tile(16, 16, 8, 2),
    },
    ("backward_weight", "plain"): {
        (2, 64): Tile(32, 128, 8, 4),
        (2, 128): Tile(32, 64, 8, 3),
        (2, 256): Tile(32, 32, 8, 2),
        (4, 64): Tile(32, 64, 8, 2),
        (4, 128): Tile(16, 32, 8, 2),
        (4, 256): Tile(16, 16, 8, 2),
    },
    ("backward_weight", "sm_80"): {(2, 64): Tile(32, 64, 8, 3)},  # mma.sync takes more registers than wgmma
    # x is wider than the products: timm's residual stream under autocast. A line of 128 bytes is 32 columns.
    ("forward", "autocast"): {(2, 64): Tile(128, 32, 8, 3)},
    ("backward_input", "autocast"): {(2, 64): Tile(128, 32, 8, 3)},
    ("backward_weight", "autocast"): {
        (2, 64): Tile(32, 64, 8, 3),
        (2, 128): Tile(16, 64, 8, 3),
        (2, 256): Tile(16, 32, 8, 3),
    },
    # A fork loops over its groups, which takes registers.
    ("forward", "fork"): {(4, 64): Tile(16, 32, 4, 2)},
    ("backward_input", "fork"): {
        (2, 64): Tile(64, 64, 8, 2),
        (2, 128): Tile(64, 32, 8, 1),
        (2, 256): Tile(32, 16, 8, 2),
    },
    # D or r is no multiple of 16 bytes: no vector loads, an address for every element.
    ("forward", "ragged"): {
        (2, 64): Tile(32, 32, 8, 2),
        (2, 128): Tile(32, 16, 8, 1),
        (2, 256): Tile(32, 16, 8, 1),
        (4, 64): Tile(16, 16, 4, 1),
        (4, 128): Tile(16, 16, 8, 1),
        (4, 256): Tile(16, 16, 8, 1),
    },
    ("backward_input", "ragged"): {
        (2, 64): Tile(32, 32, 8, 2),
        (2, 128): Tile(16, 16, 8, 1),
        (2, 256): Tile(16, 16, 8, 1),
        (4, 64): Tile(16, 16, 4, 1),
        (4, 128): Tile(16, 16, 8, 1),
        (4, 256): Tile(16, 16, 8, 1),
    },
    ("backward_weight", "ragged"): {
        (2, 64): Tile(16, 32, 8, 2),
        (2, 128): Tile(16, 16, 8, 1),
        (2, 256): Tile(16, 16, 8, 1),
        (4, 64): Tile(16, 32, 8, 2),
        (4, 128): Tile(16, 16, 8, 2),
        (4, 256): Tile(16, 16, 8, 1),
    },
}
INTERPRETER = Tile(rows=16, columns=64, warps=4, stages=1)  # small, so that small tests have several blocks
ROOMY = ("sm_80", "sm_90", "sm_100", "sm_103")  # at least 163 KB of shared memory a program; others may have 99 KB
VECTOR_BYTES = 16


def default_tile(key: Key) -> Tile:
    """The tile for a key that the table does not have."""
    if key.architecture == "cpu":
        return INTERPRETER
    bytes_each = key.dtype.itemsize
    size = (bytes_each, min(max(64, triton.next_power_of_2(key.bottleneck)), 256))
    kinds = ["plain", key.architecture]
    if key.input_dtype.itemsize > bytes_each:
        kinds.append("autocast")
    if key.fork:
        kinds.append("fork")
    if key.width * bytes_each % VECTOR_BYTES or key.bottleneck * bytes_each % VECTOR_BYTES:
        kinds.append("ragged")
    tile = next(t for kind in reversed(kinds) if (t := TILES.get((key.kernel, kind), {}).get(size)))
    if key.architecture in ROOMY:
        return tile
    # 64 KB on AMD's chips is no room for a pipeline; 99 KB is room for a shorter one.
    return replace(tile, stages=1 if key.architecture.startswith("gfx") else max(1, tile.stages - 1))


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
    p = problem
    key = Key(kernel, p.width, p.bottleneck, p.product_dtype, architecture(device), p.x.dtype, p.fork)
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
    saved = {name: asdict(tile) for name, tile in (_read(path) | {str(key): best}).items()}
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
    """What earlier searches found, read once a process."""
    return _read(cache_file())


def _read(path: Path) -> dict[str, Tile]:
    """A cache file's tiles; a file that is not there or cannot be read has none, and is searched and written anew."""
    try:
        return {key: Tile(**tile) for key, tile in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError):
        return {}
