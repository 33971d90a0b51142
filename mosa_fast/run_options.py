"""From the words of a command line to a `TrainConfig`.

Every command line that takes the options of a run, or the folder of one, reads them here. Nothing of training is
imported, so that anything may use it.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from mosa_fast.command_line import fail, nearest
from mosa_fast.config import TrainConfig
from mosa_fast.options import NULL, check_fields, facts_of, words_of
from mosa_fast.recipes import ActionRecipe, load_recipe, packaged
from mosa_fast.run_folder import RunFolder

DEFAULT_RECIPE = "digits.yaml"  # where neither a recipe nor other data are named


class Parser(ArgumentParser):
    """jsonargparse's parser, with the errors of `CommandParser`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without the usage, and leave with code 2."""
        wrong = re.search(r'Parser key "([\w.]+)":.*(?:Given value|Got value): (.*)$', message, re.DOTALL)
        words = words_of(TrainConfig, wrong[1]) if wrong else None
        if wrong and words:
            fail(f"{wrong[1]} must be {words}, got {' '.join(wrong[2].split())}")
        fail(" ".join(message.split()) + nearest(self, message))


def make_parser(prog: str, description: str) -> Parser:
    """All options of a run, from the dataclasses' fields, their docstrings and their facts.

    Args:
        prog, description: of the command line, for its `--help`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=f"python -m mosa_fast.{prog}", description=description)
    parser.add_argument("--config", action=ActionRecipe, help="YAML recipe, or its name as in fgvc/cub; later ones win")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    facts = facts_of(TrainConfig)
    for action in parser._actions:
        if action.dest in facts:
            words = (action.help or "").replace("None", NULL)  # what a docstring calls None
            action.help = f"{words} {facts[action.dest].help}".strip()
    return parser


def parse(arguments: list[str]) -> tuple[TrainConfig, dict[str, bool]]:
    """The run that a command line describes, and whether to "resume" it or to "overwrite" the one that is there.

    It raises what `parse_options` does.
    """
    parser = make_parser("train", "Fine-tune a frozen ViT with MoSA adapters.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the last checkpoint in OUT; start anew where there is none, end at once where the run is done",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the run that is in OUT, finished or not, which is lost"
    )
    parsed = _parse(parser, arguments)
    start = {name: parsed[name] for name in ("resume", "overwrite")}
    if all(start.values()):
        raise ValueError("--resume goes on with the run that is there, --overwrite replaces it: give one of them")
    return _make(parser, parsed), start


def parse_options(arguments: list[str], prog: str, description: str) -> TrainConfig:
    """The run that the options of another command line describe; `prog` and `description` are as `make_parser`'s.

    Where they name neither a recipe nor other data, the recipe is the embedded default's.

    Raises:
        ValueError: a value is out of range, or two options exclude each other.
        SystemExit: an option does not exist or cannot be parsed.
    """
    parser = make_parser(prog, description)
    return _make(parser, _parse(parser, arguments))


def _parse(parser: Parser, arguments: list[str]) -> Any:
    parsed = parser.parse_args(arguments)
    if not parsed.config and parsed.data.name == "digits":
        parsed = parser.parse_args(["--config", str(packaged() / DEFAULT_RECIPE), *arguments])
    return parsed


def _make(parser: Parser, parsed: Any) -> TrainConfig:
    # Here as well: what is checked when a section is made does not know what the section is called in a run.
    check_fields(parsed, kind=TrainConfig)
    values = parser.instantiate(parsed).as_dict()
    return TrainConfig(**{name: values[name] for name in TrainConfig.__dataclass_fields__})


def read_run(folder: RunFolder) -> tuple[TrainConfig, list[str]]:
    """The configuration and the class names of a run.

    Raises:
        ValueError: it is not the folder of a run, or its files cannot be read.
    """
    for file in (folder.config, folder.classes):
        if not file.is_file():
            raise ValueError(f"{folder} is not the folder of a run: it has no {file.name}")
    load_recipe(folder.config)  # its errors are ValueErrors that name the file
    return parse_options(["--config", str(folder.config)], "train", ""), folder.read_classes()
