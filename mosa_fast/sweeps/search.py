"""Choosing a point of a grid on validation."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from itertools import product
from math import prod

Place = tuple[int, ...]  # of a point: for each axis, which of its values
Scores = Mapping[Place, float | None]  # of points that were asked for; None: it could not be trained
Search = Generator[list[Place], Scores, dict[Place, float]]  # gives points, gets their scores, returns all it has


def everywhere(sizes: Sequence[int]) -> Search:
    """All points, given the number of values of each axis."""
    scores = yield list(product(*map(range, sizes)))
    return _known(scores)


def uphill(sizes: Sequence[int]) -> Search:
    """From the middle of the grid to the best neighbour along an axis, until no neighbour is better.

    Of a grid with one summit this finds it with a small part of the points. Where the summit is not at the edge, the
    grid is wide enough.
    """
    centre = tuple((size - 1) // 2 for size in sizes)
    asked: set[Place] = set()
    known: dict[Place, float] = {}
    while True:
        wanted = [place for place in _around(centre, sizes) if place not in asked]
        asked.update(wanted)
        known |= _known((yield wanted))
        best = best_of(known) if known else centre
        if best == centre or len(asked) == prod(sizes):
            return known
        centre = best


def best_of(scores: Mapping[Place, float]) -> Place:
    """The place with the highest score; where several tie, the first, which has the smallest values."""
    return min(scores, key=lambda place: (-scores[place], place))


def _around(centre: Place, sizes: Sequence[int]) -> list[Place]:
    steps = [(axis, step) for axis in range(len(sizes)) for step in (-1, 1)]
    moved = [tuple(i + step * (axis == other) for other, i in enumerate(centre)) for axis, step in steps]
    return [centre, *(place for place in moved if all(0 <= i < n for i, n in zip(place, sizes, strict=True)))]


def _known(scores: Scores) -> dict[Place, float]:
    return {place: score for place, score in scores.items() if score is not None}
