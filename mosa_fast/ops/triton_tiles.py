"""Block sizes, warps and pipeline stages of each Triton kernel: a table, by kernel, kind of call and size.

A tile never depends on the number of tokens, so that a last short batch does not compile anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

from mosa_fast.ops.call import Call

KERNELS = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: rows (tokens) and columns (of D) of a block, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, int]:
        """The compiler's options.

        A product and the sum it goes into are rounded once: said here, since Triton 3.9 warns that the next release
        no longer does so by itself.
        """
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By kernel and kind of call, then by bytes of a product's element and r padded to a power of two, at least 64. A kind
# that begins with an operator's name is for that one only, where it wants something else. These are the largest tiles
# found that compile without spills for sm_80 and sm_90 with every option on. They were chosen by that alone and have
# not been timed on a GPU. Large, since each program reads all weights again: at 128 rows of D = 768 in bfloat16 they
# are 0.4 MB from L2 beside 0.6 MB of activations. One program of 8 warps a multiprocessor then hides memory behind its
# pipeline. Exact float32 products run without tensor cores and want small tiles.
# The adapter's kernels read prepared weights: a third of the bytes, and few registers. So their blocks are of 64 rows,
# and two or three programs take turns on a multiprocessor, as the model of benchmarks/machine_code has it best.
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
    ("forward", "sparse_adapter plain"): {size: Tile(64, 32, 8, 3) for size in ((2, 64), (2, 128), (2, 256))},
    ("backward_input", "sparse_adapter plain"): {(2, 64): Tile(64, 64, 8, 3)},
    ("backward_weight", "sparse_adapter plain"): {(2, 64): Tile(64, 64, 8, 3)},
    # No norm and no activation: few registers, so that three small programs take turns on a multiprocessor.
    ("forward", "sparse_lora plain"): {(2, 64): Tile(64, 64, 4, 3)},
    ("backward_weight", "sm_80"): {(2, 64): Tile(32, 64, 8, 3)},  # mma.sync takes more registers than wgmma
    ("backward_weight", "sparse_adapter sm_80"): {(2, 64): Tile(64, 64, 8, 3)},
    # x is wider than the products: timm's residual stream under autocast. A line of 128 bytes is 32 columns.
    ("forward", "autocast"): {(2, 64): Tile(128, 32, 8, 3)},
    ("backward_input", "autocast"): {(2, 64): Tile(128, 32, 8, 3)},
    # The rows in flight are to fit into the L2 cache: towards x they do.
    ("forward", "sparse_adapter autocast"): {(2, 64): Tile(64, 64, 8, 2)},
    ("backward_input", "sparse_adapter autocast"): {(2, 64): Tile(32, 64, 8, 3), (2, 128): Tile(64, 32, 16, 2)},
    ("backward_weight", "sparse_adapter autocast"): {(2, 64): Tile(64, 64, 8, 3)},
    ("backward_weight", "autocast"): {
        (2, 64): Tile(32, 64, 8, 3),
        (2, 128): Tile(16, 64, 8, 3),
        (2, 256): Tile(16, 32, 8, 3),
    },
    # A fork loops over its groups, which takes registers.
    ("forward", "fork"): {(4, 64): Tile(16, 32, 4, 2)},
    ("backward_input", "fork"): {
        (2, 64): Tile(64, 64, 8, 2),
        (2, 128): Tile(32, 32, 8, 2),
        (2, 256): Tile(32, 16, 8, 2),
    },
    ("backward_input", "sparse_adapter fork"): {
        (2, 64): Tile(64, 64, 8, 3),
        (2, 256): Tile(16, 32, 8, 2),
        (4, 64): Tile(32, 16, 8, 2),
        (4, 128): Tile(16, 16, 16, 2),
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
        (4, 256): Tile(16, 16, 8, 2),
    },
    ("backward_weight", "ragged"): {
        (2, 64): Tile(16, 16, 8, 2),
        (2, 128): Tile(16, 16, 8, 2),
        (2, 256): Tile(16, 16, 8, 1),
        (4, 64): Tile(16, 32, 8, 2),
        (4, 128): Tile(16, 16, 8, 2),
        (4, 256): Tile(16, 16, 8, 1),
    },
}
SUM_TILE = Tile(rows=16, columns=128)  # second stages: 16 independent loads in flight for each thread
INTERPRETER = Tile(rows=16, columns=64, warps=4, stages=1)  # small, so that small tests have several blocks
ROOMY = ("sm_80", "sm_90", "sm_100", "sm_103")  # at least 163 KB of shared memory a program; others may have 99 KB
VECTOR_BYTES = 16


def choose(kernel: str, call: Call, bottleneck: int, operator: str | None = None) -> Tile:
    """The tile of one of `KERNELS` for a call.

    Args:
        kernel: which.
        call: of an operator.
        bottleneck: of low-rank pairs, the ranks of all targets.
        operator: whose tiles to take; None: the call's.
    """
    name, architecture = operator or call.NAME, architecture_of(call.x.device)
    return tile_of(name, kernel, call.width, bottleneck, call.product_dtype, architecture, call.x.dtype, call.fork)


@lru_cache
def tile_of(
    operator: str,
    kernel: str,
    width: int,
    bottleneck: int,
    dtype: torch.dtype,
    architecture: str,
    input_dtype: torch.dtype,
    fork: bool = False,
) -> Tile:
    """The tile for all that it may depend on.

    Args:
        operator, kernel: whose, and which of `KERNELS`.
        width, bottleneck: D and r.
        dtype, input_dtype: of the products and of x.
        architecture: "sm_90", "gfx942", "cpu" (interpreter).
        fork: whether the groups read the same rows.
    """
    if architecture == "cpu":
        return INTERPRETER
    size = (dtype.itemsize, min(max(64, triton.next_power_of_2(bottleneck)), 256))
    kinds = ["plain", architecture]
    if input_dtype.itemsize > dtype.itemsize:
        kinds.append("autocast")
    if fork:
        kinds.append("fork")
    if width * dtype.itemsize % VECTOR_BYTES or bottleneck * dtype.itemsize % VECTOR_BYTES:
        kinds.append("ragged")
    rows = (name for kind in reversed(kinds) for name in (f"{operator} {kind}", kind))
    tile = next(tile for row in rows if (tile := TILES.get((kernel, row), {}).get(size)))
    if architecture in ROOMY:
        return tile
    # 64 KB on AMD's chips is no room for a pipeline; 99 KB is room for a shorter one.
    return replace(tile, stages=1 if architecture.startswith("gfx") else max(1, tile.stages - 1))


def architecture_of(device: torch.device) -> str:
    """The name of a chip's instruction set; "cpu" where Triton interprets."""
    if device.type != "cuda":
        return "cpu"
    return _architecture_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _architecture_of_gpu(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
