"""From instructions and bytes to times. A model: nothing here was timed.

For one launch, whose programs run k at once on a multiprocessor, in waves of k * multiprocessors:

    warp     = cycles of one warp, alone: `schedule.py`; of these exposed, in which its program does not stream
    issue    = of k programs: k * instructions * warps / 4 schedulers, the busiest pipe, or one warp's cycles
    L2       = (streamed + again + programs * shared + written) / bandwidth
    DRAM     = (streamed + written + what of `again` was not kept) / bandwidth
    a wave   = max(L2, DRAM, issue without what is exposed) + exposed / k, and at least issue
    time     = launch + all waves; the last wave moves what its own programs move

Rows in flight (programs at once * span) that exceed what the L2 cache keeps are read from DRAM a second time, in the
measure in which they exceed it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations, product
from math import ceil
from typing import Any

from benchmarks.machine_code.ahead_of_time import Compiled, Launch
from benchmarks.machine_code.chips import Chip
from benchmarks.machine_code.sass import WARP, Code
from benchmarks.machine_code.schedule import duration
from benchmarks.machine_code.traffic import Loops, Traffic

SCHEDULERS = 4
MOST_PROGRAMS = 32  # on a multiprocessor


@dataclass(frozen=True)
class Estimate:
    """What the model says of one launch. Instructions: of one warp of one program. Times: microseconds, of all."""

    kernel: str
    tile: str
    programs: int
    warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    programs_a_multiprocessor: int
    waves: float
    instructions: int
    outside_loops: int
    loops: list[int]
    trips: list[int]
    by_pipe: dict[str, int]
    issued_millions: float  # by all warps of all programs
    l2_megabytes: float
    dram_megabytes: float
    planned_megabytes: float
    kept_in_l2: float  # the part of what is read again that is found there
    issue_us: float
    exposed_us: float
    l2_us: float
    dram_us: float
    us: float
    copy_us: float  # of the planned bytes
    bound: str

    def row(self) -> dict[str, Any]:
        """As the results' file has it."""
        return asdict(self)


def estimate(launch: Launch, compiled: Compiled, moved: Traffic, chip: Chip) -> Estimate:
    """The model's times of one launch."""
    code = Code.parse(compiled.sass)
    warps = launch.tile.warps
    trips = find_trips(code, moved, warps, launch.name)
    by_pipe = code.by_pipe(trips)
    multiplications, wavefronts = by_pipe.pop("multiplications"), by_pipe.pop("wavefronts")
    instructions = sum(by_pipe.values())
    outside = sum(not any(loop.holds(i.address) for loop in code.loops) for i in code.instructions)
    resident = programs_at_once(compiled, warps, chip)
    at_once = resident * chip.multiprocessors

    def throughput(count: float, programs: int) -> float:
        """Seconds in which a multiprocessor issues so many instructions of a warp, for these programs."""
        threads = warps * WARP * programs
        return (
            max(
                count * warps * programs / SCHEDULERS,
                multiplications * warps * programs / chip.tensor,
                by_pipe["fma"] * threads / chip.fma,
                by_pipe["alu"] * threads / chip.alu,
                by_pipe["mufu"] * threads / chip.mufu,
                wavefronts * warps * programs,
            )
            / chip.clock
        )

    load = chip.dram_latency if moved.through_registers else chip.l2_latency
    alone = duration(code, trips, chip.issue, load * chip.clock, chip.dram_latency * chip.clock)
    exposed = alone.exposed / chip.clock + moved.waits * chip.dram_latency
    warp = alone.cycles / chip.clock + moved.waits * chip.dram_latency
    in_flight = min(launch.programs, at_once) * moved.span
    kept = min(1.0, chip.l2_bytes * chip.kept / in_flight) if in_flight else 1.0
    l2 = (moved.streamed + moved.again + launch.programs * moved.shared + moved.written) / chip.l2
    dram = (moved.streamed + moved.written + moved.again * (1 - kept)) / chip.dram
    total, issue, left = chip.launch, 0.0, launch.programs
    while left > 0:
        programs = min(left, at_once)
        left -= programs
        here, part = ceil(programs / chip.multiprocessors), programs / launch.programs
        whole = max(warp, throughput(instructions, here))
        streaming = max(warp - exposed, throughput(instructions - alone.exposed_instructions, here))
        total += max(whole, max(part * l2, part * dram, streaming) + exposed / here)
        issue += whole
    waves = ceil(launch.programs / at_once)
    times = {"issue": issue - waves * exposed, "L2": l2, "DRAM": dram}
    return Estimate(
        kernel=launch.name,
        tile=f"{launch.tile.rows} x {launch.tile.columns}, {warps} warps, {launch.tile.stages} stages",
        programs=launch.programs,
        warps=warps,
        registers=compiled.registers,
        shared_bytes=compiled.shared,
        spill_bytes=compiled.local + compiled.stack,
        programs_a_multiprocessor=resident,
        waves=round(launch.programs / at_once, 2),
        instructions=round(instructions),
        outside_loops=outside,
        loops=[code.inside(loop) for loop in code.loops],
        trips=list(trips),
        by_pipe={pipe: round(count) for pipe, count in sorted(by_pipe.items())},
        issued_millions=round(instructions * warps * launch.programs / 1e6, 3),
        l2_megabytes=round(l2 * chip.l2 / 1e6, 1),
        dram_megabytes=round(dram * chip.dram / 1e6, 1),
        planned_megabytes=round(moved.planned / 1e6, 1),
        kept_in_l2=round(kept, 2),
        issue_us=round(issue * 1e6, 1),
        exposed_us=round(waves * exposed * 1e6, 1),
        l2_us=round(l2 * 1e6, 1),
        dram_us=round(dram * 1e6, 1),
        us=round(total * 1e6, 1),
        copy_us=round(moved.planned / chip.dram * 1e6, 1),
        bound=max(times, key=lambda name: times[name]),
    )


def programs_at_once(compiled: Compiled, warps: int, chip: Chip) -> int:
    """How many programs fit on a multiprocessor side by side."""
    registers = -(-compiled.registers // 8) * 8 * WARP * warps  # registers are given out by eights
    return min(
        MOST_PROGRAMS,
        chip.warps // warps,
        chip.registers // registers,
        chip.shared // (compiled.shared + chip.reserved),
    )


def find_trips(code: Code, moved: Traffic, warps: int, name: str) -> tuple[int, ...]:
    """How often each loop of the machine code runs: those that were declared, but for some that were unrolled.

    The multiply-adds must then add up to those declared, or to multiples, where warps repeat each other's.

    Raises:
        ValueError: the machine code has other loops.
    """
    if not moved.loops:
        return tuple(1 for _ in code.loops)
    declared = _flat(moved.loops)
    depths = [code.depth(loop) for loop in code.loops]
    repeated = [[n * once for n in (1, 2, 4, 8, 16)] for once in moved.products]
    for chosen in combinations(declared, len(depths)):
        if [depth for depth, _ in chosen] != depths:
            continue
        trips = tuple(count for _, count in chosen)
        counted = code.by_pipe(trips)["multiplications"] * warps
        if not moved.products or counted in (sum(each) for each in product(*repeated)):
            return trips
    raise ValueError(f"{name} has loops at depths {depths}, which are not those declared, (depth, trips): {declared}")


def _flat(loops: Loops, depth: int = 0) -> list[tuple[int, int]]:
    """(depth, trips) of all loops, outer before inner."""
    return [found for trips, inner in loops for found in [(depth, trips), *_flat(inner, depth + 1)]]
