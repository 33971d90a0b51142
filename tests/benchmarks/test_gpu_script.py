"""benchmarks/gpu.sh, with stubs for what it calls: what it runs, in which order, and that its time is kept."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.contenders import CONTENDERS
from benchmarks.suite import SUITES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
LIMIT, MINUTES = 535, 9


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the script called, a line for each, and the folder that it filled."""
    folder = tmp_path_factory.mktemp("gpu")
    log, out = folder / "log", folder / "out"
    for name in ("python", "ncu", "compute-sanitizer"):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >>{log}\necho done\n')
        stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", SCRIPT, out], check=True, env=environment, capture_output=True)
    return log.read_text().splitlines(), out


def test_what_is_right_is_known_before_what_it_costs(ran):
    lines, _ = ran
    order = ["compute-sanitizer", "tests/gpu", "gpu_kernels kernels", "ncu", "--suite step", "gpu_kernels tiles"]
    places = [next(n for n, line in enumerate(lines) if words in line) for words in [*order, "gpu_kernels products"]]
    assert places == sorted(places)


def test_bytes_and_stalls_are_counted_plain_and_under_autocast(ran):
    precisions = set()
    for line in filter(re.compile("^ncu").match, ran[0]):
        assert "dram__bytes_read.sum" in line
        assert "stalled_long_scoreboard" in line
        assert "--clock-control none" in line  # by itself it sets the clocks, of a machine that others may share
        suite = SUITES[re.search(r"--suite (\w+) --profile", line)[1]]
        precisions.add(next(spec.precision for spec in suite.specs if spec.case == "operator"))
    assert precisions == {"bf16-true", "bf16-mixed"}


def test_every_part_leaves_a_file_and_an_archive_has_them_all(ran):
    found = {path.name for path in ran[1].iterdir()}
    parts = re.findall(r'^ *part \d+ "?([\w$.]+)', SCRIPT.read_text(), re.MULTILINE)
    names = [name.replace("$suite", suite) for name in parts for suite in ("operator", "gpu")]
    assert found == {*names, "extension.txt"}
    with tarfile.open(f"{ran[1]}.tar.gz") as archive:
        assert {Path(name).name for name in archive.getnames() if name != "."} == found


def test_what_has_to_run_fits_into_nine_minutes():
    """The last parts, which begin with the CUDA C++ kernels, have what time is left."""
    script = SCRIPT.read_text()
    assert int(re.search(r"^limit=(\d+)", script, re.MULTILINE)[1]) == LIMIT <= MINUTES * 60 - 5
    needed, _ = script.split("# The CUDA C++ kernels, and")
    seconds = [int(count) * (2 if "$suite" in name else 1) for count, name in re.findall(r"part (\d+) (\S+)", needed)]
    assert sum(seconds) <= LIMIT


def test_the_training_step_is_that_of_vit_b_in_both_precisions():
    suite = SUITES["step"]
    assert {spec.precision for spec in suite.specs} == {"bf16-mixed", "bf16-true"}
    assert {(spec.case, spec.backbone, spec.images) for spec in suite.specs} == {("step", "vit_base_patch16_224", 128)}
    assert {"no adapter", "ours, triton", "ours, mlp", "paper", "dense", "peft, q and v"} <= set(suite.contenders)
    assert set(suite.contenders) <= {name for name, entry in CONTENDERS.items() if "step" in entry.cases}
