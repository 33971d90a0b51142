"""How far data-parallel training scales, on paper: `python -m benchmarks.scaling [--write]`.

For every recipe it counts, on tensors without data, the weights that get a gradient (DistributedDataParallel reduces
all of them in float32 each step) and the floating-point operations of a training step, and works out

    compute      = batch * operations / (peak * utilisation)
    all-reduce   = 2 (W - 1) / W * bytes / bandwidth + 2 ceil(log2 W) * latency       (each bucket's latency counts)
    exposed      = the last bucket, and what of the others does not fit behind the backward
    efficiency   = compute / (compute + exposed)

for W GPUs that keep the recipe's batch each (weak scaling). The last bucket is never hidden: the first block's
gradients, which it holds, are the last that the backward makes. Decoding is measured on this machine, on one core, with
FGVC's training transform; the table says how many such cores feed one GPU. Nothing here was run on a cluster: `Cluster`
holds the assumptions, and `--write` stores them beside the numbers.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import environment
from benchmarks.results import FOLDER, markdown_table
from benchmarks.timing import Work, interleaved
from mosa_fast.command_line import CommandParser
from mosa_fast.config import TrainConfig
from mosa_fast.data import make_transforms, preprocessing_of
from mosa_fast.data.fgvc import MULTITASK_CLASSES, SETS
from mosa_fast.data.gicd import TASKS as GICD
from mosa_fast.data.vtab import TASKS as VTAB
from mosa_fast.methods import METHODS
from mosa_fast.recipes import packaged
from mosa_fast.run_options import parse
from mosa_fast.training.model import build_model

RESULTS = FOLDER / "scaling.json"
WORLDS = (8, 64, 512, 4096)
GRADIENT_BYTES = 4  # master weights and their gradients are float32
CLASSES = {**{name: fgvc.classes for name, fgvc in SETS.items()}, "multitask": MULTITASK_CLASSES, **VTAB, **GICD}
PHOTO = (500, 375)  # pixels: the usual size of CUB's and Flowers' photographs


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines: an H100 in bfloat16 with a 400 Gb/s network card for each GPU."""

    peak: float = field(default=989e12, metadata={"help": "operations a second, dense"})
    utilisation: float = field(default=0.4, metadata={"help": "part of the peak that a whole training step reaches"})
    bandwidth: float = field(default=50e9, metadata={"help": "bytes a second that a GPU sends and receives"})
    latency: float = field(default=10e-6, metadata={"help": "seconds a hop of a tree"})
    # DistributedDataParallel's defaults.
    first_bucket: int = field(default=2**20, metadata={"help": "bytes of gradients that are reduced first"})
    bucket: int = field(default=25 * 2**20, metadata={"help": "bytes of gradients that are reduced together"})


def all_reduce_seconds(nbytes: float, world: int, cluster: Cluster) -> float:
    """Time of one all-reduce: a ring's bytes, which bound large messages, and a tree's latency, which bounds small."""
    if world == 1:
        return 0.0
    return 2 * (world - 1) / world * nbytes / cluster.bandwidth + 2 * math.ceil(math.log2(world)) * cluster.latency


def buckets(nbytes: int, cluster: Cluster) -> list[int]:
    """Sizes of the buckets in which gradients are reduced, in the order in which backward fills them."""
    sizes: list[int] = []
    left = nbytes
    while left > 0:
        sizes.append(min(left, cluster.bucket if sizes else cluster.first_bucket))
        left -= sizes[-1]
    return sizes


def exposed_seconds(nbytes: int, backward: float, world: int, cluster: Cluster) -> float:
    """Communication that no computation hides, in a step whose backward takes `backward` seconds."""
    *earlier, last = (all_reduce_seconds(size, world, cluster) for size in buckets(nbytes, cluster))
    return last + max(0.0, sum(earlier) - backward)


def step_operations(config: TrainConfig, classes: int) -> tuple[int, int, int]:
    """Trained weights, and operations of the forward and of the backward for one image (all its views)."""
    config.model.pretrained = False
    batch = 2  # more than one, so that views and samples cannot be taken for each other
    side = config.data.image_size
    assert side is not None
    with torch.device("meta"):
        model = build_model(config, classes).train()
    # Fake CPU tensors, since autocast does not know the meta device; attention as products, which the counter knows.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.to_empty(device="cpu")
        images = torch.empty(batch, 3, side, side)
        method = METHODS[config.method]
        routing = {"views": method.views_of(config.loss.views), "seed": torch.zeros(1, dtype=torch.int64)}
        logits = model(images, **routing) if method.has_adapters else model(images)
        ahead = counter.get_total_flops()
        logits.sum().backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, ahead // batch, (counter.get_total_flops() - ahead) // batch


def plan(cluster: Cluster, recipes: list[str], decode_seconds: float) -> list[dict[str, Any]]:
    """A row for each recipe."""
    counted: dict[str, tuple[int, int, int]] = {}
    rows = []
    for name in recipes:
        config, _ = parse(["--config", name])
        assert config.data.task is not None
        classes = CLASSES[config.data.task]
        # Recipes that differ in data and rates only have the same model.
        key = json.dumps([asdict(config.model), asdict(config.adapter), config.method, config.loss.views, classes])
        if key not in counted:
            counted[key] = step_operations(config, classes)
        trained, ahead, back = counted[key]
        batch, rate = config.optim.batch_size, cluster.peak * cluster.utilisation
        compute, backward = batch * (ahead + back) / rate, batch * back / rate
        reduced = trained * GRADIENT_BYTES
        rows.append(
            {
                "recipe": name,
                "trained_weights": trained,
                "reduced_bytes": reduced,
                "gflop_per_image": round((ahead + back) / 1e9, 2),
                "batch": batch,
                "step_ms": round(compute * 1e3, 2),
                "efficiency": {
                    str(world): round(compute / (compute + exposed_seconds(reduced, backward, world, cluster)), 4)
                    for world in WORLDS
                },
                "images_per_second": round(batch / compute),
                "cores_per_gpu": round(batch / compute * decode_seconds, 1),
            }
        )
    return rows


def measure_decoding(repeats: int = 40) -> float:
    """Seconds in which one core reads a JPEG photograph and transforms it for training (median)."""
    from PIL import Image

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        noise = np.random.default_rng(0).integers(0, 256, (PHOTO[1] // 8, PHOTO[0] // 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).resize(PHOTO, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        data = parse(["--config", "fgvc/cub"])[0].data
        transform = make_transforms(data, preprocessing_of(data, 224)).train
        decode = Work(lambda: transform(Image.open(io.BytesIO(stream.getvalue())).convert("RGB")))
        timing = interleaved({"decode": decode}, torch.device("cpu"), repeats=repeats)["decode"]
    finally:
        torch.set_num_threads(threads)
    return timing.median / 1e3


def markdown(results: dict[str, Any]) -> str:
    """The plan as a table; recipes that come out equal have one row."""
    assumed = results["cluster"]
    text = [
        f"Assumed: {assumed['peak'] / 1e12:.0f} TFLOP/s at {assumed['utilisation']:.0%}, "
        f"{assumed['bandwidth'] / 1e9:.0f} GB/s and {assumed['latency'] * 1e6:.0f} µs a hop between GPUs. "
        f"Measured: {results['decode_seconds'] * 1e3:.1f} ms to decode and transform an image on one core "
        f"({results['environment']['device']}).",
        "Every GPU keeps the recipe's batch, so that a step of W GPUs takes W batches: what limits after the network",
        "is the data set (VTAB-1k's 1,000 images are one step of 8 GPUs; thousands of GPUs want millions of images)",
        "and the decoding, in the last column.",
    ]
    columns = ["recipes", "reduced, MB a step", "GFLOP an image", "step, ms"]
    columns += [*(f"{world:,} GPUs" for world in WORLDS), "images/s a GPU", "cores to feed it"]
    merged: dict[tuple[str, ...], list[str]] = {}
    for row in results["rows"]:
        cells = (
            f"{row['reduced_bytes'] / 1e6:.1f}",
            f"{row['gflop_per_image']:.0f}",
            f"{row['step_ms']:.1f}",
            *(f"{100 * row['efficiency'][str(world)]:.1f} %" for world in WORLDS),
            f"{row['images_per_second']:,}",
            f"{row['cores_per_gpu']:.0f}",
        )
        merged.setdefault(cells, []).append(row["recipe"])
    table = markdown_table(columns, ((", ".join(names), *cells) for cells, names in merged.items()))
    return "\n".join(text) + "\n\n" + table


def all_recipes() -> list[str]:
    """Names of the packaged recipes whose data sets' classes are known here."""
    folders = ("fgvc", "gicd", "vtab", "linear", "full")  # Swin's recipes are the first ones on another backbone
    return [f"{folder}/{path.stem}" for folder in folders for path in sorted((packaged() / folder).glob("*.yaml"))]


def main() -> None:
    """Print the plan."""
    parser = CommandParser(
        prog="python -m benchmarks.scaling", description="How far data-parallel training scales, on paper."
    )
    for f in fields(Cluster):
        words = f"{f.metadata['help']}; default: {f.default:g}"
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, help=words)
    parser.add_argument("--write", action="store_true", help=f"store numbers and table in {RESULTS.parent.name}/")
    options = vars(parser.parse_args())
    write = options.pop("write")
    cluster = replace(Cluster(), **options)
    if min(asdict(cluster).values()) <= 0 or cluster.utilisation > 1:
        parser.error("all assumptions must be positive, and the utilisation at most 1")
    decode_seconds = measure_decoding()
    results = {
        "cluster": asdict(cluster),
        "decode_seconds": decode_seconds,
        "environment": environment(torch.device("cpu")),
        "rows": plan(cluster, all_recipes(), decode_seconds),
    }
    if write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(f"# Scaling plan\n\n{markdown(results)}\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
