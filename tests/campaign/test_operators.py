"""Calls of the operators drawn at random: none is wrong, none crashes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tally import campaign

SEED = 15
PROGRAM = Path(__file__).with_name("operators.py")


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        ("reference", 300),
        ("triton", 3),
        pytest.param("reference", 10_000, marks=pytest.mark.slow),
        pytest.param("triton", 500, marks=pytest.mark.slow),
    ],
)
def test_random_calls_are_right(backend, calls):
    if backend == "triton":
        pytest.importorskip("triton")
    name = {"reference": "operator calls, reference", "triton": "operator calls, Triton's interpreter"}[backend]
    with campaign(name, SEED, record=calls >= 500) as tally:
        done = subprocess.run(
            [sys.executable, PROGRAM, backend, str(calls), str(SEED)],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        counted = json.loads(done.stdout)
        assert counted["tried"] == calls
        for trouble in counted["wrong"]:
            tally.add(trouble)
        for _ in range(calls - len(counted["wrong"])):
            tally.add(None)
