"""What a run finds in its folder, and whether it may start or go on there."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from mosa_fast.config import TrainConfig
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.checkpoint import changes


def finished_summary(folder: RunFolder, config: TrainConfig, *, resume: bool) -> dict[str, Any] | None:
    """The summary of the run that is finished in a folder; None where none is.

    Args:
        folder: of the run.
        config: of the run that is asked for, with its image size.
        resume: a finished run with the same options is what is asked for.

    Raises:
        ValueError: it must not be replaced, or is not the run that is asked for.
    """
    if not folder.is_finished:
        return None
    if not resume:
        day = datetime.fromtimestamp(folder.summary.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        raise ValueError(
            f"{folder} holds a finished run, of {day}: choose another folder with --out, or replace it with --overwrite"
        )
    summary = folder.read_summary()
    if not isinstance(summary.get("config"), dict):
        raise ValueError(f"{folder.summary} cannot be read: it has no config; replace the run with --overwrite")
    for name, (then, now) in changes(summary["config"], asdict(config)).items():
        more = " (the learning rate came to its end with the last epoch)" if name == "optim.epochs" else ""
        raise ValueError(
            f"{folder} holds a finished run with {name} {then}, not {now}{more}: choose another folder with --out, or "
            "replace it with --overwrite"
        )
    return summary


def checkpoint_to_resume(folder: RunFolder, *, resume: bool) -> int | None:
    """Steps of the checkpoint that a run goes on from; None where there is none. The folder is locked.

    Raises:
        ValueError: there is one, and the run is not to be resumed; or a part of it is lost.
    """
    lost = folder.lost_checkpoint()
    if lost is not None:
        raise ValueError(
            f"{folder.checkpoint_weights(lost)} is without {folder.checkpoint(lost).name}, which the run cannot go on "
            "without: put that back, or start anew with --overwrite"
        )
    last = folder.last_checkpoint()
    if last is not None and not resume:
        raise ValueError(
            f"{folder} holds an unfinished run: go on with --resume, choose another folder with --out, or replace it "
            "with --overwrite"
        )
    return last
