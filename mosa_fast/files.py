"""Writing files so that a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, force it to the disk, and rename it to `path`.

    The file has the permissions of any new file of this process. A symbolic link stays one: its target is written.

    Raises:
        ValueError: there is something at `path` that is not a regular file, as a folder, a pipe or a device.
        OSError: it cannot be written, as on a full disk; the file that was there is still there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file, and is not written over")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        try:
            write(temporary)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from None
        temporary.chmod(permissions)  # safetensors puts a file of its own there, which only its owner can read
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
