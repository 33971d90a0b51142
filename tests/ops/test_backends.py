import pytest
import torch

from mosa_fast.ops import backends


def test_the_block_restores_what_was_selected_before():
    before = backends.get_backend()
    with backends.backend("reference"):
        assert backends.get_backend() == "reference"
    assert backends.get_backend() == before


def test_auto_is_the_reference_on_a_cpu():
    with backends.backend("auto"):
        assert backends.resolve_backend(torch.device("cpu"), torch.float32) == "reference"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, cuda, got 'tritn'"):
        backends.set_backend("tritn")
    monkeypatch.setenv("MOSA_FAST_BACKEND", "nope")
    with pytest.raises(ValueError, match="MOSA_FAST_BACKEND must be one of"):
        backends.get_backend()


def test_the_environment_variable_selects(monkeypatch):
    monkeypatch.setenv("MOSA_FAST_BACKEND", "reference")
    assert backends.get_backend() == "reference"
