"""What is assumed of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A GPU, as the model needs it. Bandwidths are what a good copy reaches, not the data sheet's.

    Rates are of one multiprocessor in one cycle: `tensor` multiply-adds of 16-bit products, and lanes (threads) of an
    instruction. A multiprocessor has four schedulers that issue an instruction a cycle each.
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
    alu: int = 64
    mufu: int = 16
    registers: int = 65536
    shared: int = 0  # bytes
    warps: int = 64
    reserved: int = 1024  # bytes of shared memory that a program takes besides its own
    kept: float = 0.6  # of the L2 cache: what rows in flight may take of it, beside what streams through
    dram_latency: float = 0.6e-6  # seconds from a load to its data
    l2_latency: float = 0.25e-6
    launch: float = 2e-6  # seconds from one kernel's end to the next one's first instruction
    issue: float = 2.5  # cycles from one instruction of a warp to its next one


CHIPS = {
    chip.architecture: chip
    for chip in (
        Chip("A100", "sm_80", 108, 1.41e9, 1.75e12, 4.0e12, 40 * 2**20, tensor=1024, fma=64, shared=164 * 1024),
        Chip("H100", "sm_90", 132, 1.755e9, 3.0e12, 5.5e12, 50 * 2**20, tensor=2048, fma=128, shared=228 * 1024),
    )
}
