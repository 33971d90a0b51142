"""Data and oracle of one spec: learners run here, and what they compute is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.contenders import mixture_learner
from benchmarks.learner import Batch, Learner
from benchmarks.models import Setting
from benchmarks.spec import CLASSES, VIEWS, Level, Spec
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.config import LossConfig, Precision
from mosa_fast.training.losses import mosa_loss
from mosa_fast.training.precision import AUTOCAST, autocast, input_dtype

BATCHES = 4  # inputs take turns, so that no run finds its own in a cache
CHECKED_STEP = 1234  # whose draws are compared


class Workbench:
    """What the contenders of one spec have in common.

    Attributes:
        setting: backbone and mixtures.
        batches: inputs.
    """

    def __init__(self, spec: Spec, device: torch.device, level: Level) -> None:
        self.spec, self.device, self.level = spec, device, level
        self.setting = Setting(spec, device, level)
        generator = torch.Generator(device).manual_seed(0)
        self.batches = [self._batch(generator) for _ in range(BATCHES)]
        self.labels = torch.randint(CLASSES, (spec.images,), generator=generator, device=device)
        self._expected: dict[tuple[int, bool], dict[str, Tensor]] = {}
        first = self.batches[0].joined
        self.grad = torch.randn(first[0].shape, generator=generator, device=device).to(first[0].dtype)

    def _batch(self, generator: torch.Generator) -> Batch:
        spec = self.spec
        if self.level == "model":
            shapes = [(spec.images, 3, *self.setting.backbone.patch_embed.img_size)]
            dtypes = [input_dtype(spec.precision)]
        else:
            dtypes = list(stream_dtypes(spec.precision))[: 2 if self.level == "operator" else 1]
            shapes = [(VIEWS * spec.images, spec.tokens, self.setting.backbone.embed_dim)] * len(dtypes)
        drawn = [
            torch.randn(shape, generator=generator, device=self.device).to(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        return Batch(tuple(tensor.requires_grad_(self.level != "model") for tensor in drawn), self.level)

    def turns(self) -> Iterator[Batch]:
        """The batches, over and over."""
        while True:
            yield from self.batches

    def forward(self, learner: Learner, batch: Batch, step: int) -> tuple[Tensor, ...]:
        """The learner's outputs in the spec's precision."""
        with autocast(self.spec.precision, self.device):
            return learner.train(batch, step)

    def evaluate(self, learner: Learner, batch: Batch) -> Tensor:
        """Logits in the spec's precision."""
        with autocast(self.spec.precision, self.device):
            return learner.evaluate(*batch.joined)

    def backward(self, learner: Learner, outputs: tuple[Tensor, ...]) -> None:
        """From outputs to gradients, which are left in `.grad`."""
        if self.level == "model":
            mosa_loss(torch.cat(outputs) if len(outputs) > 1 else outputs[0], self.labels, LossConfig()).backward()
        else:
            halves = self.grad.chunk(len(outputs))
            torch.autograd.backward(
                outputs, [half.to(output.dtype) for half, output in zip(halves, outputs, strict=True)]
            )
        learner.after_backward()

    def results(
        self, learner: Learner, *, dropout: bool | None = None, exact: Batch | None = None
    ) -> dict[str, Tensor]:
        """Outputs, gradients of a mixture's weights and of the input, of the first batch and a fixed draw.

        Args:
            learner: what computes them.
            dropout: whether there is any. None: what draws by itself (the paper's way) has none, since it would drop
                others than the oracle does.
            exact: the first batch in float32, on which the learner works without autocast.
        """
        dropout = learner.route is None if dropout is None else dropout
        if learner.route is not None and learner.mixture is not None:
            learner.route(models.draw_step(learner.mixture, CHECKED_STEP, self.device).experts)
        batch = exact or self.batches[0]
        with _dropout(learner, dropout):
            forward = learner.train if exact else partial(self.forward, learner)
            outputs = forward(batch, CHECKED_STEP)
            self.backward(learner, outputs)
        found = {"output": torch.cat([output.detach() for output in outputs])} | learner.gradients()
        if self.level != "model" and learner.adapters:
            inputs = [view[0].grad for view in (batch.views if learner.separate else [batch.joined])]
            found["input"] = torch.cat([gradient for gradient in inputs if gradient is not None])
        self.forget(learner, batch)
        return found

    def forget(self, learner: Learner, batch: Batch) -> None:
        """Drop all gradients."""
        for tensor in (*learner.trained(), *batch.tensors()):
            tensor.grad = None

    def expected(self, mixture: AdaptedModel, dropout: bool) -> dict[str, Tensor]:
        """The same by the reference in float32."""
        key = (id(mixture), dropout)
        if key not in self._expected:
            oracle = mixture_learner(mixture, mixture, self.level, "reference", together=False)
            oracle.module.train()
            joined = self.batches[0].joined
            exact = tuple(tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in joined)
            self._expected[key] = self.results(oracle, dropout=dropout, exact=Batch(exact, self.level))
        return self._expected[key]

    def merged_logits(self, mixture: AdaptedModel) -> dict[str, Tensor]:
        """Logits of the first batch by the reference in float32."""
        oracle = mixture_learner(mixture, mixture, self.level, "reference")
        oracle.module.eval()
        with torch.no_grad():
            (images,) = self.batches[0].joined
            return {"logits": oracle.evaluate(images.float())}

    def state_bytes(self, learner: Learner) -> int:
        """Bytes of everything but the frozen backbone: weights, copies, masks and maps, and AdamW's two moments."""
        backbone = self.setting.backbone
        frozen = _nbytes(p for p in backbone.parameters() if not p.requires_grad) + _nbytes(backbone.buffers())
        everything = _nbytes(learner.module.parameters()) + _nbytes(learner.module.buffers())
        return everything - frozen + 2 * _nbytes(learner.trained())


def stream_dtypes(precision: Precision) -> tuple[torch.dtype, torch.dtype]:
    """Of the residual stream and of the MLP's output, in a model of that precision."""
    stream = input_dtype(precision)
    return stream, AUTOCAST.get(precision, stream)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def _dropout(learner: Learner, wanted: bool) -> Iterator[None]:
    rates = [adapter.dropout for adapter in learner.adapters]
    try:
        for adapter, rate in zip(learner.adapters, rates, strict=True):
            adapter.dropout = rate if wanted else 0.0
        yield
    finally:
        for adapter, rate in zip(learner.adapters, rates, strict=True):
            adapter.dropout = rate
