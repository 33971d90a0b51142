"""How long one warp takes: its instructions one after the other, as a scheduler issues them, and what they wait for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.machine_code.sass import Code, Instruction, Loop


@dataclass
class Warp:
    """One warp on its way through the code.

    An instruction follows the one before after `issue` cycles, or when the registers that it names hold what LDG
    instructions were asked for `load` cycles ago. DEPBAR waits for groups of copies to shared memory (LDGSTS, ended by
    LDGDEPBAR), which take `copy` cycles. Other latencies (arithmetic, barriers, shared memory) are in `issue`.

    Attributes:
        groups: when the copies end that were not waited for yet.
        filled: some were, of those that follow each other without a gap.
    """

    issue: float
    load: float
    copy: float
    now: float = 0.0
    issued: int = 0
    copied: float = 0.0
    loaded: dict[int, float] = field(default_factory=dict)  # when, by register
    groups: list[float] = field(default_factory=list)
    filled: bool = False

    def step(self, i: Instruction) -> None:
        """Issue an instruction."""
        self.now += self.issue
        self.issued += 1
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
            self.filled = bool(self.groups) and (self.filled or done > 0)

    def leave_loop(self) -> None:
        """What was copied for later iterations of a loop was not: there are none, and its predicate was false."""
        self.groups.clear()
        self.filled = False


@dataclass(frozen=True)
class Duration:
    """Cycles of a warp: all, and those in which its program does not stream.

    A program streams in its loops, but for the waits of a loop's first iteration, which fill the pipeline. Of loops in
    each other it is the longest one: that over columns or rows, not that over a few groups around it or in it. What the
    compiler unrolled is a loop, too: from the first copies that are waited for to the last ones.

    Attributes:
        exposed: what is left.
        exposed_instructions: those that are issued meanwhile.
    """

    cycles: float
    exposed: float
    exposed_instructions: int


def duration(code: Code, trips: Sequence[int], issue: float, load: float, copy: float) -> Duration:
    """Of a warp that runs all of the code, each loop's body so often whenever the loop is reached."""
    warp = Warp(issue, load, copy)
    counts = dict(zip(code.loops, trips, strict=True))
    starts = {loop.start: loop for loop in code.loops}
    streaming = {loop for loop in counts if loop == max(_nest(loop, counts), key=lambda other: counts[other])}
    streamed, exposed_instructions = 0.0, 0

    def run(instructions: Sequence[Instruction], inside: Loop | None, streams: bool) -> None:
        """Instructions, those of a loop once; streams: as a part of a loop that does."""
        nonlocal streamed, exposed_instructions
        index = 0
        while index < len(instructions):
            i = instructions[index]
            loop = starts.get(i.address)
            if loop is None or loop == inside:
                before, unrolled = warp.now, warp.filled
                warp.step(i)
                index += 1
                if not streams:
                    streamed += (warp.now - before) * unrolled
                    exposed_instructions += not unrolled
                continue
            body = [j for j in instructions[index:] if loop.holds(j.address)]
            for iteration in range(counts[loop]):
                before, issued = warp.now, warp.issued
                run(body, loop, streams or loop in streaming)
                if loop in streaming:
                    streamed += warp.now - before if iteration else (warp.issued - issued) * issue
            if streams or loop in streaming:
                warp.leave_loop()
            index += len(body)

    run(code.instructions, None, False)
    return Duration(warp.now, warp.now - streamed, exposed_instructions)


def _nest(loop: Loop, loops: Iterable[Loop]) -> list[Loop]:
    """A loop, those inside and those around it; inner before outer."""
    return sorted((o for o in loops if o.holds(loop.start) or loop.holds(o.start)), key=lambda o: o.end - o.start)
