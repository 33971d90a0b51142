"""Lines of finished runs: written once, and as good as the runs where only they are there."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mosa_fast.run_folder import RunFolder
from mosa_fast.sweep import main
from mosa_fast.sweeps import runs
from mosa_fast.sweeps.arguments import find_recipes
from mosa_fast.sweeps.records import Records, read_records, recipe_at
from mosa_fast.sweeps.runs import Run
from mosa_fast.sweeps.sweep import sweep
from mosa_fast.sweeps.table import make_rows

pytestmark = pytest.mark.usefixtures("_no_git")


def test_every_finished_run_is_one_line_of_the_records(tmp_path, trainings, command):
    records = tmp_path / "records.jsonl"
    arguments = ["--configs", "digits", "--out", tmp_path / "a", "--grid", "optim.lr=1e-3,5", "--records", records]
    for _ in range(2):  # what is done is not written again
        command(main, *arguments, "--seeds", "1,2", "--data.shots=9")
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len({line.pop("digest") for line in lines}) == 3
    own = {"recipe": "configs/digits", "options": ["--data.shots=9", "--optim.lr=1e-3"], "commit": "abc"}
    assert lines == [
        own | {"seed": None, "search": True, "val_accuracy": 86.0},
        own | {"seed": 1, "search": False, "val_accuracy": 86.0, "test_accuracy": 81.0},
        own | {"seed": 2, "search": False, "val_accuracy": 86.0, "test_accuracy": 82.0},
    ]
    whole = records.read_text()
    records.write_text("".join(whole.splitlines(keepends=True)[:2]))
    command(main, *arguments, "--seeds", "1,2", "--data.shots=9")
    assert records.read_text() == whole  # one that was lost is back


def test_a_record_has_the_commit_that_its_run_was_made_by(tmp_path, trainings, monkeypatch):
    rows = make_rows(find_recipes(["digits"]))
    sweep(rows, [1], {}, tmp_path)
    monkeypatch.setattr(runs, "commit", lambda: "def")
    sweep(rows, [1, 2], {}, tmp_path, records=tmp_path / "records.jsonl")
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["commit"] for line in lines] == ["abc", "def"]


def test_a_record_keeps_its_commit_where_a_later_attempt_left_its_own_in_the_folder(tmp_path, trainings, monkeypatch):
    rows, records = make_rows(find_recipes(["digits"])), tmp_path / "records.jsonl"
    sweep(rows, [1], {}, tmp_path, records=records)
    before = records.read_text()
    folder = tmp_path / "configs" / "digits" / "seed1"
    (folder / "summary.json").unlink()
    (folder / "sweep.json").write_text((folder / "sweep.json").read_text().replace("abc", "def"))
    sweep(rows, [1], {}, tmp_path, records=records)
    assert (len(trainings), records.read_text()) == (1, before)


def test_a_last_record_that_was_cut_short_is_written_again_and_other_damage_is_named(tmp_path, trainings):
    rows, records = make_rows(find_recipes(["digits"])), tmp_path / "records.jsonl"
    sweep(rows, [1, 2], {}, tmp_path, records=records)
    whole = records.read_text()
    records.write_text(whole[:-20])
    assert len(read_records(records)) == 1
    sweep(rows, [1, 2], {}, tmp_path, records=records)
    assert records.read_text() == whole
    records.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1 is broken: Unterminated"):
        sweep(rows, [1, 2], {}, tmp_path, records=records)


@pytest.mark.parametrize(
    "value", ["[]", "{}", "1", *(f'{{"recipe": "a", "options": {o}, "seed": 1, "search": true}}' for o in ("1", "[1]"))]
)
def test_a_line_that_is_no_record_is_named(tmp_path, value):
    (tmp_path / "records.jsonl").write_text(value + "\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1 is broken: no record of a run"):
        Records(tmp_path / "records.jsonl")


@pytest.mark.parametrize("where", ["/dev/null/records.jsonl", "."])
def test_records_that_cannot_be_written_are_refused_before_anything_is_trained(tmp_path, trainings, command, where):
    code, _, error = command(main, "--configs", "digits", "--out", tmp_path, "--records", where)
    assert (code, error.count("\n"), trainings) == (2, 1, [])


SEARCHED = ["--configs", "own.yaml", "--seeds", "1,2", "--search-seeds", "7,8", "--records", "records.jsonl"]
SEARCHED += ["--seed-options", "seed", "adapter.seed", "--grid", "optim.lr=1e-3,5e-3"]


@pytest.fixture
def searched(tmp_path, trainings, monkeypatch, command):
    """A recipe, and the records of a sweep of it whose folders are gone; what its table was."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("data: {shots: 3}\noptim: {epochs: 5}\nout: here\n")
    code, out, error = command(main, *SEARCHED, "--out", "runs")
    assert code == 0, error
    assert len(trainings) == 6
    trainings.clear()
    shutil.rmtree("runs")
    return out


def test_a_line_stands_for_its_run_where_the_folder_is_not(searched, trainings, command):
    before = Path("records.jsonl").read_text()
    assert command(main, *SEARCHED, "--out", "elsewhere")[1] == searched
    assert trainings == []
    assert Path("records.jsonl").read_text() == before
    # Only what is not there is trained, and only it gets a line.
    more = [word.replace("1,2", "1,2,3") for word in SEARCHED]
    assert command(main, *more, "--out", "elsewhere")[0] == 0
    assert [(call["seed"], call["optim.lr"]) for call in trainings] == [("3", "5e-3")]
    assert Path("records.jsonl").read_text().startswith(before)
    assert len(read_records(Path("records.jsonl"))) == 7


def test_what_changes_no_result_may_be_another(searched, trainings, command):
    Path("own.yaml").write_text("optim: {epochs: 5}\ndata:\n  shots: 3  # a few\n  workers: 1\nout: there\n")
    for words in (["--data.root=elsewhere"], ["--data.root", "elsewhere", "--device", "cuda"]):
        code, _, error = command(main, *SEARCHED, "--out", "elsewhere", *words)
        assert (code, error, trainings) == (0, "", [])


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("data: {shots: 3}\noptim: {epochs: 6}\n", []),
        ("data: {shots: 3}\n", []),
        (None, ["--seed-options", "seed"]),
        (None, ["--optim.weight_decay=0"]),
    ],
)
def test_a_run_of_other_settings_is_trained_and_gets_a_line(searched, trainings, command, recipe, words):
    if recipe is not None:
        Path("own.yaml").write_text(recipe)
    _, _, error = command(main, *SEARCHED, *words, "--out", "elsewhere")
    assert len(trainings) == 6
    assert len(read_records(Path("records.jsonl"))) == 12
    noted = "records.jsonl has runs of "
    assert error.count(noted) == (not any("decay" in word for word in words)), error  # once, and not for other labels


def test_an_unfinished_run_goes_on_though_there_is_a_line(searched, trainings, command):
    command(main, *SEARCHED, "--out", "elsewhere")
    assert trainings == []
    folder = RunFolder(Path("elsewhere") / Path.cwd().name / "own" / "seed2")
    folder.checkpoint(3).parent.mkdir(parents=True)
    folder.checkpoint(3).touch()
    command(main, *SEARCHED, "--out", "elsewhere")
    assert [call["seed"] for call in trainings] == ["2"]


def test_whatever_the_engine_nothing_is_started_for_a_line(searched):
    """Ray's tasks, too, are started for what is missing only."""

    def start(words):
        raise AssertionError(f"{words} is done")

    rows, records = make_rows(find_recipes(["own.yaml"]), ("--optim.lr=5e-3",)), Path("records.jsonl")
    seeds = {"seed_options": ["seed", "adapter.seed"]}
    results = sweep(rows, [1, 2], {}, Path("elsewhere"), 2, records=records, start=start, **seeds)
    assert results.accuracies == {f"{Path.cwd().name}/own": [81.0, 82.0]}


def git(*words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_a_line_without_a_digest_counts_if_its_commit_has_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    base, recipe, records = Path("base.yaml"), Path("configs/own.yaml"), Path("records.jsonl")
    base.write_text("optim: {epochs: 5}\n")
    recipe.write_text("base: ../base.yaml\ngrid: {optim.lr: [1]}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=10", "HEAD")
    labels = {"recipe": "configs/own", "options": ["--optim.lr=1"], "seed": 1, "search": False}
    run = Run(recipe, ("--optim.lr=1", "--seed=1"), RunFolder("run"), "test_accuracy", labels)

    def found(made_by=commit, run=run):
        recipe_at.cache_clear()
        records.write_text(json.dumps({**labels, "commit": made_by, "test_accuracy": 5.0}) + "\n")
        return Records(records).find(run)

    assert found()["test_accuracy"] == 5.0
    recipe.write_text("base: ../base.yaml\ngrid: {optim.lr: [1, 2]}\nout: elsewhere\n")
    assert found() is not None
    for made_by in (f"{commit}+", None, "0123456789"):
        assert found(made_by) is None
        assert "records.jsonl has runs of configs/own that may be of another recipe: not counted" in (
            capsys.readouterr().err
        )
    assert found(run=replace(run, labels={**labels, "seed": 2})) is None
    base.write_text("optim: {epochs: 6}\n")
    assert found() is None
    base.write_text("optim: {epochs: 5}\n")
    monkeypatch.setenv("PATH", "")  # no git
    assert found() is None


def test_a_line_without_the_number_that_is_wanted_stands_for_nothing(searched, trainings, command):
    records = Path("records.jsonl")
    lines = [{**record, "test_accuracy": None} for record in read_records(records)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(main, *SEARCHED, "--out", "elsewhere")[1] == searched
    assert sorted(call["seed"] for call in trainings) == ["1", "2"]
    assert len(read_records(records)) == 8
