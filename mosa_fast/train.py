"""`python -m mosa_fast.train [--config FILE] [--section.key value ...]`: train, select, test, report."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files

from jsonargparse import ArgumentParser, set_parsing_settings

from mosa_fast.config import TrainConfig


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run; a user's mistake is one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    with as_file(files("mosa_fast.configs") / "digits.yaml") as embedded:
        if not any(argument.split("=")[0] in ("--config", "--data.name") for argument in arguments):
            arguments = ["--config", str(embedded), *arguments]
        parsed = parser.parse_args(arguments)
    try:
        values = parser.instantiate(parsed).as_dict()
        values.pop("config")
        config = TrainConfig(**values)
        from mosa_fast.training.loop import train

        train(config)
    except ValueError as error:
        parser.error(str(error))


def make_parser() -> ArgumentParser:
    """All options of a run, from the dataclasses' fields and their docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m mosa_fast.train", description="Fine-tune a frozen ViT with MoSA adapters.")
    parser.add_argument("--config", action="config", help="YAML recipe; later options override it")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    return parser


if __name__ == "__main__":
    main()
