"""How many weights a model trains, keeps in its adapter file, and computes with after merging; how it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.inside_mlp import FASTER_FROM, why_branch
from mosa_fast.adapters.wrapper import unwrapped_name
from mosa_fast.backbones.heads import classifiers
from mosa_fast.nn import SparseProjection
from mosa_fast.nn.mixture import MixtureLayer
from mosa_fast.options import counted


@dataclass(frozen=True)
class Part:
    """Counts of one part of a model.

    Attributes:
        trained: values that the optimizer updates.
        stored: values in an adapter file, owner maps and initial weights included.
        merged: values that evaluation computes with, when the experts are one dense adapter.
    """

    name: str
    trained: int = 0
    stored: int = 0
    merged: int = 0

    def __add__(self, other: Part) -> Part:
        counts = (self.trained + other.trained, self.stored + other.stored, self.merged + other.merged)
        return Part(self.name, *counts)


@dataclass(frozen=True)
class Summary:
    """Parts of a model; `print(summary)` shows a table.

    Attributes:
        parts: of the table.
        branches: of every block with adapters, by timm name, why they are computed beside its MLP (form branch); None:
            inside the MLP's products (form mlp). See MoSAConfig.form. Empty on "meta", where nothing is computed.
        inside_from: that only for inputs of so many values (views x images x tokens x width); 0: for all.
    """

    parts: tuple[Part, ...]
    branches: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    inside_from: int = 0

    def __getitem__(self, name: str) -> Part:
        """A part by its name, or "adapters" or "all": the sum of the adapters' parts, or of everything."""
        parts = self.parts if name == "all" else [part for part in self.parts if part.name not in ("head", "backbone")]
        if name in ("all", "adapters"):
            return sum(parts, Part(name))
        return next((part for part in self.parts if part.name == name), Part(name))

    def __str__(self) -> str:
        header = ("", "trained", "stored", "merged")
        rows = [(p.name, f"{p.trained:,}", f"{p.stored:,}", f"{p.merged:,}") for p in (*self.parts, self["all"])]
        first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
        lines = [
            f"{name:<{first}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, others, strict=True))
            for name, *cells in (header, *rows)
        ]
        lines.insert(-1, "-" * len(lines[0]))
        portion = self["all"].trained / max(1, self["all"].merged)
        return "\n".join([*lines, f"trained: {portion:.2%} of the weights that the merged model has{self._forms()}"])

    def _forms(self) -> str:
        counts = Counter(self.branches.values())
        inside = f"form mlp (for inputs of {self.inside_from:,} values or more)" if self.inside_from else "form mlp"
        forms = (inside if reason is None else f"form branch ({reason})" for reason in counts)
        return "".join(f"; {form}: {counted(n, 'block')}" for form, n in zip(forms, counts.values(), strict=True))


def summary(model: nn.Module) -> Summary:
    """Counts of a timm model, adapted or not, by part.

    Args:
        model: any timm model, or what `adapt` made of one; on any device, also "meta".
    """
    found: dict[str, Part] = {}
    seen: set[int] = set()

    def add(name: str, tensors: Iterable[Tensor], *, stored: bool = False, merged: int | None = None) -> None:
        new = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(map(id, new))
        trained = sum(tensor.numel() for tensor in new if tensor.requires_grad)
        every = sum(tensor.numel() for tensor in new)
        part = Part(name, trained, every if stored else trained, every if merged is None else merged)
        found[name] = found.get(name, Part(name)) + part

    branches: dict[str, str | None] = {}
    inside_from = 0
    for path, module in model.named_modules():
        if isinstance(module, AdaptedBlock) and not module.linears and not next(module.parameters()).is_meta:
            reason = branches[unwrapped_name(path).removeprefix("backbone.")] = why_branch(module)
            if reason is None and module.form == "auto":
                inside_from = FASTER_FROM
        if isinstance(module, MixtureLayer):
            for name, projection in (("down-projections", module.down), ("up-projections", module.up)):
                add(name, _all(projection), stored=True, merged=projection.merged_parameters)
            norm = getattr(module, "norm", None)
            if norm is not None:
                add("norms", norm.parameters(), stored=True)
            if isinstance(module.scale, nn.Parameter):
                add("scales", [module.scale], stored=True)
    for head in classifiers(model):
        add("head", _all(head), stored=True)
    add("backbone", model.parameters())
    return Summary(tuple(found.values()), branches, inside_from)


def _all(module: SparseProjection | nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
