"""`python -m mosa_fast.evaluate --run DIR`: the accuracy that a finished run reported, computed again."""

from __future__ import annotations

import argparse
from typing import Any

from mosa_fast.command_line import check_packages, one_line_errors, read_run
from mosa_fast.config import TrainConfig
from mosa_fast.run_folder import RunFolder


def main(arguments: list[str] | None = None) -> None:
    """Print the accuracy of a run's selected weights."""
    parser = argparse.ArgumentParser(prog="python -m mosa_fast.evaluate", description=__doc__.split(": ")[-1])
    parser.add_argument("--run", type=RunFolder, required=True, help="folder of a finished run (its --out)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="images to evaluate (default: test)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: as in the run)")
    parser.add_argument("--root", help="folder of the data set, where it has moved (default: as in the run)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        check_packages()
        config, classes = read_run(options.run)
        config.device = options.device or config.device
        config.data.root = options.root or config.data.root
        accuracy, images = evaluate_run(options.run, config, classes, options.split)
        print(f"{options.split} accuracy {accuracy:.4f} % of {images} images")


def evaluate_run(folder: RunFolder, config: TrainConfig, classes: list[str], split: str) -> tuple[float, int]:
    """Accuracy in percent of a run's selected weights on one of its splits, and the number of its images.

    Raises:
        ValueError: the run is not finished, or the data are no longer those of the run.
    """
    from mosa_fast.data.loading import evaluation_loader
    from mosa_fast.training.distributed import Ranks, pick_device
    from mosa_fast.training.evaluation import BATCH_FACTOR, evaluate
    from mosa_fast.training.finished_run import load_run_model
    from mosa_fast.training.run_data import load_run_data

    ranks = Ranks(0, 1, pick_device(config.device))
    model = load_run_model(folder, config, classes).to(ranks.device)
    config.loader.cache = False
    splits = load_run_data(config)
    if splits.classes != classes:
        raise ValueError(f"the data set has other classes than {folder} was trained on")
    dataset: Any = getattr(splits, split)
    if dataset is None:
        raise ValueError(f"{folder} has no validation images: it was trained on them too (data.mode final)")
    loader = evaluation_loader(dataset, config.optim.batch_size * BATCH_FACTOR, workers=config.data.workers)
    return evaluate(model, loader, ranks, len(classes), config.precision).accuracy, len(dataset)


if __name__ == "__main__":
    main()
