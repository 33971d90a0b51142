"""The quick suite by pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, TOLERANCE, Makers, Spec, UnavailableError, free_memory
from benchmarks.suite import SUITES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SPECS = SUITES["gpu" if GPU else "quick"].specs
NAMES = ("no adapter", "paper", "paper, compiled", "dense", "lora", "ours, reference", "ours, triton", "ours, cuda")


@pytest.fixture(scope="module", params=SPECS, ids=lambda s: f"{s.case}-{s.images}x{s.tokens}-{s.precision}")
def spec_and_makers(request: pytest.FixtureRequest) -> Iterator[tuple[Spec, Makers]]:
    yield request.param, CASES[request.param.case](request.param, DEVICE)
    free_memory()


@pytest.mark.parametrize("name", NAMES)
def test_time(benchmark: Any, spec_and_makers: tuple[Spec, Makers], name: str) -> None:
    spec, makers = spec_and_makers
    if name not in makers:
        pytest.skip("not a contender here")
    try:
        contender = makers[name]()
    except UnavailableError as error:
        pytest.skip(str(error))
    assert contender.wrong(TOLERANCE[spec.precision]) is None

    def run() -> None:
        contender.run()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{spec.case} {spec.images} x {spec.tokens} {spec.precision}"
    benchmark.pedantic(run, rounds=spec.repeats, warmup_rounds=2)
