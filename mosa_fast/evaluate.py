"""`python -m mosa_fast.evaluate --run DIR`: the accuracy that a finished run reported, computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mosa_fast.command_line import CommandParser, check_packages, one_line_errors
from mosa_fast.run_folder import RunFolder

if TYPE_CHECKING:
    from mosa_fast.training.finished_run import FinishedRun


def main(arguments: list[str] | None = None) -> None:
    """Print the accuracy of a run's selected weights."""
    parser = CommandParser(prog="python -m mosa_fast.evaluate", description=__doc__.split(": ")[-1])
    parser.add_argument("--run", type=RunFolder, required=True, help="folder of a finished run (its --out)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="images to evaluate (default: test)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: as in the run)")
    parser.add_argument("--root", help="folder of the data set, where it has moved (default: as in the run)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        check_packages()
        from mosa_fast.training.finished_run import open_run

        run = open_run(options.run, options.device)
        run.config.data.root = options.root or run.config.data.root
        accuracy, images = evaluate_run(run, options.split)
        print(f"{options.split} accuracy {accuracy:.4f} % of {images} images")


def evaluate_run(run: FinishedRun, split: str) -> tuple[float, int]:
    """Accuracy in percent of a run's selected weights on one of its splits, and the number of its images.

    Raises:
        ValueError: the data are no longer those of the run.
    """
    from mosa_fast.data.loading import evaluation_loader
    from mosa_fast.training.distributed import Ranks
    from mosa_fast.training.evaluation import BATCH_FACTOR, evaluate
    from mosa_fast.training.run_data import load_run_data

    config = run.config
    model = run.load_model()
    config.loader.cache = False
    splits = load_run_data(config, run.preprocessing)
    if splits.classes != run.classes:
        raise ValueError(f"the data set has other classes than {run} was trained on")
    dataset: Any = getattr(splits, split)
    if dataset is None:
        raise ValueError(f"{run} has no validation images: it was trained on them too (data.mode final)")
    loader = evaluation_loader(dataset, config.optim.batch_size * BATCH_FACTOR, workers=config.data.workers)
    found = evaluate(model, loader, Ranks(0, 1, run.device), len(run.classes), config.precision)
    return found.accuracy, len(dataset)


if __name__ == "__main__":
    main()
