"""Data sets, one file per family."""

from __future__ import annotations

from mosa_fast.config import DataConfig, check_choice
from mosa_fast.data.splits import Splits

FAMILIES = ("digits", "folder")


def load_data(config: DataConfig, image_size: int, seed: int) -> Splits:
    """The data set that a configuration names.

    Args:
        config: the data section of a run.
        image_size: side of the images in pixels.
        seed: of every random split.

    Raises:
        ValueError: the name is unknown, or files are missing or do not fit.
    """
    check_choice("data.name", config.name, FAMILIES)
    if config.name == "digits":
        from mosa_fast.data.digits import load_digits

        return load_digits(config.shots, image_size, seed)
    from mosa_fast.data.folder import load_folder

    return load_folder(config.root, image_size, config.val_fraction, seed)
