import json
import os
import sys
import threading

import pytest

from mosa_fast import sweep as module
from mosa_fast.data import digits
from mosa_fast.run_folder import RunFolder
from mosa_fast.sweep import main
from mosa_fast.sweeps import runs
from mosa_fast.sweeps.arguments import find_recipes, parse_grid, parse_seeds, parse_variants
from mosa_fast.sweeps.runs import Run
from mosa_fast.sweeps.sweep import sweep
from mosa_fast.sweeps.table import Results, groups, make_rows, table
from mosa_fast.train import main as train_main

FAST = ["--data.shots=1", "--optim.epochs=1", "--optim.batch_size=10"]

SEEDS = "{} must be a number of seeds, or seeds as in 1,2,3; got 'x'"
TWICE = "{} is set twice, among the options, --vary and the grid: leave one of them out"

pytestmark = pytest.mark.usefixtures("_no_git")


def test_a_sweep_of_real_runs(tmp_path, monkeypatch, command):
    """Two points on validation, then two seeds of the better one, test images read only then."""

    def train_here(words):  # what a process of its own would do, without the seconds that its imports take
        assert words[:3] == [sys.executable, "-m", "mosa_fast.train"]
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", words[2:])
            train_main()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(runs.subprocess, "run", train_here)
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
    # 40,416 weights of adapters, 1,930 of the head
    assert row == f"| configs/digits | {(first + second) / 2:.2f} | {abs(first - second) / 2:.2f} | 2 | 42,346 |"
    for path in tmp_path.glob("search/**/summary.json"):
        assert "test_accuracy" not in json.loads(path.read_text())
    assert row in (tmp_path / "table.md").read_text()


def test_what_is_done_is_skipped_and_what_was_cut_off_is_run_again(tmp_path, trainings):
    rows = make_rows(find_recipes(["digits"]))
    first = sweep(rows, 3, {}, tmp_path)
    assert first.accuracies == {"configs/digits": [87.0, 88.0, 89.0]}
    assert first.failed == []
    assert len(trainings) == 3
    (tmp_path / "configs" / "digits" / "seed3408" / "summary.json").write_text('{"val_')
    (tmp_path / "configs" / "digits" / "seed3409" / "summary.json").write_text('{"val_accuracy": 1.0}')
    assert sweep(rows, 3, {}, tmp_path) == first
    assert [call["seed"] for call in trainings[3:]] == ["3408", "3409"]


def test_results_of_other_settings_are_not_taken_for_these(tmp_path, trainings):
    recipes = find_recipes(["digits"])
    sweep(make_rows(recipes), 1, {}, tmp_path)
    with pytest.raises(ValueError, match="seed3407 was made with other settings: choose another --out"):
        sweep(make_rows(recipes, ("--optim.epochs=2",)), 1, {}, tmp_path)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("seed: 5\n")
    run = Run(recipe, (), RunFolder(tmp_path / "run"), "test_accuracy")
    run.execute(runs.as_process)
    recipe.write_text("seed: 6\n")
    with pytest.raises(ValueError, match="other settings"):
        run.summary()


def test_options_that_change_no_result_may_be_others(tmp_path, trainings):
    recipes = find_recipes(["digits"])
    first = sweep(make_rows(recipes, ("--data.root", "here", "--data.workers=0")), 1, {}, tmp_path)
    assert sweep(make_rows(recipes, ("--data.root=there",)), 1, {}, tmp_path) == first
    assert len(trainings) == 1


def test_a_sweep_goes_on_after_its_typo_was_mended(tmp_path, trainings):
    recipes = find_recipes(["digits"])
    assert sweep(make_rows(recipes, ("--optim.lr=5",)), 1, [], tmp_path).failed != []
    assert sweep(make_rows(recipes, ("--optim.lr=5e-3",)), 1, [], tmp_path).failed == []
    folder = RunFolder(tmp_path / "configs" / "digits" / "seed3407")
    folder.summary.unlink()
    folder.checkpoint(3).parent.mkdir()
    folder.checkpoint(3).touch()  # what a run has begun is not thrown away either
    with pytest.raises(ValueError, match="other settings"):
        sweep(make_rows(recipes, ("--optim.lr=4e-3",)), 1, [], tmp_path)


def test_the_grid_is_searched_on_validation_only(tmp_path, trainings):
    grid = parse_grid(["optim.lr=1e-3,5e-3,1e-2", "loss.reg_weight=1,2"])
    assert grid == {"optim.lr": ["1e-3", "5e-3", "1e-2"], "loss.reg_weight": ["1", "2"]}
    sweep(make_rows(find_recipes(["vtab/kitti"]), ("--data.root=here",)), 1, grid, tmp_path)
    search, final = trainings[:-1], trainings[-1]
    assert len(search) == 6
    assert all(call["test"] == "false" and call["data.mode"] == "tune" for call in search)
    assert "test" not in final
    assert "data.mode" not in final  # the recipe's own: final
    assert (final["optim.lr"], final["loss.reg_weight"], final["data.root"]) == ("5e-3", "1", "here")
    assert parse_grid([]) == {}
    for item in ("optim.lr", "=1", "optim.lr=1,,2"):
        with pytest.raises(ValueError, match="--grid must look like"):
            parse_grid([item])


def test_where_several_tie_on_validation_the_smallest_values_are_taken(tmp_path, trainings):
    # 4e-3 and 6e-3 are as far from the best rate
    sweep(make_rows(find_recipes(["digits"])), 1, parse_grid(["optim.lr=6e-3,4e-3"]), tmp_path)
    assert trainings[-1]["optim.lr"] == "4e-3"


def test_without_values_every_recipe_is_searched_on_its_own_grid(tmp_path, trainings, command):
    arguments = ["--configs", "digits/linear", "digits/full", "--out", tmp_path, "--grid"]
    assert command(main, *arguments)[0] == 0
    assert [call["optim.lr"] for call in trainings[:3]] == ["0.003", "0.01", "0.03"]
    assert [call["optim.lr"] for call in trainings[4:7]] == ["0.0001", "0.0003", "0.001"]
    assert [trainings[i]["optim.lr"] for i in (3, 7)] == ["0.003", "0.001"]  # the best of each, after its search
    assert len(trainings) == 8
    recipe = tmp_path / "own.yaml"
    recipe.write_text("grid: {optim.lr: 3}\n")
    code, _, error = command(main, "--configs", recipe, "--out", tmp_path / "b", "--grid")
    assert code == 2
    assert "grid must be like {optim.lr: [1.0e-3, 5.0e-3]}, got {'optim.lr': 3}" in error


def test_several_values_of_options_go_together_in_one_table(tmp_path, trainings, command):
    vary = ["--vary", "data.shots=10,50", "optim.epochs=60,12"]
    code, out, _ = command(main, "--configs", "digits", "--out", tmp_path, *vary, "--seeds", "1,2")
    assert code == 0
    assert [(call["data.shots"], call["optim.epochs"], call["seed"]) for call in trainings] == [
        ("10", "60", "1"),
        ("10", "60", "2"),
        ("50", "12", "1"),
        ("50", "12", "2"),
    ]
    for shots in (10, 50):
        assert f"| configs/digits, data.shots={shots} | 81.50 | 0.50 | 2 | - |" in out
    assert list(parse_variants([["a=1,2"], ["b=x,y"]])) == ["a=1-b=x", "a=1-b=y", "a=2-b=x", "a=2-b=y"]
    for items, message in (
        (["a=1,2", "b=1"], "as many values for each option"),
        (["a=1,1"], "--vary a gives 1 twice"),
        (["a"], "--vary must look like"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variants([items])


def test_a_search_may_be_the_mean_over_seeds_which_the_adapters_get_too(tmp_path, trainings):
    rows = make_rows(find_recipes(["digits"]))
    seeds = {"search_seeds": [7, 8], "seed_options": ["seed", "adapter.seed"]}
    sweep(rows, [1], parse_grid(["optim.lr=1e-3,5e-3"]), tmp_path, **seeds)
    assert [(call["optim.lr"], call["seed"]) for call in trainings] == [
        ("1e-3", "7"),
        ("1e-3", "8"),
        ("5e-3", "7"),
        ("5e-3", "8"),
        ("5e-3", "1"),
    ]
    assert all(call["adapter.seed"] == call["seed"] for call in trainings)


def test_a_point_that_failed_with_one_seed_is_not_chosen(tmp_path, trainings, monkeypatch):
    train = runs.subprocess.run

    def fails_once(words):
        if "--optim.lr=5e-3" in words and "--seed=8" in words:
            return type("Done", (), {"returncode": 2})
        return train(words)

    monkeypatch.setattr(runs.subprocess, "run", fails_once)
    grid = parse_grid(["optim.lr=1e-3,5e-3"])
    results = sweep(make_rows(find_recipes(["digits"])), [1], grid, tmp_path, search_seeds=[7, 8])
    assert trainings[-1]["optim.lr"] == "1e-3"
    assert results.failed == [str(tmp_path / "search" / "configs" / "digits" / "optim.lr=5e-3" / "seed8")]


def test_uphill_trains_only_what_lies_on_the_way_to_the_summit(tmp_path, trainings, command):
    grid = ["--grid", "optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3", "loss.reg_weight=1,2,3"]
    code, out, _ = command(main, "--configs", "digits", "--out", tmp_path, "--search", "uphill", *grid)
    assert code == 0
    searched = [(call["optim.lr"], call["loss.reg_weight"]) for call in trainings[:-1]]
    assert searched[:5] == [("4e-3", "2"), ("3e-3", "2"), ("5e-3", "2"), ("4e-3", "1"), ("4e-3", "3")]
    # Around the better neighbour; then, since all weights tie and the smallest counts, around that.
    assert searched[5:] == [("6e-3", "2"), ("5e-3", "1"), ("5e-3", "3"), ("6e-3", "1")]
    assert (trainings[-1]["optim.lr"], trainings[-1]["loss.reg_weight"]) == ("5e-3", "1")
    assert "is best on validation, 90.00 % (at the edge of the grid: loss.reg_weight)" in out


@pytest.fixture
def two_at_once(trainings, monkeypatch):
    """Every training waits for another one that runs beside it."""
    both, train = threading.Barrier(2, timeout=20), runs.subprocess.run

    def wait_for_another(words):
        both.wait()  # broken, unless two are there at once
        return train(words)

    monkeypatch.setattr(runs.subprocess, "run", wait_for_another)


def test_an_idle_process_takes_a_run_of_the_next_row(tmp_path, trainings, two_at_once, monkeypatch, command):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, _, _ = command(main, "--configs", "digits/linear", "digits/full", "--out", tmp_path, "--processes", 2)
    assert code == 0


def test_seeds_are_a_number_or_a_list():
    assert (parse_seeds("3"), parse_seeds("3,1"), parse_seeds("7,")) == (3, [3, 1], [7])
    with pytest.raises(ValueError, match="--seeds must be a number of seeds, or seeds as in 1,2,3; got 'x'"):
        parse_seeds("x")


def test_processes_run_side_by_side_and_divide_the_cores(tmp_path, trainings, two_at_once, monkeypatch, command):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # so that it is restored, whatever it was
    monkeypatch.delenv("OMP_NUM_THREADS")
    code, out, _ = command(main, "--configs", "digits", "--out", tmp_path, "--seeds", 4, "--processes", 2)
    assert code == 0
    assert "| configs/digits | 86.00 | 2.04 | 4 | - |" in out
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_an_interruption_of_one_process_starts_no_other(tmp_path, trainings, monkeypatch, command):
    started = []

    def stopped(words):
        started.append(words)
        return type("Done", (), {"returncode": 130})

    monkeypatch.setattr(runs.subprocess, "run", stopped)
    code, _, _ = command(main, "--configs", "digits", "--out", tmp_path, "--seeds", 50, "--processes", 2)
    assert code == 130
    assert len(started) < 50


def test_failed_runs_are_listed_and_the_rest_goes_on(tmp_path, trainings, command):
    code, out, error = command(main, "--configs", "digits", "--out", tmp_path, "--grid", "optim.lr=5,1e-3")
    assert code == 1
    assert "| configs/digits | 87.00 | - | 1 |" in out
    assert "1 run failed: " in error
    code, out, error = command(main, "--configs", "digits", "--out", tmp_path / "b", "--optim.lr=5")
    assert "| configs/digits | failed | - | 0 |" in out


@pytest.mark.timeout(60)
def test_an_interruption_cancels_trainings_that_do_not_get_it(tmp_path):
    class Elsewhere:
        """Trainings on other machines: they go on until they are told."""

        def __init__(self):
            self.told, self.begun = threading.Event(), threading.Semaphore(0)

        def __call__(self, words):
            self.begun.release()
            if words[-1].endswith("seed3407"):  # the first is told to stop when the second has begun
                self.begun.acquire()
                self.begun.acquire()
                return 130
            self.told.wait()
            return 130

        def cancel(self):
            self.told.set()

    with pytest.raises(KeyboardInterrupt):
        sweep(make_rows(find_recipes(["digits"])), 3, {}, tmp_path, processes=2, start=Elsewhere())


def test_an_interruption_stops_and_says_how_to_go_on(tmp_path, monkeypatch, command):
    monkeypatch.setattr(runs.subprocess, "run", lambda command: type("Done", (), {"returncode": 130}))
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path)
    assert code == 130
    assert "the same command goes on from here" in error


def test_group_means_and_their_standard_errors():
    recipes = find_recipes(["configs/vtab/*.yaml", "configs/fgvc/*.yaml", "configs/linear/cub.yaml"])
    assert len(recipes) == 26
    rows = make_rows(recipes)
    members = groups(rows)
    assert {title: len(names) for title, names in members.items()} == {
        "fgvc: FGVC mean": 5,
        "vtab: Natural mean": 7,
        "vtab: Specialized mean": 4,
        "vtab: Structured mean": 8,
    }
    assert "fgvc/multitask" not in members["fgvc: FGVC mean"]
    results = Results({name: [50.0, 60.0, 70.0] for name in recipes}, {"fgvc/cub": 1234})
    results.accuracies["vtab/kitti"] = [58.0, None, 70.0]
    text = table(results, members).splitlines()
    assert "| fgvc/cub | 60.00 | 5.77 | 3 | 1,234 |" in text
    assert "| **vtab: Structured mean** (8) | 60.50 | 9.50 | 2 | - |" in text  # of 51 and 70: the seeds that all have
    assert "| **fgvc: FGVC mean** (5) | 60.00 | 5.77 | 3 | - |" in text


def test_groups_are_averaged_variant_by_variant():
    recipes = find_recipes(["configs/vtab/*.yaml"])
    members = groups(make_rows(recipes, variants=parse_variants([["optim.epochs=1,2"]])))
    assert members["vtab: Specialized mean, optim.epochs=2"][0] == "vtab/patch_camelyon, optim.epochs=2"
    assert len(members) == 6


def test_patterns_that_match_nothing_are_named(command):
    code, _, error = command(main, "--configs", "nowhere/*.yaml")
    assert code == 2
    assert "no recipe nowhere/*.yaml" in error
    code, _, error = command(main, "--configs", "digits", "--seeds", 0)
    assert code == 2
    assert "--seeds must be at least 1, got 0" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "uphill"], "--search and --search-seeds are for a grid: give --grid"),
        (["--search-seeds", "1,2"], "--search and --search-seeds are for a grid: give --grid"),
        (["--grid", "optim.lr=1", "optim.lr=2,3"], "--grid gives optim.lr twice: write optim.lr=1,2,3"),
        (["--vary", "data.shots=1", "data.shots=2"], "--vary gives data.shots twice: write data.shots=1,2"),
        (["--vary", "data.shots=1,2,1"], "--vary data.shots gives 1 twice"),
        (["--grid", "optim.lr=1,1"], "--grid optim.lr gives 1 twice"),
        (["--seeds", "3,1,3"], "--seeds gives 3 twice"),
        (["--grid", "optim.lr=1", "--search-seeds", "x"], SEEDS.format("--search-seeds")),
        (["--seed", "7"], "seed is set by --seeds: give the seeds there, as in --seeds 1,2,3"),
        (["--vary", "seed=1,2"], "seed is set by --seeds: give the seeds there, as in --seeds 1,2,3"),
        (["--seed=7", "--grid", "optim.lr=1", "--search-seeds", "1"], "seed is set by --seeds: give the seeds there"),
        (["--vary", "data.shots=1", "--vary", "data.shots=2"], TWICE.format("data.shots")),
        (["--vary", "data.shots=1,2", "--data.shots=3"], TWICE.format("data.shots")),
        (["--vary", "optim.lr=1,2", "--grid", "optim.lr=3,4"], TWICE.format("optim.lr")),
        (["--optim.lr", "1", "--grid", "optim.lr=3,4"], TWICE.format("optim.lr")),
    ],
)
def test_words_that_would_mean_nothing_are_refused(tmp_path, trainings, command, words, message):
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path, *words)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {message}")
    assert not trainings


def test_a_search_without_seeds_of_its_own_takes_the_seed_that_is_given(tmp_path, trainings, command):
    words = ("--grid", "optim.lr=1e-3", "--seed", 0, "--seeds", "7,8")
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path, *words)
    assert code == 0, error
    assert [call.get("seed", "0") for call in trainings] == ["0", "7", "8"]


@pytest.mark.parametrize("words", [["--test=false"], ["--test", "false"]])
def test_a_sweep_that_would_not_test_is_refused_up_front(tmp_path, trainings, command, words):
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path, *words)
    assert code == 2
    assert "--test is no option of a sweep: its table is of test accuracies" in error
    assert not trainings
