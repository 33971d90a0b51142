"""The adapter inside its block's MLP: where that is exact, and where it is done (docs/design.md has the algebra)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, Mlp
from torch import Tensor, nn

from mosa_fast.adapters.seams import seam_of
from mosa_fast.backbones.frozen import drop_rate
from mosa_fast.nn import SparseAdapter
from mosa_fast.nn.mixture import MixtureLayer
from mosa_fast.ops import get_backend

# Where the products of the MLP have been measured to be faster than the branch (docs/design.md).
FASTER_ON = ("cpu",)


def why_branch(block: Any) -> str | None:
    """Why an adapted block computes its adapter beside the MLP; None: it does so inside the MLP's products.

    Args:
        block: an AdaptedBlock.

    Raises:
        ValueError: its configuration asks for the form mlp, which is not exact here; the message says why.
    """
    form = next((layer.config.form for layer in block.adapters() if isinstance(layer, MixtureLayer)), "auto")
    if form == "branch":
        return "its configuration says so"
    reason = why_not_inside(block)
    if form == "mlp":
        if reason is not None:
            raise ValueError(f"form mlp is not exact in a {type(block.block).__name__}: {reason}; use auto or branch")
        return None
    device = block.block.norm2.weight.device.type
    if reason is None and device not in FASTER_ON:
        return f"on {device} the other form is not known to be faster"
    if reason is None and get_backend() != "auto":
        return f"the backend {get_backend()} was asked for"
    if reason is None and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return "an exported program must not need an operator of this package"
    return reason


def why_not_inside(block: Any) -> str | None:
    """Why a block's adapter cannot be computed inside its frozen MLP's products; None: it can."""
    if block.linears:
        return "low-rank pairs are in its attention"
    reason = why_no_wider_mlp(block)
    if reason is not None:
        return reason
    timm_block: Any = block.block
    adapter, mlp, norm = block.adapters()[0], timm_block.mlp, timm_block.norm2
    if type(adapter) is not SparseAdapter:
        return f"in place of its adapter there is a {type(adapter).__name__}"
    if type(mlp.fc1) is not nn.Linear or type(mlp.fc2) is not nn.Linear:
        return f"its MLP's linears are {type(mlp.fc1).__name__} and {type(mlp.fc2).__name__}"
    dropped = (mlp.drop1, mlp.drop2, *(getattr(timm_block, name, None) for name in ("drop_path", "drop_path2")))
    if any(module is not None and drop_rate(module) > 0 for module in dropped):
        return "its MLP has dropout or drop-path"
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return "its norm is not a LayerNorm with weight and bias"
    weights = [tensor for tensor in frozen_mlp(block).values() if isinstance(tensor, Tensor)]
    if any(tensor.requires_grad for tensor in weights):
        return "its MLP is trained"
    if any(not _is_plain(tensor) for tensor in weights):
        return "its MLP's weights are not plain floating-point tensors"
    if any(map(_has_hooks, (norm, mlp, mlp.fc1, mlp.act, mlp.fc2, adapter))):
        return "hooks want to see what its MLP or adapter computes"
    return None


def why_no_wider_mlp(block: Any) -> str | None:
    """Why a block's adapter is not exactly a part of a wider MLP; None: it is."""
    timm_block: Any = block.block
    seam, mlp, norm = seam_of(timm_block), timm_block.mlp, timm_block.norm2
    if block.placement != "adaptformer":
        return f"a {block.placement} adapter does not read what the MLP reads"
    if type(mlp) is not Mlp:
        return f"its MLP is gated ({type(mlp).__name__})"
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "there is a norm inside its MLP"
    if not is_exact_gelu(mlp.act):
        return f"its activation is {type(mlp.act).__name__}, not the exact GELU"
    adapter = block.adapters()[0]
    if adapter.activation != "gelu":
        return f"the adapter's activation is {adapter.activation}, not gelu"
    if mlp.fc1.bias is None or mlp.fc2.bias is None:
        return "its MLP has no biases"
    if seam.norm_after_mlp:
        return "its norm comes after the MLP, the adapter after that"
    own_norm = getattr(adapter, "norm", None)
    if own_norm is not None and not (isinstance(norm, nn.LayerNorm) and norm.eps == own_norm.eps):
        return f"its norm is a {type(norm).__name__}, the adapter's a LayerNorm"
    return None


def is_exact_gelu(activation: nn.Module) -> bool:
    """Whether a timm model's activation is `x * Phi(x)` itself, not one of its approximations."""
    return isinstance(activation, GELU) or (type(activation) is nn.GELU and activation.approximate == "none")


def frozen_mlp(block: Any) -> dict[str, Any]:
    """A block's norm2, MLP and LayerScale, by the names that `mosa_fast.ops.adapted_mlp` has for them."""
    timm_block: Any = block.block
    seam, norm, mlp = seam_of(timm_block), timm_block.norm2, timm_block.mlp
    return {
        "mlp_norm_weight": norm.weight,
        "mlp_norm_bias": norm.bias,
        "eps": norm.eps,
        "fc1_weight": mlp.fc1.weight,
        "fc1_bias": mlp.fc1.bias,
        "fc2_weight": mlp.fc2.weight,
        "fc2_bias": mlp.fc2.bias,
        "layer_scale": None if seam.inside else seam.layer_scale(timm_block),
    }


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
