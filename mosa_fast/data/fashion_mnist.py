"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, ten classes (docs/data.md, Fashion-MNIST).

Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, arXiv 1708.07747, MIT licence.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST

from mosa_fast.config import DataConfig
from mosa_fast.data.grey import as_images, take_per_class
from mosa_fast.data.parts import Splits, Wanted

CLASSES = 10
VAL_PER_CLASS = 200
MAX_SHOTS = 5800  # what every class has left
MAX_INK = 255
PARTS = {"train": "train", "test": "t10k"}  # as the files call them


def load_fashion_mnist(config: DataConfig, wanted: Wanted) -> Splits:
    """Few training images a class, 2,000 validation images, and the 10,000 test images, scaled to [-1, 1].

    Args:
        config: the data section: `shots` training images per class (None: all that validation leaves); `download` lets
            torchvision fetch the files.
        wanted: its root is the folder of the four idx files, gzipped or not, or the one in which torchvision makes
            FashionMNIST/raw; its seed draws training and validation images.

    Raises:
        ValueError: the files are missing or damaged, or there are not so many images per class.
    """
    if config.shots is not None and config.shots > MAX_SHOTS:
        raise ValueError(f"data.shots must be 1 to {MAX_SHOTS} for fashion_mnist, got {config.shots}")
    root, seed = wanted.root, wanted.seed
    if config.download:
        try:
            FashionMNIST(root, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"Fashion-MNIST cannot be downloaded to {root}: {error}") from None
    pixels, targets = _read_part(root, "train")
    labels = targets.tolist()
    val, train = take_per_class(range(len(labels)), labels, VAL_PER_CLASS, seed)
    if config.shots is not None:
        train, _ = take_per_class(train, labels, config.shots, seed)

    def part(pixels: Tensor, targets: Tensor) -> TensorDataset:
        return TensorDataset(as_images(pixels / MAX_INK, wanted.image_size), targets)

    return Splits(
        part(pixels[train], targets[train]),
        part(pixels[val], targets[val]),
        part(*_read_part(root, "test")),
        targets[train].tolist(),
        list(FashionMNIST.classes),
    )


def read_idx(path: Path) -> Tensor:
    """The array of an idx file of bytes, gzipped or not: type and rank, the dimensions as 32-bit integers, data.

    Raises:
        ValueError: it is something else, or cut short.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        rank = content[3]
        shape = np.frombuffer(content, ">i4", rank, offset=4).tolist()
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a whole idx file: {error}") from None


def _read_part(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """uint8 pixels `[N, 28, 28]` and int64 labels `[N]`."""
    pixels, labels = (_find(root, f"{PARTS[part]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return read_idx(pixels), read_idx(labels).long()


def _find(root: Path, name: str) -> Path:
    for folder in (root, root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"no {name} or {name}.gz in {root}: --data.download true fetches it")
