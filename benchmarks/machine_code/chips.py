"""What is assumed of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A GPU, as the model needs it. Bandwidths are what a good copy reaches, not the data sheet's.

    Rates are of one multiprocessor in one cycle: `tensor` multiply-adds of 16-bit products, and for other pipes lanes,
    of which an instruction takes 32. Four schedulers issue an instruction a cycle each.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float  # Hz, under load
    dram: float  # bytes a second
    l2: float  # bytes a second
    l2_bytes: int
    tensor: int
    fma: int
    shared: int  # bytes
    alu: int = 64
    mufu: int = 16
    registers: int = 65536
    warps: int = 64
    reserved: int = 1024  # bytes of shared memory that a program takes besides its own
    kept: float = 0.6  # of the L2 cache: what rows in flight may take of it, beside what streams through
    dram_latency: float = 0.6e-6  # seconds from a load to its data
    l2_latency: float = 0.25e-6
    launch: float = 2e-6  # seconds from one kernel's end to the next one's first instruction
    issue: float = 2.5  # cycles from one instruction of a warp to its next one


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("H100", "sm_90", 132, 1.755e9, 3.0e12, 5.5e12, 50 * 2**20, tensor=2048, fma=128, shared=228 * 1024),
        Chip("H200", "sm_90", 132, 1.755e9, 4.3e12, 5.5e12, 60 * 2**20, tensor=2048, fma=128, shared=228 * 1024),
        Chip("A100", "sm_80", 108, 1.41e9, 1.75e12, 4.0e12, 40 * 2**20, tensor=1024, fma=64, shared=164 * 1024),
    )
}
# The command line's: the field, its unit, and words.
ASSUMPTIONS = {
    "multiprocessors": ("multiprocessors", 1, "number of multiprocessors"),
    "clock": ("clock", 1e9, "GHz"),
    "dram": ("dram", 1e12, "TB/s from DRAM"),
    "l2": ("l2", 1e12, "TB/s from the L2 cache"),
    "l2-mib": ("l2_bytes", 2**20, "MiB of L2 cache"),
    "kept": ("kept", 1, "of the L2 cache that rows in flight may take"),
    "dram-latency": ("dram_latency", 1e-6, "µs from a load to its data"),
    "l2-latency": ("l2_latency", 1e-6, "µs from a load to its data in L2"),
    "launch": ("launch", 1e-6, "µs a launch"),
    "issue": ("issue", 1, "cycles from one instruction of a warp to its next one"),
}
