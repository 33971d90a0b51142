"""The quick suite by pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, COPY, Makers, free_memory
from benchmarks.contenders import CONTENDERS
from benchmarks.spec import Spec
from benchmarks.suite import SUITES
from benchmarks.timing import synchronize

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SPECS = SUITES["gpu" if GPU else "quick"].specs


@pytest.fixture(scope="module", params=SPECS, ids=lambda s: f"{s.case}-{s.images}x{s.tokens}-{s.precision}")
def spec_and_makers(request: pytest.FixtureRequest) -> Iterator[tuple[Spec, Makers]]:
    yield request.param, CASES[request.param.case](request.param, DEVICE)
    free_memory()


@pytest.mark.parametrize("name", [COPY, *CONTENDERS])
def test_time(benchmark: Any, spec_and_makers: tuple[Spec, Makers], name: str) -> None:
    spec, makers = spec_and_makers
    if name not in makers:
        pytest.skip("not a contender here")
    make = makers[name]
    if isinstance(make, str):
        pytest.skip(make)
    contender = make()
    assert contender.wrong(spec, contender.results()) is None
    run = contender.work["all"].run

    def timed() -> None:
        run()
        synchronize(DEVICE)

    benchmark.group = str(spec)
    benchmark.pedantic(timed, rounds=spec.repeats, warmup_rounds=2)
