"""Where a run's numbers go while it runs: the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mosa_fast.run_folder import RunFolder
from mosa_fast.training.position import Position

LINE_SECONDS = 60.0  # without a terminal: between epochs, a line at most so often


class Speedometer:
    """Images a second over all processes, in steps alone, since the step at which it was last read."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self._then, self._speed = (position.steps, position.training_seconds), 0

    def read(self) -> int:
        """The speed; where no step was taken since, the one read then (0: there was none)."""
        (steps, seconds), now = self._then, (self.position.steps, self.position.training_seconds)
        if now[0] > steps:
            self._speed = round((now[0] - steps) * self.position.images_per_step / max(now[1] - seconds, 1e-9))
            self._then = now
        return self._speed


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
        self.speed = Speedometer(position)

    def update(self, numbers: dict[str, str], *, epoch_end: bool = False) -> None:
        """Show where the run is, these numbers, and the speed since this was last shown."""
        step, steps = self.position.steps, self.position.total_steps
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(numbers | {"images/s": str(self.speed.read())}, refresh=False)
            return
        now = time.perf_counter()
        if self.enabled and (epoch_end or now - self.last_line >= LINE_SECONDS):
            self.last_line = now
            left = (now - self.start) / max(1, step - self.first_step) * (steps - step)
            numbers = numbers | {"images/s": str(self.speed.read())}
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
        folder: of the run; its configuration is written.
        config: of the run, nested as the dataclasses are.
        position: of the run, as it begins or is resumed.
        enabled: False: nothing is logged.

    Raises:
        ValueError: Weights & Biases is asked for and does not begin a run.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any], position: Position, *, enabled: bool) -> None:
        self.position, self.speed = position, Speedometer(position)
        self.tensorboard: Any = None
        self.wandb: Any = None
        if not enabled:
            return
        if config["wandb"] is not None:
            import wandb

            identity = folder.wandb_id()
            try:
                self.wandb = wandb.init(
                    project=config["wandb"],
                    dir=str(folder),
                    id=identity,  # a resumed run goes on in the same place
                    name="-".join(folder.path.resolve().parts[-2:]),
                    resume="allow",
                    config=config,
                )
            except Exception as error:  # of many kinds, not all of them public: nobody is logged in, nothing answers
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"Weights & Biases cannot be logged to: {reason}") from None
        if config["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=position.steps)
            # Indented, Markdown shows it as it is.
            text = "".join(f"    {line}\n" for line in folder.config.read_text(encoding="utf-8").splitlines())
            self.tensorboard.add_text("configuration", text, position.steps)

    def add(self, numbers: dict[str, float]) -> None:
        """Log numbers at the run's position."""
        step = self.position.steps
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def add_running(self, numbers: dict[str, float]) -> None:
        """Log numbers in the middle of an epoch, with the speed since this was last done."""
        self.add(numbers | {"images_per_second": self.speed.read()})

    def add_pictures(self, *paths: Path) -> None:
        """Log PNG files to TensorBoard, by their names."""
        for path in paths if self.tensorboard is not None else ():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self.tensorboard.add_image(path.stem, pixels, self.position.steps, dataformats="HWC")

    def close(self) -> None:
        """Write out what is pending."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
