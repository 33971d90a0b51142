"""What each kernel moves and multiplies, by the arithmetic of its tiles. Who changes a kernel changes its function.

A function takes a call and one of its launches and says, in bytes and for the whole launch unless it says otherwise:

    streamed    read from DRAM, once
    again       read a second time, soon after: from the L2 cache if what is in flight meanwhile fits there
    span        of one program: what the cache must hold until the second reading
    shared      of one program: what all programs read (weights), from the L2 cache
    written     written to DRAM
    planned     read and written by a kernel that is as good as the design wants it

and, for one program: `loops`, the trip counts of its loops, in the order of the source, each with those inside it;
`products`, the tensor-core multiply-adds of each; `through_registers`, whether what is streamed is loaded to registers
in the iteration that uses it (else loads to registers come from the L2 cache); and `waits`, how often a kernel waits
for DRAM whose loops are not declared, since the compiler unrolls them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from benchmarks.machine_code.ahead_of_time import Launch
from mosa_fast.kernels.sparse_adapter_bwd_weight import BLOCKS_AT_ONCE, FEWEST_COLUMNS
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.slots import padded_rank, padded_width

Loops = tuple[tuple[int, "Loops"], ...]  # of each: trips, and the loops inside

FLOAT, OWNER = 4, 1  # bytes of a master weight and of its owner


@dataclass(frozen=True)
class Traffic:
    """Of one launch; see above."""

    streamed: int
    written: int
    again: int = 0
    span: int = 0
    shared: int = 0
    planned: int = 0
    loops: Loops = ()
    products: tuple[int, ...] = ()
    through_registers: bool = False
    waits: int = 0


def traffic(call: SparseAdapterCall, launch: Launch) -> Traffic:
    """Of one of the launches of a call.

    Raises:
        ValueError: nothing is said of this kernel.
    """
    if launch.name not in KERNELS:
        raise ValueError(f"{launch.name}: what it moves is to be declared in benchmarks/machine_code/traffic.py")
    return KERNELS[launch.name](call, launch)


def forward(c: SparseAdapterCall, launch: Launch) -> Traffic:
    """X for statistics and projection, x and skip for the sum, out; saved: p, statistics."""
    rows, columns = launch.tile.rows, launch.tile.columns
    rank, steps = launch.arguments["BLOCK_BOTTLENECK"], ceil(c.width / columns)
    x, out = _bytes(c.x), c.out_rows * c.width * c.out_dtype.itemsize
    skip = 0 if c.skip is None else _bytes(c.skip)
    saved = _ranks(c) + 2 * FLOAT * c.in_rows
    readers = c.groups if c.fork else 1  # neighbouring programs read the same rows
    return Traffic(
        streamed=x + skip,
        again=x * (2 * readers - 1) + skip * (readers - 1),
        span=rows * c.width * c.x.dtype.itemsize // readers,
        shared=_prepared(c),
        written=out + saved,
        planned=x + skip + out,
        loops=((steps, ()), (steps, ())),
        products=(rows * c.width * rank,) * 2,
    )


def backward_input(c: SparseAdapterCall, launch: Launch) -> Traffic:
    """Y for h's gradient, y and x for x's; written besides: h and t, t's sums, the skip's gradient if it is not y."""
    rows, columns = launch.tile.rows, launch.tile.columns
    rank, steps, groups = launch.arguments["BLOCK_BOTTLENECK"], ceil(c.width / columns), c.groups if c.fork else 1
    grad, x = c.out_rows * c.width * c.out_dtype.itemsize, _bytes(c.x)
    skip = launch.arguments["grad_skip_ptr"]
    grad_skip = 0 if skip is None else _bytes(skip)
    sums = _bytes(launch.arguments["rank_sums_ptr"])
    return Traffic(
        streamed=grad + x + _ranks(c) + 2 * FLOAT * c.in_rows,
        again=grad + (_ranks(c) if c.fork else 0),
        span=rows * c.width * c.out_dtype.itemsize * groups,
        shared=_prepared(c) * groups,
        written=x + grad_skip + 2 * _ranks(c) + sums,
        planned=grad + 2 * x + grad_skip,
        loops=((groups, ((steps, ()),)), (steps, ((groups, ()),))) if c.fork else ((steps, ()), (steps, ())),
        products=(rows * c.width * rank * groups,) * 2,
    )


def backward_weight(c: SparseAdapterCall, launch: Launch) -> Traffic:
    """Y and x once, h and t for every block of columns; t's sums over blocks of rows; the partial sums."""
    a, rows, columns = launch.arguments, launch.tile.rows, launch.tile.columns
    rank, blocks, segments = a["BLOCK_BOTTLENECK"], ceil(c.width / columns), a["segments_per_slice"]
    steps = ceil(min(a["piece_rows"], c.rows_per_group) / rows)
    summed = ceil(ceil(a["piece_rows"] / a["SUMMED_ROWS"]) / BLOCKS_AT_ONCE.value)
    grad, x = _bytes(a["grad_out_ptr"]), _bytes(c.x)
    ranks = 2 * _ranks(c) + (0 if a["RAW_INPUT"] else 2 * FLOAT * c.in_rows)
    rank_sums = _bytes(a["rank_sums_ptr"])
    loops = ((steps, ()), *[(summed, ())] * (2 if a["RAW_INPUT"] else 1))
    return Traffic(
        streamed=grad + x + ranks + rank_sums,
        again=(blocks - 1) * (ranks + rank_sums),
        shared=(_down(c) + _owners(c)) // blocks * segments,
        written=_bytes(a["partial_ptr"]),
        planned=grad + x,
        loops=((segments, loops),) if a["ACCUMULATE"] else loops,
        products=tuple(rows * columns * n * steps * segments for n in (rank, rank, FEWEST_COLUMNS.value)),
    )


def sum_slices(c: SparseAdapterCall, launch: Launch) -> Traffic:
    """The partial sums, and the gradients."""
    slices, partial = launch.arguments["slices"], launch.arguments["partial_ptr"]
    steps = ceil(slices / launch.tile.rows)
    return Traffic(
        streamed=_bytes(partial),
        written=_bytes(partial) // slices,
        loops=((steps, ()),),
        through_registers=True,
    )


def prepare_weights(c: SparseAdapterCall, launch: Launch) -> Traffic:
    """Each layer's weights once, again for every further slot, and what is made of them."""
    layers, slots = len(launch.arguments["down_weight_ptrs"]), c.slots
    down, up = _down(c), _up(c)
    made = slots.down * _bytes_prepared(c, "down") + slots.up * _bytes_prepared(c, "up")
    return Traffic(
        streamed=layers * (down + up),
        again=layers * ((slots.down - 1) * down + (slots.up - 1) * up),
        written=layers * made,
        waits=ceil(padded_width(c.width) / launch.tile.columns),  # the compiler unrolls the loop of the down-projection
    )


KERNELS: dict[str, Callable[[SparseAdapterCall, Launch], Traffic]] = {
    "prepare_weights_kernel": prepare_weights,
    "sparse_adapter_fwd_kernel": forward,
    "sparse_adapter_bwd_input_kernel": backward_input,
    "sparse_adapter_bwd_weight_kernel": backward_weight,
    "sum_slices_kernel": sum_slices,
}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ranks(c: SparseAdapterCall) -> int:
    """One tensor `[M, r]` in the products' type."""
    return c.out_rows * c.bottleneck * c.product_dtype.itemsize


def _down(c: SparseAdapterCall) -> int:
    """The down-projection: the weight, its owner and W0."""
    initial = 0 if c.down_init is None else FLOAT
    return c.down_weight.numel() * (FLOAT + initial + (0 if c.down_owner is None else OWNER))


def _up(c: SparseAdapterCall) -> int:
    """The up-projection: the weight and its owner."""
    return c.up_weight.numel() * (FLOAT + (0 if c.up_owner is None else OWNER))


def _prepared(c: SparseAdapterCall) -> int:
    """The weights that a group computes with, and its vectors."""
    return _bytes_prepared(c, "down") + _bytes_prepared(c, "up")


def _bytes_prepared(c: SparseAdapterCall, projection: str) -> int:
    """One slot of one projection, with its vectors."""
    width, rank = padded_width(c.width), padded_rank(c.bottleneck, "triton")
    return width * rank * c.product_dtype.itemsize + FLOAT * (2 * rank if projection == "down" else width)


def _owners(c: SparseAdapterCall) -> int:
    """Both owner maps."""
    return sum(0 if owner is None else owner.numel() * OWNER for owner in (c.down_owner, c.up_owner))
