"""What is measured: a case at a shape, in a precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mosa_fast.config import MoSAConfig, Precision

Level = Literal["operator", "lora", "block", "model"]
Mode = Literal["all", "forward", "backward"]

VIEWS = 2
CLASSES = 200
CONFIG = MoSAConfig(bottleneck=64, experts=4)  # the paper's for FGVC: parallel to the MLP, dense down-projection
LORA_CONFIG = replace(CONFIG, method="lora")  # MoSL: pairs of rank 16 on q and v
DENSE_LORA_CONFIG = replace(LORA_CONFIG, experts=1)
OPERATORS = ("operator", "lora")  # cases of one operator alone
BANKS = {f"bank{tasks}": tasks for tasks in (1, 8, 64)}  # cases of serving, by the number of tasks
EVALUATIONS = ("evaluation", *BANKS)  # cases without a backward


@dataclass(frozen=True)
class Spec:
    """One shape of one case.

    Attributes:
        case: a name in `benchmarks.cases.CASES`.
        backbone: timm's name.
        images: per view.
        precision: as a training run has it.
        tokens: of an image; a whole model has its backbone's number.
        compiled: have the contenders under torch.compile too.
        modes: what is timed: all of the case's work; of an operator or a block also its forward or backward alone.
        repeats: timed runs of each contender, where there is time for them.
        weight: the spec's part of its suite's time, relative to the other specs'.
    """

    case: str
    backbone: str
    images: int
    precision: Precision
    tokens: int = 197
    compiled: bool = False
    modes: tuple[Mode, ...] = ("all",)
    repeats: int = 10
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.case} {self.backbone} {self.images} x {self.tokens} {self.precision}"
