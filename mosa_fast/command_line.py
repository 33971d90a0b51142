"""What all command lines share: a user's mistake is one clear line and exit code 2. It needs only Python."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

NEAR = 0.6  # how alike an unknown option and the one that may have been meant are
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # what torch's errors say
PACKAGES = ("torch", "torchvision", "timm")


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Print the message without the usage, and leave with code 2."""
        fail(" ".join(message.split()) + nearest(self, message))


def nearest(parser: argparse.ArgumentParser, message: str) -> str:
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


def user_path(text: str) -> Path:
    """A path as people write it, with ~ for their home where the shell has left that, as in `--out=~/runs`."""
    return Path(os.path.expanduser(text))


def names_of(words: Sequence[str]) -> list[str]:
    """The options that words of a command line give values to, by their names without dashes."""
    return [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]


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
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("mosa_fast."):
            raise
        fail(f"mosa_fast runs where it is installed, since {error.name} lies beside it: pip install -e .")
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
