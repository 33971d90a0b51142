"""Where a timm block can be taken apart: the only file that knows timm's blocks, a few lines a family.

A seam cuts a block's own forward into its attention and its MLP, from the block's untouched children, so that layers
can read and add between them. A block's class is looked up exactly: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import (
    beit,
    cait,
    eva,
    hiera,
    naflexvit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    xcit,
)
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from mosa_fast.backbones.fingerprint import is_quantised
from mosa_fast.backbones.structure import structure_of


@dataclass(frozen=True)
class Seam:
    """How one class of blocks is taken apart; h is the residual stream between attention and MLP.

    `block(x)` is `output(h + finish(m))`, with `h = attention(x)` and `n, m = inner(h)`. Every function takes the block
    first.

    Attributes:
        attention: (block, x, *timm's arguments) to h: attention with its residual.
        inner: (block, h) to n and m: what the MLP reads, and what it gives. Where norm2 comes after the MLP, m is its
            output.
        finish: (block, m) to the MLP's branch: LayerScale and drop-path, without the residual.
        output: (block, sum) to the block's output: the identity almost everywhere.
        inside: the adaptformer placement sits inside the MLP, reading n and adding to m (docs/method.md, Placements).
        gamma: where LayerScale's factor of the MLP's branch is in the block, if it has one.
        counts_images: timm's forward reads the number of images before the blocks and uses it after them, so that a
            block must not make more of them: several views are repeated at the input.
    """

    attention: Callable[..., Tensor]
    inner: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    finish: Callable[[Any, Tensor], Tensor]
    output: Callable[[Any, Tensor], Tensor] = lambda block, total: total
    inside: bool = False
    gamma: str = "ls2.gamma"
    counts_images: bool = False

    def mlp(self, block: nn.Module, h: Tensor) -> Tensor:
        """The MLP's branch with LayerScale and drop-path, without its residual."""
        return self.finish(block, self.inner(block, h)[1])

    def layer_scale(self, block: nn.Module) -> Tensor | None:
        """LayerScale's factor of the MLP's branch, `[D]`; None where there is none."""
        found: Any = block
        for name in self.gamma.split("."):
            found = getattr(found, name, None)
        return found

    @property
    def norm_after_mlp(self) -> bool:
        """Whether norm2 normalises what the MLP gives, not what it reads."""
        return self.inner is _post_norm


def _pre_norm(block: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    n = block.norm2(h)
    return n, block.mlp(n)


def _post_norm(block: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    return h, block.norm2(block.mlp(h))


def _drop_path(block: Any, m: Tensor) -> Tensor:
    return block.drop_path2(m)


def _scaled(gamma: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gamma is None else gamma * branch


def _post_norm_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, *args, **kwargs)))


# ViT, DeiT, hybrids, NaFlexViT, relative positions


def _vit_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs)))


def _vit_finish(block: Any, m: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(m))


# EVA and the families that timm builds of its blocks; BEiT


def _eva_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(_scaled(block.gamma_1, block.attn(block.norm1(x), *args, **kwargs)))


def _eva_finish(block: Any, m: Tensor) -> Tensor:
    return block.drop_path2(_scaled(block.gamma_2, m))


# Swin: tokens are [B, H, W, C]; shifts, windows, masks and padding are in the method that is called here


def _swin_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path1(block._attn(block.norm1(x)))


def _swin_v2_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(block._attn(x)))


def _swin_v2_cr_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(block._shifted_window_attn(x)))


def _swin_v2_cr_output(block: Any, total: Tensor) -> Tensor:
    return block.norm3(total)  # a norm at the end of some stages, else the identity


# Segment Anything's encoder: tokens are [B, H, W, C], and drop-path draws for every window


def _sam_attention(block: Any, x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    padded = None
    windows = block.norm1(x)
    if block.window_size > 0:
        windows, padded = window_partition(windows, block.window_size)
    branch = block.drop_path1(block.ls1(block.attn(windows)))
    if padded is not None:
        branch = window_unpartition(branch, block.window_size, (height, width), padded)
    return x + branch


# CaiT: one drop-path for both branches


def _cait_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path(block.gamma_1 * block.attn(block.norm1(x)))


def _cait_finish(block: Any, m: Tensor) -> Tensor:
    return block.drop_path(block.gamma_2 * m)


# Hiera: the first block of a stage pools its tokens and doubles their width


def _hiera_attention(block: Any, x: Tensor) -> Tensor:
    n = block.norm1(x)
    if block.do_expand:
        pooled = (x if block.proj is None else block.proj(n)).unflatten(1, (block.attn.q_stride, -1))
        x = pooled.amax(dim=1)
        if block.proj is None:
            x = torch.cat([x, pooled.mean(dim=1)], dim=-1)
    return x + block.drop_path1(block.ls1(block.attn(n)))


# XCiT: attention over channels, then over neighbouring patches


def _xcit_attention(block: Any, x: Tensor, height: int, width: int) -> Tensor:
    x = x + _xcit_drop_path(block, 1)(block.gamma1 * block.attn(block.norm1(x)))
    return x + _xcit_drop_path(block, 3)(block.gamma3 * block.local_mp(block.norm3(x), height, width))


def _xcit_finish(block: Any, m: Tensor) -> Tensor:
    return _xcit_drop_path(block, 2)(block.gamma2 * m)


def _xcit_drop_path(block: Any, number: int) -> nn.Module:
    return getattr(block, f"drop_path{number}", None) or block.drop_path  # older timm has one for all three


SEAMS: dict[type[nn.Module], Seam] = {
    vision_transformer.Block: Seam(_vit_attention, _pre_norm, _vit_finish),
    vision_transformer.ResPostBlock: Seam(_post_norm_attention, _post_norm, _drop_path, inside=True),
    vision_transformer_relpos.RelPosBlock: Seam(_vit_attention, _pre_norm, _vit_finish),
    vision_transformer_relpos.ResPostRelPosBlock: Seam(_post_norm_attention, _post_norm, _drop_path, inside=True),
    vision_transformer_sam.Block: Seam(_sam_attention, _pre_norm, _vit_finish),
    eva.EvaBlock: Seam(_eva_attention, _pre_norm, _eva_finish, gamma="gamma_2"),
    eva.EvaBlockPostNorm: Seam(_post_norm_attention, _post_norm, _drop_path, inside=True),
    beit.Block: Seam(_eva_attention, _pre_norm, _eva_finish, gamma="gamma_2"),
    swin_transformer.SwinTransformerBlock: Seam(_swin_attention, _pre_norm, _drop_path, inside=True),
    swin_transformer_v2.SwinTransformerV2Block: Seam(_swin_v2_attention, _post_norm, _drop_path, inside=True),
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: Seam(
        _swin_v2_cr_attention, _post_norm, _drop_path, _swin_v2_cr_output, inside=True
    ),
    cait.LayerScaleBlock: Seam(_cait_attention, _pre_norm, _cait_finish, gamma="gamma_2"),
    hiera.HieraBlock: Seam(_hiera_attention, _pre_norm, _vit_finish),
    xcit.XCABlock: Seam(_xcit_attention, _pre_norm, _xcit_finish, gamma="gamma2", counts_images=True),
}
# Blocks that timm has and that cannot be taken apart, with the reason.
REFUSED = {
    getattr(vision_transformer, name): "attention and MLP have products and residual in common, so that there is no "
    "branch to put an adapter beside"
    for name in ("ParallelScalingBlock", "DiffParallelScalingBlock")
    if hasattr(vision_transformer, name)  # the second is younger than the oldest timm
}
# Parts of a timm model that run after its blocks, when the views are separate already: they may draw random numbers.
AFTER_BLOCKS = (
    *("norm", "neck", "fc_norm", "attn_pool", "head", "head_drop", "head_dist"),
    *("blocks_token_only", "cls_attn_blocks"),  # CaiT's and XCiT's blocks of the class token
)
# Arguments of a timm model's forward that hold something for every image: NaFlexViT's patches, Hiera's mask.
PER_IMAGE = ("patch_coord", "patch_valid", "mask")
# Models that hand their blocks a batch and take one of any size back. Others use the same blocks (CrossViT, PiT), and
# count images or cut them up between these.
MODELS = (
    *(vision_transformer.VisionTransformer, naflexvit.NaFlexVit, eva.Eva, beit.Beit, cait.Cait, hiera.Hiera, xcit.Xcit),
    *(swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2),
    swin_transformer_v2_cr.SwinTransformerV2Cr,
    vision_transformer_relpos.VisionTransformerRelPos,
    vision_transformer_sam.VisionTransformerSAM,
)


def seam_of(block: nn.Module) -> Seam:
    """The seam of a block that `find_blocks` found."""
    return SEAMS[type(block)]


def find_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in the parent, block) of every block of a known class, in the order they are registered.

    Raises:
        ValueError: there is none, or blocks of a known class stand beside modules of another one.
    """
    found = False
    if not isinstance(model, MODELS):
        names = ", ".join(kind.__name__ for kind in MODELS)
        raise ValueError(f"adapt knows timm's {names}, but the model is a {type(model).__name__}")
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        known = [name for name, child in children.items() if type(child) in SEAMS]
        for name, child in children.items():
            if type(child) in REFUSED or (known and name not in known):
                reason = REFUSED.get(type(child), f"it has no seam; {_known()}")
                raise ValueError(f"{path}.{name} is a {type(child).__name__}, which cannot be adapted: {reason}")
        for name in known:
            found = True
            yield parent, name, children[name]
    if not found:
        raise ValueError(f"no block of {type(model).__name__} can be adapted; {_known()}")


@dataclass(frozen=True)
class Target:
    """One projection of a block's attention: columns [start, stop) of what the linear at `path` gives."""

    path: str
    start: int
    stop: int


def lora_targets(block: Any) -> dict[str, Target]:
    """Where q, k, v and o of a block are; in a fused qkv they lie side by side in every family."""
    attention, targets = block.attn, {}
    qkv = getattr(attention, "qkv", None)
    for index, name in enumerate("qkv"):
        if qkv is not None:
            width = qkv.out_features // 3  # not the block's width where heads are narrower
            targets[name] = Target("attn.qkv", index * width, (index + 1) * width)
        else:  # k and v are narrower where queries are grouped
            targets[name] = Target(f"attn.{name}_proj", 0, getattr(attention, f"{name}_proj").out_features)
    return targets | {"o": Target("attn.proj", 0, attention.proj.out_features)}


def call_qkv_as_module(block: Any, wanted: bool = True) -> None:
    """Make timm call a fused qkv that it would read by its weight, where the biases of q and v lie apart.

    EVA, BEiT and Swin v2 have this switch. The bias is then added to the product's result: the same function, in half
    precision with one rounding more.
    """
    if getattr(block.attn, "q_bias", None) is not None:
        block.attn.qkv_bias_separate = wanted


def call_quantised_qkv(block: nn.Module) -> None:
    """The same where a fused qkv is quantised: torchao serves the module's product, not all that timm writes itself."""
    qkv = getattr(getattr(block, "attn", None), "qkv", None)
    if any(map(is_quantised, qkv.parameters() if isinstance(qkv, nn.Module) else ())):
        call_qkv_as_module(block)


def carries_samples(name: str, value: object) -> bool:
    """Whether an argument of a timm model's forward holds something for every image.

    Attention masks do with four dimensions, `[B, 1, T, T]`; `[T, T]` is the same for all.
    """
    if not isinstance(value, Tensor):
        return False
    return value.ndim == 4 and value.shape[0] > 1 if name == "attn_mask" else name in PER_IMAGE


def check_adaptable(name: str) -> None:
    """Raise ValueError for a timm model that adapters cannot be put into, before anything of it is downloaded."""
    for _ in find_blocks(structure_of(name)):
        pass


def _known() -> str:
    classes = ", ".join(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in SEAMS)
    return f"those that can are made of {classes}"
