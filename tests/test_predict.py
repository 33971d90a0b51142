"""Predictions of a finished run: what is found, what is answered, and what one bad file costs the others."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finished_runs import short_run
from PIL import Image

from mosa_fast.config import ModelConfig, MoSAConfig
from mosa_fast.data.inputs import find_inputs
from mosa_fast.data.loading import Unreadable
from mosa_fast.predict import main

NAMES = ("a.png", "b.jpg", "inner/c.png", "inner/deep/d.webp")


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def shots(tmp_path, monkeypatch):
    """Names of images, of several kinds, in folders."""
    monkeypatch.chdir(tmp_path)
    return [str(write_image(tmp_path / "shots" / name, seed).relative_to(tmp_path)) for seed, name in enumerate(NAMES)]


def test_folders_patterns_and_lists_stand_for_the_images_in_them(shots):
    _, b, c, d = shots
    open("shots/notes.txt", "w").close()
    assert find_inputs(["shots"]) == shots
    assert find_inputs(["shots/**/*.png"]) == ["shots/a.png", c]
    assert find_inputs(["shots/inner", b, "shots/d*"]) == [c, d, b, Unreadable("shots/d*", "no file has that name")]
    assert find_inputs([b, "-"], ["shots/inner\n", "\n", "no[ne].png\r\n"]) == [b, c, d, "no[ne].png"]
    os.mkdir("empty")
    assert find_inputs(["empty"])[0].name == "empty"
    os.rename(b, "[b].jpg")
    assert find_inputs(["[b].jpg"]) == ["[b].jpg"]  # a name is a name before it is a pattern


def test_links_are_followed_and_those_in_a_circle_end(shots):
    os.symlink("..", "shots/inner/up")
    os.symlink("../../outside", "shots/inner/out")
    write_image(Path("outside/e.png"))
    assert find_inputs(["shots"]) == [*shots, "shots/inner/out/e.png"]


def test_one_bad_file_is_named_and_the_others_are_answered(shots, digits_run, command):
    open("shots/bad.png", "w").close()
    os.mkfifo("shots/pipe.jpg")
    os.symlink("circle.png", "shots/circle.png")
    named = ["shots/bad.png", "shots/circle.png", "shots/pipe.jpg", "none.png"]
    code, out, errors = command(main, "--run", digits_run, "--batch_size", 3, "shots", "none.png")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == shots
    assert [line.split(" cannot be read (")[0] for line in errors.splitlines()] == named


def test_batches_and_workers_change_no_answer(shots, digits_run, command):
    at_once = command(main, "--run", digits_run, "--format", "json", *shots)
    assert at_once[0] == 0
    expected = json.loads(at_once[1])
    for options in (("--batch_size", 1, "--workers", 0), ("--batch_size", 3, "--workers", 2)):
        answers = json.loads(command(main, "--run", digits_run, "--format", "json", *options, *shots)[1])
        for answer, other in zip(answers, expected, strict=True):
            assert [c["class"] for c in answer["classes"]] == [c["class"] for c in other["classes"]]
            for one, two in zip(answer["classes"], other["classes"], strict=True):
                assert one["probability"] == pytest.approx(two["probability"], abs=1e-6)


def test_formats_hold_the_same_answers(shots, digits_run, command):
    options = ("--run", digits_run, "--top", 3, *shots)
    answers = json.loads(command(main, "--format", "json", *options)[1])
    rows = list(csv.DictReader(io.StringIO(command(main, "--format", "csv", *options)[1])))
    lines = command(main, *options)[1].splitlines()
    assert [answer["image"] for answer in answers] == shots
    flat = [(a["image"], a["run"], c["class"], c["probability"]) for a in answers for c in a["classes"]]
    assert [(r["image"], r["run"], r["class"], float(r["probability"])) for r in rows] == [
        (image, run, name, pytest.approx(p, abs=1e-6)) for image, run, name, p in flat
    ]
    assert [r["rank"] for r in rows] == ["1", "2", "3"] * 4
    for line, answer in zip(lines, answers, strict=True):
        words = [f"{c['class']} {100 * c['probability']:.1f}%" for c in answer["classes"]]
        assert line.split("  ") == [answer["image"], *words]


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_several_runs_answer_as_each_does_alone(precision, shots, tmp_path, command):
    runs = [
        short_run(tmp_path / "four", precision=precision),
        short_run(tmp_path / "eight", precision=precision, adapter=MoSAConfig(bottleneck=8, seed=1)),
    ]
    options = ("--format", "json", "--top", 10, *shots)
    together = json.loads(command(main, "--run", runs[0], "--run", runs[1], *options)[1])
    assert [answer["image"] for answer in together] == [name for name in shots for _ in runs]
    lines = command(main, "--run", runs[0], "--run", runs[1], *shots)[1].splitlines()
    assert [line.split("  ")[1] for line in lines] == [f"{run}:" for run in runs] * 4
    close = {"fp32": 1e-6, "bf16-true": 2e-3}[precision]
    for run in runs:
        alone = json.loads(command(main, "--run", run, *options)[1])
        own = [answer for answer in together if answer["run"] == str(run)]
        for one, other in zip(alone, own, strict=True):
            expected = {c["class"]: pytest.approx(c["probability"], abs=close) for c in one["classes"]}
            assert {c["class"]: c["probability"] for c in other["classes"]} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "linear"}, "has no adapters (method linear)"),
        ({"precision": "bf16-mixed"}, "do not have the same precision"),
        ({"model": ModelConfig("test_vit2", pretrained=False)}, "do not have the same backbone"),
        ({"seed": 1}, "backbone"),  # its random weights are others
        ({"adapter": MoSAConfig(bottleneck=4, placement="pfeiffer")}, "one bank holds one kind"),
    ],
)
def test_runs_that_cannot_be_served_together_are_named(changes, message, shots, digits_run, tmp_path, command):
    other = short_run(tmp_path / "other", **changes)
    code, out, error = command(main, "--run", digits_run, "--run", other, "--format", "csv", *shots)
    assert (code, out) == (2, "")
    assert message in error
    assert str(other) in error
    assert error.count("\n") == 1


def test_a_run_answers_once(shots, digits_run, command):
    code, _, error = command(main, "--run", digits_run, "--run", digits_run, *shots)
    assert (code, error) == (2, f"error: --run {digits_run} is given more than once\n")


def test_nothing_to_read_is_an_empty_answer(digits_run, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert command(main, "--run", digits_run, "--format", "json", "-") == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top", 0), "--top must be at least 1"),
        (("--batch_size", 0), "--batch_size must be at least 1"),
        (("--workers", -1), "--workers must be at least 0"),
        (("--device", "cuda:99"), "device 'cuda:99' is not available"),
    ],
)
def test_a_mistake_is_one_line(digits_run, command, options, message):
    code, out, errors = command(main, "--run", digits_run, *options, "a.png")
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_reader_who_has_seen_enough_and_names_that_are_not_text_are_no_errors(shots, digits_run, tmp_path):
    odd = os.fsdecode(os.fsencode(str(tmp_path / "odd")) + b"\xff.png")
    os.rename(shots[0], odd)
    program = [sys.executable, "-m", "mosa_fast.predict", f"--run={digits_run}", "--format=csv"]
    with subprocess.Popen([*program, odd, *shots[1:] * 400], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        assert os.fsencode(odd) in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
    listed = subprocess.run([*program, "-"], input=os.fsencode(odd) + b"\n", capture_output=True)
    assert listed.returncode == 0
    assert os.fsencode(odd) in listed.stdout
