"""Where a run's numbers go while it runs: the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # without a terminal: between epochs, a line at most so often


class Progress:
    """A bar on a terminal; elsewhere plain lines, which a log file can hold.

    Args:
        steps: of the whole run.
        first_step: steps taken before, by the run that this one resumes.
        enabled: False: nothing is shown.
    """

    def __init__(self, steps: int, first_step: int, *, enabled: bool) -> None:
        self.steps, self.first_step, self.enabled = steps, first_step, enabled
        self.bar = tqdm(total=steps, initial=first_step, unit="step") if enabled and sys.stderr.isatty() else None
        self.start = self.last_line = time.perf_counter()

    def update(self, step: int, numbers: dict[str, str], *, epoch_end: bool = False) -> None:
        """Show where the run is."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(numbers, refresh=False)
            return
        now = time.perf_counter()
        if self.enabled and (epoch_end or now - self.last_line >= LINE_SECONDS):
            self.last_line = now
            left = (now - self.start) / max(1, step - self.first_step) * (self.steps - step)
            shown = "  ".join(f"{name} {value}" for name, value in numbers.items())
            eta = timedelta(seconds=round(left))
            print(f"step {step}/{self.steps}  {shown}  ETA {eta}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class Loggers:
    """TensorBoard where its package is installed, and Weights & Biases where it is asked for.

    Raises:
        ValueError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, out: Path, config: dict[str, Any], first_step: int) -> None:
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config["wandb"] is not None:
            try:
                import wandb
            except ImportError:
                raise ValueError("wandb is not installed: pip install wandb, or leave the option out") from None
            # The folder names the run, so that a resumed one goes on in the same place.
            name = "-".join(out.resolve().parts[-2:])
            self.wandb = wandb.init(
                project=config["wandb"], dir=str(out), id=name, name=name, resume="allow", config=config
            )
        if config["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers at a step."""
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
