"""`python -m mosa_fast`: the commands, with a line each."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from mosa_fast.command_line import one_line_errors

COMMANDS = ("train", "evaluate", "predict", "export", "sweep", "info", "data.check", "data.split")


def describe(command: str) -> str:
    """What a command is for: the first line of its module, without the words that call it. Nothing is imported."""
    source = Path(__file__).parent.joinpath(*command.split(".")).with_suffix(".py")
    documentation = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    first = documentation.splitlines()[0].rpartition("`: ")[2].rstrip(".")
    return first[:1].lower() + first[1:]


def main() -> None:
    """Print the commands; exit code 2 where something was asked for that is none of the module's."""
    width = max(map(len, COMMANDS))
    with one_line_errors():
        if sys.argv[1:] not in ([], ["-h"], ["--help"]):
            raise ValueError(f"no {sys.argv[1]!r} here: a command is called as python -m mosa_fast.train")
        print("python -m mosa_fast.COMMAND --help says more of each:\n")
        print("\n".join(f"{command:<{width}}  {describe(command)}" for command in COMMANDS))


if __name__ == "__main__":
    main()
