"""`python -m benchmarks.machine_code`: what the adapter's kernels cost, by their machine code."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.machine_code.ahead_of_time import compile_launch, launches
from benchmarks.machine_code.calls import adapter_call
from benchmarks.machine_code.chips import CHIPS
from benchmarks.machine_code.model import estimate
from benchmarks.machine_code.traffic import traffic

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "product_dtype": torch.bfloat16, "skip_dtype": torch.bfloat16},
    "fork": {"dtype": torch.bfloat16, "fork": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[768])
    parser.add_argument("--bottlenecks", nargs="+", type=int, default=[64])
    parser.add_argument("--architectures", nargs="+", choices=CHIPS, default=["sm_90"])
    parser.add_argument("--images", type=int, default=128, help="of two views each")
    options = parser.parse_args()
    for architecture in options.architectures:
        chip = CHIPS[architecture]
        for kind in options.kinds:
            for width in options.widths:
                for bottleneck in options.bottlenecks:
                    samples = options.images * (1 if kind == "fork" else 2)
                    call = adapter_call(width, bottleneck, split="up", samples=samples, **KINDS[kind])
                    rows = []
                    for launch in launches(call, architecture, chip.multiprocessors):
                        compiled = compile_launch(launch, architecture)
                        rows.append(estimate(launch, compiled, traffic(call, launch), chip))
                    print(f"{architecture} {kind} D={width} r={bottleneck} M={call.out_rows}")
                    for row in rows:
                        print(
                            f"  {row.kernel:34}{row.us:7.1f} us  copy {row.copy_us:6.1f}  DRAM {row.dram_us:6.1f}  "
                            f"L2 {row.l2_us:6.1f}  issue {row.issue_us:6.1f}  exposed {row.exposed_us:5.1f}  "
                            f"{row.bound:5}{row.instructions:7} ({row.outside_loops} + {row.loops} x {row.trips}) "
                            f"{row.registers} regs {row.shared_bytes} B {row.spill_bytes} spilt  "
                            f"{row.programs} programs, {row.programs_a_multiprocessor} at once, {row.waves} waves, "
                            f"L2 {row.l2_megabytes} MB, kept {row.kept_in_l2}"
                        )
                    total, copy = sum(r.us for r in rows), sum(r.copy_us for r in rows)
                    print(f"  total {total:.1f} us, copy {copy:.1f} us, ratio {total / copy:.2f}")


if __name__ == "__main__":
    main()
