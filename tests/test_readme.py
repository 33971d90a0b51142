"""The README, and CONTRIBUTING.md, say what the files say."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.parametrize(
    ("page", "file", "module", "table"),
    [
        ("CONTRIBUTING.md", "campaign", "report", "reliability_table"),
        ("README.md", "machine_code", "machine_code.results", "readme_table"),
    ],
)
def test_the_tables_are_those_of_the_results(page, file, module, table):
    from benchmarks.results import FOLDER

    make = getattr(importlib.import_module(f"benchmarks.{module}"), table)
    assert make(json.loads((FOLDER / f"{file}.json").read_text())) in (ROOT / page).read_text()


def test_the_table_of_accuracies_is_that_of_the_runs():
    from benchmarks import evidence, evidence_rows

    assert evidence.readme_table(evidence_rows.collect(evidence_rows.read(evidence.RESULTS))) in README.read_text()


def test_the_code_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    # Only the size of the model is changed: nothing is downloaded, and the example takes a second.
    code = code.replace(
        '"vit_base_patch16_224.augreg_in21k", pretrained=True', '"vit_tiny_patch16_224", depth=2, pretrained=False'
    )
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["logits"].shape == (8, 200)
    assert isinstance(scope["y"], torch.Tensor)
    assert (tmp_path / "cub.safetensors").is_file()
