"""Why does a mixture want a larger scale than a dense adapter? `python -m benchmarks.mixture` looks into its trainings.

It trains MoSA with E experts (share = down) and a dense adapter (E = 1) as docs/evidence.md does: Fashion-MNIST, 20
images a class, 520 steps, the embedded backbone. During a run it measures how far sampled models are from the merged
one, and how noisy the gradient is over draws and over minibatches (`benchmarks.mixture_probes`); at its end, the
accuracy on validation images of the merged model, of sampled ones, and of merges with other factors. Test images are
not read. Runs that `--out` holds are not made again.

It writes results/mixture.json, with tables and a plot beside it. What they tell: docs/evidence.md, Why.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import set_fused_attn
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.mixture_plot import plot
from benchmarks.mixture_probes import (
    accuracy,
    balanced_draws,
    distances,
    gradient_noise,
    logits_of,
    scaled,
    weight_sizes,
)
from benchmarks.results import FOLDER, markdown_table, publish
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.backbones.create import input_size
from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import TrainConfig
from mosa_fast.data.loading import batches, train_loader
from mosa_fast.methods import METHODS
from mosa_fast.run_options import parse_options
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.model import build_model
from mosa_fast.training.optim import make_optimizer, make_schedule
from mosa_fast.training.position import Position
from mosa_fast.training.precision import store_frozen
from mosa_fast.training.run_data import load_run_data, preprocessing_of_run
from mosa_fast.training.step import Objective, TrainStep

RESULTS = FOLDER / "mixture.json"
RATE = 2e-3  # the best of MoSA's with four experts
PROBED = (0.05, 0.125, 0.25, 0.5, 1.0)  # parts of the run after which distances are measured
NOISE_PROBED = (0.125, 1.0)  # and the gradient's noise
DISTANCE_IMAGES, DISTANCE_DRAWS = 100, 8
NOISE_DRAWS, MINIBATCHES = 16, 4  # draws: a multiple of every number of experts
IMAGES, SAMPLED = 1000, 2  # for accuracies: images, and draws
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # on the merged update, at evaluation


class Case(NamedTuple):
    """A training: number of experts (1: a dense adapter), scale, and seed of everything."""

    experts: int
    scale: float
    seed: int


CASES = (  # those wanted most come first
    *(Case(experts, 1.0, 1) for experts in (1, 4, 2, 8)),
    *(Case(experts, scale, 1) for experts, scale in ((4, 8.0), (2, 4.0), (8, 16.0))),
)


def config_of(case: Case, options: Sequence[str]) -> TrainConfig:
    """The evidence's recipe of the method, with the case's experts, scale and seed."""
    recipe = "evidence/mosa_e4" if case.experts > 1 else "evidence/dense"
    words = [f"--optim.lr={RATE}", f"--adapter.experts={case.experts}", f"--adapter.scale={case.scale}"]
    words += [f"--seed={case.seed}", f"--adapter.seed={case.seed}", *options]
    config = parse_options(["--config", recipe, *words], "train", "")
    config.data.image_size = config.data.image_size or input_size(config.model)
    return config


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, and what was found on the way and at the end."""
    splits = load_run_data(config, preprocessing_of_run(config))
    val_images, val_labels = splits.val.tensors  # type: ignore[union-attr]
    model: Any = build_model(config, len(splits.classes))
    store_frozen(model, config.precision)
    loss = replace(config.loss, views=METHODS[config.method].views_of(config.loss.views))
    position = Position(len(splits.train_labels), config.optim.batch_size, config.optim.epochs)
    optimizer = make_optimizer(model, config.optim.lr, config.optim.weight_decay, config.optim.optimizer)
    warmup_steps = round(config.optim.warmup * position.steps_per_epoch)
    schedule = make_schedule(optimizer, position.total_steps, warmup_steps)
    objective = Objective(model, loss, config.precision)
    step = TrainStep(objective, optimizer, schedule, position, Ranks(0, 1, torch.device("cpu")), seed=config.seed)
    loader: Any = train_loader(splits.train, position.batch_size, config.seed)
    draws = balanced_draws(model, NOISE_DRAWS if config.adapter.experts > 1 else 1, config.seed)
    at, noise_at = ({round(part * position.total_steps) for part in parts} for parts in (PROBED, NOISE_PROBED))
    order = torch.randperm(len(val_images), generator=torch.Generator().manual_seed(config.seed))
    some = val_images[order[:DISTANCE_IMAGES]]
    found: dict[str, Any] = {"distances": [], "noise": []}
    while not position.is_at_end:
        loader.batch_sampler.set_position(position.epoch, 0)
        for batch in batches(loader):
            step(batch)
            if position.steps in at:
                row = {"step": position.steps, **distances(model, some, draws[:, :DISTANCE_DRAWS])}
                found["distances"].append(row | weight_sizes(model))
            if position.steps in noise_at:
                minibatches = some_minibatches(splits.train.tensors, position.batch_size, config.seed)  # type: ignore[attr-defined]
                found["noise"].append({"step": position.steps, **gradient_noise(model, minibatches, draws)})
            set_training(model, True)
        position.epochs_done += 1
    order = order[:IMAGES]
    return found | accuracies(model, val_images[order], val_labels[order], draws[:, :SAMPLED])


def some_minibatches(tensors: Sequence[Tensor], size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Minibatches of the training images, none of which has an image twice."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(tensors[0]), generator=generator)[:size] for _ in range(MINIBATCHES)]
    return [(tensors[0][order], tensors[1][order]) for order in orders]


def accuracies(model: AdaptedModel, images: Tensor, labels: Tensor, draws: Tensor) -> dict[str, Any]:
    """Of draws, each by itself and by their mean probabilities, and of the merged model by a factor on its update."""
    sampled = logits_of(model, images, draws)
    by_factor = {}
    for factor in FACTORS:
        with scaled(model, factor):
            by_factor[str(factor)] = accuracy(logits_of(model, images), labels)
    ensemble = sampled.softmax(-1).mean(0, keepdim=True)
    return {"sampled": accuracy(sampled, labels), "ensemble": accuracy(ensemble, labels), "merged": by_factor}


def merges(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies at the end of every training: of the merged model, of a draw, and of merges with another factor."""
    lines = []
    for row in rows:
        by_factor = {float(factor): value for factor, value in row["merged"].items()}
        best = max(by_factor, key=lambda factor: (by_factor[factor], -factor))
        mixture = row["experts"] > 1
        lines.append(
            [
                *(str(row["experts"]), f"{row['scale']:g}", f"{by_factor[1.0]:.1f}"),
                f"{row['sampled']:.1f}" if mixture else "",
                f"{by_factor[float(row['experts'])]:.1f}" if mixture else "",
                f"{best:g}: {by_factor[best]:.1f}",
            ]
        )
    return markdown_table(("E", "scale", "merged", "one draw", "sum of the experts", "best factor"), lines)


def learning(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far every training has moved the model, how far apart draws are, and how noisy gradients."""
    columns = (
        *("E", "scale", "moved, early", "half", "end", "draw to merged", "KL", "weights, trained", "merged"),
        *("noise of draws", "in own steps"),
    )
    lines = []
    for row in rows:
        moved = [found["l2_merged_frozen"] for found in row["distances"]]
        end, noise, mixture = row["distances"][-1], row["noise"][0], row["experts"] > 1
        lines.append(
            [
                *(str(row["experts"]), f"{row['scale']:g}"),
                *(f"{moved[0]:.3f}", f"{moved[-2]:.2f}", f"{moved[-1]:.2f}"),
                f"{end['l2_sampled_merged']:.2f}" if mixture else "",
                f"{end['kl_sampled_merged']:.4f}" if mixture else "",
                *(f"{end['trained']:.4f}", f"{end['merged']:.4f}"),
                *(f"{noise[k]['draws'] / noise[k]['batches']:.2f}" if mixture else "" for k in ("up", "active")),
            ]
        )
    return markdown_table(columns, lines)


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables, with what they are of."""
    made, rows = results["environment"], sorted(results["runs"], key=lambda row: (row["experts"], row["scale"]))
    accuracies = f"Accuracies in percent on {IMAGES:,} validation images, at the end of each training."
    rest = f"""Moved: Euclidean distance of logits, from a model whose adapters add nothing, with the same head, to the
merged one, after {PROBED[0]:.0%} of the steps, half and all of them. Draw to merged: the same distance, and KL, from a
draw of experts to the merged model, at the end. Weights: root mean square of the up-projections, as they are trained,
and merged. Noise of draws: variance of their gradient over draws of experts by that over minibatches of 16 images,
after {NOISE_PROBED[0]:.1%} of the steps; then the same in those draws alone in which a weight learns."""
    made_by = f"By `python -m benchmarks.mixture`: {made['device']}, torch {made['torch']}, {made['commit']}."
    why = "What it tells: [docs/evidence.md](../../docs/evidence.md#why)."
    parts = ["# Inside the mixture", why, accuracies, merges(rows), rest, learning(rows), made_by]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Make the runs that are missing, and the table and plot of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the trainings (1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (.json)")
    arguments, options = parser.parse_known_args()  # the others are a run's, as --data.root
    set_fused_attn(False)  # as benchmarks/evidence.sh has it
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"runs": []}
    for case in (case._replace(seed=seed) for seed in arguments.seeds for case in CASES):
        if not any(case._asdict().items() <= row.items() for row in results["runs"]):
            results["environment"] = environment(torch.device("cpu"))
            results["runs"].append(case._asdict() | run(config_of(case, options)))
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(case, results["runs"][-1]["merged"], flush=True)
    publish(results, arguments.out, markdown(results), {"training": plot})


if __name__ == "__main__":
    main()
