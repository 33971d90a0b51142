"""How kernels are told the targets of a linear: ranges of its output's columns, cut into blocks.

A range is as `kernels.device_functions.block_of_columns` takes it: first column, last but one, row of the up-weight
that belongs to the first column, first rank of the target.
"""

from __future__ import annotations

from mosa_fast.kernels.device_functions import NO_RANK
from mosa_fast.ops import launching
from mosa_fast.ops.arguments import TargetsCall
from mosa_fast.ops.triton_tiles import Tile

Ranges = tuple[tuple[int, int, int, int], ...]


def targets(call: TargetsCall) -> Ranges:
    """Each target's columns, first row of the up-weight, and first rank."""
    found, row = [], 0
    for target, (start, stop) in enumerate(call.ranges):
        found.append((start, stop, row, target * call.rank))
        row += stop - start
    return tuple(found)


def all_columns(call: TargetsCall, out_width: int) -> Ranges:
    """The targets' ranges, and between them those of no target."""
    found, end = [], 0
    for target in targets(call):
        found += [(end, target[0], 0, NO_RANK.value), target]
        end = target[1]
    found.append((end, out_width, 0, NO_RANK.value))
    return tuple(columns for columns in found if columns[0] < columns[1])


def blocks(ranges: Ranges, tile: Tile) -> int:
    """How many blocks of columns there are."""
    return sum(launching.blocks(stop - start, tile.columns) for start, stop, *_ in ranges)


def even(ranges: Ranges, tile: Tile) -> bool:
    """Whether no block of columns is cut short."""
    return all((stop - start) % tile.columns == 0 for start, stop, *_ in ranges)
