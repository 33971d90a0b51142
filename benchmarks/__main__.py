"""`python -m benchmarks [--quick | --suite NAME] [--cases ...] [--contenders ...] [--out FILE] [--compare OLD]`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import CASES, COPY
from benchmarks.contenders import CONTENDERS
from benchmarks.machine import environment
from benchmarks.measure import profile, run_suite
from benchmarks.results import FOLDER, compare, read, write
from benchmarks.suite import SUITES
from mosa_fast.command_line import CommandParser


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks", description="Times adapters, side by side.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--suite", choices=SUITES, help="default: gpu where there is one, else quick")
    choice.add_argument("--quick", action="store_true", help="the suite for two CPU cores and two minutes")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="only these")
    parser.add_argument("--contenders", nargs="+", choices=(COPY, *CONTENDERS), metavar="NAME", help="only these")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/suite_DEVICE.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 where something became slower")
    parser.add_argument(
        "--profile", action="store_true", help="run ours at the first operator, untimed, for a profiler"
    )
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = "quick" if options.quick else options.suite or ("gpu" if gpu else "quick")
    suite = SUITES[name]
    if suite.gpu and not gpu:
        parser.error(f"--suite {name} needs a GPU, and torch sees none")
    if options.profile:
        profile(next(spec for spec in suite.specs if spec.case == "operator"), device)
        return
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {options.out}")
    old = None
    if options.compare is not None:  # read first: bad input must not cost a run
        try:
            old = read(options.compare)
        except ValueError as error:
            parser.error(f"--compare: {error}")
    if options.cases:
        suite = replace(suite, specs=tuple(spec for spec in suite.specs if spec.case in options.cases))
    if options.contenders:
        suite = replace(suite, contenders=tuple(options.contenders))

    path = options.out or FOLDER / f"{_file_stem(name, device)}.json"
    results = run_suite(suite, device, save=lambda results: write(results, path))
    print(f"{len(results['rows'])} rows in {results['seconds']} s: {path}")
    if old is not None:
        try:
            lines, slower = compare(results, old)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(lines))
        sys.exit(1 if slower else 0)


def _file_stem(suite: str, device: torch.device) -> str:
    kind = "suite" if suite in ("quick", "gpu") else suite
    return kind + "_" + re.sub(r"[^a-z0-9]+", "_", environment(device)["device"].lower()).strip("_")


if __name__ == "__main__":
    main()
