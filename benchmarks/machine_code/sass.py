"""Reading machine code: which instructions there are, for which pipe, and in which loops.

A loop is what lies between the target of a branch that goes back and the branch. What is skipped inside it by branches
forwards counts as if it ran: an upper bound, which predicates make a tight one (compilers for GPUs seldom branch).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

PIPES = {
    "tensor": "HGMMA HMMA IMMA DMMA BMMA QGMMA IGMMA",
    "fma": "FFMA FMUL FADD IMAD FFMA2 HFMA2 HMUL2 HADD2 HMNMX2",
    "mufu": "MUFU I2F I2FP F2I F2F FRND POPC FLO BREV",
    "memory": "LDG STG LDGSTS LDS STS LDSM STSM LD ST LDL STL ATOM ATOMG ATOMS RED SHFL UBLKCP UTMALDG UTMASTG",
    "uniform": "R2UR S2UR REDUX",  # and all whose name begins with U
    "control": "BRA EXIT BAR NOP RET CALL BSSY BSYNC BREAK WARPSYNC WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR "
    "CCTL ACQBULK NANOSLEEP YIELD SYNCS ELECT WARPGROUPSET ARRIVES DEPBAR",
}
ALU = "alu"  # all the others: integers, logic, comparisons, selections, moves, conversions to 16 bits
PIPE_OF = {mnemonic: pipe for pipe, mnemonics in PIPES.items() for mnemonic in mnemonics.split()}
INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);",
    re.MULTILINE,
)
WARPS_OF_A_GROUP = 4  # warps that issue one HGMMA together
SHARED_BYTES_A_CYCLE = 128  # of one multiprocessor's shared memory and L1 cache
WARP = 32


@dataclass(frozen=True)
class Instruction:
    """One instruction, at its address in bytes."""

    address: int
    opcode: str  # with its modifiers, as LDG.E.128
    operands: str

    @cached_property
    def mnemonic(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        """Which part of a multiprocessor runs it."""
        if self.mnemonic in PIPE_OF:
            return PIPE_OF[self.mnemonic]
        return "uniform" if self.mnemonic.startswith("U") else ALU

    @cached_property
    def registers(self) -> tuple[int, ...]:
        """Those it names, the result's first."""
        return tuple(int(number) for number in re.findall(r"\bR(\d+)\b", self.operands))

    @property
    def words(self) -> int:
        """Registers that a thread's load fills, or its store empties."""
        return next((int(bits) // 32 for bits in self.opcode.split(".") if bits in ("64", "128")), 1)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.mnemonic == "BRA" else None
        return None if found is None else int(found[1], 16)

    @property
    def multiplications(self) -> int:
        """Multiply-adds of a tensor-core instruction, for one of the warps that issue it."""
        if self.mnemonic == "HGMMA":
            rows, columns, depth = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", self.opcode)[0])
            return rows * columns * depth // WARPS_OF_A_GROUP
        if self.mnemonic == "HMMA":
            shape = re.findall(r"\.(16)(8)(16|8|4)\b", self.opcode)
            return 0 if not shape else int(shape[0][0]) * int(shape[0][1]) * int(shape[0][2])
        return 0

    @property
    def wavefronts(self) -> int:
        """Cycles for which it has the shared memory or L1 cache, without conflicts."""
        if self.pipe != "memory":
            return 0
        if self.mnemonic in ("LDSM", "STSM"):
            return int(self.opcode[-1]) if self.opcode[-1].isdigit() else 1
        return self.words * 4 * WARP // SHARED_BYTES_A_CYCLE


@dataclass(frozen=True)
class Loop:
    """Instructions of addresses from `start` to the branch at `end`; depth 0 is outermost."""

    start: int
    end: int

    def holds(self, address: int) -> bool:
        """Whether an address lies in it."""
        return self.start <= address <= self.end


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def parse(cls, sass: str) -> Code:
        """From what cuobjdump prints."""
        found = [
            Instruction(int(match["address"], 16), match["opcode"], match["operands"].strip())
            for match in INSTRUCTION.finditer(sass)
        ]
        # After the code comes a branch to itself, and padding.
        end = next((i.address for i in found if i.target == i.address), len(sass))
        return cls(tuple(i for i in found if i.address < end))

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, outer before inner, in the order of their first instructions."""
        ends: dict[int, int] = {}
        for i in self.instructions:
            if i.target is not None and i.target < i.address:
                ends[i.target] = max(i.address, ends.get(i.target, 0))
        return tuple(Loop(start, ends[start]) for start in sorted(ends))

    def depth(self, loop: Loop) -> int:
        """How many loops are around it."""
        return sum(other.holds(loop.start) for other in self.loops if other != loop)

    def runs(self, trips: Sequence[float]) -> list[float]:
        """How often each instruction runs, if each loop's body runs so often whenever the loop is reached."""
        times = []
        for i in self.instructions:
            runs = 1.0
            for loop, count in zip(self.loops, trips, strict=True):
                if loop.holds(i.address):
                    runs *= count
            times.append(runs)
        return times

    def by_pipe(self, trips: Sequence[float]) -> Counter[str]:
        """Instructions that a warp issues, by pipe, and beside them `multiplications` and `wavefronts`."""
        found: Counter[str] = Counter()
        for i, runs in zip(self.instructions, self.runs(trips), strict=True):
            found[i.pipe] += runs  # type: ignore[assignment]
            found["multiplications"] += i.multiplications * runs  # type: ignore[assignment]
            found["wavefronts"] += i.wavefronts * runs  # type: ignore[assignment]
        return found

    def inside(self, loop: Loop) -> int:
        """Instructions of a loop's body."""
        return sum(loop.holds(i.address) for i in self.instructions)
