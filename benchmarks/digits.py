"""Does the adapter earn its place? Five ways to train the embedded backbone on the embedded digits.

`python -m benchmarks.digits` runs, for 10 and 50 training images per class:

- linear: the head alone; dense: an adapter of one expert, one view; mosa: four experts, two views; full: all weights
  from the pretrained ones; scratch: all weights from random ones;
- for each, every learning rate of its grid on one seed, judged on validation with the test images unread; of equals
  the smallest;
- then five other seeds with the best rate, test evaluated once, at the epoch that validation selects.

Data, steps, batches, schedule, bottleneck, scale and dropout are the same for all: those of configs/digits.yaml. A
seed draws the training and validation images, their order, the head's initial weights, experts and dropout; owner maps
and the adapters' initial weights come from adapter.seed, which is the recipe's in all runs. Every finished run is kept
in a folder, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "digits.json"
SEARCH_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
EPOCHS = {10: 60, 50: 12}  # by shots: 420 and 384 steps of at most 16 images
WARMUP = 0.1  # of the epochs
EVALUATIONS = 5  # validations in a run
GRIDS = {
    "linear": (3e-3, 1e-2, 3e-2),
    "dense": (1e-3, 2e-3, 5e-3),
    "mosa": (2e-3, 5e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3),
    "scratch": (3e-4, 1e-3, 3e-3),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    contender: str
    shots: int
    lr: float
    seed: int
    test: bool

    def folder(self, root: Path) -> Path:
        """Where it leaves its files."""
        return root / f"{self.contender}-{self.shots}-{self.lr:g}-seed{self.seed}"


def execute(run: Run, root: Path) -> dict[str, Any]:
    """Train, unless it was done before; the summary."""
    import torch

    from mosa_fast.train import parse
    from mosa_fast.training.loop import train

    torch.set_num_threads(1)  # two runs side by side beat one on two cores
    config, _ = parse([])
    config.data.shots = run.shots
    config.optim.lr = run.lr
    config.optim.epochs = EPOCHS[run.shots]
    config.optim.warmup_epochs = WARMUP * config.optim.epochs
    config.eval_every = config.optim.epochs // EVALUATIONS
    config.seed, config.test, config.out = run.seed, run.test, str(run.folder(root))
    if run.contender == "dense":
        config.adapter = replace(config.adapter, experts=1)
        config.loss.views = 1
    elif run.contender != "mosa":
        config.method = run.contender  # the others carry the method's name
    done = run.folder(root) / "summary.json"
    if done.is_file():
        summary = json.loads(done.read_text())
        config.data.image_size = summary["config"]["data"]["image_size"]
        if summary["config"] == asdict(config):  # else the recipe has changed since
            return summary
    return train(config, progress=False)


def benchmark(root: Path, processes: int) -> dict[str, Any]:
    """Search, then measure; everything that results/digits.json holds."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        table, searches = [], []
        for shots in EPOCHS:
            search = [Run(c, shots, lr, SEARCH_SEED, test=False) for c, rates in GRIDS.items() for lr in rates]
            found = pool.starmap(execute, [(run, root) for run in search], chunksize=1)
            best: dict[str, tuple[float, Run]] = {}
            for run, summary in zip(search, found, strict=True):
                searches.append(
                    {
                        "method": run.contender,
                        "shots": shots,
                        "lr": run.lr,
                        "seed": run.seed,
                        "val": summary["val_accuracy"],
                    }
                )
                if run.contender not in best or summary["val_accuracy"] > best[run.contender][0]:
                    best[run.contender] = (summary["val_accuracy"], run)
            runs = [replace(best[c][1], seed=seed, test=True) for c in GRIDS for seed in SEEDS]
            summaries = pool.starmap(execute, [(run, root) for run in runs], chunksize=1)
            for contender in GRIDS:
                rows = [s for r, s in zip(runs, summaries, strict=True) if r.contender == contender]
                tests = [row["test_accuracy"] for row in rows]
                table.append(
                    {
                        "method": contender,
                        "shots": shots,
                        "lr": best[contender][1].lr,
                        "test_mean": round(statistics.mean(tests), 2),
                        "test_standard_error": round(statistics.stdev(tests) / len(tests) ** 0.5, 2),
                        "test": tests,
                        "val": [row["val_accuracy"] for row in rows],
                        "trained_weights": rows[0]["trained_weights"] + rows[0]["head_weights"],
                        "steps": rows[0]["steps"],
                    }
                )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "table": table,
        "searches": searches,
        "versions": summaries[0]["versions"],
        "device": summaries[0]["device"],
        "commit": commit,
    }


def markdown(results: dict[str, Any]) -> str:
    """The README's table."""
    names = {
        "linear": "linear probe",
        "dense": "dense adapter",
        "mosa": "**MoSA**",
        "full": "full fine-tuning",
        "scratch": "from scratch",
    }
    cell = {
        (row["method"], row["shots"]): f"{row['test_mean']:.2f} ± {row['test_standard_error']:.2f}"
        for row in results["table"]
    }
    weights = {row["method"]: row["trained_weights"] for row in results["table"]}
    lines = ["| test accuracy, % | trained weights | 10 per class | 50 per class |", "| --- | --- | --- | --- |"]
    for method, name in names.items():
        lines.append(f"| {name} | {weights[method]:,} | {cell[method, 10]} | {cell[method, 50]} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="folder of the single runs")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    results = benchmark(arguments.runs, arguments.processes)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
