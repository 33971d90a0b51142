"""The registry of contenders: no adapters, ours, the paper's way of working, a dense adapter, LoRA, other methods.

A contender is a function from a `Setting` to a `Learner`, registered under its name: a new one needs no change anywhere
else. Where there is little time, those at the end of this file are left out first. All stand on the same timm ViT (no
dropout or drop-path of its own) with a trained head; it is frozen but for what a method of a run trains of it. All see
two views of the same images, but for methods that have one.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.learner import Batch, Learner
from benchmarks.models import Setting
from benchmarks.ours import backends_of, best_backend, int8_backbone, method, mixture_learner, ours
from benchmarks.plain import CopiedAdapter, DenseAdapter, PlainModel
from benchmarks.plain_lora import CopiedPairs, CopiedPairsModel, GivenTargets, PeftPairs, SeparateQKV
from benchmarks.spec import CONFIG, DENSE_LORA_CONFIG, LORA_CONFIG, OPERATORS, VIEWS, Spec
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.methods import METHODS, Method
from mosa_fast.nn.mixture import adapters
from mosa_fast.ops.backends import unavailable_reason


@dataclass(frozen=True)
class Entry:
    """A registered contender.

    Attributes:
        make: the function.
        cases: those it takes part in.
        when: whether it takes part in a spec of theirs on a device.
        unavailable: why it cannot run here; None: it can.
        views_together: in a training step, what the views have in common is run once.
    """

    make: Callable[[Setting], Learner]
    cases: tuple[str, ...]
    when: Callable[[Spec, torch.device], bool] = lambda spec, device: True
    unavailable: Callable[[], str | None] = lambda: None
    views_together: bool = False

    def takes_part(self, spec: Spec, device: torch.device) -> bool:
        """Whether it is a row of the spec."""
        return spec.case in self.cases and self.when(spec, device)


CONTENDERS: dict[str, Entry] = {}
ALL_CASES = ("operator", "block", "step", "evaluation")  # of adapters
LORA_CASES = ("lora", "step")
NO_ADAPTER, NO_ADAPTER_APART = "no adapter", "no adapter, two views"
VARIANTS = ("compiled", "two views")  # ends of names; a variant has its contender's colour in the plots

_Maker = TypeVar("_Maker", bound=Callable[..., Learner])


def contender(name: str, cases: tuple[str, ...] = ALL_CASES, **options: Any) -> Callable[[_Maker], _Maker]:
    """Register a contender under a name; the options are `Entry`'s."""

    def register(make: _Maker) -> _Maker:
        CONTENDERS[name] = Entry(make, cases, **options)
        return make

    return register


def split_variant(name: str) -> tuple[str, str]:
    """A row's name as contender and variant ("" where it is none): ("ours, triton", "compiled")."""
    start, _, end = name.rpartition(", ")
    return (start, end) if end in VARIANTS else (name, "")


# Nothing


@contender(NO_ADAPTER, views_together=True)
def without_adapters(setting: Setting) -> Learner:
    """The same work without adapters; a model's first block runs once, and its output is repeated."""
    return _without_adapters(setting, together=True)


@contender(NO_ADAPTER_APART, cases=("step",))
def without_adapters_apart(setting: Setting) -> Learner:
    """The same work without adapters, both views from the pixels on."""
    return _without_adapters(setting, together=False)


def _without_adapters(setting: Setting, *, together: bool) -> Learner:
    # In a model gradients flow from the head to the output of the first block: with adapters that is as far as they
    # reach, since the first adapter is the first thing that is trained.
    model, level = copy.deepcopy(setting.backbone), setting.level

    def fork(block: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        x = repeat_batch(x, VIEWS) if together and block.training else x
        return x.detach().requires_grad_(block.training)

    if level == "model":
        model.blocks[0].register_forward_hook(fork)

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        if level == "operator":
            h, skip = batch.joined
            return (h + skip,)
        if level == "block":
            return (model.blocks(*batch.joined),)
        return (model(*(batch.joined if together else batch.repeated())),)

    return Learner(model, train, model)


# Ours: adapters, and low-rank pairs (MoSL)


def _when_best(name: str, operator: str, spec: Spec, device: torch.device) -> bool:
    return name == best_backend(device, operator)


def _when_shown(name: str, operator: str, spec: Spec, device: torch.device) -> bool:
    # Those that cannot serve here are rows with their reason; among the methods of a run, one backend is enough.
    return spec.case != "methods" or _when_best(name, operator, spec, device)


for _title, _operator, _config, _cases in (
    ("ours", "sparse_adapter", CONFIG, ALL_CASES),
    ("MoSL", "sparse_lora", LORA_CONFIG, LORA_CASES),
):
    for _name in backends_of(_operator):
        contender(
            f"{_title}, {_name}",
            (*_cases, "methods"),
            when=partial(_when_shown, _name, _operator),
            unavailable=partial(unavailable_reason, _name),
            views_together=_title == "ours",  # pairs begin in the first block, where the views part
        )(partial(ours, backend_name=_name, config=_config))
for _name in backends_of("sparse_adapter"):  # a variant that cannot serve is no row
    contender(f"ours, {_name}, two views", ("step",), when=partial(_when_best, _name, "sparse_adapter"))(
        partial(ours, backend_name=_name, together=False)
    )


@contender("ours, mlp", ("block", "step", "evaluation"), views_together=True)
def inside_mlp(setting: Setting) -> Learner:
    """Our adapters inside the products of their blocks' MLPs; they must compute what those beside them do."""
    model = setting.stored(setting.mixture(replace(CONFIG, form="mlp")))
    return mixture_learner(model, setting.mixture(), setting.level, "reference")


def _int8_unavailable() -> str | None:
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        return f'there is no torchao for this torch: pip install -e ".[int8]" ({error})'
    return None


contender("ours, int8 backbone", ("step", "evaluation"), unavailable=_int8_unavailable, views_together=True)(
    int8_backbone
)


# The paper's way of working


@contender("paper")
def paper(setting: Setting, compiled: bool = False) -> Learner:
    """E copies, experts drawn by Python's generator, a whole forward for each view, masks after backward."""
    mixture = setting.mixture()
    copies = [CopiedAdapter(adapter) for adapter in adapters(mixture)]
    return _by_copies(mixture, copies, PlainModel(setting.backbone, copies, setting.level, compiled))


@contender("paper, MoSL", LORA_CASES)
def paper_pairs(setting: Setting) -> Learner:
    """The same with low-rank pairs."""
    mixture = setting.mixture(LORA_CONFIG)
    copies = [CopiedPairs(pairs) for pairs in adapters(mixture)]
    return _by_copies(mixture, copies, CopiedPairsModel(setting.backbone, copies, setting.level))


def _by_copies(
    mixture: AdaptedModel,
    copies: Sequence[CopiedAdapter | CopiedPairs],
    model: PlainModel | CopiedPairsModel,
) -> Learner:
    draws, number = random.Random(0), mixture.mosa_config.experts
    count = sum(layer.draws for layer in adapters(mixture))
    given: list[list[int]] = []

    def route(experts: Tensor) -> None:
        given[:] = [experts[:, view, 1].tolist() for view in range(VIEWS)]

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        routes = given or [[draws.randrange(number) for _ in range(count)] for _ in range(VIEWS)]
        return tuple(model(*view, experts=route) for view, route in zip(batch.views, routes, strict=True))

    def mask_gradients() -> None:
        for copied in copies:
            copied.mask_gradients()

    def merge() -> None:
        for copied in copies:
            copied.merge()

    return Learner(
        model,
        train,
        model,
        mixture,
        adapters=copies,
        separate=True,
        route=route,
        after_backward=mask_gradients,
        prepare_evaluation=merge,
    )


# Dense ones: AdaptFormer's adapter, and LoRA by the peft library


@contender("dense")
def dense(setting: Setting) -> Learner:
    """AdaptFormer's dense adapter, two dropout views in one batch."""
    made = [DenseAdapter(adapter) for adapter in adapters(setting.mixture())]
    model = PlainModel(setting.backbone, made, setting.level, compiled=False)
    return Learner(model, lambda batch, step: (model(*batch.repeated()),), model)


def peft_unavailable() -> str | None:
    """Why there is no contender of the peft library; None: there is."""
    return None if importlib.util.find_spec("peft") else 'peft is not installed: pip install -e ".[compare]"'


@contender("peft, q and v", LORA_CASES, unavailable=peft_unavailable)
def peft_q_and_v(setting: Setting) -> Learner:
    """LoRA on the targets that MoSL has, which stand apart for it; two views in one batch."""
    mixture = setting.mixture(DENSE_LORA_CONFIG)
    layers = list(adapters(mixture))
    if setting.level == "lora":
        model: Any = _with_peft(GivenTargets(layers[0]), ["q", "v"])
        run = model.base_model.model
        pairs = [PeftPairs([run.q, run.v], layers[0])]
    else:
        model = copy.deepcopy(setting.backbone)
        for block in model.blocks:
            block.attn.qkv = SeparateQKV(block.attn.qkv)
        run = model = _with_peft(model, ["q", "v"], modules_to_save=["head"])
        linears = [block.attn.qkv for block in model.base_model.model.blocks]
        pairs = [PeftPairs([qkv.q, qkv.v], layer) for qkv, layer in zip(linears, layers, strict=True)]
    return Learner(model, lambda batch, step: (run(*batch.repeated()),), model, mixture, adapters=pairs)


@contender("peft, fused qkv", ("block", "step", "evaluation"), unavailable=peft_unavailable)
def peft_fused(setting: Setting) -> Learner:
    """LoRA as it is put into timm's models: one pair on q, k and v together; two views in one batch."""
    model = _with_peft(copy.deepcopy(setting.backbone), ["qkv"], modules_to_save=["head"])
    run = model if setting.level == "model" else model.base_model.model.blocks
    return Learner(model, lambda batch, step: (run(*batch.repeated()),), model)


def _with_peft(model: nn.Module, targets: list[str], **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    rank = DENSE_LORA_CONFIG.rank
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options))


# What else a run can train: from the registry of methods


def _when_allowed(row: Method, spec: Spec, device: torch.device) -> bool:
    return row.freezes_backbone or spec.precision != "bf16-true"


for _row in METHODS.values():
    # mosa is a contender above, with adapters and with pairs; scratch costs what full does.
    if _row.name not in ("mosa", "scratch"):
        contender(_row.name, ("methods",), when=partial(_when_allowed, _row))(partial(method, row=_row))


# Under torch.compile


def _when_best_compiled(name: str, operator: str, spec: Spec, device: torch.device) -> bool:
    # The compiled reference is what a fused operator has to beat.
    beaten = name == "reference" and spec.case in OPERATORS
    return spec.compiled and (beaten or _when_best(name, operator, spec, device))


def _when_compiled(spec: Spec, device: torch.device) -> bool:
    return spec.compiled


for _name in backends_of("sparse_adapter"):
    _when = partial(_when_best_compiled, _name, "sparse_adapter")
    contender(f"ours, {_name}, compiled", when=_when, views_together=True)(
        partial(ours, backend_name=_name, compiled=True)
    )
for _name in backends_of("sparse_lora"):
    _when = partial(_when_best_compiled, _name, "sparse_lora")
    contender(f"MoSL, {_name}, compiled", ("lora",), when=_when)(
        partial(ours, backend_name=_name, config=LORA_CONFIG, compiled=True)
    )
contender("paper, compiled", when=_when_compiled)(partial(paper, compiled=True))
