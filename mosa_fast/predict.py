"""`python -m mosa_fast.predict --run DIR IMAGES...`: the most probable classes of images, by name."""

from __future__ import annotations

import argparse

from mosa_fast.command_line import one_line_errors, read_run
from mosa_fast.config import TrainConfig
from mosa_fast.run_folder import RunFolder


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each image: its name, then classes with their probabilities."""
    parser = argparse.ArgumentParser(prog="python -m mosa_fast.predict", description=__doc__.split(": ")[-1])
    parser.add_argument("--run", type=RunFolder, required=True, help="folder of a finished run (its --out)")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files")
    parser.add_argument("--top", type=int, default=5, help="classes to print for each image (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: as in the run)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.top < 1:
            raise ValueError(f"--top must be at least 1, got {options.top}")
        config, classes = read_run(options.run)
        config.device = options.device or config.device
        for image, ranking in predict(options.run, config, classes, options.images, options.top):
            print(f"{image}  " + "  ".join(f"{name} {100 * p:.1f}%" for name, p in ranking))


def predict(
    folder: RunFolder, config: TrainConfig, classes: list[str], images: list[str], top: int
) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each image file its most probable classes and their probabilities, best first.

    Raises:
        ValueError: an image cannot be read (it is named), or the run is not finished.
    """
    import torch
    from PIL import Image

    from mosa_fast.data.loading import UNREADABLE
    from mosa_fast.data.transforms import evaluation_transform
    from mosa_fast.training.distributed import pick_device
    from mosa_fast.training.finished_run import load_run_model
    from mosa_fast.training.precision import autocast, input_dtype
    from mosa_fast.training.run_data import preprocessing_of_run

    device = pick_device(config.device)
    transform = evaluation_transform(preprocessing_of_run(config))
    model = load_run_model(folder, config, classes).to(device)
    results = []
    for path in images:
        try:
            with Image.open(path) as image:
                pixels = transform(image.convert("RGB"))
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
        with torch.no_grad(), autocast(config.precision, device):
            logits = model(pixels[None].to(device, input_dtype(config.precision)))
        best = logits[0].float().softmax(0).topk(min(top, len(classes)))
        ranking = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        results.append((path, [(classes[label], probability) for probability, label in ranking]))
    return results


if __name__ == "__main__":
    main()
