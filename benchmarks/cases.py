"""The registry of cases: what is timed, on which shapes, by which contenders, and how their results are checked.

A case is a function from a `Spec` to contenders, registered by its name: a new one needs no change anywhere else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks import models
from benchmarks.models import VIEWS, Batch, Learner, Level
from mosa_fast.adapters.vision_transformer import AdaptedVisionTransformer
from mosa_fast.config import LossConfig, MoSAConfig
from mosa_fast.ops.backends import BACKENDS, unavailable_reason
from mosa_fast.training.losses import mosa_loss

BATCHES = 4  # inputs take turns, so that no run finds its own in a cache
CONFIG = MoSAConfig(bottleneck=64, experts=4)  # adaptformer placement, dense down: METHOD's FGVC setting
# Largest relative RMS error of outputs and gradients against float32 on the reference; a wrong mask gives 0.3 and more.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
CHECKED_STEP = 1234


@dataclass(frozen=True)
class Spec:
    """One shape of one case.

    Attributes:
        case: a name in `CASES`.
        backbone: timm's name.
        images: per view.
        precision: "fp32", or "bf16" for autocast with float32 weights and residual stream.
        tokens: of an image; a whole model has its backbone's number.
        compiled: have the contenders under torch.compile too.
        repeats: timed runs of each contender.
    """

    case: str
    backbone: str
    images: int
    precision: str
    tokens: int = 197
    compiled: bool = False
    repeats: int = 10


@dataclass
class Contender:
    """One way of doing a case's work.

    Attributes:
        run: what is timed.
        results: values by name, computed once more without timing; None: only that they are finite is checked.
        expected: what they should be.
        state_bytes: see `models.state_bytes`; None where it means nothing.
        compiled: under torch.compile.
    """

    name: str
    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    expected: Callable[[], dict[str, Tensor]] | None = None
    state_bytes: int | None = None
    compiled: bool = False

    def wrong(self, tolerance: float) -> str | None:
        """What is wrong with its results; None: nothing."""
        found = self.results()
        for name, value in found.items():
            if not value.isfinite().all():
                return f"{name} is not finite"
        for name, truth in {} if self.expected is None else self.expected().items():
            difference = torch.linalg.vector_norm(found[name].float() - truth) / torch.linalg.vector_norm(truth)
            if not difference <= tolerance:
                return f"{name} is off by {float(difference):.1e}"
        return None


Makers = dict[str, Callable[[], Contender]]  # made one after the other: one that fails does not stop the others
CASES: dict[str, Callable[[Spec, torch.device], Makers]] = {}


def case(name: str) -> Callable[[Callable[[Spec, torch.device], Makers]], Callable[[Spec, torch.device], Makers]]:
    """Register a case under a name."""

    def register(function: Callable[[Spec, torch.device], Makers]) -> Callable[[Spec, torch.device], Makers]:
        CASES[name] = function
        return function

    return register


@case("operator")
def operator_case(spec: Spec, device: torch.device) -> Makers:
    """The adapter alone, forward and backward, with the masks where there are any."""
    return _training(spec, device, "operator")


@case("block")
def block_case(spec: Spec, device: torch.device) -> Makers:
    """A transformer block with its adapter, forward and backward."""
    return _training(spec, device, "block")


@case("step")
def step_case(spec: Spec, device: torch.device) -> Makers:
    """A whole training step: two views, loss, backward, masks, AdamW."""
    return _training(spec, device, "model")


@case("evaluation")
def evaluation_case(spec: Spec, device: torch.device) -> Makers:
    """Logits of the merged model."""
    bench = Workbench(spec, device, "model")

    def make(name: str, learner_of: Callable[[], Learner], checked: bool) -> Contender:
        learner = learner_of()
        learner.module.eval()
        learner.prepare_evaluation()
        turns = bench.turns()

        @torch.no_grad()
        def logits(batch: Batch) -> Tensor:
            with bench.autocast():
                return learner.evaluate(*batch.joined)

        return Contender(
            name,
            lambda: logits(next(turns)),
            lambda: {"logits": logits(bench.batches[0])},
            bench.merged_logits if checked else None,
            compiled="compiled" in name,
        )

    wanted = {name: entry for name, entry in bench.learners().items() if "two views" not in name}
    return {name: partial(make, name, *entry) for name, entry in wanted.items()}


def _training(spec: Spec, device: torch.device, level: Level) -> Makers:
    bench = Workbench(spec, device, level)
    return {name: partial(_trained, bench, name, *entry) for name, entry in bench.learners().items()}


def _trained(bench: Workbench, name: str, learner_of: Callable[[], Learner], checked: bool) -> Contender:
    learner = learner_of()
    learner.module.train()
    turns, steps = bench.turns(), iter(range(10**9))
    # A learning rate of zero: the same work, and the check after the timing finds the weights as they were.
    fused = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(learner.trained(), lr=0.0, fused=fused) if bench.level == "model" else None

    def run() -> None:
        batch = next(turns)
        bench.forward_backward(learner, batch, next(steps))
        if optimizer is not None:
            optimizer.step()
        bench.forget(learner, batch)

    state = models.state_bytes(learner, bench.vit) if bench.level == "model" else None
    expected = partial(bench.expected, dropout=learner.route is None) if checked else None
    return Contender(name, run, lambda: bench.results(learner), expected, state, "compiled" in name)


class Workbench:
    """Backbone, data and oracle of one spec, shared by its contenders."""

    def __init__(self, spec: Spec, device: torch.device, level: Level) -> None:
        self.spec, self.device, self.level = spec, device, level
        self.vit: VisionTransformer = models.make_backbone(spec.backbone, device, None if level == "model" else 1)
        self.compact: AdaptedVisionTransformer = models.make_compact(self.vit, CONFIG)
        generator = torch.Generator(device).manual_seed(0)
        self.batches = [self._batch(generator) for _ in range(BATCHES)]
        self.labels = torch.randint(models.CLASSES, (spec.images,), generator=generator, device=device)
        self._expected: dict[bool, dict[str, Tensor]] = {}
        if level != "model":
            h = self.batches[0].joined[0]
            self.grad = torch.randn(h.shape, generator=generator, device=device)

    def _batch(self, generator: torch.Generator) -> Batch:
        spec, width = self.spec, self.vit.embed_dim
        if self.level == "model":
            size = self.vit.patch_embed.img_size
            assert size is not None
            images = torch.randn(spec.images, 3, *size, generator=generator, device=self.device)
            return Batch((images,), ((images,),) * VIEWS)
        dtypes = [torch.float32]  # h; the MLP's output comes in autocast's dtype
        if self.level == "operator":
            dtypes.append(torch.float32 if spec.precision == "fp32" else torch.bfloat16)
        shape = (VIEWS * spec.images, spec.tokens, width)
        drawn = [torch.randn(shape, generator=generator, device=self.device).to(dtype) for dtype in dtypes]
        halves = zip(*(tensor.chunk(VIEWS) for tensor in drawn), strict=True)
        views = tuple(tuple(half.clone().requires_grad_() for half in view) for view in halves)
        return Batch(tuple(tensor.requires_grad_() for tensor in drawn), views)

    def learners(self) -> dict[str, tuple[Callable[[], Learner], bool]]:
        """All contenders: how each is made, and whether its results are to be the mixture's."""
        vit, compact, level, compiled = self.vit, self.compact, self.level, self.spec.compiled
        makers: dict[str, tuple[Callable[[], Learner], bool]] = {
            "no adapter": (partial(models.without_adapters, vit, level), False),
            "paper": (partial(models.paper, vit, compact, level), True),
            "dense": (partial(models.dense, vit, compact, level), False),
        }
        if level == "model":
            makers["no adapter, two views"] = (partial(models.without_adapters, vit, level, shared=False), False)
        if compiled:
            makers["paper, compiled"] = (partial(models.paper, vit, compact, level, compiled=True), True)
        if level != "operator":
            makers["lora"] = (partial(_lora, vit, level), False)
        for name in BACKENDS:
            # The reference on a GPU, and every backend that runs here; those that do not are rows with their reason.
            makers[f"ours, {name}"] = (partial(_ours, compact, level, name), True)
        best = best_backend(self.device)
        if compiled:
            makers[f"ours, {best}, compiled"] = (partial(_ours, compact, level, best, compiled=True), True)
        if level == "model":
            makers[f"ours, {best}, two views"] = (partial(_ours, compact, level, best, shared=False), True)
        return makers

    def turns(self) -> Iterator[Batch]:
        """The batches, over and over."""
        while True:
            yield from self.batches

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The spec's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled and self.spec.precision == "bf16")

    def forward_backward(self, learner: Learner, batch: Batch, step: int, autocast: bool = True) -> tuple[Tensor, ...]:
        """What every training contender does; gradients are left in `.grad`."""
        with self.autocast(autocast):
            outputs = learner.train(batch, step)
        if self.level == "model":
            mosa_loss(torch.cat(outputs) if len(outputs) > 1 else outputs[0], self.labels, LossConfig()).backward()
        else:
            torch.autograd.backward(outputs, self.grad.chunk(len(outputs)))
        learner.after_backward()
        return outputs

    def forget(self, learner: Learner, batch: Batch) -> None:
        """Drop all gradients."""
        for tensor in (*learner.trained(), *batch.joined, *(tensor for view in batch.views for tensor in view)):
            tensor.grad = None

    def results(self, learner: Learner, *, dropout: bool | None = None, autocast: bool = True) -> dict[str, Tensor]:
        """Outputs, gradients of a mixture's weights and of the input, on a fixed batch and draw.

        What draws by itself (the paper's way) is told what to draw, and does it without dropout.
        """
        dropout = learner.route is None if dropout is None else dropout
        batch = self.batches[0]
        if learner.route is not None:
            learner.route(models.routing_of(self.compact, CHECKED_STEP, self.device).experts)
        with _without_dropout(learner, not dropout):
            outputs = self.forward_backward(learner, batch, CHECKED_STEP, autocast)
        found = {"output": torch.cat([output.detach() for output in outputs])} | models.gradients(learner)
        if self.level != "model" and learner.adapters:
            views = [batch.joined] if batch.joined[0].grad is not None else batch.views
            found["input"] = torch.cat([view[0].grad for view in views if view[0].grad is not None])
        self.forget(learner, batch)
        return found

    def expected(self, dropout: bool) -> dict[str, Tensor]:
        """The same by the reference in float32."""
        if dropout not in self._expected:
            oracle = models.ours(self.compact, self.level, "reference", shared=False)
            oracle.module.train()
            self._expected[dropout] = self.results(oracle, dropout=dropout, autocast=False)
        return self._expected[dropout]

    def merged_logits(self) -> dict[str, Tensor]:
        """Logits of the first batch by the reference in float32."""
        oracle = models.ours(self.compact, self.level, "reference")
        oracle.module.eval()
        with torch.no_grad():
            return {"logits": oracle.evaluate(*self.batches[0].joined)}


def best_backend(device: torch.device) -> str:
    """What `auto` would take on the device."""
    kernels = ("triton", "cuda") if device.type == "cuda" else ()
    return next((name for name in kernels if unavailable_reason(name) is None), "reference")


def free_memory() -> None:
    """Let go of what a case has left."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class UnavailableError(RuntimeError):
    """A contender cannot run here; the message says why."""


def _ours(compact: AdaptedVisionTransformer, level: Level, name: str, **options: bool) -> Learner:
    reason = unavailable_reason(name)
    if reason is not None:
        raise UnavailableError(reason)
    return models.ours(compact, level, name, **options)


def _lora(vit: VisionTransformer, level: Level) -> Learner:
    reason = models.lora_unavailable()
    if reason is not None:
        raise UnavailableError(reason)
    return models.lora(vit, level)


@contextmanager
def _without_dropout(learner: Learner, wanted: bool) -> Iterator[None]:
    rates = [adapter.dropout for adapter in learner.adapters]
    try:
        for adapter in learner.adapters if wanted else ():
            adapter.dropout = 0.0
        yield
    finally:
        for adapter, rate in zip(learner.adapters, rates, strict=True):
            adapter.dropout = rate
