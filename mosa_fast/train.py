"""Train, select, test, report.

`python -m mosa_fast.train [--config FILE] [--section.key value ...] [--resume | --overwrite]`
"""

from __future__ import annotations

import os
import sys

from mosa_fast.command_line import check_packages, leave, one_line_errors
from mosa_fast.idle_options import idle_options
from mosa_fast.run_options import parse


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says.

    Exit codes: 0 done, 2 a user's mistake (one line on standard error), 130 and 143 stopped by SIGINT and SIGTERM
    with everything saved.
    """
    words = sys.argv[1:] if arguments is None else arguments
    with one_line_errors():
        config, start = parse(words)
        if os.environ.get("RANK", "0") == "0":
            for line in idle_options(config, words):
                print(f"note: {line}", file=sys.stderr, flush=True)
        check_packages()
        from mosa_fast.training.loop import train
        from mosa_fast.training.signals import Interrupted

        try:
            train(config, **start)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr, flush=True)
            leave(128 + stopped.signal)


if __name__ == "__main__":
    main()
