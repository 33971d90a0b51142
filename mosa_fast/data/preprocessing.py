"""What evaluation does to an image, as data: what a run knows and a file can say. It needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
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
    interpolation: str = "bilinear"

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
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one that torchvision knows, got {self.interpolation!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them; `Preprocessing(**fields)` is the inverse."""
        return asdict(self)


def cropped(image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """Resize the shorter side to 8/7 of the size, and cut out the centre."""
    return Preprocessing(image_size, int(image_size * RESIZE_RATIO), *statistics)


def squashed(image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """Resize both sides (VTAB-1k, digits)."""
    return Preprocessing(image_size, None, *statistics)
