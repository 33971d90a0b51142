"""A training, from a configuration to a report, through any number of interruptions."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mosa_fast.adapters.adapter_file import load_trained_state
from mosa_fast.adapters.metadata import versions
from mosa_fast.backbones.create import input_size
from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import TrainConfig
from mosa_fast.data.fingerprint import DataFingerprint
from mosa_fast.data.loading import batches, evaluation_loader, train_loader
from mosa_fast.data.mixing import Mixing
from mosa_fast.methods import METHODS
from mosa_fast.run_folder import RunFolder
from mosa_fast.run_lock import lock_folder
from mosa_fast.training.checkpoint import Checkpoints
from mosa_fast.training.checks import check_backend, check_loggers, print_notes
from mosa_fast.training.distributed import join_ranks
from mosa_fast.training.evaluation import BATCH_FACTOR, Scores, evaluate
from mosa_fast.training.finished_run import save_trained, weights_file
from mosa_fast.training.folder_state import checkpoint_to_resume, finished_summary
from mosa_fast.training.loggers import Loggers, Progress
from mosa_fast.training.losses import class_weights
from mosa_fast.training.model import build_model, check_model, count_trained
from mosa_fast.training.optim import make_optimizer, make_schedule
from mosa_fast.training.pictures import plot_confusion, plot_curves
from mosa_fast.training.position import Position
from mosa_fast.training.precision import store_frozen
from mosa_fast.training.report import MetricsLog, class_table, closing_table, opening_table
from mosa_fast.training.run_data import load_run_data, preprocessing_of_run
from mosa_fast.training.selection import Selection
from mosa_fast.training.signals import Interrupted, StopAsked, StopSignals
from mosa_fast.training.step import GraphedStep, Objective, TrainStep


def train(
    config: TrainConfig, *, progress: bool = True, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Run a training from data to report.

    The epoch with the best validation accuracy is selected, the last one where there are no validation images
    (data.mode final); test is evaluated once, after the last epoch, for the selected weights and for the last ones.

    Args:
        config: the run; `data.image_size` is set where it was None.
        progress: show a bar or lines (standard error) and the closing table (standard output).
        resume: go on from the last checkpoint in `config.out`; start anew where there is none, and do nothing where
            the run is finished.
        overwrite: start anew whatever is in `config.out`. Otherwise a run that is there is not replaced.

    Returns:
        What the run's summary holds.

    Raises:
        ValueError: the configuration, the data, the model or the checkpoint do not fit together, the folder holds
            another run or is in use by one, or training diverges.
        OSError: a file cannot be written.
        Interrupted: SIGTERM or SIGINT came; the run has saved itself.
    """
    folder = RunFolder(config.out)
    check_model(config)
    if config.data.image_size is None:
        config.data.image_size = input_size(config.model)
    progress = progress and os.environ.get("RANK", "0") == "0"

    with join_ranks(config.device) as ranks, StopSignals() as stop, ExitStack() as held:

        def finished_run() -> dict[str, Any] | None:
            # The first process looks, for all: what they would see themselves may differ, on a shared folder.
            return None if overwrite else ranks.from_first(lambda: finished_summary(folder, config, resume=resume))

        finished = finished_run()  # before the folder is locked, which may not be possible in a finished one
        if finished is not None:
            return _left_as_it_is(folder, finished, progress=progress)
        device, optim, method = ranks.device, config.optim, METHODS[config.method]
        on_gpu = device.type == "cuda"
        if config.cuda_graphs and (not on_gpu or ranks.world > 1):
            raise ValueError(f"cuda_graphs needs one GPU, this run has {ranks.world} process(es) on {device.type}")
        check_backend(config, device)
        check_loggers(config)
        if progress:
            print_notes(config, device)

        # Set-up: the folder, which belongs to this run from here on.
        ranks.from_first(lambda: held.enter_context(lock_folder(folder)))
        finished = finished_run()  # once more: whoever held the folder until now may have finished since
        if finished is not None:
            return _left_as_it_is(folder, finished, progress=progress)
        checkpoint = None if overwrite else ranks.from_first(lambda: checkpoint_to_resume(folder, resume=resume))

        # Set-up: data.
        preprocessing = preprocessing_of_run(config)
        splits = load_run_data(config, preprocessing)
        position = Position(len(splits.train_labels), optim.batch_size * ranks.world, optim.epochs)
        loading: dict[str, Any] = {
            "workers": config.data.workers,
            "pin": on_gpu,
            "rank": ranks.rank,
            "world": ranks.world,
        }
        mixing = Mixing.of(config.data, len(splits.classes))
        loader: Any = train_loader(splits.train, position.batch_size, config.seed, mixing=mixing, **loading)

        # Set-up: model, loss, optimizer and the step that joins them.
        model = build_model(config, len(splits.classes))
        if method.has_adapters:  # so that the adapter file is enough to use them
            model.classes, model.preprocessing = splits.classes, preprocessing
        store_frozen(model, config.precision)
        set_training(model.to(device), True)
        weights = class_weights(splits.train_labels, len(splits.classes), config.loss.class_weights)
        loss_config = replace(config.loss, views=method.views_of(config.loss.views))
        objective: nn.Module = Objective(model, loss_config, config.precision, weights).to(device)
        if config.compile:
            objective.compile(fullgraph=True)
        if ranks.world > 1:
            objective = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
        optimizer = make_optimizer(model, optim.lr, optim.weight_decay, optim.optimizer, graphed=config.cuda_graphs)
        warmup_steps = round(optim.warmup * position.steps_per_epoch)
        schedule = make_schedule(optimizer, position.total_steps, warmup_steps)
        step = TrainStep(
            objective,
            optimizer,
            schedule,
            position,
            ranks,
            seed=config.seed,
            scale_loss=config.precision == "fp16-mixed",
            accumulate=optim.accumulate,
        )
        take_step = GraphedStep(step) if config.cuda_graphs else step

        # Set-up: what is kept of the run, and where it begins.
        selection = Selection(config.patience)
        metrics = MetricsLog(folder.metrics, enabled=ranks.is_first)
        checkpoints = Checkpoints(
            folder,
            config,
            ranks,
            model,
            DataFingerprint(splits, config.data.root),
            position,
            step=step,
            optimizer=optimizer,
            schedule=schedule,
            selection=selection,
            metrics=metrics,
        )
        if checkpoint is not None:
            checkpoints.load(checkpoint)
            if progress:
                print(f"resumed {folder} at step {position.steps} of {position.total_steps}", flush=True)
        elif ranks.is_first:
            if resume and progress and folder.config.is_file():
                print(f"{folder} has no checkpoint to go on from: starting anew", flush=True)
            folder.start_anew()
        metrics.begin()
        if ranks.is_first:
            folder.write_config(asdict(config))
            folder.write_classes(splits.classes)
        loggers = Loggers(folder, asdict(config), position, enabled=ranks.is_first)
        held.callback(loggers.close)
        if progress:
            print(opening_table(config, splits, model, position, ranks), flush=True)
        bar = Progress(position, enabled=progress)
        held.callback(bar.close)

        def scores(images: Any, *, confusion: bool = False) -> Scores:
            evaluated = evaluation_loader(images, optim.batch_size * BATCH_FACTOR, **loading)
            with position.pause():
                return evaluate(
                    model, evaluated, ranks, len(splits.classes), config.precision, stop, confusion=confusion
                )

        def save_checkpoint() -> None:
            with position.pause():
                checkpoints.save()

        def is_stop_asked() -> bool:
            # Processes must leave at the same step; they look at each other's signals where they meet anyway.
            if ranks.world == 1:
                return stop.received is not None
            return position.steps % config.log_every == 0 and ranks.any(stop.received is not None)

        try:
            while not position.is_at_end and not selection.patience_is_over:
                # Train: the steps of an epoch, from the current position on.
                loader.batch_sampler.set_position(position.epoch, position.steps_in_epoch)
                for batch in batches(loader):
                    take_step(batch.to(device))
                    if position.steps % config.log_every == 0:
                        loss, train_accuracy = step.averages()
                        step.count_bad_steps(config.max_bad_steps)
                        bar.update({"loss": f"{loss:.3f}", "train": f"{train_accuracy:.1f}%"})
                        running = {"running_loss": loss, "running_accuracy": train_accuracy}
                        loggers.add_running(running | {"lr": float(schedule.get_last_lr()[0])})
                    if is_stop_asked():
                        raise StopAsked
                    is_mid_epoch = position.steps_in_epoch < position.steps_per_epoch
                    if config.checkpoint_steps and position.steps % config.checkpoint_steps == 0 and is_mid_epoch:
                        save_checkpoint()

                # Evaluate: validation selects.
                loss, train_accuracy = step.averages()
                row: dict[str, Any] = {
                    "epoch": position.epoch,
                    "train_loss": loss,
                    "train_accuracy": train_accuracy,
                    "lr": float(schedule.get_last_lr()[0]),
                    "bad_steps": step.count_bad_steps(config.max_bad_steps),
                    "seconds": round(position.seconds, 2),
                }
                is_last = position.is_last_epoch
                if splits.val is None:
                    if is_last:
                        selection.select(position.epoch, None, model)
                elif is_last or position.epoch % config.eval_every == 0:
                    row |= scores(splits.val).named("val")
                    selection.validated(position.epoch, row["val_accuracy"], model)

                # Log.
                position.epochs_done += 1
                step.reset_sums()
                shown = {"epoch": str(row["epoch"]), "loss": f"{loss:.3f}", "train": f"{train_accuracy:.1f}%"}
                if selection.val_accuracy is not None:
                    shown["val"] = f"{row.get('val_accuracy', selection.val_accuracy):.1f}%"
                bar.update(shown, epoch_end=True)
                metrics.add(row)
                loggers.add({name: value for name, value in row.items() if name != "epoch"})

                # Save.
                if is_last or selection.patience_is_over or position.epochs_done % config.checkpoint_every == 0:
                    save_checkpoint()

            # Test, once: the last weights, then the selected ones.
            seconds = position.seconds
            summary: dict[str, Any] = {"val_accuracy": selection.val_accuracy}
            selected = metrics.rows[selection.epoch - 1]
            summary |= {name: selected[name] for name in ("val_loss", "val_top5") if name in selected}
            if config.test:
                tested = scores(splits.test, confusion=True)
                summary["last_test_accuracy"] = tested.accuracy
            load_trained_state(model, selection.weights, "the selected epoch")
            if config.test:
                if selection.epoch != position.epochs_done:
                    tested = scores(splits.test, confusion=True)
                loggers.add(tested.named("test"))
                summary |= tested.named("test")
                if tested.confusion is not None:
                    summary["test_classes"] = class_table(tested, splits.classes)
        except StopAsked:
            save_checkpoint()
            where = f"step {position.steps} of {position.total_steps} is saved in {folder}; go on with --resume"
            raise Interrupted(f"stopped: {where}", stop.received or signal.SIGTERM) from None

        # Report.
        bar.close()
        summary |= {
            "selected_epoch": selection.epoch,
            "epochs": position.epochs_done,
            "steps": position.steps,
            "bad_steps": step.count_bad_steps(config.max_bad_steps),
            **count_trained(model),
            "seconds": round(seconds, 1),
            "device": str(device),
            "processes": ranks.world,
            "versions": versions(),
            "config": asdict(config),
        }
        if ranks.is_first:
            save_trained(model, folder, config.method)
            pictures = [folder.curves]
            plot_curves(folder.curves, metrics.rows, summary)
            if config.test and tested.confusion is not None:
                pictures.append(folder.confusion)
                plot_confusion(folder.confusion, tested.confusion, splits.classes)
            loggers.add_pictures(*pictures)
            folder.write_summary(summary)
            folder.remove_checkpoints()
            if progress:
                print(closing_table(summary, folder, weights_file(folder, config.method)))
        ranks.barrier()
        return summary


def _left_as_it_is(folder: RunFolder, summary: dict[str, Any], *, progress: bool) -> dict[str, Any]:
    if progress:
        print(f"{folder} holds this run, finished: nothing to do", flush=True)
    return summary
