import json
import sys
from pathlib import Path

import pytest

from mosa_fast import sweep as module
from mosa_fast.data import digits
from mosa_fast.sweep import Run, find_recipes, groups, main, parse_grid, sweep, table
from mosa_fast.train import main as train_main

FAST = ["--data.shots=1", "--optim.epochs=1", "--optim.batch_size=10"]


@pytest.fixture
def trainings(monkeypatch):
    """Stands in for the training processes: records their options and writes the summaries they would."""
    calls = []

    def train(command):
        options = dict(word.removeprefix("--").split("=", 1) for word in command[5:] if "=" in word)
        calls.append(options)
        lr, seed = float(options.get("optim.lr", 1e-3)), int(options.get("seed", 0))
        if lr > 1:
            return type("Done", (), {"returncode": 2})
        out = Path(options["out"])
        out.mkdir(parents=True, exist_ok=True)
        summary = {"val_accuracy": 90 - abs(lr - 5e-3) * 1000}
        if options.get("test") != "false":
            summary["test_accuracy"] = 80.0 + seed % 10
        (out / "summary.json").write_text(json.dumps(summary))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(module.subprocess, "run", train)
    return calls


def test_a_sweep_of_real_runs(tmp_path, monkeypatch, command):
    """Two points on validation, then two seeds of the better one, test images read only then."""

    def train_here(words):  # what a process of its own would do, without the seconds that its imports take
        assert words[:3] == [sys.executable, "-m", "mosa_fast.train"]
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", words[2:])
            train_main()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(module.subprocess, "run", train_here)
    monkeypatch.setattr(digits, "TEST_PER_CLASS", 5)
    monkeypatch.setattr(digits, "VAL_PER_CLASS", 5)
    arguments = ["--configs", "digits", "--out", tmp_path, "--seeds", 2, "--grid", "optim.lr=1e-9,5e-3", *FAST]
    code, out, error = command(main, *arguments)
    assert code == 0, error
    assert "configs/digits: optim.lr=5e-3 is best on validation" in out
    row = next(line for line in out.splitlines() if line.startswith("| configs/digits"))
    summaries = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("configs/digits/seed*/summary.json"))]
    assert [s["config"]["seed"] for s in summaries] == [3407, 3408]
    first, second = (s["test_accuracy"] for s in summaries)
    assert row == f"| configs/digits | {(first + second) / 2:.2f} | {abs(first - second) / 2:.2f} | 2 |"
    for path in tmp_path.glob("search/**/summary.json"):
        assert "test_accuracy" not in json.loads(path.read_text())
    assert row in (tmp_path / "table.md").read_text()


def test_what_is_done_is_skipped_and_what_was_cut_off_is_run_again(tmp_path, trainings):
    recipes = find_recipes(["digits"])
    first, _ = sweep(recipes, 3, [], (), tmp_path)
    assert first == {"configs/digits": [87.0, 88.0, 89.0]}
    assert len(trainings) == 3
    (tmp_path / "configs" / "digits" / "seed3408" / "summary.json").write_text('{"val_')
    (tmp_path / "configs" / "digits" / "seed3409" / "summary.json").write_text('{"val_accuracy": 1.0}')
    assert sweep(recipes, 3, [], (), tmp_path) == (first, [])
    assert [call["seed"] for call in trainings[3:]] == ["3408", "3409"]


def test_results_of_other_settings_are_not_taken_for_these(tmp_path, trainings):
    recipes = find_recipes(["digits"])
    sweep(recipes, 1, [], (), tmp_path)
    with pytest.raises(ValueError, match="seed3407 was made with other settings: choose another --out"):
        sweep(recipes, 1, [], ("--optim.epochs=2",), tmp_path)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("seed: 5\n")
    run = Run(recipe, (), tmp_path / "run")
    run.execute("test_accuracy")
    recipe.write_text("seed: 6\n")
    with pytest.raises(ValueError, match="other settings"):
        run.summary("test_accuracy")


def test_the_grid_is_searched_on_validation_only(tmp_path, trainings):
    grid = parse_grid(["optim.lr=1e-3,5e-3,1e-2", "loss.reg_weight=1,2"])
    assert len(grid) == 6
    sweep(find_recipes(["vtab/kitti"]), 1, grid, ("--data.root=here",), tmp_path)
    search, final = trainings[:-1], trainings[-1]
    assert len(search) == 6
    assert all(call["test"] == "false" and call["data.mode"] == "tune" for call in search)
    assert "test" not in final
    assert "data.mode" not in final  # the recipe's own: final
    assert (final["optim.lr"], final["loss.reg_weight"], final["data.root"]) == ("5e-3", "1", "here")
    assert parse_grid([]) == []
    for item in ("optim.lr", "=1", "optim.lr=1,,2"):
        with pytest.raises(ValueError, match="--grid must look like"):
            parse_grid([item])


def test_failed_runs_are_listed_and_the_rest_goes_on(tmp_path, trainings, command):
    code, out, error = command(main, "--configs", "digits", "--out", tmp_path, "--grid", "optim.lr=5,1e-3")
    assert code == 1
    assert "| configs/digits | 87.00 | - | 1 |" in out
    assert "1 runs failed: " in error
    code, out, error = command(main, "--configs", "digits", "--out", tmp_path / "b", "--optim.lr=5")
    assert "| configs/digits | failed | - | 0 |" in out


def test_an_interruption_stops_and_says_how_to_go_on(tmp_path, monkeypatch, command):
    monkeypatch.setattr(module.subprocess, "run", lambda command: type("Done", (), {"returncode": 130}))
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path)
    assert code == 130
    assert "the same command goes on from here" in error


def test_group_means_and_their_standard_errors():
    recipes = find_recipes(["configs/vtab/*.yaml", "configs/fgvc/*.yaml", "configs/linear/cub.yaml"])
    assert len(recipes) == 26
    members = groups(recipes)
    assert {title: len(names) for title, names in members.items()} == {
        "fgvc: FGVC mean": 5,
        "vtab: Natural mean": 7,
        "vtab: Specialized mean": 4,
        "vtab: Structured mean": 8,
    }
    assert "fgvc/multitask" not in members["fgvc: FGVC mean"]
    results = {name: [50.0, 60.0, 70.0] for name in recipes}
    results["vtab/kitti"] = [58.0, None, 70.0]
    text = table(results, members).splitlines()
    assert "| fgvc/cub | 60.00 | 5.77 | 3 |" in text
    assert "| **vtab: Structured mean** (8) | 60.50 | 9.50 | 2 |" in text  # of 51 and 70: the seeds that all have
    assert "| **fgvc: FGVC mean** (5) | 60.00 | 5.77 | 3 |" in text


def test_patterns_that_match_nothing_are_named(command):
    code, _, error = command(main, "--configs", "nowhere/*.yaml")
    assert code == 2
    assert "no recipe nowhere/*.yaml" in error
    code, _, error = command(main, "--configs", "digits", "--seeds", 0)
    assert code == 2
    assert "--seeds must be at least 1, got 0" in error
