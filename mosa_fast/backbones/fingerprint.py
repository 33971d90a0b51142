"""Telling by a few of its weights whether a backbone is the one that adapters were trained on.

A fingerprint is a sample: SAMPLES values of every frozen parameter, at fixed places, each with how far its storage may
have moved it (half a step of its dtype). It is no hash, because the same weights are met in several precisions: runs
store their frozen weights in bfloat16 or float16, people quantise them to int8. Two backbones are the same where the
values agree within what their two precisions allow; in float32, weights of one training step more do not. Device,
wrappers, head and what is trained do not matter. Position embeddings are left out: timm resamples them to the size of
the images.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 4
POSITIONS = ("pos_embed", "rel_pos", "relative_position")  # in the names of what belongs to a size of images
# How far a stored value may be from the original, as a part of the value, and at least.
ROUNDING = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
FLOAT32 = (2.0**-16, 0.0)  # some conversions of published files are not the same to the last bit on every machine
INT8_STEPS = 127.0  # on either side of zero, for the largest value of a row


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A sample of a backbone's weights.

    Attributes:
        sample: float32 `[parameters, 2, SAMPLES]` on the CPU: values, and how far storage may have moved them; in the
            order of the parameters' names.
    """

    sample: Tensor

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Fingerprint:
        """The fingerprint of frozen parameters, by their timm names, in any dtype and on any device."""
        rows = [_sample(parameters[name]) for name in _sampled(parameters)]
        # Gathered before the copy, so that a GPU is waited for once.
        return cls(torch.stack(rows).cpu() if rows else torch.empty(0, 2, SAMPLES))

    @classmethod
    def from_text(cls, text: str) -> Fingerprint:
        """The inverse of `to_text`.

        Raises:
            ValueError: it is not such a text.
        """
        try:
            content = bytearray(base64.b64decode(text, validate=True))
            sample = torch.frombuffer(content, dtype=torch.float32) if content else torch.empty(0)
            return cls(sample.reshape(-1, 2, SAMPLES))
        except (binascii.Error, ValueError, RuntimeError, TypeError):
            raise ValueError("not a sample of weights") from None

    def to_text(self) -> str:
        """As text: little-endian float32, base64."""
        return base64.b64encode(self.sample.numpy().astype("<f4").tobytes()).decode("ascii")

    def differences(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Names of the parameters that are not those of this fingerprint; all, where there are more or fewer."""
        names, other = _sampled(parameters), Fingerprint.of(parameters).sample
        if other.shape != self.sample.shape:
            return names
        distance, allowed = (self.sample[:, 0] - other[:, 0]).abs(), self.sample[:, 1] + other[:, 1]
        same = (distance <= allowed).all(dim=1)  # not where anything is NaN
        return [name for name, is_same in zip(names, same.tolist(), strict=True) if not is_same]


def _sampled(parameters: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in parameters if not any(word in name for word in POSITIONS))


@torch.no_grad()
def _sample(parameter: Tensor) -> Tensor:
    """Float32 `[2, SAMPLES]` on the parameter's device."""
    count = parameter.numel()
    places = torch.tensor([(count - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)], device=parameter.device)
    if is_quantised(parameter):
        dense = parameter.dequantize().float()
        values = dense.flatten()[places]
        largest = dense.abs().amax(dim=-1)[places // dense.shape[-1]]
        return torch.stack([values, largest / INT8_STEPS])  # a whole step: the largest value of a row is cut off
    values = parameter.detach().flatten()[places].float()
    relative, least = ROUNDING.get(parameter.dtype, FLOAT32)
    return torch.stack([values, (values.abs() * relative).clamp(min=least)])


def is_quantised(parameter: Tensor) -> bool:
    """Whether a weight is a tensor of torchao's, which computes as a dense one and stores less."""
    return type(parameter).__module__.partition(".")[0] == "torchao"
