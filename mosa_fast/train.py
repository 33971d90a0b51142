"""`python -m mosa_fast.train [--config FILE] [--section.key value ...] [--resume]`: train, select, test, report."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files

from jsonargparse import set_parsing_settings

from mosa_fast.command_line import Parser, one_line_errors
from mosa_fast.config import TrainConfig


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run.

    Exit codes: 0 done, 2 a user's mistake (one line on standard error), 130 and 143 stopped by SIGINT and SIGTERM
    with everything saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    with as_file(files("mosa_fast.configs") / "digits.yaml") as embedded:
        if not any(argument.split("=")[0] in ("--config", "--data.name") for argument in arguments):
            arguments = ["--config", str(embedded), *arguments]
        parsed = parser.parse_args(arguments)
    with one_line_errors():
        values = parser.instantiate(parsed).as_dict()
        resume = values.pop("resume")
        values.pop("config")
        config = TrainConfig(**values)
        from mosa_fast.training.loop import train

        train(config, resume=resume)


def make_parser() -> Parser:
    """All options of a run, from the dataclasses' fields and their docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="python -m mosa_fast.train", description="Fine-tune a frozen ViT with MoSA adapters.")
    parser.add_argument("--config", action="config", help="YAML recipe; later options override it")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the last checkpoint in OUT; start anew where there is none, end at once where the run is done",
    )
    parser.add_class_arguments(TrainConfig, nested_key=None)
    return parser


if __name__ == "__main__":
    main()
