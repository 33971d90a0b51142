"""The training loop."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mosa_fast.backbones.adapter_file import load_trained_state, save_adapter, trained_state
from mosa_fast.backbones.create import channel_statistics, input_size
from mosa_fast.backbones.vision_transformer import AdaptedVisionTransformer
from mosa_fast.config import TrainConfig
from mosa_fast.data import load_data
from mosa_fast.data.transforms import IMAGENET, Statistics
from mosa_fast.files import write_atomically
from mosa_fast.routing import step_seed
from mosa_fast.training.losses import DEEP_BLOCKS, class_weights, mosa_loss
from mosa_fast.training.model import build_model, count_trained, forward
from mosa_fast.training.optim import make_optimizer, make_schedule
from mosa_fast.training.report import MetricsLog, format_table, plot_curves, versions, write_summary

EVAL_BATCH_FACTOR = 4  # evaluation keeps no activations, so its batches can be larger


def train(config: TrainConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run a training from data to report.

    The epoch with the best validation accuracy is selected, the last one where there are no validation images
    (data.mode final); test is evaluated once, after the last epoch, for the selected weights and for the last ones.

    Args:
        config: the run.
        progress: show a bar (standard error) and the closing table (standard output).

    Returns:
        What summary.json holds.

    Raises:
        ValueError: the configuration, the data or the model do not fit together.
    """
    start = time.perf_counter()
    device = pick_device(config.device)
    if config.data.image_size is None:
        config.data.image_size = input_size(config.model)
    own = config.data.normalisation == "backbone"
    statistics = Statistics(*channel_statistics(config.model)) if own else IMAGENET
    splits = load_data(config.data, config.data.image_size, config.seed, statistics)
    classes = len(splits.classes)
    model = build_model(config, classes).to(device)

    def loader(dataset: Any, *, train: bool) -> DataLoader[Any]:
        workers = 0 if config.data.name == "digits" else config.data.workers
        batch = config.optim.batch_size * (1 if train else EVAL_BATCH_FACTOR)
        generator = torch.Generator().manual_seed(config.seed)
        return DataLoader(dataset, batch, shuffle=train, num_workers=workers, generator=generator)

    train_loader = loader(splits.train, train=True)
    val_loader = None if splits.val is None else loader(splits.val, train=False)
    steps_per_epoch = len(train_loader)
    optimizer = make_optimizer(model, config.optim.lr, config.optim.weight_decay, config.optim.optimizer)
    warmup = round(config.optim.warmup_epochs * steps_per_epoch)
    schedule = make_schedule(optimizer, config.optim.epochs * steps_per_epoch, warmup)
    weights = class_weights(splits.train_labels, classes, config.loss.class_weights)
    weights = None if weights is None else weights.to(device)
    loss_config = config.loss
    if config.method != "mosa":
        loss_config = type(loss_config)(views=1, class_weights=loss_config.class_weights)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(out / "metrics.jsonl")
    torch.manual_seed(config.seed)
    best: dict[str, Any] = {"val_accuracy": -1.0}
    step = 0
    bar = tqdm(total=config.optim.epochs * steps_per_epoch, unit="step", disable=not progress)
    for epoch in range(1, config.optim.epochs + 1):
        model.train()
        # Sums stay on the device: reading them in every step would make the host wait for it.
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            outputs: list[Tensor] | None = [] if loss_config.deep_reg else None
            seed = step_seed(config.seed, step, device=device)
            logits = forward(model, images, loss_config.views, seed, outputs)
            loss = mosa_loss(logits, labels, loss_config, weights, outputs and outputs[:DEEP_BLOCKS])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            loss_sum += loss.detach() * len(labels)
            correct += (logits[: len(labels)].argmax(1) == labels).sum()
            bar.update()
        seen = len(splits.train_labels)
        row = {
            "epoch": epoch,
            "train_loss": loss_sum.item() / seen,
            "train_accuracy": 100 * correct.item() / seen,
            "lr": schedule.get_last_lr()[0],
            "seconds": round(time.perf_counter() - start, 2),
        }
        if val_loader is None:
            if epoch == config.optim.epochs:
                best = {"val_accuracy": None, "epoch": epoch, "state": _snapshot(model)}
        elif epoch % config.eval_every == 0 or epoch == config.optim.epochs:
            row["val_accuracy"] = evaluate(model, val_loader, device)
            if row["val_accuracy"] > best["val_accuracy"]:
                best = {"val_accuracy": row["val_accuracy"], "epoch": epoch, "state": _snapshot(model)}
            bar.set_postfix(loss=f"{row['train_loss']:.3f}", val=f"{row['val_accuracy']:.1f}%")
        log.add(row)
    bar.close()
    train_seconds = time.perf_counter() - start

    summary: dict[str, Any] = {"val_accuracy": best["val_accuracy"]}
    if config.test:
        test_loader = loader(splits.test, train=False)
        summary["last_test_accuracy"] = evaluate(model, test_loader, device)
        load_trained_state(model, best["state"], "the selected epoch")
        is_last = best["epoch"] == config.optim.epochs
        summary["test_accuracy"] = summary["last_test_accuracy"] if is_last else evaluate(model, test_loader, device)
    else:
        load_trained_state(model, best["state"], "the selected epoch")
    summary |= {
        "selected_epoch": best["epoch"],
        "epochs": config.optim.epochs,
        "steps": step,
        **count_trained(model),
        "seconds": round(train_seconds, 1),
        "device": str(device),
        "versions": versions(),
        "config": asdict(config),
    }
    weights_file = save_trained(model, out)
    write_summary(out / "summary.json", summary)
    plot_curves(out / "curves.png", log.rows, summary)
    if progress:
        print(_closing_table(summary, weights_file))
    return summary


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Accuracy in percent of the merged model; leaves the model in the mode it was in."""
    training = model.training
    model.eval()
    correct, seen = torch.zeros((), dtype=torch.int64, device=device), 0
    for images, labels in loader:
        logits = model(images.to(device))
        correct += (logits.argmax(1) == labels.to(device)).sum()
        seen += len(labels)
    model.train(training)
    return 100 * correct.item() / max(1, seen)


def save_trained(model: nn.Module, out: Path) -> Path:
    """Write what was trained: adapter.safetensors for adapters, model.safetensors for other methods."""
    if isinstance(model, AdaptedVisionTransformer):
        save_adapter(model, out / "adapter.safetensors")
        return out / "adapter.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_atomically(out / "model.safetensors", lambda temporary: save_file(tensors, temporary))
    return out / "model.safetensors"


def pick_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
            return device
    raise ValueError(f"device {name!r} is not available here")


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained_state(model).items()}


def _closing_table(summary: dict[str, Any], weights_file: Path) -> str:
    out = weights_file.parent
    rows = [("validation accuracy", "none: trained on the validation images too, the last epoch counts")]
    if summary["val_accuracy"] is not None:
        rows = [("validation accuracy", f"{summary['val_accuracy']:.2f} %  (epoch {summary['selected_epoch']})")]
    if "test_accuracy" in summary:
        rows.append(("test accuracy", f"{summary['test_accuracy']:.2f} %"))
        rows.append(("test accuracy, last epoch", f"{summary['last_test_accuracy']:.2f} %"))
    rows += [
        ("trained weights", f"{summary['trained_weights']:,} + head {summary['head_weights']:,}"),
        ("time", f"{summary['seconds']:.0f} s, {summary['steps']} steps on {summary['device']}"),
        ("weights", str(weights_file)),
        ("metrics", str(out / "metrics.jsonl")),
        ("summary", str(out / "summary.json")),
        ("curves", str(out / "curves.png")),
    ]
    return format_table(rows)
