"""VTAB-1k in the folders of NOAH and PETL-ViT (docs/data.md, VTAB-1k)."""

from __future__ import annotations

from functools import partial

from mosa_fast.config import DataConfig
from mosa_fast.data.annotations import check_files, read_lines
from mosa_fast.data.images import ImageFiles
from mosa_fast.data.parts import Splits, Wanted

GROUPS = {
    "Natural": {
        "cifar": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
    },
    "Specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5},
    "Structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}
TASKS = {task: classes for tasks in GROUPS.values() for task, classes in tasks.items()}


def load_vtab(config: DataConfig, wanted: Wanted) -> Splits:
    """One task of `root/<task>/{train800,val200,train800val200,test}.txt`.

    Args:
        config: the data section. mode "tune": train800, selected on val200; "final": train800val200, nothing to
            select with.
        wanted: its root is the folder of all tasks.

    Raises:
        ValueError: a list is missing or a line of it is wrong, or an image that it lists is missing.
    """
    assert config.task is not None
    folder, classes = wanted.root / config.task, TASKS[config.task]

    def part(name: str, *, train: bool = False) -> ImageFiles:
        source = folder / f"{name}.txt"
        parse = partial(_parse, classes=classes if wanted.strict else None)
        rows = [(str(folder / path), label) for path, label in read_lines(source, _fix(config.task), parse)]
        if wanted.strict:
            check_files([path for path, _ in rows], source)
        return ImageFiles(rows, wanted.transforms.train if train else wanted.transforms.evaluate)

    final = config.mode == "final"
    train = part("train800val200" if final else "train800", train=True)
    names = [str(label) for label in range(classes)]  # the lists give no names
    return Splits(train, None if final else part("val200"), part("test"), train.targets, names)


def _fix(task: str | None) -> str:
    return f"data.root must hold {task}/train800.txt, val200.txt, train800val200.txt and test.txt"


def _parse(line: str, classes: int | None) -> tuple[str, int]:
    path, _, label = line.strip().rpartition(" ")
    if not path or not label.lstrip("-").isdigit():
        raise ValueError(f"expected 'images/<split>/000000.jpg <label>', got {line.strip()!r}")
    if classes is not None and not 0 <= int(label) < classes:
        raise ValueError(f"label {label} is not in 0 to {classes - 1}")
    return path.strip(), int(label)
