"""`python -m benchmarks [--quick | --suite gpu] [--cases ...] [--out FILE] [--compare OLD.json]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from benchmarks.cases import CASES
from benchmarks.suite import SUITES, compare, run_suite, write

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times adapters, side by side.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--suite", choices=SUITES, help="default: gpu where there is one, else quick")
    choice.add_argument("--quick", action="store_true", help="the suite for two CPU cores and two minutes")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="only these")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/suite_DEVICE.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 where something became slower")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    name = "quick" if options.quick else options.suite or ("gpu" if gpu else "quick")
    if name == "gpu" and not gpu:
        parser.error("--suite gpu needs a GPU, and torch sees none")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {options.out}")
    old = None
    if options.compare is not None:  # read first: bad input must not cost a run
        try:
            old = json.loads(options.compare.read_text())
            old["rows"], old["environment"]["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--compare: {options.compare} is not a result of this suite ({error})")

    results = run_suite(SUITES[name], torch.device("cuda" if gpu else "cpu"), options.cases)
    slug = re.sub(r"[^a-z0-9]+", "_", results["environment"]["device"].lower()).strip("_")
    path = options.out or RESULTS / f"suite_{slug}.json"
    write(results, path)
    print(f"{len(results['rows'])} rows in {results['seconds']} s: {path}")
    if old is not None:
        try:
            lines, slower = compare(results, old)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(lines))
        sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
