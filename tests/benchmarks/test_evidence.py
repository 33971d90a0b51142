"""Tables of the evidence: pairs are of one seed, intervals are Student's, searches open no test."""

import json
import os
import subprocess

import pytest

from benchmarks.evidence import main, markdown, readme_table, table
from benchmarks.evidence_plots import COLORS, PLOTS
from benchmarks.evidence_rows import METHODS, Estimate, Setting, collect, read
from benchmarks.results import FOLDER
from mosa_fast.run_options import parse_options

SCORES = {
    "linear": (70.0, 72.0, 74.0),
    "dense": (74.0, 75.0, 76.0),
    "mosa_e4": (74.5, 75.6, 76.4),
    "full": (70.0, 80.0, 75.0),
}


def record(method, seed, score, *options, search=False, steps=520):
    scores = {"val_accuracy": score} if search else {"val_accuracy": 1.0, "test_accuracy": score}
    words = ["--data.shots=20", "--optim.lr=0.002", *options]
    labels = {"recipe": f"evidence/{method}", "options": words, "seed": seed, "search": search, "steps": steps}
    return labels | scores | {"trained_weights": 40416, "head_weights": 1930}


@pytest.fixture
def records():
    found = [record(name, seed, score) for name, own in SCORES.items() for seed, score in enumerate(own)]
    found += [record("mosa_e4", 101, 99.0, search=True), record("lora", 101, 99.0, search=True)]
    found += [record("dense", seed, 80.0 + seed, steps=2080) for seed in (0, 1)]
    return [*found, record("linear", 0, 97.0, "--data.name=digits")]


def test_rows_are_of_one_data_set_and_schedule_and_of_tests_only(records):
    evidence = collect(records)
    assert list(evidence) == [
        Setting("fashion_mnist", 20, 1),
        Setting("fashion_mnist", 20, 4),
        Setting("digits", 20, 1),
    ]
    rows = evidence["fashion_mnist", 20, 1]
    assert list(rows) == ["linear", "dense", "mosa_e4", "full"]  # lora has no test yet
    assert rows["mosa_e4"].tests == {0: 74.5, 1: 75.6, 2: 76.4}
    assert rows["mosa_e4"].searched == 1
    later = collect([*records, record("dense", 0, 10.0)])
    assert later["fashion_mnist", 20, 1]["dense"].tests[0] == 10.0


def test_differences_are_paired_by_seed(records):
    rows = collect(records)["fashion_mnist", 20, 1]
    del rows["dense"].tests[2]
    pair = rows["mosa_e4"].minus(rows["dense"])
    assert (pair.seeds, pair.mean, pair.error) == (2, pytest.approx(0.55), pytest.approx(0.05))
    rows["dense"].tests = {7: 1.0}
    assert rows["mosa_e4"].minus(rows["dense"]) is None


def test_a_difference_is_one_where_students_interval_leaves_out_zero():
    assert Estimate(1.0, 0.36, 5).verdict == "ahead"
    assert Estimate(-1.0, 0.36, 5).verdict == "behind"
    assert Estimate(1.0, 0.37, 5).verdict == "level"  # 2.776 * 0.37 > 1
    assert Estimate(1.0, 0.30, 3).verdict == "level"  # 4.303 * 0.30 > 1
    assert Estimate.of([1.0]).verdict == ""


def test_tables_say_what_was_measured(records):
    evidence = collect(records)
    rows = evidence["fashion_mnist", 20, 1]
    lines = table(rows).splitlines()
    mosa = "| **MoSA**, E = 4 | 42,346 | 0.002 |  | 3 | 75.50 ± 0.55 | +0.50 ± 0.06 | ahead |"
    assert mosa in lines
    assert "| dense adapter | 42,346 | 0.002 |  | 3 | 75.00 ± 0.58 |  |  |" in lines
    short = readme_table(evidence).splitlines()
    assert short[0] == "| test accuracy, % | trained weights | Fashion-MNIST, 20 a class | digits, 20 a class |"
    assert short[2] == "| linear probe | 42,346 | 72.00 ± 1.15 | 97.00 |"
    assert "**Fashion-MNIST, 20 images a class, 4 times the steps**" in markdown(evidence)


def test_options_that_change_no_result_may_be_given_in_any_way(records):
    elsewhere = [{**row, "options": [*row["options"], "--data.root", "there", "--device=cuda"]} for row in records]
    assert collect(elsewhere) == collect(records)


def test_the_queue_hands_its_options_to_runs_that_take_them(tmp_path):
    """Every sweep that the script asks for, with the words after the folder last, so that they win."""
    script = FOLDER.with_name("evidence.sh")
    words = ["--device", "cuda", "--processes", "8", "--cuda_graphs", "true", "--data.root", "here"]
    done = subprocess.run(
        ["bash", script, tmp_path / "runs", *words], capture_output=True, text=True, env=os.environ | {"PYTHON": "echo"}
    )
    assert done.returncode == 0, done.stderr
    sweeps = [line.split() for line in done.stdout.splitlines()]
    assert len(sweeps) > 10
    for line in sweeps:
        assert line[:3] == ["-m", "mosa_fast.sweep", "--configs"]
        assert line[-8:] == words
        first, last = line.index("--configs") + 1, line.index("--out")
        own = line[line.index("--records") + 2 : -8]
        assert line[line.index("--records") + 1] == str(tmp_path / "runs" / "evidence.jsonl")
        assert all((FOLDER.parent.parent / recipe).is_file() for recipe in line[first:last])
        config = parse_options(["--config", line[last - 1], *own, *words[:2], *words[4:]], "train", "")
        assert (config.device, config.optim.warmup_epochs) == ("cuda", config.optim.epochs / 10)


def test_every_method_has_a_colour_of_its_own():
    assert len(set(COLORS.values())) == len(METHODS)


def test_the_command_writes_tables_and_plots_beside_the_file(tmp_path, records, command):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    code, _out, error = command(main, path)
    assert code == 0, error
    assert (tmp_path / "some.md").read_text() == markdown(collect(read(path)))
    assert all((tmp_path / f"some_{name}.png").stat().st_size > 5000 for name in PLOTS)
    code, _, error = command(main, tmp_path / "none.jsonl")
    assert code == 2
    assert "none.jsonl cannot be read" in error


def test_plots_that_there_is_nothing_for_are_neither_promised_nor_left_from_before(tmp_path, records, command):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records if line["steps"] < 600))
    (tmp_path / "some_steps.png").touch()
    code, out, error = command(main, path)
    assert code == 0, error
    assert out.rstrip() == ", ".join(str(tmp_path / f"some{end}") for end in (".md", "_shots.png", "_differences.png"))
    assert not (tmp_path / "some_steps.png").exists()
