"""The adapter inside its block's MLP: where that is exact, and where it is done (docs/design.md has the algebra)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import mosa_fast.ops.adapted_mlp_flops  # noqa: F401  # registers what is counted
from mosa_fast.adapters.seams import seam_of
from mosa_fast.backbones.frozen import drop_rate
from mosa_fast.nn import SparseAdapter
from mosa_fast.ops import get_backend
from mosa_fast.ops.registration import beyond_reverse_mode

# Where the products of the MLP have been measured to be faster than the branch (docs/design.md).
FASTER_ON = ("cpu",)
# ... and how many values (views x images x tokens x width) a block's input must have: for fewer, as of two views of one
# image of 224 pixels at width 384, it costs more to call the many small operations than the memory saves that they do
# not touch.
FASTER_FROM = 2**18
# What may stand between the products, since what it computes is known; a subclass may compute something else.
KNOWN = (nn.Identity, nn.Dropout, DropPath, LayerScale)
OTHER_DERIVATIVES = "a transform of torch.func or forward-mode differentiation runs"


def why_branch(block: Any, values: int | None = None) -> str | None:
    """Why an adapted block computes its adapter beside the MLP; None: it does so inside the MLP's products.

    Args:
        block: an AdaptedBlock.
        values: of its input (`FASTER_FROM`). None: enough.
    """
    if block.form == "branch":
        return "its configuration says so"
    if block.form == "auto" and (reason := _why_not_faster(block, values)) is not None:
        return reason
    if beyond_reverse_mode():
        return OTHER_DERIVATIVES
    return why_not_inside(block)


def is_inside(block: Any, values: int | None = None) -> bool:
    """Whether an adapted block computes its adapter inside the MLP's products, as `why_branch` decides.

    Raises:
        ValueError: its configuration asks for the form mlp, which is not exact here; the message says why.
    """
    reason = why_branch(block, values)
    if block.form == "mlp" and reason not in (None, OTHER_DERIVATIVES):
        raise ValueError(f"form mlp is not exact in a {type(block.block).__name__}: {reason}; use auto or branch")
    return reason is None


def _why_not_faster(block: Any, values: int | None) -> str | None:
    """Why the form auto takes the branch even where both are exact; the cheapest questions first."""
    weight = next(block.parameters())
    if weight.device.type not in FASTER_ON:
        return f"on {weight.device.type} the other form is not known to be faster"
    if get_backend() != "auto":
        return f"the backend {get_backend()} was asked for"
    if torch.is_autocast_enabled(weight.device.type) or weight.dtype.itemsize < 4:
        return "in half precision the other form is not faster"
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "a compiler sees more in the branch, and an exported program needs no operator of this package"
    if values is not None and values < FASTER_FROM:
        return f"its input has fewer than {FASTER_FROM:,} values"
    return None


def why_not_inside(block: Any) -> str | None:
    """Why a block's adapter cannot be computed inside its frozen MLP's products; None: it can."""
    if block.linears:
        return "low-rank pairs are in its attention"
    reason = why_no_wider_mlp(block)
    if reason is not None:
        return reason
    timm_block: Any = block.block
    adapter, mlp, norm, seam = block.adapters()[0], timm_block.mlp, timm_block.norm2, seam_of(timm_block)
    if type(adapter) is not SparseAdapter:
        return f"in place of its adapter there is a {type(adapter).__name__}"
    if (adapter.norm is None) != seam.inside:
        return "its adapter's norm is not what this family of blocks has"
    if type(mlp.fc1) is not nn.Linear or type(mlp.fc2) is not nn.Linear:
        return f"its MLP's linears are {_name(mlp.fc1)} and {_name(mlp.fc2)}"
    between = [mlp.drop1, mlp.drop2, *(getattr(timm_block, name, None) for name in ("drop_path", "drop_path2", "ls2"))]
    between = [module for module in between if module is not None]
    unknown = next((module for module in between if type(module) not in KNOWN), None)
    if unknown is not None:
        return f"there is a {_name(unknown)} on its MLP's way"
    if any(drop_rate(module) > 0 for module in between):
        return "its MLP has dropout or drop-path"
    if norm.weight is None or norm.bias is None:
        return "its norm is not a LayerNorm with weight and bias"
    weights = [tensor for tensor in frozen_mlp(block).values() if isinstance(tensor, Tensor)]
    if any(tensor.requires_grad for tensor in weights):
        return "its MLP is trained"
    if any(not _is_plain(tensor) for tensor in weights):
        return "its MLP's weights are not plain floating-point tensors"
    if _has_any_global_hook() or any(map(_is_watched, (norm, mlp, mlp.fc1, mlp.act, mlp.fc2, adapter, *between))):
        return "hooks want to see what its MLP or adapter computes"
    return None


def why_no_wider_mlp(block: Any) -> str | None:
    """Why a block's adapter is not exactly a part of a wider MLP; None: it is."""
    timm_block: Any = block.block
    seam, mlp, norm = seam_of(timm_block), timm_block.mlp, timm_block.norm2
    if block.placement != "adaptformer":
        return f"a {block.placement} adapter does not read what the MLP reads"
    if type(mlp) is not Mlp:
        own = type(mlp).__module__.startswith("timm.")
        return f"its MLP is gated ({type(mlp).__name__})" if own else f"its MLP is a {_name(mlp)}, not timm's"
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
    if not _is_layer_norm(norm) or (own_norm is not None and norm.eps != own_norm.eps):
        return f"its norm is a {_name(norm)}, the adapter's a LayerNorm with eps {getattr(own_norm, 'eps', None)}"
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


def _is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm as torch or timm wrote it."""
    return isinstance(module, nn.LayerNorm) and type(module).__module__.split(".")[0] in ("torch", "timm")


def _is_watched(module: nn.Module) -> bool:
    """Whether anything but the module's class has a say in calling it: hooks, or a forward of the instance's own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
