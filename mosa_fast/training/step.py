"""One training step. Nothing in it waits for the device: what people want to know is summed there and read later."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.backbones.frozen import draws_random_numbers
from mosa_fast.config import LossConfig, Precision
from mosa_fast.data.loading import Batch
from mosa_fast.routing import step_seed
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.losses import DEEP_BLOCKS, mosa_loss
from mosa_fast.training.position import Position
from mosa_fast.training.precision import autocast, input_dtype

GRAPH_WARMUP = 3  # steps taken eagerly before the capture, so that everything lazy has been set up


class Objective(nn.Module):
    """Model and loss in one module: what is compiled and what DistributedDataParallel wraps."""

    def __init__(
        self, model: nn.Module, config: LossConfig, precision: Precision, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.precision = model, config, precision
        self.register_buffer("class_weights", class_weights)

    def forward(self, images: Tensor, labels: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and how many of its first view's predictions are right."""
        outputs: list[Tensor] | None = [] if self.config.deep_reg and self.config.views == 2 else None
        with autocast(self.precision, images.device):
            images = images.to(input_dtype(self.precision))
            if isinstance(self.model, AdaptedModel):
                logits = self.model(images, views=self.config.views or 1, seed=seed, block_outputs=outputs)
            else:
                logits = self.model(images)
        weights: Any = self.class_weights
        loss = mosa_loss(logits, labels, self.config, weights, outputs and outputs[:DEEP_BLOCKS])
        likeliest = labels.argmax(1) if labels.is_floating_point() else labels
        return loss, (logits[: len(labels)].argmax(1) == likeliest).sum()


class TrainStep:
    """Forward, backward, update and schedule.

    A step whose gradients are not finite updates nothing and is counted; the schedule goes on.

    Args:
        objective: an Objective, or DistributedDataParallel around one.
        optimizer: a fused one (it can leave out an update without the host knowing).
        schedule: of the learning rate, per step.
        position: of the run; a step moves it on.
        ranks: the processes, and the device where the model is.
        seed: of the run.
        scale_loss: fp16: scale the loss so that small gradients survive.
        accumulate: parts that a batch is worked through in.

    Attributes:
        step: int64 scalar, the position's steps on the device.
        sums: float64 `[3]` on the device since `reset_sums`: loss times images, right predictions, images.
        bad: int64 `[3]` on the device: bad steps in a row now, the most in a row ever, all.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: Optimizer,
        schedule: LambdaLR,
        position: Position,
        ranks: Ranks,
        *,
        seed: int,
        scale_loss: bool = False,
        accumulate: int = 1,
    ) -> None:
        self.objective, self.optimizer, self.schedule, self.position = objective, optimizer, schedule, position
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ranks, self.device = ranks, ranks.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)
        self.seed, self.accumulate = seed, accumulate
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.bad = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.backbone_draws = draws_random_numbers(objective)

    def __call__(self, batch: Batch) -> None:
        """Take a step on this process's part of a batch, which is on the device."""
        self.seed_backbone()
        self.compute(batch)
        self.advance()

    def seed_backbone(self) -> None:
        """Make what a frozen backbone's own dropout and drop-path draw a function of (seed, step, rank)."""
        if self.backbone_draws:
            number = (self.seed * 1_000_003 + self.position.steps) * self.ranks.world + self.ranks.rank
            torch.manual_seed(number % 2**64)

    def advance(self) -> None:
        """The host's part of a step: it counts, and sets the next learning rate."""
        self.schedule.step()
        self.position.steps += 1

    def averages(self) -> tuple[float, float]:
        """Mean loss, and accuracy of the first view in percent, over all processes since `reset_sums`; this waits."""
        loss, right, seen = self.ranks.sum(self.sums).tolist()
        return loss / max(1.0, seen), 100 * right / max(1.0, seen)

    def reset_sums(self) -> None:
        """Begin to average anew."""
        self.sums.zero_()

    def count_bad_steps(self, most: int) -> int:
        """The number of bad steps so far; this waits for the device.

        Raises:
            ValueError: there were `most` of them in a row.
        """
        _, longest, total = self.bad.tolist()
        if longest >= most:
            raise ValueError(
                f"training diverged: the gradients of {longest} steps in a row were not finite (by step "
                f"{self.position.steps}); try a lower optim.lr or a longer warm-up. The last checkpoint is kept"
            )
        return total

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: of the sums, each process's own. All processes have to ask."""
        return {"sums": self.ranks.gather(self.sums), "bad": self.bad, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the position has been loaded before."""
        self.step.fill_(self.position.steps)
        self.sums.copy_(state["sums"][self.ranks.rank])
        self.bad.copy_(state["bad"])
        self.scaler.load_state_dict(state["scaler"])

    def compute(self, batch: Batch) -> None:
        """The device's part of a step."""
        self.optimizer.zero_grad()
        parts = min(self.accumulate, len(batch.labels))
        start, losses, right = batch.first, [], []
        pairs = zip(batch.images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True)
        for part, (x, y) in enumerate(pairs):
            seed = step_seed(self.seed, self.step, start, self.device)
            wrapped = isinstance(self.objective, DistributedDataParallel)
            with self.objective.no_sync() if wrapped and part < parts - 1 else nullcontext():  # type: ignore[operator]
                loss, correct = self.objective(x, y, seed)
                # Processes average their gradients, so each weighs its part of the batch by the number of them.
                weight = 0.0 if batch.count == 0 else self.ranks.world * len(y) / batch.total
                self.scaler.scale(loss * weight).backward()
            losses.append(loss.detach() * len(y))
            right.append(correct)
            start += len(y)
        self._update()
        self._count(torch.stack(losses).sum(), torch.stack(right).sum(), batch.count)

    def _update(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._is_bad = ~norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = self._is_bad.float()  # type: ignore[attr-defined]  # the fused kernel reads it
            self.optimizer.step()

    def _count(self, loss: Tensor, right: Tensor, count: int) -> None:
        good = ~self._is_bad
        seen = good * float(count)
        values = torch.stack([loss.double(), right.double(), torch.full_like(loss, count, dtype=torch.float64)])
        # A comparison, because zero times a loss that is not a number is not zero.
        self.sums += torch.where(seen > 0, values, 0.0)
        streak = (self.bad[0] + 1) * self._is_bad
        self.bad.copy_(torch.stack([streak, torch.maximum(self.bad[1], streak), self.bad[2] + self._is_bad]))
        self.step += 1


class GraphedStep:
    """A TrainStep replayed from a CUDA graph: captured whole on one GPU, with the batch in fixed buffers.

    The first steps, and batches of another size (the last of an epoch), run eagerly. What changes from step to step is
    on the device: the batch, the step number (and with it experts and dropout), and the learning rate.

    Args:
        step: on a CUDA device, its optimizer with a tensor for the learning rate (`make_optimizer(graphed=True)`).
    """

    def __init__(self, step: TrainStep) -> None:
        self.eager = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.images = self.labels = torch.empty(0)
        self.side = torch.cuda.Stream(step.device)
        self.warmed_up = 0

    def __call__(self, batch: Batch) -> None:
        """As TrainStep's; there is one process, so the batch is whole."""
        step, images, labels = self.eager, batch.images, batch.labels
        step.seed_backbone()
        if self.graph is not None and images.shape == self.images.shape:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()
        elif self.graph is None and self.warmed_up >= GRAPH_WARMUP and images.shape == self.images.shape:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self._capture()
        else:
            # Where captures warm up: on the stream's own memory, not on the default one's.
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                step.compute(batch)
            torch.cuda.current_stream().wait_stream(self.side)
            if self.graph is None:
                same = images.shape == self.images.shape
                self.warmed_up = self.warmed_up + 1 if same else 1
                if not same:
                    self.images, self.labels = images.clone(), labels.clone()
        step.advance()

    def _capture(self) -> None:
        step, graph = self.eager, torch.cuda.CUDAGraph()
        step.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=self.side):
            step.compute(Batch(self.images, self.labels, 0, len(self.labels), len(self.labels)))
        self.graph = graph
        graph.replay()  # capturing records the step without taking it
