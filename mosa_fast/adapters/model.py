"""Putting adapters into a timm model, and merging them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mosa_fast.adapters.vision_transformer import AdaptedBlock, AdaptedVisionTransformer, adapted_class
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter


def adapt(model: VisionTransformer, config: MoSAConfig | None = None) -> AdaptedVisionTransformer:
    """Put a mixture of sparse adapters into every block of a timm VisionTransformer, in place.

    The backbone is frozen; the adapters and the classification head are trained. The adapted model is called as
    `model(images, views=2)` in training, which gives `[2 * B, classes]`, and as `model(images)` in evaluation.

    Args:
        model: a timm VisionTransformer made of plain Blocks (ViT, DeiT, DINOv2, MAE, MoCo v3, CLIP and others).
        config: what to put in; the paper's defaults when None.

    Returns:
        The same model.

    Raises:
        ValueError: the model is of another kind, or has adapters already.
    """
    config = config or MoSAConfig()
    if isinstance(model, AdaptedVisionTransformer):
        raise ValueError("the model has adapters already; make a new one, or merge(model) and go on with that")
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"adapt needs a timm VisionTransformer, got {type(model).__name__}")
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise ValueError(f"adapt knows timm's Block, but blocks.{index} is a {type(block).__name__}")
        if not isinstance(block.norm2, nn.LayerNorm):
            raise ValueError(f"adapt needs LayerNorm, but blocks.{index}.norm2 is a {type(block.norm2).__name__}")

    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    for block in model.blocks:
        assert isinstance(block, Block)
        norm = block.norm2
        assert isinstance(norm, nn.LayerNorm)
        # Master weights are float32 under a half-precision backbone.
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        block.adapter = SparseAdapter(
            norm.normalized_shape[0],
            config.bottleneck,
            config.experts,
            share=config.share,
            scale=config.scale,
            dropout=config.dropout,
            bias=config.bias,
            merge=config.merge,
            norm_eps=norm.eps,
            generator=generator,
            device=norm.weight.device,
            dtype=dtype,
        ).train(block.training)
        block.__class__ = AdaptedBlock
    model.__class__ = adapted_class(type(model))
    assert isinstance(model, AdaptedVisionTransformer)
    model.mosa_config = config
    for module in classifiers(model):
        module.requires_grad_(True)
    return model


def adapters(model: nn.Module) -> Iterator[SparseAdapter]:
    """The adapters of an adapted model, from the first block to the last."""
    if not isinstance(model, AdaptedVisionTransformer):
        raise ValueError(f"{type(model).__name__} has no adapters; call adapt(model, config) first")
    return (block.adapter for block in model.blocks if isinstance(block, AdaptedBlock))
