"""`python -m mosa_fast.info [--config RECIPE] [--section.key value ...]`: what is here, or what a run would train.

Without options: versions, devices, and which backends can serve here, or why not. With a run's options: its table of
trained, stored and merged weights, made without weights, data or a GPU.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import mosa_fast
from mosa_fast.command_line import CommandParser, broken, one_line_errors
from mosa_fast.config import TrainConfig


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def state(package: str) -> str:
    """The version of a package that models or images need, and why it cannot be used where it can't."""
    reason = broken(package)
    return version(package) + ("" if reason is None else f", cannot be used: {reason}")


def devices() -> list[str]:
    """One line for every GPU that torch sees."""
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def describe() -> str:
    """The report on this machine."""
    import torch

    from mosa_fast.ops.backends import BACKENDS, get_backend, unavailable_reason

    rows = [
        ("mosa_fast", mosa_fast.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        *((package, state(package)) for package in ("torchvision", "timm")),
        ("CUDA of torch", torch.version.cuda or torch.version.hip or "none"),
    ]
    rows += [(f"GPU {index}", line) for index, line in enumerate(devices())] or [("GPU", "none that torch can use")]
    for name in BACKENDS:
        reason = unavailable_reason(name)
        rows.append((f"backend {name}", "available" if reason is None else f"not available: {reason}"))
    rows.append(("selected", get_backend()))
    return "\n".join(f"{name:18} {value}" for name, value in rows)


def weights(config: TrainConfig) -> str:
    """The table of a run's weights.

    Raises:
        ValueError: the backbone cannot be made as the run wants it, or the number of classes is not known.
    """
    import torch

    from mosa_fast.adapters.summary import summary
    from mosa_fast.backbones.create import input_size
    from mosa_fast.data import class_count
    from mosa_fast.training.model import build_model

    config.model.pretrained = False
    config.data.image_size = config.data.image_size or input_size(config.model)
    with torch.device("meta"):
        model = build_model(config, class_count(config.data))
    return f"method {config.method} on {config.model.name}\n{summary(model)}"


def main(arguments: list[str] | None = None) -> None:
    """Print the report on this machine, or the table of a run."""
    parser = CommandParser(
        prog="python -m mosa_fast.info",
        description="What is here: versions, devices, backends. With a run's options: the weights that it trains.",
        epilog="Other options are those of mosa_fast.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", help="recipe of a run, or its name as in fgvc/cub")
    options, others = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors():
        if options.config is None and not others:
            print(describe())
            return
        from mosa_fast.run_options import parse_options  # with packages that the report on a machine does without

        recipes = [word for recipe in options.config or () for word in ("--config", recipe)]
        print(weights(parse_options([*recipes, *others], "info", parser.description or "")))


if __name__ == "__main__":
    main()
