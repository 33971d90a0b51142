"""The registry of cases: what work of a spec's contenders is timed, and how their results are checked.

A case is a function from a `Spec` to contenders, registered by its name: a new one needs no change anywhere else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.contenders import CONTENDERS, Entry, split_variant
from benchmarks.learner import Batch, Learner
from benchmarks.machine import copy_of
from benchmarks.spec import CONFIG, LORA_CONFIG, OPERATORS, VIEWS, Level, Mode, Spec
from benchmarks.timing import Work
from benchmarks.workbench import Workbench, stream_dtypes

# Largest relative RMS error of outputs and gradients against float32 on the reference; a wrong mask gives 0.3 and more.
# Roundings add up over the layers of a model.
TOLERANCE = {"fp32": 1e-3, "bf16-mixed": 0.1, "bf16-true": 0.1}
OPERATOR_TOLERANCE = {"fp32": 1e-5, "bf16-mixed": 2e-2, "bf16-true": 3e-2}
COPY = "copy"  # an operator's yardstick: the bytes that our kernels plan to move, copied


@dataclass
class Contender:
    """One way of doing a case's work, ready to be timed.

    Attributes:
        work: by mode.
        results: values by name, of one more run.
        expected: what they should be; None: that they are finite is all that is asked.
        state_bytes: see `Workbench.state_bytes`; None where it means nothing.
        compiled: under torch.compile.
        typical: the results' run is like those that are timed, with dropout where they have it.
    """

    name: str
    work: dict[Mode, Work]
    results: Callable[[], dict[str, Tensor]]
    expected: Callable[[], dict[str, Tensor]] | None = None
    state_bytes: int | None = None
    compiled: bool = False
    typical: bool = True

    def wrong(self, spec: Spec, found: dict[str, Tensor]) -> str | None:
        """What is wrong with results that were found; None: nothing."""
        tolerance = (OPERATOR_TOLERANCE if spec.case in OPERATORS else TOLERANCE)[spec.precision]
        for name, value in found.items():
            if not value.isfinite().all():
                return f"{name} is not finite"
        for name, truth in {} if self.expected is None else self.expected().items():
            difference = torch.linalg.vector_norm(found[name].float() - truth) / torch.linalg.vector_norm(truth)
            if not difference <= tolerance:
                return f"{name} is off by {float(difference):.1e}"
        return None


# By name: what makes a contender, or why there is none. One after the other: one that fails does not stop the others.
Makers = dict[str, Callable[[], Contender] | str]
_Case = Callable[[Spec, torch.device], Makers]
CASES: dict[str, _Case] = {}


def case(name: str) -> Callable[[_Case], _Case]:
    """Register a case under a name."""

    def register(function: _Case) -> _Case:
        CASES[name] = function
        return function

    return register


@case("operator")
def operator_case(spec: Spec, device: torch.device) -> Makers:
    """The adapter alone, forward and backward, with the masks where there are any."""
    return _with_copy(spec, device, _training(spec, device, "operator"))


@case("lora")
def lora_case(spec: Spec, device: torch.device) -> Makers:
    """The low-rank pairs of a block's q and v alone, given what the linear reads and gives, forward and backward."""
    return _with_copy(spec, device, _training(spec, device, "lora"))


def _with_copy(spec: Spec, device: torch.device, makers: Makers) -> Makers:
    def copied() -> Contender:
        return Contender(COPY, {mode: copy_of(operator_work(spec, mode)[1], device) for mode in spec.modes}, dict)

    return {COPY: copied, **makers}


@case("block")
def block_case(spec: Spec, device: torch.device) -> Makers:
    """A transformer block with its adapter, forward and backward."""
    return _training(spec, device, "block")


@case("step")
def step_case(spec: Spec, device: torch.device) -> Makers:
    """A whole training step: two views, loss, backward, masks, AdamW."""
    return _training(spec, device, "model")


@case("methods")
def methods_case(spec: Spec, device: torch.device) -> Makers:
    """A training step of every method, with the views that a run of it has."""
    return _training(spec, device, "model")


@case("evaluation")
def evaluation_case(spec: Spec, device: torch.device) -> Makers:
    """Logits of the merged model."""
    return _makers(Workbench(spec, device, "model"), _evaluated)


def _training(spec: Spec, device: torch.device, level: Level) -> Makers:
    return _makers(Workbench(spec, device, level), _trained)


def _makers(bench: Workbench, make: Callable[[Workbench, str, Entry], Contender]) -> Makers:
    return {
        name: entry.unavailable() or partial(make, bench, name, entry)
        for name, entry in CONTENDERS.items()
        if entry.takes_part(bench.spec, bench.device)
    }


def _trained(bench: Workbench, name: str, entry: Entry) -> Contender:
    learner = entry.make(bench.setting)
    learner.module.train()
    for batch in bench.batches if learner.separate else ():
        batch.views  # noqa: B018  # cut now, untimed
    works = model_work(bench, learner) if bench.level == "model" else layer_work(bench, learner)
    dropout = learner.route is None  # what draws by itself cannot be told what to drop
    return Contender(
        name,
        works,
        partial(bench.results, learner),
        None if learner.mixture is None and learner.truth is None else partial(bench.expected, learner, dropout),
        state_bytes=bench.state_bytes(learner) if bench.level == "model" else None,
        compiled=_is_compiled(name),
        typical=dropout,
    )


def model_work(bench: Workbench, learner: Learner) -> dict[Mode, Work]:
    """A training step with its optimizer."""
    turns, steps = bench.turns(), iter(range(10**9))
    # A learning rate of zero: the same work, and the weights stay as they are.
    optimizer = torch.optim.AdamW(learner.trained(), lr=0.0, fused=bench.device.type == "cuda")

    def step() -> None:
        batch = next(turns)
        bench.backward(learner, bench.forward(learner, batch, next(steps)))
        optimizer.step()
        bench.forget(learner, batch)

    return {"all": Work(step)}


def layer_work(bench: Workbench, learner: Learner) -> dict[Mode, Work]:
    """Forward and backward of an adapter or a block, together and each alone."""
    turns, steps = bench.turns(), iter(range(10**9))
    done: list[tuple[Batch, tuple[Tensor, ...]]] = []  # the forward whose backward comes next

    def forget() -> None:
        for batch, _ in done:
            bench.forget(learner, batch)
        done.clear()

    def forward() -> None:
        batch = next(turns)
        done.append((batch, bench.forward(learner, batch, next(steps))))

    def backward() -> None:
        bench.backward(learner, done[0][1])
        forget()  # in its time, like a training step's: the next contender finds no gradients on the inputs

    def forget_and_forward() -> None:
        forget()
        forward()

    def both() -> None:
        forward()
        backward()

    return {"all": Work(both, forget), "forward": Work(forward, forget), "backward": Work(backward, forget_and_forward)}


def _evaluated(bench: Workbench, name: str, entry: Entry) -> Contender:
    learner = entry.make(bench.setting)
    learner.module.eval()
    learner.prepare_evaluation()
    turns = bench.turns()

    @torch.no_grad()
    def logits(batch: Batch) -> Tensor:
        return bench.evaluate(learner, batch)

    return Contender(
        name,
        {"all": Work(lambda: logits(next(turns)))},
        lambda: {"logits": logits(bench.batches[0])},
        None if learner.mixture is None else partial(bench.merged_logits, learner.mixture),
        compiled=_is_compiled(name),
    )


def _is_compiled(name: str) -> bool:
    return split_variant(name)[1] == "compiled"


def operator_work(spec: Spec, mode: Mode) -> tuple[float, int]:
    """Operations, and the bytes that our kernels plan to move, of a case's operator, for M tokens D wide.

    The adapter: two products of `2 M D r` operations forward, and backward two towards x (one is the forward's again)
    and two for the weights. Forward reads x and skip and writes the output; backward reads x and the output's gradient
    twice and writes the gradient of x.

    Low-rank pairs of T targets, W = T D columns of the linear's `O = 3 D`: forward `2 M (D T r + r W)`, backward twice
    that. Forward reads x and y and writes the output; backward reads the gradient in W columns twice and x, and writes
    the gradient of x.
    """
    elements = VIEWS * spec.images * spec.tokens * _width(spec.backbone)
    stream, product = (dtype.itemsize for dtype in stream_dtypes(spec.precision))
    if spec.case == "operator":
        operations = 4.0 * elements * CONFIG.bottleneck
        moved = (elements * (2 * stream + product), elements * 5 * stream)
    else:
        targets = len(LORA_CONFIG.targets)
        operations = 4.0 * elements * targets * LORA_CONFIG.rank
        moved = (elements * (stream + 2 * 3 * product), elements * (2 * targets * product + 2 * stream))
    forward, backward = (operations, moved[0]), (2 * operations, moved[1])
    return {"forward": forward, "backward": backward, "all": (3 * operations, sum(moved))}[mode]


@cache
def _width(backbone: str) -> int:
    with torch.device("meta"):
        model: Any = timm.create_model(backbone, depth=1)
    return int(model.embed_dim)


def free_memory() -> None:
    """Let go of what a case has left."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
