"""From image files to tensors (docs/data.md, Images)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

from mosa_fast.config import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_RATIO = 8 / 7  # 256 for 224, 438 for 384, 512 for 448


class Statistics(NamedTuple):
    """Mean and standard deviation of the channels, of pixels in [0, 1]."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


IMAGENET = Statistics()


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an RGB image before the model sees it; `evaluation_transform` does it.

    Attributes:
        image_size: side in pixels of what the model is given.
        resize: what the shorter side is resized to, before the centre is cut out. None: both sides are resized to
            image_size, and nothing is cut off.
        mean, std: of the channels, of pixels in [0, 1].
        interpolation: of the resizing, as torchvision's InterpolationMode calls it.

    Raises:
        ValueError: a value is of another type or out of range; the message names it.
    """

    image_size: int
    resize: int | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = InterpolationMode.BILINEAR.value

    def __post_init__(self) -> None:
        for name, side in (("image_size", self.image_size), ("resize", self.resize or self.image_size)):
            if type(side) is not int or side < 1:
                raise ValueError(f"{name} must be a number of pixels, got {side!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (
                not isinstance(values, (list, tuple))
                or len(values) != 3
                or not {type(v) for v in values} <= {int, float}
            ):
                raise ValueError(f"{name} must be three numbers, got {values!r}")
            object.__setattr__(self, name, tuple(map(float, values)))  # a list, where it comes from JSON
        if self.interpolation not in [mode.value for mode in InterpolationMode]:
            raise ValueError(f"interpolation must be one that torchvision knows, got {self.interpolation!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them; `Preprocessing(**fields)` is the inverse."""
        return asdict(self)


AUGMENTATIONS = {
    "randaugment": v2.RandAugment,
    "autoaugment": v2.AutoAugment,
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


class Transforms(NamedTuple):
    """What training and evaluation do to an image."""

    train: v2.Compose
    evaluate: v2.Compose


def cropped(image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """Resize the shorter side to 8/7 of the size, and cut out the centre."""
    return Preprocessing(image_size, int(image_size * RESIZE_RATIO), *statistics)


def squashed(image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """Resize both sides (VTAB-1k, digits)."""
    return Preprocessing(image_size, None, *statistics)


def evaluation_transform(preprocessing: Preprocessing) -> v2.Compose:
    """PIL image to float32 `[3, image_size, image_size]`."""
    return _compose(preprocessing, [v2.CenterCrop(preprocessing.image_size)])


def train_transform(preprocessing: Preprocessing, config: DataConfig) -> v2.Compose:
    """The same for training: a random crop, and a flip; nothing random where evaluation cuts nothing off.

    What `crop_scale`, `augment` and `random_erasing` of the data section change is off by default. All of it draws
    from torch, never from Python or numpy.
    """
    size = preprocessing.image_size
    augment = [] if config.augment == "none" else [AUGMENTATIONS[config.augment]()]
    erase = [v2.RandomErasing(config.random_erasing)] if config.random_erasing else []
    changes = [v2.RandomHorizontalFlip(), *augment]
    if config.crop_scale is not None:
        crop = v2.RandomResizedCrop(size, (config.crop_scale, 1.0), interpolation=_interpolation(preprocessing))
        return v2.Compose([v2.RGB(), crop, *changes, *_tensor(preprocessing), *erase])
    return v2.Compose([*_compose(preprocessing, [v2.RandomCrop(size), *changes]).transforms, *erase])


def _compose(preprocessing: Preprocessing, crop: list[torch.nn.Module]) -> v2.Compose:
    size, interpolation = preprocessing.image_size, _interpolation(preprocessing)
    if preprocessing.resize is None:
        geometry: list[torch.nn.Module] = [v2.Resize((size, size), interpolation)]
    else:
        geometry = [v2.Resize(preprocessing.resize, interpolation), *crop]
    return v2.Compose([v2.RGB(), *geometry, *_tensor(preprocessing)])


def _interpolation(preprocessing: Preprocessing) -> InterpolationMode:
    return InterpolationMode(preprocessing.interpolation)


def _tensor(preprocessing: Preprocessing) -> list[torch.nn.Module]:
    normalise = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
