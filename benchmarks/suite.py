"""What the suites measure: their specs, and the minutes they have."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import serving  # noqa: F401  # registers its cases
from benchmarks.cases import COPY
from benchmarks.contenders import NO_ADAPTER
from benchmarks.spec import BANKS, OPERATORS, Mode, Spec


@dataclass(frozen=True)
class Suite:
    """Specs in the order in which they run, and the minutes they may take.

    Attributes:
        specs: each gets its part of the time that is left when it begins, by its weight.
        minutes: of all.
        contenders: those that take part; all of the cases' where empty.
        gpu: needs one.
    """

    specs: tuple[Spec, ...]
    minutes: float
    contenders: tuple[str, ...] = ()
    gpu: bool = False


def _gpu_specs() -> tuple[Spec, ...]:
    base = "vit_base_patch16_224"
    first = [
        Spec("step", base, 128, "bf16-mixed", compiled=True, weight=6),
        Spec("operator", base, 128, "bf16-mixed", compiled=True, repeats=30, weight=2),
        Spec("step", base, 128, "bf16-true", weight=2),
        Spec("step", base, 128, "fp32", repeats=5, weight=2),
        Spec("operator", base, 128, "fp32", compiled=True, repeats=30, weight=2),
        Spec("block", base, 128, "bf16-mixed", compiled=True, repeats=20, weight=3),
        Spec("lora", base, 128, "bf16-mixed", compiled=True, repeats=30, weight=2),
        Spec("methods", base, 128, "bf16-mixed", weight=2),
        Spec("evaluation", base, 128, "bf16-mixed", compiled=True, weight=4),
        Spec("evaluation", base, 128, "fp32", repeats=5),
        *(Spec(case, base, 128, "bf16-mixed") for case in BANKS),
    ]
    batches = [Spec("operator", base, images, "bf16-mixed", repeats=20) for images in (8, 32, 512)]
    tokens = [Spec("operator", base, 32, "bf16-mixed", tokens=count, repeats=20) for count in (50, 577, 1370)]
    return (*first, *batches, *tokens)


def _operator_specs() -> tuple[Spec, ...]:
    base = "vit_base_patch16_224"
    others = ("vit_small_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")  # 384, 1,024 and 1,280 wide
    modes: tuple[Mode, ...] = ("forward", "backward", "all")
    shapes = [(base, 64), (base, 128), *((name, images) for name in (base, *others) for images in (4, 512))]
    adapters = [(name, images, name == base) for name, images in shapes]
    return (
        # torch.compile takes longer than everything else: at one width only
        *(
            Spec("operator", name, images, "bf16-true", compiled=compiled, modes=modes, weight=3 if compiled else 1)
            for name, images, compiled in adapters
        ),
        *(Spec("lora", base, images, "bf16-true", modes=modes) for images in (4, 128)),
    )


def _step_specs() -> tuple[Spec, ...]:
    return tuple(Spec("step", "vit_base_patch16_224", 128, precision) for precision in ("bf16-mixed", "bf16-true"))


def _quick_specs() -> tuple[Spec, ...]:
    tiny, small = "vit_tiny_patch16_224", "vit_small_patch16_224"
    # The longest come last, and have the time that the others left: on slow cores they would leave none.
    return (
        *(Spec("operator", tiny, images, "fp32") for images in (2, 32)),
        *(Spec("operator", tiny, 8, "fp32", tokens=count) for count in (50, 577)),
        Spec("lora", tiny, 8, "fp32"),
        Spec("block", tiny, 4, "fp32"),
        Spec("evaluation", tiny, 4, "fp32"),
        Spec("bank8", tiny, 8, "fp32"),
        Spec("operator", tiny, 8, "fp32", compiled=True, weight=4),
        Spec("methods", small, 1, "fp32", weight=3),
        Spec("step", small, 1, "fp32", weight=5),
    )


def _full_specs() -> tuple[Spec, ...]:
    base = "vit_base_patch16_224"
    return (
        *(Spec(case, base, 8, "fp32") for case in OPERATORS),
        Spec("block", base, 4, "fp32"),
        Spec("evaluation", base, 4, "fp32"),
        Spec("methods", base, 1, "fp32", weight=4),
        Spec("step", base, 1, "fp32", weight=6),
    )


def _bank_specs() -> tuple[Spec, ...]:
    # One image of every task, where they differ most: with eight of each, swapping is nearly as fast on a CPU.
    images = {case: max(8, tasks) for case, tasks in BANKS.items()}
    return tuple(
        Spec(case, "vit_tiny_patch16_224", count, "fp32", repeats=20, weight=count) for case, count in images.items()
    )


SUITES = {
    "quick": Suite(_quick_specs(), 2),
    "full": Suite(_full_specs(), 8),
    "gpu": Suite(_gpu_specs(), 8, gpu=True),
    "bank": Suite(_bank_specs(), 6),
    "operator": Suite(
        _operator_specs(),
        2,
        (
            *(COPY, "ours, reference", "ours, reference, compiled", "ours, triton", "ours, cuda"),
            *("MoSL, reference", "MoSL, triton", "peft, q and v"),
        ),
        gpu=True,
    ),
    "step": Suite(
        _step_specs(),
        2,
        (NO_ADAPTER, "ours, triton", "ours, mlp", "paper", "dense", "peft, q and v", "peft, fused qkv"),
        gpu=True,
    ),
}
