"""The folder of a run: what its files are called, who writes them and who reads them. No other module names them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from mosa_fast.files import write_text


class RunFolder:
    """Paths of a run's files, and the plain text ones' contents.

    Args:
        path: the folder (`--out` of the run, `--run` afterwards), with ~ for somebody's home; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration, itself a recipe. Written when a run starts; read by run_options."""
        return self.path / "config.yaml"

    @property
    def classes(self) -> Path:
        """Names of the classes, by label. Written when a run starts; read by run_options."""
        return self.path / "classes.json"

    @property
    def metrics(self) -> Path:
        """A line an epoch. Written by training.report.MetricsLog; read by people."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files. Written by training.loggers; read by TensorBoard."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The run's id at Weights & Biases. Written and read by `wandb_id`."""
        return self.path / "wandb.id"

    @property
    def checkpoints(self) -> Path:
        """Folder of what an unfinished run goes on from. Written and read by training.checkpoint."""
        return self.path / "checkpoint"

    def checkpoint(self, step: int) -> Path:
        """State of everything but the model after so many steps."""
        return self.checkpoints / f"step-{step:09d}.pt"

    def checkpoint_weights(self, step: int) -> Path:
        """Trained weights of the model after so many steps."""
        return self.checkpoints / f"step-{step:09d}.safetensors"

    def pending_weights(self, step: int) -> Path:
        """The same until the state is there; whatever the process dies of, no weights lose their state by it."""
        return self.checkpoints / f"step-{step:09d}.safetensors.pending"

    @property
    def lock(self) -> Path:
        """Who writes to the folder. Held, written and, at a run's end, removed by run_lock."""
        return self.path / "lock"

    @property
    def adapter(self) -> Path:
        """Adapters and head of the selected epoch. Written at the end; read by training.finished_run, load_adapter."""
        return self.path / "adapter.safetensors"

    @property
    def model(self) -> Path:
        """Where a method has no adapters, what it trained. Written at a run's end; read by training.finished_run."""
        return self.path / "model.safetensors"

    @property
    def curves(self) -> Path:
        """Loss and accuracy over the epochs. Written by training.pictures; read by people."""
        return self.path / "curves.png"

    @property
    def confusion(self) -> Path:
        """Which class is taken for which, of the test images. Written by training.pictures; read by people."""
        return self.path / "confusion.png"

    @property
    def summary(self) -> Path:
        """All numbers of a run. Written last, so that it tells that a run is done; read by the sweep and by people."""
        return self.path / "summary.json"

    @property
    def sweep(self) -> Path:
        """What a sweep asked this run to do. Written and read by the sweep."""
        return self.path / "sweep.json"

    @property
    def results(self) -> tuple[Path, ...]:
        """What a run that came to its end has left of itself, beside its lines of epochs; the summary first."""
        return self.summary, self.adapter, self.model, self.curves, self.confusion

    @property
    def is_finished(self) -> bool:
        """Whether the run in this folder came to its end."""
        return self.summary.is_file()

    @property
    def is_unfinished(self) -> bool:
        """Whether a run began in this folder and has not come to its end."""
        return self.config.is_file() and not self.is_finished

    @property
    def holds_a_run(self) -> bool:
        """Whether there is anything to lose: a finished run, or checkpoints of one."""
        return self.is_finished or any(self.checkpoints.glob("*"))

    def last_checkpoint(self) -> int | None:
        """Steps of the last complete checkpoint, or None."""
        return max(self._steps("pt"), default=None)

    def lost_checkpoint(self) -> int | None:
        """Steps of weights that are later than the last complete checkpoint: somebody lost their state. Or None."""
        weights, last = max(self._steps("safetensors"), default=-1), self.last_checkpoint()
        return weights if weights > (-1 if last is None else last) else None

    def _steps(self, suffix: str) -> list[int]:
        found = (re.fullmatch(rf"step-(\d+)\.{suffix}", path.name) for path in self.checkpoints.glob("*"))
        return [int(match[1]) for match in found if match]

    def start_anew(self) -> None:
        """Forget that a run was here before: nothing of it is to be taken for the new one's."""
        for path in (*self.results, self.wandb):
            path.unlink(missing_ok=True)
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        """Remove what only an unfinished run needs: all of it, or nothing where the process dies."""
        discarded = self.path / ".checkpoint.discarded"
        shutil.rmtree(discarded, ignore_errors=True)
        if self.checkpoints.is_dir():
            self.checkpoints.replace(discarded)
            shutil.rmtree(discarded, ignore_errors=True)

    def wandb_id(self) -> str:
        """What the run in this folder is known by at Weights & Biases: random, and the same when it is resumed."""
        if not self.wandb.is_file():
            write_text(self.wandb, uuid4().hex + "\n")
        return self.wandb.read_text(encoding="utf-8").strip()

    def write_config(self, config: dict[str, Any]) -> None:
        """Keep the resolved configuration."""
        import yaml

        write_text(self.config, yaml.safe_dump(config, sort_keys=False))

    def write_classes(self, classes: list[str]) -> None:
        """Keep the names of the classes."""
        write_text(self.classes, json.dumps(classes, indent=0, ensure_ascii=False) + "\n")

    def read_classes(self) -> list[str]:
        """The inverse of `write_classes`.

        Raises:
            ValueError: it is not such a file.
        """
        classes = _read_json(self.classes)
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{self.classes} cannot be read: it is no list of names")
        return classes

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep all numbers of a run."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The inverse of `write_summary`.

        Raises:
            ValueError: it is not such a file.
        """
        return _read_mapping(self.summary)

    def write_sweep(self, identity: dict[str, Any]) -> None:
        """Keep what a sweep asks for."""
        write_text(self.sweep, json.dumps(identity, indent=2) + "\n")

    def read_sweep(self) -> dict[str, Any]:
        """The inverse of `write_sweep`; it raises what `read_summary` does."""
        return _read_mapping(self.sweep)


def _read_mapping(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it is no mapping")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
