"""Image files: which there are, and from any of them to RGB.

Training, evaluation, prediction and the data check all read images here, so that one file is one image everywhere
(docs/data.md, Images).
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# What Pillow's decoders raise for files that are not, or not quite, images.
UNREADABLE = (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # what makes a picture upright, by its EXIF orientation (1 is upright)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations in which width and height change places
_FULL_16_BIT = 65535


def read_image(source: str | Path | BinaryIO) -> Image.Image:
    """An image file as 8-bit RGB.

    The first picture of an animation; turned as its EXIF orientation says; 16-bit grey divided by 257, so that white
    stays white; anything else (palette, grey, alpha, CMYK) as Pillow converts it, which leaves alpha out.

    Raises:
        OSError, ValueError, ...: one of `UNREADABLE`; the file is missing, is none of the regular kind (a pipe would
            be waited for), or does not hold an image whose range is known.
    """
    with _open(source) as image:
        try:
            return to_rgb(image)
        except UNREADABLE:
            raise
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise ValueError(f"{type(error).__name__}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """What `read_image` does to the opened image."""
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        # Pillow's exif_transpose would also write the EXIF data anew, and fails where they are odd.
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("images of floating-point numbers have no known range: convert them to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= _FULL_16_BIT:
            raise ValueError("32-bit grey images have no known range: convert them to 8 or 16 bits")
        image = Image.fromarray(((grey * 255 + _FULL_16_BIT // 2) // _FULL_16_BIT).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def image_size(source: str | Path | BinaryIO) -> tuple[int, int]:
    """Width and height of what `read_image` gives, from the file's header; the same errors."""
    with _open(source) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def read_bytes(path: str | Path) -> bytes:
    """The contents of a regular file; OSError or ValueError where it is none."""
    _check_regular(path)
    return Path(path).read_bytes()


def find_files(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Everything below a folder that is no folder: its own by name, then its folders'; not what begins with a dot.

    Pipes and links to nothing are among them, for `read_image` to refuse. Links are followed, but
    not back to a folder that they are in.

    Args:
        folder: where to look.
        onerror: is called with the error of a folder that cannot be listed; None: the error is raised.
    """
    above = tuple(_identity(parent) for parent in folder.resolve().parents)
    yield from _find(folder, above, onerror)


def is_image_name(name: str | Path) -> bool:
    """Whether a file is an image by the end of its name."""
    return str(name).lower().endswith(SUFFIXES)


def _find(
    folder: Path, above: tuple[tuple[int, int], ...], onerror: Callable[[OSError], None] | None
) -> Iterator[Path]:
    try:
        here = _identity(folder)
        entries = sorted(folder.iterdir())
    except OSError as error:
        if onerror is None:
            raise
        return onerror(error)
    if here in above:
        return
    yield from (path for path in entries if not path.is_dir() and not path.name.startswith("."))
    for path in entries:
        if path.is_dir() and not path.name.startswith("."):
            yield from _find(path, (*above, here), onerror)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _open(source: str | Path | BinaryIO) -> Image.Image:
    if isinstance(source, (str, Path)):
        _check_regular(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Corrupt EXIF data")
        return Image.open(source)


def _check_regular(path: str | Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")


def _orientation(image: Image.Image) -> Any:
    """What EXIF says; 1, upright, where there is none, or where it is damaged: that makes no image unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
