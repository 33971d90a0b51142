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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
