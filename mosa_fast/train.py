"""`python -m mosa_fast.train [--config FILE] [--section.key value ...]`: train, select, test, report."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files

from jsonargparse import ArgumentParser, set_parsing_settings

from mosa_fast.config import TrainConfig
from mosa_fast.recipes import ActionRecipe


def main() -> None:
    """Train as the command line says; a user's mistake is one line on standard error and exit code 2."""
    try:
        config = make_config(sys.argv[1:])
        from mosa_fast.training.loop import train

        train(config)
    except ValueError as error:
        make_parser().error(str(error))


def make_config(arguments: list[str]) -> TrainConfig:
    """The run that a command line describes; the embedded default where it names neither a recipe nor data.

    Raises:
        ValueError: a value is out of range.
        SystemExit: an option does not exist or cannot be parsed.
    """
    parser = make_parser()
    with as_file(files("mosa_fast.configs") / "digits.yaml") as embedded:
        if not any(argument.split("=")[0] in ("--config", "--data.name") for argument in arguments):
            arguments = ["--config", str(embedded), *arguments]
        parsed = parser.parse_args(arguments)
    values = parser.instantiate(parsed).as_dict()
    values.pop("config")
    return TrainConfig(**values)


def make_parser() -> ArgumentParser:
    """All options of a run, from the dataclasses' fields and their docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m mosa_fast.train", description="Fine-tune a frozen ViT with MoSA adapters.")
    parser.add_argument("--config", action=ActionRecipe, help="YAML recipe, or its name as in fgvc/cub; later ones win")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    return parser


if __name__ == "__main__":
    main()
