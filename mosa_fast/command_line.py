"""What the command lines share: a user's mistake is one clear line on standard error and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from mosa_fast.config import TrainConfig


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line and name the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without the usage, and leave with code 2."""
        fail(" ".join(message.split()) + self._nearest(message))

    def _nearest(self, message: str) -> str:
        options = [
            o.removeprefix("--") for action in self._actions for o in action.option_strings if o.startswith("--")
        ]
        group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        other = re.search(r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)", message)
        if group:
            unknown = f"{group[1]}.{group[2]}"
        elif other:
            unknown = other[1] or other[2]
        else:
            return ""
        near = difflib.get_close_matches(unknown, options, n=1, cutoff=0.5)
        if not near:  # the right name in the wrong section
            ends = {option.rsplit(".", 1)[-1]: option for option in options}
            near = [ends[end] for end in difflib.get_close_matches(unknown.rsplit(".", 1)[-1], ends, n=1, cutoff=0.7)]
        return f"; did you mean {near[0]}?" if near else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 2, and an interruption into 128 + the signal."""
    from mosa_fast.training.signals import Interrupted

    try:
        yield
    except (ValueError, OSError) as error:
        fail(describe(error))
    except Interrupted as error:
        print(error, file=sys.stderr, flush=True)
        leave(128 + error.signal)
    except KeyboardInterrupt:
        print("stopped before there was anything to save", file=sys.stderr)
        leave(130)


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


def run_config(run: Path) -> tuple[TrainConfig, list[str]]:
    """The configuration and the class names of a run's folder.

    Raises:
        ValueError: it is not the folder of a run, or its files cannot be read.
    """
    import json

    from mosa_fast.config import TrainConfig
    from mosa_fast.train import make_parser

    for name in ("config.yaml", "classes.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run} is not the folder of a run: it has no {name}")
    parser = make_parser()
    values = parser.instantiate(parser.parse_path(str(run / "config.yaml"))).as_dict()
    values = {key: values[key] for key in TrainConfig.__dataclass_fields__}
    return TrainConfig(**values), json.loads((run / "classes.json").read_text(encoding="utf-8"))
