"""One run at a time in a folder (docs/training.md, One run in a folder)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from mosa_fast.run_folder import RunFolder

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # what file systems without locks answer

_held: set[Path] = set()  # by this process, which the system lets lock a file twice


@contextmanager
def lock_folder(folder: RunFolder) -> Iterator[None]:
    """Hold a run's folder, which is made where it is missing.

    The lock is POSIX's: forked loaders of images do not inherit it, so that it ends with the process that holds it,
    however that dies; it counts for all machines that share the folder, where the file system has locks.

    Raises:
        ValueError: another run holds it; the message names the process.
        OSError: the folder cannot be written to.
    """
    is_new = not folder.path.is_dir()
    path = folder.lock.resolve()
    if path in _held:
        raise ValueError(_refusal(folder, f"this process, {os.getpid()}"))
    file = _acquire(folder)
    _held.add(path)
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}))
        file.flush()
        yield
    finally:
        _held.discard(path)
        folder.lock.unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.path.rmdir()


def _acquire(folder: RunFolder) -> TextIO:
    """The file of the lock, locked and empty."""
    while True:
        folder.path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder was removed since, by the run that had made it
            file = folder.lock.open("a+", encoding="utf-8")  # "w" would wipe out who holds it
            try:
                _lock(folder, file)
                # Whoever held it may have removed the file between our opening and our locking it. (By stat: to close
                # a second descriptor would end the lock.)
                if os.path.samestat(os.fstat(file.fileno()), folder.lock.stat()):
                    file.truncate(0)
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


def _lock(folder: RunFolder, file: TextIO) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(
                f"note: the file system of {folder} has no locks: see to it that no other run writes there",
                file=sys.stderr,
                flush=True,
            )
        elif error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(_refusal(folder, _holder(file))) from None
        else:
            raise


def _refusal(folder: RunFolder, holder: str) -> str:
    return f"{folder} is in use by {holder}: wait for it, stop it, or choose another folder with --out"


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"  # it has the lock and has not yet said who it is
