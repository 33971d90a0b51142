import json
from pathlib import Path

import pytest
import torch
from finished_runs import finished_run

from mosa_fast.run_folder import RunFolder

# Sums in the same order in every test and its child processes; and on busy cores, threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> RunFolder:
    """A finished run of a ViT of 5 tokens, on 50 digits."""
    return finished_run(tmp_path_factory.mktemp("run") / "digits")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line's `main` in this process: (exit code, standard output, standard error)."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def _no_git(monkeypatch):
    """All that is trained now is of the commit abc."""
    monkeypatch.setattr("mosa_fast.sweeps.runs.commit", lambda: "abc")


@pytest.fixture
def trainings(monkeypatch):
    """Stands in for the training processes: records their options and writes the summaries they would."""
    calls = []

    def train(command):
        assert command[1:3] == ["-m", "mosa_fast.train"]
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

    monkeypatch.setattr("mosa_fast.sweeps.runs.subprocess.run", train)
    return calls


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
