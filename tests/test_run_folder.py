import ast
from pathlib import Path

import pytest

import mosa_fast
from mosa_fast.command_line import user_path
from mosa_fast.run_folder import RunFolder

PACKAGE = Path(mosa_fast.__file__).parent


def file_names() -> set[str]:
    """What RunFolder calls the files of a run."""
    folder = RunFolder("run")
    found = [getattr(folder, name) for name, value in vars(RunFolder).items() if isinstance(value, property)]
    return {path.name for path in found if isinstance(path, Path)}


def test_no_other_module_spells_the_name_of_a_runs_file():
    names = file_names()
    assert {"config.yaml", "adapter.safetensors", "checkpoint", "tensorboard"} <= names
    # words that are also options, packages and functions' arguments: only as a path's end are they a file's name
    paths = {name for name in names if "." in name}
    for source in PACKAGE.rglob("*.py"):
        if source.name == "run_folder.py" or source.parent.name == "formats":  # whose folders are others' than runs'
            continue
        tree = ast.parse(source.read_text())
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                assert not [name for name in paths if name in node.value], f"{source}, line {node.lineno}"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                assert node.right.value not in names, f"{source}, line {node.lineno}"


def test_the_last_complete_checkpoint_is_found(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for step in (9, 10, 1_000_000_000):
        folder.checkpoint(step).parent.mkdir(exist_ok=True)
        folder.checkpoint(step).touch()
    folder.checkpoint_weights(2_000_000_000).touch()  # without its state it is not complete
    (folder.checkpoints / ".step-3000000000.pt.1.tmp").touch()
    assert folder.last_checkpoint() == 1_000_000_000
    assert folder.lost_checkpoint() == 2_000_000_000
    folder.checkpoint(3_000_000_000).touch()
    assert folder.lost_checkpoint() is None


def test_texts_are_read_as_they_were_written(tmp_path):
    folder = RunFolder(tmp_path / "new")
    folder.write_classes(["Möwe", "owl"])
    assert folder.read_classes() == ["Möwe", "owl"]
    assert not folder.is_finished
    folder.write_summary({"val_accuracy": None, "steps": 3})
    assert folder.is_finished
    assert folder.read_summary() == {"val_accuracy": None, "steps": 3}
    folder.summary.write_text('{"val_')
    with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
        folder.read_summary()
    folder.start_anew()
    assert not folder.is_finished


def test_a_new_run_finds_nothing_that_the_one_before_it_has_left_of_itself(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config({"seed": 1})
    assert folder.is_unfinished
    folder.checkpoints.mkdir()
    left = (folder.adapter, folder.model, folder.curves, folder.confusion, folder.summary, folder.checkpoint(3))
    for path in left:
        path.touch()
    assert folder.is_finished
    assert not folder.is_unfinished
    folder.start_anew()
    assert [path for path in left if path.exists()] == []


def test_a_home_that_the_shell_has_left_as_it_is_typed_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/birds").path == tmp_path / "runs" / "birds"
    assert user_path("~/out") == tmp_path / "out"
    assert user_path("~nobody-of-this-name/out") == Path("~nobody-of-this-name/out")
