"""Data and oracle of one spec: learners run here, and what they compute is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.learner import Batch, Learner
from benchmarks.models import Setting
from benchmarks.ours import mixture_learner
from benchmarks.spec import CLASSES, VIEWS, Level, Spec
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.config import LossConfig, Precision
from mosa_fast.training.losses import mosa_loss
from mosa_fast.training.precision import AUTOCAST, autocast, input_dtype

BATCHES = 4  # inputs take turns, so that no run finds its own in a cache
CHECKED_STEP = models.DRAWS - 1  # whose draws are compared


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
        self._expected: dict[tuple[int, int, bool], dict[str, Tensor]] = {}
        joined = self.batches[0].joined
        # Of the shape that a layer or a block gives: the last input's, that of h or the linear's output.
        self.grad = torch.randn(joined[-1].shape, generator=generator, device=device).to(joined[0].dtype)

    def _batch(self, generator: torch.Generator) -> Batch:
        spec = self.spec
        if self.level == "model":
            shapes = [(spec.images, 3, *self.setting.backbone.patch_embed.img_size)]
            dtypes = [input_dtype(spec.precision)]
        else:
            width = self.setting.backbone.embed_dim
            widths = {"operator": (width, width), "lora": (width, 3 * width), "block": (width,)}[self.level]
            shapes = [(VIEWS * spec.images, spec.tokens, width) for width in widths]
            dtypes = list(stream_dtypes(spec.precision))[: len(widths)]
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
            learner.route(models.draw_step(learner.mixture, CHECKED_STEP, self.device, learner.views).experts)
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

    def expected(self, learner: Learner, dropout: bool) -> dict[str, Tensor]:
        """What a learner that has a mixture or a truth should find, in float32; of a mixture, by the reference."""
        if learner.mixture is None:
            assert learner.truth is not None
            return self._exact(learner.truth(), dropout)
        key = (id(learner.mixture), learner.views, dropout)
        if key not in self._expected:
            oracle = mixture_learner(
                learner.mixture, learner.mixture, self.level, "reference", views=learner.views, together=False
            )
            self._expected[key] = self._exact(oracle, dropout)
        return self._expected[key]

    def _exact(self, oracle: Learner, dropout: bool) -> dict[str, Tensor]:
        oracle.module.train()
        joined = self.batches[0].joined
        exact = tuple(tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in joined)
        return self.results(oracle, dropout=dropout, exact=Batch(exact, self.level))

    def merged_logits(self, mixture: AdaptedModel) -> dict[str, Tensor]:
        """Logits of the first batch by the reference in float32."""
        oracle = mixture_learner(mixture, mixture, self.level, "reference")
        oracle.module.eval()
        with torch.no_grad():
            (images,) = self.batches[0].joined
            return {"logits": oracle.evaluate(images.float())}

    def state_bytes(self, learner: Learner) -> int:
        """Bytes of everything but the frozen backbone: weights, copies, masks and maps, and AdamW's two moments."""
        backbone, trained = self.setting.backbone, _nbytes(learner.trained())
        frozen = _nbytes(p for p in backbone.parameters() if not p.requires_grad) + _nbytes(backbone.buffers())
        everything = _nbytes(learner.module.parameters()) + _nbytes(learner.module.buffers())
        # What a method trains of the backbone is not frozen: only what it does not train can be.
        return everything - min(frozen, everything - trained) + 2 * trained


def stream_dtypes(precision: Precision) -> tuple[torch.dtype, torch.dtype]:
    """Of the residual stream and of the MLP's output, in a model of that precision."""
    stream = input_dtype(precision)
    return stream, AUTOCAST.get(precision, stream)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def _dropout(learner: Learner, wanted: bool) -> Iterator[None]:
    rates = {adapter: adapter.dropout for adapter in learner.adapters if hasattr(adapter, "dropout")}
    try:
        for adapter, rate in rates.items():
            adapter.dropout = rate if wanted else 0.0
        yield
    finally:
        for adapter, rate in rates.items():
            adapter.dropout = rate
