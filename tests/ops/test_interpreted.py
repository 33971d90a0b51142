"""Runs `tests/interpreter` in a process of its own: Triton decides at import whether it interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this very process")
FOLDER = Path(__file__).parents[1] / "interpreter"


def test_kernels_in_the_interpreter():
    # A failure shows the tests' own report.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", FOLDER, "-q", "-p", "no:cacheprovider"],
        # torch.compile keeps compiled backwards on disk without noticing that an operator has changed.
        env=os.environ | {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
