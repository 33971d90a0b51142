"""Leaving the mixture: dense adapters in place of experts, or an ordinary timm model in place of adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.inside_mlp import why_no_wider_mlp
from mosa_fast.adapters.linears import LoRALinear
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.adapters.seams import call_qkv_as_module, seam_of
from mosa_fast.adapters.wrapper import unwrapped, unwrapped_name
from mosa_fast.backbones.fingerprint import is_quantised
from mosa_fast.backbones.structure import structure_of
from mosa_fast.nn.mixture import adapters

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Replace every mixture by the dense adapter that evaluation uses, in place.

    Raises:
        ValueError: the model has no adapters.
    """
    for adapter in adapters(model):
        adapter.merge()
    return model


def fold(model: AdaptedModel, create_kwargs: Mapping[str, Any] | None = None) -> Any:
    """An ordinary timm model that computes the same logits: every MLP is as much wider as its adapter is.

    Low-rank pairs become part of their linears' weights, in every family. For adapters it is exact with the placement
    adaptformer and the exact GELU in adapter and block (docs/design.md, The adapter inside the MLP). With `g`, `b` the
    weight and bias of norm2, `ga`, `ba` those of the adapter's norm and `s` its scale, norm2 keeps only its
    normalisation, and

        fc1' = [W1 diag(g); Wd diag(ga)],  b1' = [b1 + W1 b; bd + Wd ba],  fc2' = [W2, s Wu],  b2' = b2 + s bu

    LayerScale's factor is multiplied into W2 and b2 and becomes 1. Inside an MLP (Swin) there is no second norm.

    Args:
        model: adapted, with experts or merged; it is left as it is.
        create_kwargs: what the timm model was made with by timm.create_model besides its name: needed where this timm
            does not keep it (1.0.20 does not).

    Returns:
        The timm model, in evaluation mode and with all its weights trainable; its `create_kwargs` make the same one:
        `timm.create_model(plain.pretrained_cfg["architecture"], **plain.create_kwargs)`.

    Raises:
        ValueError: it cannot be folded exactly; the message says why.
    """
    next(adapters(model))  # an error where there are none
    model = unwrapped(model)  # type: ignore[assignment]
    blocks = {name: block for name, block in model.backbone.named_modules() if isinstance(block, AdaptedBlock)}
    for name, block in blocks.items():
        reason = why_not_folded(block)
        if reason is not None:
            raise ValueError(f"{name} cannot be folded exactly: {reason}; merge(model) makes its adapters dense")
    plain: Any = copy.deepcopy(model.backbone).eval()
    needed = {
        name: block.mlp.fc1.out_features + block.adapters()[0].config.bottleneck
        for name, block in blocks.items()
        if not block.linears
    }
    known = getattr(plain, "_model_args", None) if create_kwargs is None else create_kwargs
    kwargs, structure = _wider(plain, known, blocks, needed)
    for name in blocks:
        plain.set_submodule(unwrapped_name(name), _folded_block(plain.get_submodule(name)))
    wider_modules: dict[str, Any] = dict(structure.named_modules())
    for name, mlp in plain.named_modules():  # timm widens other MLPs as well, as that of attention pooling
        if type(mlp) is Mlp and type(wider_modules.get(name)) is Mlp:
            _widen(mlp, wider_modules[name].fc1.out_features)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (plain, structure)]
    if shapes[0] != shapes[1]:
        odd = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"timm makes another model of {kwargs}, which differs in {odd}: give fold its create_kwargs")
    plain.create_kwargs = plain._model_args = kwargs
    return plain.requires_grad_(True)


def why_not_folded(block: AdaptedBlock) -> str | None:
    """Why a block's adapter is not exactly a part of a wider MLP; None: it is (low-rank pairs: of their linears)."""
    if any(map(is_quantised, block.parameters())):
        return "its weights are quantised, and the adapter's, which would become a part of them, are not"
    if block.linears:
        return None
    return why_no_wider_mlp(block)


def _wider(
    plain: Any, known: Mapping[str, Any] | None, blocks: Mapping[str, Any], needed: Mapping[str, int]
) -> tuple[dict[str, Any], Any]:
    """Arguments of timm.create_model that give every block an MLP of at least the needed width, and what they make."""
    name = (getattr(plain, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise ValueError("fold needs a model that timm.create_model made: this one does not know its name")
    if known is None:  # not guessed: another number of heads, say, makes a model of the same shapes
        raise ValueError("this model's timm did not keep what it was made with (1.0.20): give fold its create_kwargs")
    kwargs = {**known, "num_classes": plain.num_classes}
    if not needed:
        return kwargs, structure_of(name, **kwargs)
    stages: dict[str, float] = {}
    for path, hidden in needed.items():
        # Half a column more, since timm cuts hidden = width * ratio down to an integer.
        ratio = (hidden + 0.5) / blocks[path].norm2.weight.numel()
        stage = path.rpartition(".")[0]
        stages[stage] = max(ratio, stages.get(stage, 0.0))
    for choice in (tuple(stages.values()), max(stages.values())):  # one for each stage where timm takes that: Swin
        try:
            made = kwargs | {"mlp_ratio": choice}
            return made, structure_of(name, **made)
        except (TypeError, IndexError):  # the latter where other arguments say how many stages there are
            continue
    raise ValueError(f"timm.create_model({name!r}) takes no mlp_ratio")


@torch.no_grad()
def _folded_block(adapted: Any) -> nn.Module:
    """The timm block of a copied AdaptedBlock, with the adapter in its MLP, or low-rank pairs in their linears."""
    if adapted.linears:
        return _with_linears(adapted.block)
    seam, block = seam_of(adapted.block), adapted.block
    mlp: Any = block.mlp
    norm: Any = block.norm2
    adapter = copy.deepcopy(adapted.adapters()[0])
    adapter.merge()
    weight1, bias1, weight2, bias2 = (
        tensor.double() for tensor in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    )
    gamma = seam.layer_scale(block)
    if gamma is not None and not seam.inside:
        weight2, bias2 = gamma.double()[:, None] * weight2, gamma.double() * bias2
        gamma.fill_(1.0)
    down, down_bias = adapter.down.weight.double(), adapter.down.bias[0].double()
    if adapter.norm is not None:
        bias1 = bias1 + weight1 @ norm.bias.double()
        weight1 = weight1 * norm.weight.double()
        down_bias = down_bias + down @ adapter.norm.bias.double()
        down = down * adapter.norm.weight.double()
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    scale = torch.as_tensor(adapter.scale, dtype=torch.float64, device=down.device)
    up, up_bias = scale * adapter.up.weight.double(), scale * adapter.up.bias[0].double()
    mlp.fc1 = _linear(mlp.fc1, torch.cat([weight1, down]), torch.cat([bias1, down_bias]))
    mlp.fc2 = _linear(mlp.fc2, torch.cat([weight2, up], dim=1), bias2 + up_bias)
    return block


@torch.no_grad()
def _with_linears(block: nn.Module) -> nn.Module:
    """A block whose linears have their low-rank parts in their weights: `W' = W + s B A`, row by row of a target."""
    for path, wrapped in list(block.named_modules()):
        if isinstance(wrapped, LoRALinear):
            linear: Any = wrapped.linear
            lora: Any = copy.deepcopy(wrapped.lora)
            lora.merge()
            scale = torch.as_tensor(lora.scale, dtype=torch.float64, device=lora.up.weight.device)
            widths = [stop - start for start, stop in lora.columns]
            pairs = zip(lora.columns, lora.down.weight.chunk(len(widths)), lora.up.weight.split(widths), strict=True)
            weight = linear.weight.double()
            for (start, stop), down, up in pairs:
                weight[start:stop] += scale * up.double() @ down.double()
            linear.weight.copy_(weight)
            block.set_submodule(path, linear)
    call_qkv_as_module(block, False)
    return block


@torch.no_grad()
def _widen(mlp: Any, hidden: int) -> None:
    """Give an MLP so many hidden channels; the new ones are zero and add nothing."""
    spare = hidden - mlp.fc1.out_features
    mlp.fc1 = _linear(mlp.fc1, F.pad(mlp.fc1.weight, (0, 0, 0, spare)), F.pad(mlp.fc1.bias, (0, spare)))
    mlp.fc2 = _linear(mlp.fc2, F.pad(mlp.fc2.weight, (0, spare)), mlp.fc2.bias)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], dtype=like.weight.dtype, device=weight.device
    )
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made
