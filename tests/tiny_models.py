"""One small random model per family and block class: test material that runs in milliseconds on a CPU.

`TINY[name]()` makes a model of 10 classes through timm.create_model (so that it has a pretrained_cfg, feature_info and
everything a user's model has), in float32, in evaluation mode, with all parameters and BatchNorm statistics random:
timm's own initialisation hides errors (LayerScale 1e-6, Swin v2's and CaiT's branches near zero, biases zero).
`image(model)` makes a fitting batch. Names that the installed timm does not know are left out, so that the same file
serves timm 1.0.20 and 1.0.31.
"""

from __future__ import annotations

import inspect
from functools import partial

import timm
import torch
from timm.layers import HybridEmbed
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def _hybrid(**kwargs):
    """A BatchNorm stem before a ViT, as vit_base_mci_224 has it."""
    stem = ConvStem(channels=(8, 8), depth=2, stride=(2, 2), kernel_size=(3, 3), padding=(1, 1), act_layer=nn.GELU)
    return timm.create_model(
        "vit_base_mci_224",
        embed_layer=partial(HybridEmbed, backbone=stem, proj=True, patch_size=4),
        **{**_VIT, "patch_size": 4, **kwargs},
    )


def _timm(name: str, **fixed):
    return partial(timm.create_model, name, **fixed)


_ALL = {
    # vision_transformer.Block
    "vit": _timm("vit_tiny_patch16_224", **_VIT),
    "vit_layer_scale_registers": _timm("vit_small_patch14_reg4_dinov2", **_VIT, init_values=0.5),
    "vit_map_pool": _timm("vit_base_patch16_siglip_224", **_VIT),  # tanh-GELU only in the *_siglip_256/512 of SigLIP 2
    "vit_tanh_gelu": _timm("vit_base_patch32_siglip_256", **_VIT),
    "vit_quick_gelu": _timm("vit_base_patch32_clip_quickgelu_224", **_VIT),
    "vit_mlp_norm": _timm("beit3_base_patch16_224", **_VIT),  # LayerNorm inside the MLP and the attention
    "vit_glu": _timm("vit_giant_patch14_dinov2", **_VIT, mlp_ratio=2.0, init_values=0.5),  # GluMlp (packed SwiGLU)
    "vit_rms_norm": _timm("aimv2_large_patch14_224", **_VIT, mlp_ratio=2.0),  # RmsNorm, SwiGLU, no biases
    "vit_differential": _timm("vit_dwee_patch16_reg1_gap_256", **_VIT, mlp_ratio=2.0),  # DiffAttention
    "vit_parallel_things": _timm("vit_small_patch16_18x2_224", **{**_VIT, "depth": 2}),  # no pretrained tags
    "vit_post_norm": _timm("vit_base_patch16_rpn_224", **_VIT),  # ResPostBlock
    "vit_parallel_scaling": _timm("vit_pwee_patch16_reg1_gap_256", **_VIT, mlp_ratio=2.0),
    "vit_differential_parallel_scaling": _timm("vit_dpwee_patch16_reg1_gap_256", **_VIT, mlp_ratio=2.0),
    "deit_distilled": _timm("deit_tiny_distilled_patch16_224", **_VIT),
    "deit3": _timm("deit3_small_patch16_224", **_VIT),
    "hybrid": _hybrid,
    # eva
    "eva": _timm("eva_giant_patch14_224", **_VIT, mlp_ratio=2.0),  # fused qkv read by its weight
    "eva02_small": _timm("eva02_tiny_patch14_224", **_VIT),  # the same, GluMlp, rope
    "eva02": _timm("eva02_base_patch14_224", **_VIT),  # q_proj, k_proj, v_proj; SwiGLU with a norm inside
    "eva_post_norm": _timm("eva02_enormous_patch14_clip_224", **_VIT),
    "dinov3": _timm("vit_small_patch16_dinov3", **_VIT, dynamic_img_size=False),
    "dinov3_qkv_bias": _timm("vit_small_patch16_dinov3_qkvb", **_VIT, dynamic_img_size=False),
    "rope_mixed": _timm("vit_small_patch16_rope_mixed_224", **_VIT),
    "perception_encoder": _timm("vit_pe_core_tiny_patch16_384", **_VIT, attn_pool_num_heads=2),
    "sapiens2": _timm(
        "vit_base_patch16_sapiens2",
        **{**_VIT, "embed_dim": 32, "num_heads": 4},
        num_kv_heads=2,
        mlp_ratio=2.0,
    ),
    # the others
    "beit": _timm("beit_base_patch16_224", **_VIT, init_values=0.5),
    "beit_shared_bias": _timm("beit_base_patch16_224", **_VIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "swin": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "swin_v2": _timm("swinv2_tiny_window8_256", **_SWIN),
    "swin_v2_cr": _timm("swinv2_cr_tiny_ns_224", **_SWIN),
    "relpos": _timm("vit_relpos_small_patch16_224", **_VIT, init_values=0.5),
    "relpos_class_token": _timm("vit_relpos_medium_patch16_cls_224", **_VIT),
    "relpos_shared": _timm("vit_srelpos_small_patch16_224", **_VIT),
    "relpos_post_norm": _timm("vit_relpos_medium_patch16_rpn_224", **_VIT),
    "sam": _timm(
        "samvit_base_patch16",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        window_size=3,
        global_attn_indexes=(1,),
        neck_chans=16,
    ),
    "naflex": _timm(
        "naflexvit_base_patch16_gap", **{k: v for k, v in _VIT.items() if k != "img_size"}, pos_embed_grid_size=(2, 2)
    ),
    "naflex_map_pool": _timm(
        "naflexvit_base_patch16_siglip",
        **{k: v for k, v in _VIT.items() if k != "img_size"},
        pos_embed_grid_size=(2, 2),
    ),
    "naflex_rope": _timm(
        "naflexvit_base_patch16_gap",
        **{k: v for k, v in _VIT.items() if k != "img_size"},
        rope_type="axial",
        pos_embed="none",
    ),  # builds EvaBlocks
    "cait": _timm("cait_xxs24_224", **_VIT, init_values=0.5),
    "hiera": _timm(
        "hiera_tiny_224",
        img_size=(32, 32),
        embed_dim=8,
        num_heads=1,
        stages=(2, 1, 2),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, False, False),
    ),
    "hiera_layer_scale": _timm(
        "hiera_small_abswin_256",
        img_size=(32, 32),
        embed_dim=8,
        num_heads=1,
        stages=(1, 1, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, True, False),
        global_pos_size=(4, 4),
        init_values=0.5,
    ),
    "xcit": _timm(
        "xcit_nano_12_p8_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, cls_attn_layers=1
    ),
}


def _known(name: str, make) -> bool:
    if name == "eva_post_norm" and "swiglu_align_to" not in inspect.signature(EvaBlockPostNorm.__init__).parameters:
        return False  # timm 1.0.20 can't build this block at all: Eva hands it an argument that it does not take
    return timm.is_model(make.args[0] if isinstance(make, partial) else "vit_base_mci_224")


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" in name or "temperature" in name or "lambda" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            gain = (name.endswith("weight") and parameter.ndim == 1) or "gamma" in name
            parameter.copy_(1 + 0.2 * noise if gain else 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def make_tiny(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """The model `name`; kwargs go to timm (drop_path_rate, proj_drop_rate, global_pool, ...)."""
    torch.manual_seed(seed)  # for what _randomise leaves as it is
    return _randomise(_ALL[name](**{"num_classes": 10, **kwargs}), seed).eval()


def image(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    """`[batch, 3, H, W]` of the size the model was made for."""
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if size is None:  # NaFlex takes any size; Hiera keeps its token grid only
        shape = getattr(model, "tokens_spatial_shape", None)
        size = (16, 16) if shape is None else tuple(s * t for s, t in zip(shape, model.patch_stride, strict=True))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


TINY = {name: partial(make_tiny, name) for name, make in _ALL.items() if _known(name, make)}
