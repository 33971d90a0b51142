"""The training loop: from a configuration to a report, through any number of interruptions."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mosa_fast.adapters.adapter_file import load_trained_state, save_adapter, trained_state
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.backbones.create import check_adaptable, input_size
from mosa_fast.config import LossConfig, TrainConfig
from mosa_fast.data.loading import StepSampler, batches, evaluation_loader, train_loader
from mosa_fast.files import write_atomically
from mosa_fast.training.checkpoint import last_checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from mosa_fast.training.data import load_run_data
from mosa_fast.training.distributed import Ranks, join_ranks, rank_slice
from mosa_fast.training.evaluation import BATCH_FACTOR, EvaluationStopped, evaluate
from mosa_fast.training.loggers import Loggers, Progress
from mosa_fast.training.losses import class_weights
from mosa_fast.training.model import build_model, count_trained
from mosa_fast.training.optim import make_optimizer, make_schedule
from mosa_fast.training.precision import store_frozen
from mosa_fast.training.report import (
    MetricsLog,
    closing_table,
    plot_curves,
    read_summary,
    versions,
    write_run,
    write_summary,
)
from mosa_fast.training.signals import Interrupted, StopSignals
from mosa_fast.training.step import GraphedStep, Objective, TrainStep


def train(config: TrainConfig, *, progress: bool = True, resume: bool = False) -> dict[str, Any]:
    """Run a training from data to report.

    The epoch with the best validation accuracy is selected, the last one where there are no validation images
    (data.mode final); test is evaluated once, after the last epoch, for the selected weights and for the last ones.

    Args:
        config: the run.
        progress: show a bar or lines (standard error) and the closing table (standard output).
        resume: go on from the last checkpoint in `config.out`; start anew where there is none, and do nothing where
            the run is finished.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: the configuration, the data, the model or the checkpoint do not fit together, or training diverges.
        OSError: a file cannot be written.
        Interrupted: SIGTERM or SIGINT came; the run has saved itself.
    """
    out = Path(config.out)
    checkpoint, finished = last_checkpoint(out), (out / "summary.json").is_file()
    if resume and finished:
        return read_summary(out / "summary.json")
    if checkpoint is not None and not finished and not resume:
        raise ValueError(f"{out} holds an unfinished run: go on with --resume, or choose another folder with --out")
    with join_ranks(config.device) as ranks, StopSignals() as stop:
        run = Run(config, ranks, stop, progress=progress and ranks.is_first)
        run.start(checkpoint if resume else None)
        for epoch in range(run.epochs_done + 1, config.optim.epochs + 1):
            run.train_epoch(epoch)
            run.finish_epoch(epoch)
            if run.patience_is_over:
                break
        return run.finish()


class Run:
    """A run's parts and its position; `train` above says in which order the methods are called."""

    def __init__(self, config: TrainConfig, ranks: Ranks, stop: StopSignals, *, progress: bool) -> None:
        """Data, model, optimizer and step, as the configuration describes them."""
        self.config, self.ranks, self.stop, self.progress = config, ranks, stop, progress
        self.out = Path(config.out)
        device, optim = ranks.device, config.optim
        if config.cuda_graphs and (device.type != "cuda" or ranks.world > 1):
            raise ValueError(f"cuda_graphs needs one GPU, this run has {ranks.world} process(es) on {device.type}")
        if config.method == "mosa":
            check_adaptable(config.model)  # before any data is read
        if config.data.image_size is None:
            config.data.image_size = input_size(config.model)
        self.splits = load_run_data(config)
        self.images = len(self.splits.train_labels)

        self.model: Any = build_model(config, len(self.splits.classes))
        store_frozen(self.model, config.precision)
        self.model.to(device).train()
        self.model.set_grad_checkpointing(config.grad_checkpointing)

        self.batch_size = optim.batch_size * ranks.world
        self.share = partial(rank_slice, rank=ranks.rank, world=ranks.world)
        pin = device.type == "cuda"
        self.train_loader = train_loader(
            self.splits.train, self.batch_size, config.seed, workers=config.data.workers, pin=pin, share=self.share
        )
        self.steps_per_epoch = len(self.train_loader)
        self.steps = optim.epochs * self.steps_per_epoch

        self.optimizer = make_optimizer(
            self.model, optim.lr, optim.weight_decay, optim.optimizer, graphed=config.cuda_graphs
        )
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        self.schedule = make_schedule(self.optimizer, self.steps, warmup)
        self.step = self._make_step()
        self.take_step = GraphedStep(self.step) if config.cuda_graphs else self.step

        self.epochs_done = 0
        self.best: dict[str, Any] = {"val_accuracy": -1.0, "epoch": 0}
        self.best_weights: dict[str, Tensor] = {}
        self.validations_since_best = 0
        self.seconds_before = 0.0
        self.begin = time.perf_counter()

    def start(self, checkpoint: Path | None) -> None:
        """Begin at the beginning, or where the checkpoint is."""
        rows: list[dict[str, Any]] = []
        if checkpoint is not None:
            rows = self._load(checkpoint)
            self._say(f"resumed {self.out} at step {self.step.steps_taken} of {self.steps}")
        elif self.ranks.is_first:
            (self.out / "summary.json").unlink(missing_ok=True)  # of the run that was in this folder before
            remove_checkpoints(self.out)
        if self.ranks.is_first:
            self.log = MetricsLog(self.out / "metrics.jsonl", rows)
            write_run(self.out, asdict(self.config), self.splits.classes)
            self.loggers = Loggers(self.out, asdict(self.config), self.step.steps_taken)
        self.bar = Progress(self.steps, self.step.steps_taken, enabled=self.progress)
        self.last_read = time.perf_counter(), self.step.steps_taken

    def train_epoch(self, epoch: int) -> None:
        """The steps of an epoch, from the current position on."""
        sampler = self.train_loader.batch_sampler
        assert isinstance(sampler, StepSampler)
        first_step = self.step.steps_taken - (epoch - 1) * self.steps_per_epoch
        if first_step == self.steps_per_epoch:
            return  # interrupted between the last step and the end of its epoch
        sampler.set_position(epoch, first_step)
        for images, labels in batches(self.train_loader):
            done = self.step.steps_taken - (epoch - 1) * self.steps_per_epoch
            total = min(self.batch_size, self.images - done * self.batch_size)
            first, last = self.share(total)
            images = images.to(self.ranks.device, non_blocking=True)
            labels = labels.to(self.ranks.device, non_blocking=True)
            self.take_step(images, labels, first, last - first, total)
            step = self.step.steps_taken
            if step % self.config.log_every == 0:
                self._read_numbers()
            if self._stop_asked(step):
                self._leave()
            every = self.config.checkpoint_steps
            if every is not None and step % every == 0 and done + 1 < self.steps_per_epoch:
                self._save()

    def finish_epoch(self, epoch: int) -> None:
        """Validate, log and save."""
        loss, right, seen = self._sums()
        row: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": loss / max(1.0, seen),
            "train_accuracy": 100 * right / max(1.0, seen),
            "lr": float(self.schedule.get_last_lr()[0]),
            "bad_steps": self._check_bad_steps(),
            "seconds": round(self._seconds(), 2),
        }
        last = epoch == self.config.optim.epochs
        if self.splits.val is None:
            if last:
                self._select(epoch, None)
        elif last or epoch % self.config.eval_every == 0:
            row["val_accuracy"] = self._evaluate(self.splits.val)
            self.validations_since_best += 1
            if row["val_accuracy"] > self.best["val_accuracy"]:
                self._select(epoch, row["val_accuracy"])
        self.epochs_done = epoch
        self.step.sums.zero_()
        shown = {"epoch": str(epoch), "loss": f"{row['train_loss']:.3f}", "train": f"{row['train_accuracy']:.1f}%"}
        if self.best["epoch"] and self.splits.val is not None:
            shown["val"] = f"{row.get('val_accuracy', self.best['val_accuracy']):.1f}%"
        shown["images/s"] = self._speed()
        self.bar.update(self.step.steps_taken, shown, epoch_end=True)
        if self.ranks.is_first:
            self.log.add(row)
            self.loggers.add(self.step.steps_taken, {name: value for name, value in row.items() if name != "epoch"})
        if last or self.patience_is_over or epoch % self.config.checkpoint_every == 0:
            self._save()

    @property
    def patience_is_over(self) -> bool:
        """Whether there were enough validations in a row without a better one."""
        return self.config.patience is not None and self.validations_since_best >= self.config.patience

    def finish(self) -> dict[str, Any]:
        """Test, and write what a run leaves."""
        self.bar.close()
        seconds = self._seconds()
        summary: dict[str, Any] = {"val_accuracy": self.best["val_accuracy"]}
        if self.config.test:
            summary["last_test_accuracy"] = self._evaluate(self.splits.test)
        load_trained_state(self.model, self.best_weights, "the selected epoch")
        if self.config.test:
            is_last = self.best["epoch"] == self.epochs_done
            summary["test_accuracy"] = summary["last_test_accuracy"] if is_last else self._evaluate(self.splits.test)
        summary |= {
            "selected_epoch": self.best["epoch"],
            "epochs": self.epochs_done,
            "steps": self.step.steps_taken,
            "bad_steps": self._check_bad_steps(),
            **count_trained(self.model),
            "seconds": round(seconds, 1),
            "device": str(self.ranks.device),
            "processes": self.ranks.world,
            "versions": versions(),
            "config": asdict(self.config),
        }
        if self.ranks.is_first:
            weights_file = save_trained(self.model, self.out)
            plot_curves(self.out / "curves.png", self.log.rows, summary)
            self.loggers.add(
                self.step.steps_taken, {name: summary[name] for name in ("test_accuracy",) if name in summary}
            )
            self.loggers.close()
            write_summary(self.out / "summary.json", summary)
            remove_checkpoints(self.out)
            if self.progress:
                print(closing_table(summary, weights_file))
        self.ranks.barrier()
        return summary

    def _select(self, epoch: int, val_accuracy: float | None) -> None:
        self.best = {"val_accuracy": val_accuracy, "epoch": epoch}
        self.best_weights = {name: t.detach().clone() for name, t in trained_state(self.model).items()}
        self.validations_since_best = 0

    def _make_step(self) -> TrainStep:
        config, device = self.config, self.ranks.device
        weights = class_weights(self.splits.train_labels, len(self.splits.classes), config.loss.class_weights)
        loss = config.loss
        if config.method != "mosa":
            loss = LossConfig(views=1, class_weights=loss.class_weights)
        objective: nn.Module = Objective(self.model, loss, config.precision, weights).to(device)
        if config.compile:
            objective.compile(fullgraph=True)
        if self.ranks.world > 1:
            objective = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
        return TrainStep(
            objective,
            self.optimizer,
            self.schedule,
            seed=config.seed,
            device=device,
            scale_loss=config.precision == "fp16-mixed",
            accumulate=config.optim.accumulate,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )

    def _evaluate(self, dataset: Any) -> float:
        loader = evaluation_loader(
            dataset,
            self.config.optim.batch_size * BATCH_FACTOR,
            workers=self.config.data.workers,
            pin=self.ranks.device.type == "cuda",
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        try:
            return evaluate(self.model, loader, self.ranks, self.config.precision, self.stop)
        except EvaluationStopped:
            self._leave()
            raise

    def _sums(self) -> list[float]:
        return self.ranks.sum(self.step.sums).tolist()

    def _read_numbers(self) -> None:
        loss, right, seen = self._sums()
        self._check_bad_steps()
        speed = self._speed()
        seen = max(1.0, seen)
        shown = {"loss": f"{loss / seen:.3f}", "train": f"{100 * right / seen:.1f}%", "images/s": speed}
        self.bar.update(self.step.steps_taken, shown)
        if self.ranks.is_first:
            rate = float(self.schedule.get_last_lr()[0])
            numbers = {"running_loss": loss / seen, "running_accuracy": 100 * right / seen}
            self.loggers.add(self.step.steps_taken, numbers | {"lr": rate, "images_per_second": float(speed)})

    def _speed(self) -> str:
        """Images per second over all processes since this was last asked."""
        now, steps = time.perf_counter(), self.step.steps_taken
        then, before = self.last_read
        self.last_read = now, steps
        return f"{(steps - before) * self.batch_size / max(now - then, 1e-9):.0f}"

    def _check_bad_steps(self) -> int:
        _, longest, total = self.step.bad.tolist()
        if longest >= self.config.max_bad_steps:
            raise ValueError(
                f"training diverged: the gradients of {longest} steps in a row were not finite (by step "
                f"{self.step.steps_taken}); try a lower optim.lr or a longer warm-up. The last checkpoint is kept"
            )
        return total

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.begin

    def _say(self, message: str) -> None:
        if self.progress:
            print(message, flush=True)

    def _stop_asked(self, step: int) -> bool:
        # Processes must leave at the same step; they look at each other's signals where they meet anyway.
        if self.ranks.world == 1:
            return self.stop.received is not None
        return step % self.config.log_every == 0 and self.ranks.any(self.stop.received is not None)

    def _leave(self) -> None:
        self._save()
        self.bar.close()
        if self.ranks.is_first:
            self.loggers.close()
        where = f"step {self.step.steps_taken} of {self.steps} is saved in {self.out}; go on with --resume"
        raise Interrupted(f"stopped: {where}", self.stop.received or 15)

    def _save(self) -> None:
        if self.ranks.is_first:
            state = {
                "config": asdict(self.config),
                "batch_size": self.batch_size,
                "step": self.step.steps_taken,
                "epochs_done": self.epochs_done,
                "sums": self.step.sums,
                "bad": self.step.bad,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.step.scaler.state_dict(),
                "best": self.best,
                "validations_since_best": self.validations_since_best,
                "rows": self.log.rows,
                "seconds": self._seconds(),
            }
            selected = (self.best["epoch"], self.best_weights) if self.best_weights else None
            save_checkpoint(self.out, self.step.steps_taken, state, self.model, selected)
        self.ranks.barrier()

    def _load(self, path: Path) -> list[dict[str, Any]]:
        state, selected = load_checkpoint(path, self.model, asdict(self.config))
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"{self.out} was started with {state['batch_size']} images a step over all processes, not "
                f"{self.batch_size}: resume it with as many processes, or change optim.batch_size to match"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.step.set_steps(state["step"])
        self.step.sums.copy_(state["sums"])
        self.step.bad.copy_(state["bad"])
        self.epochs_done, self.best = state["epochs_done"], state["best"]
        self.best_weights = {name: tensor.to(self.ranks.device) for name, tensor in selected.items()}
        self.validations_since_best = state["validations_since_best"]
        self.seconds_before = state["seconds"]
        return state["rows"]


def save_trained(model: nn.Module, out: Path) -> Path:
    """Write what was trained: adapter.safetensors for adapters, model.safetensors for other methods."""
    if isinstance(model, AdaptedModel):
        save_adapter(model, out / "adapter.safetensors")
        return out / "adapter.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_atomically(out / "model.safetensors", lambda temporary: save_file(tensors, temporary))
    return out / "model.safetensors"
