"""`python -m mosa_fast.predict --run DIR INPUT...`: the most probable classes of images, by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mosa_fast.answers import FORMATS, Answer
from mosa_fast.command_line import CommandParser, check_packages, leave, one_line_errors
from mosa_fast.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from mosa_fast.data.loading import Unreadable
    from mosa_fast.training.finished_run import FinishedRun


def main(arguments: list[str] | None = None) -> None:
    """Print an answer for each image and run.

    Exit codes: 0 done, 1 an input could not be read (it is named on standard error, the others have their answers), 2 a
    user's mistake.
    """
    parser = CommandParser(
        prog="python -m mosa_fast.predict",
        description="Print the most probable classes of images, by name.",
        epilog="What cannot be read is named on standard error; the others are answered, and the exit code is 1.",
    )
    parser.add_argument(
        "--run", type=RunFolder, required=True, action="append", help="folder of a finished run (its --out); repeatable"
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image file; folder (all images below it); pattern such as 'shots/**/*.png'; - reads a line for each file "
        "or folder from standard input",
    )
    parser.add_argument("--top", type=int, default=5, help="classes to print for each image (default: 5)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the answers (default: text)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: as in the run)")
    parser.add_argument("--batch_size", type=int, help="images of a batch (default: as the run evaluates)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: as in the run)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        check_packages()
        for name, least in (("top", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        folders = list(map(str, options.run))
        if len(set(folders)) < len(folders):
            raise ValueError(f"--run {max(folders, key=folders.count)} is given more than once")
        from mosa_fast.data.inputs import find_inputs
        from mosa_fast.training.finished_run import open_run

        runs = [open_run(folder, options.device) for folder in options.run]
        for stream in (sys.stdin, sys.stdout) if "-" in options.inputs else (sys.stdout,):
            stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names of files are bytes
        inputs = find_inputs(options.inputs, sys.stdin or ())
        bad = 0
        answers = predict(runs, inputs, options.top, options.batch_size, options.workers)
        with FORMATS[options.format](sys.stdout, len(runs) > 1) as write:
            for answer in answers:
                if isinstance(answer, Answer):
                    write(answer)
                else:
                    print(f"{answer.name} cannot be read ({answer.reason})", file=sys.stderr)
                    bad += 1
    if bad:
        leave(1)


def predict(
    runs: list[FinishedRun],
    inputs: list[str | Unreadable],
    top: int = 5,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Answer | Unreadable]:
    """The answers for every input in order, of every run; or why it has none.

    Args:
        runs: whose models answer.
        inputs: of `mosa_fast.data.inputs.find_inputs`.
        top: classes of an answer.
        batch_size: images of a batch; None: as the first run evaluates.
        workers: processes that read images; None: as in the first run.

    Raises:
        ValueError: weights cannot be read, or the runs cannot be served together (`mosa_fast.training.serving`).
    """
    from mosa_fast.data.inputs import input_batches
    from mosa_fast.data.transforms import evaluation_transform
    from mosa_fast.training.evaluation import BATCH_FACTOR
    from mosa_fast.training.serving import serve

    config = runs[0].config
    ask = serve(runs)
    transform = evaluation_transform(runs[0].preprocessing)
    batch_size = batch_size or config.optim.batch_size * BATCH_FACTOR
    workers = config.data.workers if workers is None else workers

    def answers() -> Iterator[Answer | Unreadable]:
        for batch in input_batches(inputs, transform, batch_size, workers):
            rankings: Any = []
            if len(batch.images):
                logits = ask(batch.images)
                rankings = [_rankings(own, run.classes, top) for run, own in zip(runs, logits, strict=True)]
            answered = zip(*rankings, strict=True)
            for place, name in enumerate(batch.names):
                if place in batch.bad:
                    yield batch.bad[place]
                else:
                    for run, ranking in zip(runs, next(answered), strict=True):
                        yield Answer(name, str(run), ranking)

    return answers()


def _rankings(logits: Tensor, classes: list[str], top: int) -> list[list[tuple[str, float]]]:
    """For each row of logits `[B, classes]` the most probable classes and their probabilities, best first."""
    best = logits.softmax(1).topk(min(top, len(classes)))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(classes[label], p) for label, p in zip(*row, strict=True)] for row in rows]


if __name__ == "__main__":
    main()
