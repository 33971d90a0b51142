"""What must not be in a folder of images: things that a reader would wait for without end."""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS


def check_tree(folder: Path) -> None:
    """Look through a folder of images as its reader will, links followed.

    Raises:
        ValueError: a link leads back to a folder above it, or something called an image is no file (a pipe, a socket).
    """
    _check(str(folder), (os.path.realpath(folder),))


def _check(folder: str, above: tuple[str, ...]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in above:
                    raise ValueError(f"{entry.path} leads back to {real}, a folder that it is in: remove the link")
                _check(entry.path, (*above, real))
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.is_file() and os.path.exists(entry.path):
                raise ValueError(f"{entry.path} is called an image and is no file")
