"""Writing files so that a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import errno
import os
import shutil
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
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary folder of files beside `path`, force it to the disk, and rename it to `path`.

    A folder that is at `path` is replaced; a crash at that very moment leaves it beside the new one's place. A symbolic
    link stays one: the folder that it leads to is replaced.

    Raises:
        ValueError: the folder at `path` has entries that the new one has not, which would be lost; it stays as it is.
        OSError: it cannot be written; the folder that was there is still there.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        write(temporary)
        for entry in (*temporary.iterdir(), temporary):
            _sync(entry)
        if path.exists():
            lost = sorted(
                entry.name for entry in path.iterdir() if entry.is_dir() or not (temporary / entry.name).exists()
            )
            if lost:
                raise ValueError(f"{path} is not replaced: what else is in it would be lost ({', '.join(lost)})")
            path.replace(old)
        temporary.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
