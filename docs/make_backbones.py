"""`python docs/make_backbones.py [--check]`: writes docs/backbones.md: what of timm's can be adapted.

Every architecture that has pretrained weights is made on the meta device (no memory, no download) and adapted; tags
only multiply its row. With `--check` nothing is written: the exit code is 1 where the file is not what this timm gives,
and 0 for a file made by another timm, of which only that every family can be adapted is checked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import mosa_fast as mosa
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.fold import why_not_folded
from mosa_fast.adapters.inside_mlp import is_exact_gelu
from mosa_fast.adapters.seams import lora_targets, seam_of

FILE = Path(__file__).parent / "backbones.md"
FAMILIES = (  # timm's modules, in the order of the table
    *("vision_transformer", "deit", "vision_transformer_hybrid", "naflexvit", "eva", "beit", "swin_transformer"),
    *("swin_transformer_v2", "swin_transformer_v2_cr", "vision_transformer_relpos", "vision_transformer_sam"),
    *("cait", "hiera", "xcit"),
)
SMALLEST = mosa.MoSAConfig(bottleneck=1, experts=1)


@dataclass(frozen=True)
class Row:
    """What the table says of an architecture; the tags of equal rows are added up."""

    family: str
    block: str
    mlp: str
    norm2: str
    adaptformer: str
    folds: str
    lora: str

    @property
    def is_adapted(self) -> bool:
        """Whether adapters can be put into it."""
        return not self.adaptformer.startswith("no")


def make(architecture: str) -> nn.Module:
    """The model on the meta device, of two blocks where its depth is one number: that is faster, and all are alike."""
    with torch.device("meta"):
        try:
            return timm.create_model(architecture, depth=2)
        except (TypeError, AssertionError):  # stages have depths of their own
            return timm.create_model(architecture)


def describe(family: str, model: nn.Module) -> Row:
    """The row of a model's blocks."""
    try:
        adapted = mosa.adapt(model, SMALLEST)
    except ValueError as error:
        kind = str(error).split(" is a ")[-1].split(",")[0]
        return Row(family, kind, "-", "-", f"no: {str(error).split(': ')[-1]}", "no", "no")
    rows = {describe_block(family, block) for block in adapted.modules() if isinstance(block, AdaptedBlock)}
    if len(rows) != 1:
        raise RuntimeError(f"{family}: blocks of different kinds in one model: {rows}")
    return rows.pop()


def describe_block(family: str, block: AdaptedBlock) -> Row:
    """The row of one block."""
    seam, mlp, norm = seam_of(block.block), block.mlp, block.norm2
    inside = "" if isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity) else " with a norm"
    activation = "exact GELU" if is_exact_gelu(mlp.act) else type(mlp.act).__name__
    return Row(
        family,
        type(block.block).__name__,
        f"{type(mlp).__name__}{inside}, {activation}",
        f"{type(norm).__name__}, eps {norm.eps:g}" + (", after the MLP" if seam.norm_after_mlp else ""),
        "inside the MLP" if seam.inside else "beside the MLP",
        why_not_folded(block) or "exactly",
        describe_targets(block.block),
    )


def describe_targets(block: nn.Module) -> str:
    """The linears in which low-rank pairs find a block's q, k, v and o."""
    linears: dict[str, list[str]] = {}
    for name, target in lora_targets(block).items():
        linears.setdefault(target.path.removeprefix("attn."), []).append(name)
    return "; ".join(f"{', '.join(names)}: `{linear}`" for linear, names in linears.items())


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def page() -> str:
    """The whole page."""
    tags: Counter[Row] = Counter()
    examples: dict[Row, str] = {}
    for family in FAMILIES:
        architectures = Counter(tag.split(".")[0] for tag in timm.list_models(pretrained=True, module=family))
        for architecture, number in sorted(architectures.items()):
            row = describe(family, make(architecture))
            tags[row] += number
            examples.setdefault(row, architecture)
    ordered = sorted(tags, key=lambda row: (FAMILIES.index(row.family), row.block, -tags[row], astuple(row)))

    def count(family: str | None, wanted: Any) -> int:
        return sum(tags[row] for row in tags if family in (None, row.family) and wanted(row))

    sums = [
        (
            family or "**all**",
            count(family, lambda row: True),
            count(family, lambda row: row.is_adapted),
            count(family, lambda row: row.folds == "exactly"),
        )
        for family in (*FAMILIES, None)
    ]
    rows = [(*astuple(row)[:2], tags[row], *astuple(row)[2:], f"`{examples[row]}`") for row in ordered]
    return f"""# Backbones

What of timm's pretrained transformers can be adapted: {sums[-1][2]} of {sums[-1][1]} pretrained tags of timm
{timm.__version__}. Made by `python docs/make_backbones.py` from the models themselves.

{table(("family", "pretrained tags", "can be adapted", "fold exactly"), sums)}

The placements pfeiffer and houlsby work wherever adaptformer does; where adaptformer sits differs, see
[method.md](method.md#placements). `fold(model)` is exact for adapters where the column says so. Low-rank pairs (MoSL)
can be on q, k, v and o of every model that can be adapted, in the linears of its attention that are named here (k's and
v's are narrower where queries are grouped), and fold exactly everywhere.

{table(("family", "block", "tags", "MLP", "norm2", "adaptformer sits", "folds", "LoRA targets", "example"), rows)}
"""


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split(": ")[1].split("\\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is another")
    options = parser.parse_args()
    text = page()
    if not options.check:
        FILE.write_text(text, encoding="utf-8")
    elif f"timm\n{timm.__version__}." in FILE.read_text(encoding="utf-8") and FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE} is not what this timm gives: run python docs/make_backbones.py")


if __name__ == "__main__":
    main()
