"""Where a run's numbers go while it runs: the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from mosa_fast.run_folder import RunFolder
from mosa_fast.training.position import Position

LINE_SECONDS = 60.0  # without a terminal: between epochs, a line at most so often


class Progress:
    """A bar on a terminal; elsewhere plain lines, which a log file can hold.

    Args:
        position: of the run, as it begins or is resumed.
        enabled: False: nothing is shown.
    """

    def __init__(self, position: Position, *, enabled: bool) -> None:
        self.position, self.first_step, self.enabled = position, position.steps, enabled
        shown = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=position.total_steps, initial=position.steps, unit="step") if shown else None
        self.start = self.last_line = time.perf_counter()
        self._last_read, self._speed = (self.start, position.steps), 0

    def images_per_second(self) -> int:
        """Over all processes, since the step at which this was last asked."""
        (then, before), (now, steps) = self._last_read, (time.perf_counter(), self.position.steps)
        if steps > before:
            self._speed = round((steps - before) * self.position.batch_size / max(now - then, 1e-9))
            self._last_read = now, steps
        return self._speed

    def update(self, numbers: dict[str, str], *, epoch_end: bool = False) -> None:
        """Show where the run is."""
        step, steps = self.position.steps, self.position.total_steps
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(numbers, refresh=False)
            return
        now = time.perf_counter()
        if self.enabled and (epoch_end or now - self.last_line >= LINE_SECONDS):
            self.last_line = now
            left = (now - self.start) / max(1, step - self.first_step) * (steps - step)
            shown = "  ".join(f"{name} {value}" for name, value in numbers.items())
            eta = timedelta(seconds=round(left))
            print(f"step {step}/{steps}  {shown}  ETA {eta}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class Loggers:
    """TensorBoard where its package is installed, and Weights & Biases where it is asked for.

    Args:
        folder: of the run.
        config: of the run, nested as the dataclasses are.
        position: of the run, as it begins or is resumed.
        enabled: False: nothing is logged.

    Raises:
        ValueError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], position: Position, *, enabled: bool) -> None:
        self.position = position
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not enabled:
            return
        if config["wandb"] is not None:
            try:
                import wandb
            except ImportError:
                raise ValueError("wandb is not installed: pip install wandb, or leave the option out") from None
            # The folder names the run, so that a resumed one goes on in the same place.
            name = "-".join(folder.path.resolve().parts[-2:])
            self.wandb = wandb.init(
                project=config["wandb"], dir=str(folder), id=name, name=name, resume="allow", config=config
            )
        if config["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=position.steps)

    def add(self, numbers: dict[str, float]) -> None:
        """Log numbers at the run's position."""
        step = self.position.steps
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """Write out what is pending."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
