"""How long one warp takes: its instructions one after the other, as a scheduler issues them, and what they wait for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.machine_code.sass import Code, Instruction


@dataclass
class Warp:
    """One warp on its way through the code.

    An instruction follows the one before after `issue` cycles, or when the registers that it names hold what LDG
    instructions were asked for `load` cycles ago. DEPBAR waits for groups of copies to shared memory (LDGSTS, ended by
    LDGDEPBAR), which take `copy` cycles. Other latencies (arithmetic, barriers, shared memory) are in `issue`.
    """

    issue: float
    load: float
    copy: float
    now: float = 0.0
    copied: float = 0.0
    loaded: dict[int, float] = field(default_factory=dict)  # when, by register
    groups: list[float] = field(default_factory=list)

    def step(self, i: Instruction) -> None:
        """Issue an instruction."""
        self.now += self.issue
        if self.loaded:
            self.now = max([self.now, *(self.loaded.pop(register, 0.0) for register in i.registers)])
        if i.mnemonic == "LDG":
            self.loaded |= {i.registers[0] + word: self.now + self.load for word in range(i.words)}
        elif i.mnemonic == "LDGSTS":
            self.copied = self.now + self.copy
        elif i.mnemonic == "LDGDEPBAR":
            self.groups.append(self.copied)
        elif i.mnemonic == "DEPBAR" and (left := re.search(r"SB0, 0x([0-9a-f]+)", i.operands)):
            done = max(0, len(self.groups) - int(left[1], 16))
            self.now = max([self.now, *self.groups[:done]])
            del self.groups[:done]


@dataclass(frozen=True)
class Duration:
    """Cycles of a warp: all, and those in which its program does not stream.

    exposed: outside of innermost loops, and the waits of their first iterations, which fill the pipeline.
    """

    cycles: float
    exposed: float


def duration(code: Code, trips: Sequence[int], issue: float, load: float, copy: float) -> Duration:
    """Of a warp that runs all of the code, each loop's body so often whenever the loop is reached."""
    warp = Warp(issue, load, copy)
    starts = {loop.start: (loop, count) for loop, count in zip(code.loops, trips, strict=True)}
    inner = {loop for loop in code.loops if not any(loop.holds(other.start) for other in code.loops if other != loop)}
    streaming = 0.0

    def run(instructions: Sequence[Instruction], inside: int | None) -> None:
        nonlocal streaming
        index = 0
        while index < len(instructions):
            i = instructions[index]
            if i.address not in starts or i.address == inside:
                warp.step(i)
                index += 1
                continue
            loop, count = starts[i.address]
            body = [j for j in instructions[index:] if loop.holds(j.address)]
            for iteration in range(count):
                before = warp.now
                run(body, loop.start)
                if loop in inner:
                    streaming += len(body) * issue if iteration == 0 else warp.now - before
            index += len(body)

    run(code.instructions, None)
    return Duration(warp.now, warp.now - streaming)
