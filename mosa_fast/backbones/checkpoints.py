"""Reading the published files of backbones into timm models (docs/data.md, Backbones and their files).

| file | layout |
| --- | --- |
| `ViT-B_16.npz`, `ViT-L_16.npz` | Flax names; timm converts them |
| `linear-vit-b-300ep.pth.tar` (MoCo v3) | under `state_dict`, prefix `module.` |
| MoCo v3 before its linear probe | the same, prefix `module.base_encoder.` |
| `mae_pretrain_vit_base.pth` | under `model`; decoder and mask token are left out |
| `swin_base_patch4_window7_224_22k.pth` | under `model`; timm renames its downsampling layers |
| DINOv2, DeiT, timm's own, safetensors | as timm's conversion of ViT files knows them |

A file's classification head is never used. Position embeddings are resampled to the model's image size.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import swin_transformer, vision_transformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "teacher")  # what training scripts put a model's weights under
PREFIXES = ("module.base_encoder.", "base_encoder.", "module.", "backbone.")  # from the most special to the least
HEADS = ("head.", "head_dist.", "fc_head.")
DECODER = "decoder_"  # MAE's; its mask token, and DINOv2's by which timm knows that release, is left to timm
SHOWN = 8  # problems listed in a message
# timm's renaming and resampling of a published file, by the models it is for.
CONVERSIONS: dict[type[nn.Module], Callable[[dict[str, Tensor], Any], dict[str, Any]]] = {
    SwinTransformer: swin_transformer.checkpoint_filter_fn,
    VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
}


def load_checkpoint(model: nn.Module, path: str | Path, md5: str | None = None) -> None:
    """Load a published file into a timm model of a known family (CONVERSIONS), in place, all but its head.

    Args:
        model: on the CPU; its head is left as it is.
        path: the file: .npz, .safetensors, or anything that torch.save wrote (read with weights_only=True).
        md5: what its MD5 digest must begin with; None: anything.

    Raises:
        ValueError: the family is not known, or the file is missing, is not readable, has another digest, or does not
            fit the model; then nothing has been loaded, and the message lists what is missing, unexpected or of
            another shape.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no checkpoint file {path}: model.checkpoint must be the path of a local file")
    if md5 is not None:
        check_digest(path, md5)
    if path.suffix == ".npz":
        _load_npz(model, path)
        return
    tensors = _convert(model, unwrap(_read(path)), path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not _is_head(name)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_fit(path, model, expected, found)
    model.load_state_dict(tensors, strict=False)


def check_digest(path: Path, prefix: str) -> None:
    """Raise ValueError unless the MD5 digest of a file begins with `prefix`."""
    md5 = hashlib.md5(usedforsecurity=False)  # what the recipes name; it guards against mistakes, not against attacks
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            md5.update(chunk)
    digest = md5.hexdigest()
    if not digest.startswith(prefix.lower()):
        raise ValueError(
            f"{path} has the MD5 digest {digest[:8]}..., the recipe asks for {prefix}...: it is another file or was "
            f"damaged (--model.checkpoint_md5 null accepts any file)"
        )


def unwrap(content: object) -> dict[str, Tensor]:
    """The backbone's tensors in what torch.load gave: without wrappers, prefixes, decoder and head."""
    while isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in WRAPPERS):
        content = next(content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            break
    return {name: tensor for name, tensor in tensors.items() if not _is_head(name) and not name.startswith(DECODER)}


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a file of plain tensors, as weights_only=True reads them: {reason}") from None
    except KeyError:  # of an unpickler that met bytes it does not know
        raise ValueError(f"{path} cannot be read: it is no file that torch.save wrote") from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}") from None


def _convert(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Timm's renaming and resampling for the model's family."""
    convert = next((function for kind, function in CONVERSIONS.items() if isinstance(model, kind)), None)
    if convert is None:
        known = " and ".join(kind.__name__ for kind in CONVERSIONS)
        raise ValueError(
            f"{path}: files are read into timm's {known}, not into a {type(model).__name__}; without "
            f"--model.checkpoint timm downloads its own weights"
        )
    if not tensors:
        raise ValueError(f"{path} holds no weights of a backbone")
    try:
        converted: dict[str, Any] = convert(tensors, model)
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError):
        converted = tensors  # of another architecture: the comparison of names and shapes will say so
    return {name: tensor for name, tensor in converted.items() if not _is_head(name)}


def _check_fit(
    path: Path, model: nn.Module, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            problems.append(f"unexpected {name}")
        elif expected[name] != shape:
            problems.append(f"{name} is {list(shape)}, the model's is {list(expected[name])}")
    if problems:
        shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {shown}")


def _is_head(name: str) -> bool:
    return name.startswith(HEADS)


def _load_npz(model: nn.Module, path: Path) -> None:
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{path}: npz files hold a ViT, the model is a {type(model).__name__}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name].shape for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an npz file: {error}") from None
    found = {name: shape for name, shape in found.items() if not name.startswith(("head/", "pre_logits/"))}
    position = "Transformer/posembed_input/pos_embedding"
    expected = _npz_shapes(model)
    if position in found and len(found[position]) == 3:
        expected[position] = (1, found[position][1], model.embed_dim)  # timm resamples it to another image size
    _check_fit(path, model, expected, found)
    head = {name: tensor.clone() for name, tensor in model.state_dict().items() if _is_head(name)}
    model.load_pretrained(str(path))
    model.load_state_dict(head, strict=False)  # timm takes the file's head too where it has as many classes


def _npz_shapes(model: VisionTransformer) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the original ViT release gives a model's weights."""
    width, patch = model.embed_dim, model.patch_embed.proj.weight.shape
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "embedding/kernel": (*patch[2:], patch[1], width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, model.patch_embed.num_patches + 1, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
    }
    for index, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{index}"
        module: Any = block
        heads, hidden = module.attn.num_heads, module.mlp.fc1.out_features
        attention, mlp = f"{prefix}/MultiHeadDotProductAttention_1", f"{prefix}/MlpBlock_3"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{prefix}/{norm}/scale": (width,), f"{prefix}/{norm}/bias": (width,)}
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, heads, width // heads)
            shapes[f"{attention}/{name}/bias"] = (heads, width // heads)
        shapes |= {f"{attention}/out/kernel": (heads, width // heads, width), f"{attention}/out/bias": (width,)}
        shapes |= {f"{mlp}/Dense_0/kernel": (width, hidden), f"{mlp}/Dense_0/bias": (hidden,)}
        shapes |= {f"{mlp}/Dense_1/kernel": (hidden, width), f"{mlp}/Dense_1/bias": (width,)}
    return shapes
