"""`python -m mosa_fast.export --run DIR --format NAME --out PATH`: a finished run for programs without this package."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mosa_fast.command_line import CommandParser, check_packages, one_line_errors, user_path
from mosa_fast.files import write_atomically, write_folder_atomically
from mosa_fast.formats import FORMATS
from mosa_fast.run_folder import RunFolder

if TYPE_CHECKING:
    from mosa_fast.training.finished_run import FinishedRun

TOLERANCE = 1e-3  # of the largest logit; what a ViT-B/16 is exported to differs by 2e-6, by the rounding of float32
BATCHES = (1, 3)  # images that the exported model is compared on


class Exported(NamedTuple):
    """What an export came to.

    Attributes:
        merged_because: why it was merged and not folded; None: it has no adapters any more.
        difference: largest difference of a logit from the run's own, in float32.
        largest: absolute value of a logit.
    """

    merged_because: str | None
    difference: float
    largest: float


def main(arguments: list[str] | None = None) -> None:
    """Export a run and print how far the result is from it."""
    parser = CommandParser(
        prog="python -m mosa_fast.export",
        description="Write a finished run as a model that runs without this package, with classes and preprocessing.",
        epilog="Adapters are folded into the model where that is exact, else merged (torch-export, onnx). What is "
        "written is opened again and compared with the run's model, in float32.",
    )
    parser.add_argument("--run", type=RunFolder, required=True, help="folder of a finished run (its --out)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="timm: a folder for timm.create_model('local-dir:PATH', pretrained=True); torch-export: a .pt2 file for "
        "torch.export.load; onnx: an ONNX file",
    )
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="PATH", help="what to write; an earlier export is replaced"
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        check_packages()
        from mosa_fast.training.finished_run import open_run

        done = export_run(open_run(options.run, "cpu"), options.format, options.out)
        print(f"{options.run} is exported to {options.out}, for images of any number, in float32")
        if done.merged_because is not None:
            print(f"merged, not folded: {done.merged_because}")
        print(f"largest difference from the run's logits: {done.difference:.1e} (of logits up to {done.largest:.1f})")


def export_run(run: FinishedRun, format: str, out: Path) -> Exported:
    """Write a run's model and compare what was written with it.

    Args:
        run: on the CPU.
        format: one of FORMATS.
        out: the file or folder; an earlier export of the same format is replaced.

    Raises:
        ValueError: there is something else at `out`, or in the folder there, the format cannot hold the model, or the
            difference is greater than the tolerance; nothing is written then.
    """
    import torch

    from mosa_fast.formats.plain_model import plain_model
    from mosa_fast.ops.backends import backend

    form = importlib.import_module(f"mosa_fast.formats.{FORMATS[format]}")
    if os.path.lexists(out) and not form.is_export(out):
        raise ValueError(f"{out} is there already and is no earlier export as {format}: choose another --out")
    # Frozen weights that the run stored in half precision keep their values.
    model: Any = run.load_model().float()
    generator = torch.Generator().manual_seed(0)
    size = run.preprocessing.image_size
    images = [torch.randn(count, 3, size, size, generator=generator) for count in BATCHES]
    with torch.no_grad(), backend("reference"):
        expected = [model(batch) for batch in images]
    largest = max(logits.abs().max().item() for logits in expected)
    plain = plain_model(model, run.classes, run.preprocessing)
    form.check(plain)
    differences: list[float] = []

    def write_and_compare(path: Path) -> None:
        form.write(plain, path)
        written = form.read(path)
        with torch.no_grad():
            differences.extend((written(x) - y).abs().max().item() for x, y in zip(images, expected, strict=True))
        if not all(difference <= TOLERANCE * max(1.0, largest) for difference in differences):
            far = f"{max(differences):.2g} (of logits up to {largest:.2g})"
            raise ValueError(f"the exported model's logits differ from the run's by {far}")

    (write_folder_atomically if form.IS_FOLDER else write_atomically)(out, write_and_compare)
    return Exported(plain.merged_because, max(differences), largest)


if __name__ == "__main__":
    main()
