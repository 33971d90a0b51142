"""`python -m mosa_fast.train [--config FILE] [--section.key value ...] [--resume]`: train, select, test, report."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files

from jsonargparse import set_parsing_settings

from mosa_fast.command_line import Parser, one_line_errors
from mosa_fast.config import TrainConfig
from mosa_fast.recipes import ActionRecipe


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says.

    Exit codes: 0 done, 2 a user's mistake (one line on standard error), 130 and 143 stopped by SIGINT and SIGTERM
    with everything saved.
    """
    with one_line_errors():
        config, resume = parse(sys.argv[1:] if arguments is None else arguments)
        from mosa_fast.training.loop import train

        train(config, resume=resume)


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The run that a command line describes, and whether to resume it.

    Where it names neither a recipe nor other data, the recipe is the embedded default's.

    Raises:
        ValueError: a value is out of range.
        SystemExit: an option does not exist or cannot be parsed.
    """
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if not parsed.config and parsed.data.name == "digits":
        with as_file(files("mosa_fast.configs") / "digits.yaml") as recipe:
            parsed = parser.parse_args(["--config", str(recipe), *arguments])
    values = parser.instantiate(parsed).as_dict()
    resume = values.pop("resume")
    values.pop("config")
    return TrainConfig(**values), resume


def make_parser() -> Parser:
    """All options of a run, from the dataclasses' fields and their docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="python -m mosa_fast.train", description="Fine-tune a frozen ViT with MoSA adapters.")
    parser.add_argument("--config", action=ActionRecipe, help="YAML recipe, or its name as in fgvc/cub; later ones win")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the last checkpoint in OUT; start anew where there is none, end at once where the run is done",
    )
    parser.add_class_arguments(TrainConfig, nested_key=None)
    return parser


if __name__ == "__main__":
    main()
