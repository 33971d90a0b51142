import subprocess
import sys

import pytest
import torch

from mosa_fast.ops import backends
from mosa_fast.ops.registration import OPERATORS


def test_the_block_restores_what_was_selected_before():
    before = backends.get_backend()
    with backends.backend("reference"):
        assert backends.get_backend() == "reference"
    assert backends.get_backend() == before


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_is_the_reference_on_a_cpu(operator):
    with backends.backend("auto"):
        assert backends.resolve_backend(torch.device("cpu"), torch.float32, operator) == "reference"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, cuda, got 'tritn'"):
        backends.set_backend("tritn")
    monkeypatch.setattr(backends, "_selected", None)  # whatever another test has chosen
    monkeypatch.setenv("MOSA_FAST_BACKEND", "nope")
    with pytest.raises(ValueError, match="MOSA_FAST_BACKEND must be one of"):
        backends.get_backend()


def test_the_environment_variable_selects(monkeypatch):
    monkeypatch.setattr(backends, "_selected", None)  # whatever another test has chosen
    monkeypatch.setenv("MOSA_FAST_BACKEND", "reference")
    assert backends.get_backend() == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves it")
def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot serve: (no GPU is visible|triton is not installed)"
    ):
        backends.set_backend("triton")
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot serve: (the CUDA C.. extension is|no GPU is|this torch is built)"
    ):
        backends.set_backend("cuda")
    assert backends.get_backend() == "auto"


def test_info_names_every_backend():
    from mosa_fast.info import describe

    text = describe()
    for name in backends.BACKENDS:
        assert f"backend {name}" in text
    assert torch.__version__ in text


def test_importing_the_operators_imports_no_kernels():
    code = "import sys, mosa_fast.ops; assert 'triton' not in sys.modules and 'mosa_fast.kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
