"""From the words of a command line to a `TrainConfig`; a user's mistake is one clear line and exit code 2.

Every command line that takes the options of a run, or the folder of one, reads them here. Nothing of training is
imported, so that anything may use it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from mosa_fast.config import TrainConfig
from mosa_fast.options import NULL, check_fields, facts_of, words_of
from mosa_fast.recipes import ActionRecipe, load_recipe, packaged
from mosa_fast.run_folder import RunFolder

NEAR = 0.6  # how alike an unknown option and the one that may have been meant are
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # what torch's errors say
PACKAGES = ("torch", "torchvision", "timm")
DEFAULT_RECIPE = "digits.yaml"  # where neither a recipe nor other data are named


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and leave with code 2."""
        fail(" ".join(message.split()) + _nearest(self, message))


class Parser(ArgumentParser):
    """jsonargparse's parser, with the errors of `CommandParser`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without the usage, and leave with code 2."""
        wrong = re.search(r'Parser key "([\w.]+)":.*(?:Given value|Got value): (.*)$', message, re.DOTALL)
        words = words_of(TrainConfig, wrong[1]) if wrong else None
        if wrong and words:
            fail(f"{wrong[1]} must be {words}, got {' '.join(wrong[2].split())}")
        fail(" ".join(message.split()) + _nearest(self, message))


def _nearest(parser: argparse.ArgumentParser | ArgumentParser, message: str) -> str:
    """The option that may have been meant by one that an error's message says is unknown."""
    options = [o.removeprefix("--") for action in parser._actions for o in action.option_strings if o.startswith("--")]
    found = re.search(r"(?:there is no option |unrecognized arguments: --)([\w.]+)", message)
    if not found:
        return ""
    unknown = found[1]
    near = difflib.get_close_matches(unknown, options, n=1, cutoff=NEAR)
    if not near:  # the right name in the wrong section
        ends = {option.rsplit(".", 1)[-1]: option for option in options}
        near = [ends[end] for end in difflib.get_close_matches(unknown.rsplit(".", 1)[-1], ends, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else ""


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2; a reader who has seen enough is no error."""
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            leave(128 + signal.SIGPIPE)
        fail(describe(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = " ".join(str(error).split())[:200]
        fail(f"out of memory: smaller images, batches or adapters may do (docs/training.md); {reason}")
    except KeyboardInterrupt:
        print("stopped before there was anything to save", file=sys.stderr)
        leave(130)


def _nobody_reads() -> bool:
    """Whether standard output leads to a reader who has gone, as `head` does; what is left for it is then dropped."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True


def check_packages() -> None:
    """Import what models and images need.

    Raises:
        ValueError: a package is missing or broken, as one that was built for another torch.
    """
    for package in PACKAGES:
        reason = broken(package)
        if reason is not None:
            raise ValueError(
                f"{package} cannot be used here ({reason}): install it again, to match the installed torch"
            )


def broken(package: str) -> str | None:
    """Why a package cannot be imported; None: it can."""
    try:
        import_module(package)
    except Exception as error:  # of any kind, where compiled parts do not fit
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def fail(message: str) -> NoReturn:
    """One line on standard error, and exit code 2."""
    rank = os.environ.get("RANK")
    print(f"error{'' if rank is None else f' on rank {rank}'}: {message}", file=sys.stderr, flush=True)
    leave(2)


def leave(code: int) -> NoReturn:
    """Exit with a code."""
    raise SystemExit(code)
