"""`python -m mosa_fast.evaluate --run DIR`: the accuracy that a finished run reported, computed again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mosa_fast.command_line import one_line_errors, run_config
from mosa_fast.config import TrainConfig


def main(arguments: list[str] | None = None) -> None:
    """Print the accuracy of a run's selected weights."""
    parser = argparse.ArgumentParser(prog="python -m mosa_fast.evaluate", description=__doc__.split(": ")[-1])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run (its --out)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="images to evaluate (default: test)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: as in the run)")
    parser.add_argument("--root", help="folder of the data set, where it has moved (default: as in the run)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        config, classes = run_config(options.run)
        config.device = options.device or config.device
        config.data.root = options.root or config.data.root
        accuracy, images = evaluate_run(options.run, config, classes, options.split)
        print(f"{options.split} accuracy {accuracy:.4f} % of {images} images")


def evaluate_run(run: Path, config: TrainConfig, classes: list[str], split: str) -> tuple[float, int]:
    """Accuracy in percent of a run's selected weights on one of its splits, and the number of its images.

    Raises:
        ValueError: the run is not finished, or the data are no longer those of the run.
    """
    from mosa_fast.data.loading import evaluation_loader
    from mosa_fast.training.data import load_run_data
    from mosa_fast.training.distributed import Ranks, pick_device
    from mosa_fast.training.evaluation import BATCH_FACTOR, evaluate

    ranks = Ranks(0, 1, pick_device(config.device))
    model = load_run_model(run, config, classes).to(ranks.device)
    config.loader.cache = False
    splits = load_run_data(config)
    if splits.classes != classes:
        raise ValueError(f"the data set has other classes than {run} was trained on")
    dataset: Any = getattr(splits, split)
    loader = evaluation_loader(dataset, config.optim.batch_size * BATCH_FACTOR, workers=config.data.workers)
    return evaluate(model, loader, ranks, config.precision), len(dataset)


def load_run_model(run: Path, config: TrainConfig, classes: list[str]) -> Any:
    """A run's model with its selected weights, on the CPU, in evaluation mode.

    Raises:
        ValueError: the run is not finished, or its weights cannot be read or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from mosa_fast.adapters.adapter_file import load_adapter, load_trained_state
    from mosa_fast.training.model import build_model
    from mosa_fast.training.precision import store_frozen

    weights = run / ("adapter.safetensors" if config.method == "mosa" else "model.safetensors")
    if not (run / "summary.json").is_file() or not weights.is_file():
        raise ValueError(f"{run} is not finished (no {weights.name} and summary.json); resume it first")
    model: Any = build_model(config, len(classes))
    store_frozen(model, config.precision)
    if config.method == "mosa":
        load_adapter(model, weights)
    else:
        try:
            load_trained_state(model, load_file(weights), str(weights))
        except SafetensorError as error:
            raise ValueError(f"{weights} cannot be read: {error}") from None
    return model.eval()


if __name__ == "__main__":
    main()
