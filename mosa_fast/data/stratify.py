"""Cutting a data set in two, class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratified_split(labels: Sequence[int], take: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices in two so that every class gives its part.

    Args:
        labels: class of every element.
        take: how much of each class goes to the first part: a count, or a fraction (rounded, at least one element
            where the class has two or more).
        seed: fixes the choice.

    Returns:
        Indices of the first and of the second part, each in ascending order.

    Raises:
        ValueError: a class has fewer elements than the count.
    """
    rng = np.random.default_rng(seed)
    label_array = np.asarray(labels)
    first: list[int] = []
    for label in np.unique(label_array):
        members = rng.permutation(np.flatnonzero(label_array == label))
        if isinstance(take, float):
            count = min(max(1, round(take * len(members))), len(members) - 1)
        elif take > len(members):
            raise ValueError(f"class {label} has {len(members)} images, {take} are asked for")
        else:
            count = take
        first += members[:count].tolist()
    chosen = set(first)
    return sorted(first), [index for index in range(len(label_array)) if index not in chosen]
