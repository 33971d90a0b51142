"""`python -m benchmarks.machine_code [--checked] [--write] [--compare FILE.json]`: what the adapter's kernels cost.

Compiles them for GPUs that need not be here, counts instructions, and works out times (`benchmarks/machine_code/`).
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.machine import environment
from benchmarks.machine_code import results as files
from benchmarks.machine_code import step
from benchmarks.machine_code.cases import IMAGES, KINDS, VIEWS, Case, all_cases, checked_cases, count
from benchmarks.machine_code.chips import ASSUMPTIONS, CHIPS, Chip
from benchmarks.machine_code.mlp_form import mlp_rows
from benchmarks.machine_code.plot import PLOTS
from benchmarks.machine_code.step import Utilisation
from benchmarks.results import publish
from mosa_fast.command_line import CommandParser


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.machine_code",
        description="What the adapter's kernels cost, by a model of their time.",
    )
    chosen = parser.add_argument_group("calls (default: all that matter)")
    chosen.add_argument("--checked", action="store_true", help="those that CI compares")
    chosen.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    chosen.add_argument("--width", type=int, default=768, help="of the kinds; default: %(default)s")
    chosen.add_argument("--bottleneck", type=int, default=64, help="of the kinds; default: %(default)s")
    chosen.add_argument("--images", type=int, default=IMAGES, help="of the kinds, a view; default: %(default)s")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="default: all")
    parser.add_argument("--workers", type=int, help="processes that compile; default: as many as there are cores")
    parser.add_argument("--write", action="store_true", help="store numbers, tables and plot in benchmarks/results")
    parser.add_argument("--compare", type=Path, metavar="FILE.json", help="exit with 1 where instructions grew by 3 %%")
    assumed = parser.add_argument_group("assumptions, of one chip")
    for name, (field, unit, words) in ASSUMPTIONS.items():
        defaults = ", ".join(f"{getattr(chip, field) / unit:g} ({chip.name})" for chip in CHIPS.values())
        assumed.add_argument(f"--{name}", type=float, help=f"{words}; default: {defaults}")
    whole = parser.add_argument_group("assumptions, of the step without adapters: parts of the tensor cores' peak")
    for name, part in asdict(Utilisation()).items():
        whole.add_argument(f"--{name}", type=float, default=part, help="default: %(default)s")
    options = parser.parse_args()
    utilisation = Utilisation(options.products, options.attention)
    given = {
        field: type(getattr(CHIPS["H100"], field))(getattr(options, name.replace("-", "_")) * unit)
        for name, (field, unit, _) in ASSUMPTIONS.items()
        if getattr(options, name.replace("-", "_")) is not None
    }
    if given and len(options.chips) > 1:
        parser.error("assumptions are those of one chip: choose it with --chips")
    if min([*given.values(), utilisation.products, utilisation.attention]) <= 0:
        parser.error("all assumptions must be positive")
    if options.write and (
        options.checked or options.kinds or given or len(options.chips) < len(CHIPS) or utilisation != Utilisation()
    ):
        parser.error("--write stores all calls on all chips as they are assumed")
    old = None
    if options.compare is not None:  # read first: bad input must not cost a run
        try:
            old = files.read(options.compare)
        except ValueError as error:
            parser.error(f"--compare: {error}")
        versions = {row["triton"] for row in old["rows"]}
        if triton.__version__ not in versions:
            made = " and ".join(sorted(versions))
            print(f"Not compared: the file counts the machine code of Triton {made}, here is {triton.__version__}")
            return
    chips = [replace(CHIPS[name], **given) for name in options.chips]
    if options.kinds:
        cases = [Case(kind, options.width, options.bottleneck, options.images) for kind in options.kinds]
    else:
        cases = checked_cases() if options.checked else all_cases()

    rows = []
    try:
        for found in count(cases, chips, options.workers):
            rows += found
            print(_layer(found), flush=True)
    except ValueError as error:  # a kernel is not as `traffic.py` says
        parser.error(str(error))
    results: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "chips": [asdict(chip) for chip in chips],
        "step": {"backbone": step.BACKBONE, **asdict(utilisation)},
        "taxes": [tax for chip in chips for tax in taxes(chip, rows, utilisation)],
        "rows": rows,
    }
    for tax in results["taxes"]:
        print("{kind}, {chip}: a step of {step_ms} ms, {adapters_ms} ms of adapters, {tax:.1%}".format(**tax))
    print(files.assumptions(results))
    if options.write:
        results["mlp_form"] = list(mlp_rows(chips, utilisation))
        files.write(results)
        publish(results, files.RESULTS, files.markdown(results), PLOTS)
        print(f"For the README:\n{files.readme_table(results)}")
    if old is not None:
        lines, grown = files.compare(rows, old["rows"])
        print("\n".join(lines))
        sys.exit(1 if grown else 0)


def taxes(chip: Chip, rows: list[files.Row], utilisation: Utilisation) -> list[dict[str, Any]]:
    """Of ViT-B/16 at batch 128, two views, for the kinds whose layers (the first one forks) were counted."""
    found = files.layers(rows)
    lines = []
    for kind, precision in step.PRECISION.items():
        first = found.get((f"{kind} fork".removeprefix("plain "), chip.name, 768, 64, VIEWS * IMAGES * 197))
        layer = found.get((kind, chip.name, 768, 64, VIEWS * IMAGES * 197))
        if first is None or layer is None:
            continue
        bare = step.count_step(chip, precision, IMAGES, VIEWS, utilisation).seconds
        adapters = (first[0]["layer_us"] + (step.DEPTH - 1) * layer[0]["layer_us"]) / 1e6
        call = {"kind": kind, "precision": precision, "chip": chip.name}
        times = {"step_ms": round(bare * 1e3, 1), "adapters_ms": round(adapters * 1e3, 2)}
        lines.append(call | times | {"tax": round(adapters / bare, 4)})
    return lines


def _layer(rows: list[files.Row]) -> str:
    """A call's kernels, to read while others are compiled."""
    lines = ["{kind}, {chip}, D = {width}, r = {bottleneck}, M = {rows}".format(**rows[0])]
    for row in rows:
        lines.append(
            (
                "  {kernel:34}{us:7.1f} us, copy {copy_us:5.1f}  DRAM {dram_us:6.1f}  L2 {l2_us:6.1f}  "
                "issue {issue_us:6.1f}  exposed {exposed_us:5.1f}  {bound:5}"
                "{instructions:7} = {outside_loops} + {loops} x {trips}  {registers} registers  {shared_bytes} B  "
                "{spill_bytes} spilt  {programs} programs, {programs_a_multiprocessor} at once, {waves} waves  "
                "L2 {l2_megabytes} MB, kept {kept_in_l2}"
            ).format(**row)
        )
    lines.append("  together {layer_us} us, {ratio_to_copy} times the copy".format(**rows[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
