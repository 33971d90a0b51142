"""Where a timm block can be taken apart: the only file that knows timm's blocks, a few lines a family.

A seam cuts a block's own forward into its attention and its MLP, from the block's untouched children, so that a layer
can read and add between them. A block's class is looked up exactly: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

# Parts of a timm model that run after its blocks: what they draw at random does not part the views.
AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool", "head", "head_drop", "head_dist")
# Arguments of a timm model's forward that hold something for every image (NaFlexViT's patches).
PER_IMAGE = ("patch_coord", "patch_valid")


@dataclass(frozen=True)
class Seam:
    """How one class of blocks is taken apart; h is the residual stream between attention and MLP.

    Attributes:
        attention: (block, x, *timm's arguments) to h: attention with its residual.
        mlp: (block, h) to the MLP's branch with LayerScale and drop-path, without its residual.
    """

    attention: Callable[..., Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


def _vit_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs)))


def _vit_mlp(block: Any, h: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(h))))


def _eva_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(_scaled(block.attn(block.norm1(x), *args, **kwargs), block.gamma_1))


def _eva_mlp(block: Any, h: Tensor) -> Tensor:
    return block.drop_path2(_scaled(block.mlp(block.norm2(h)), block.gamma_2))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


SEAMS: dict[type[nn.Module], Seam] = {
    vision_transformer.Block: Seam(_vit_attention, _vit_mlp),  # ViT, DeiT, DINOv2, SigLIP, CLIP, hybrids
    eva.EvaBlock: Seam(_eva_attention, _eva_mlp),  # EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions
}


def seam_of(block: nn.Module) -> Seam | None:
    """The seam of a block of a known class; None: it is something else."""
    return SEAMS.get(type(block))


def find_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in the parent, block) of every block of a known class, in the order they are registered.

    Raises:
        ValueError: there is none, or blocks of a known class stand beside modules of another one.
    """
    found = False
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        known = [name for name, child in children.items() if seam_of(child) is not None]
        if known and len(known) < len(children):
            odd = next(name for name in children if name not in known)
            raise ValueError(f"{path}.{odd} is a {type(children[odd]).__name__}, which has no seam; {_known()}")
        for name in known:
            found = True
            yield parent, name, children[name]
    if not found:
        raise ValueError(f"no block of {type(model).__name__} can be adapted; {_known()}")


def carries_samples(name: str, value: object) -> bool:
    """Whether an argument of a timm model's forward holds something for every image.

    Attention masks do with four dimensions, `[B, 1, T, T]`; `[T, T]` is the same for all.
    """
    if not isinstance(value, Tensor):
        return False
    return value.ndim == 4 and value.shape[0] > 1 if name == "attn_mask" else name in PER_IMAGE


def check_adaptable(name: str) -> None:
    """Raise ValueError for a timm model that adapters cannot be put into, before anything of it is downloaded."""
    with torch.device("meta"):
        for _ in find_blocks(timm.create_model(name)):
            pass


def _known() -> str:
    classes = ", ".join(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in SEAMS)
    return f"those that can are made of {classes}"
