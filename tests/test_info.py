import re
import subprocess
import sys

import pytest

from mosa_fast.info import main


@pytest.mark.parametrize(
    ("arguments", "adapters"),
    [
        (("--config", "fgvc/cub"), 1_208_064),
        (("--config", "vtab/cifar"), 322_752),
        (("--config", "fgvc/cub", "--adapter.placement", "houlsby"), 2_379_264),
    ],
)
def test_the_table_of_a_recipe_has_the_published_counts(command, arguments, adapters):
    code, out, _ = command(main, *arguments)
    assert code == 0
    rows = {
        line.split("  ")[0]: [int(n) for n in re.findall(r"\d[\d,]*", line.replace(",", ""))]
        for line in out.splitlines()
    }
    parts = [rows[name][-1] for name in ("down-projections", "up-projections", "norms") if name in rows]
    assert sum(parts) == adapters
    assert rows["backbone"] == [0, 0, 85_798_656]
    assert "form" not in out  # how adapters are computed is for a model that computes, which this one does not


def test_biases_of_a_run_are_counted(command):
    code, out, _ = command(main, "--config", "fgvc/cub", "--method", "bias")
    assert code == 0
    assert re.search(r"backbone +102,912 +102,912", out)


def test_without_options_it_reports_on_the_machine(command):
    code, out, _ = command(main)
    assert code == 0
    assert "backend reference" in out
    assert "selected" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data.name", "folder"), "data.root is needed"),
        (("--model.name", "no_such_model"), "timm has no model 'no_such_model'"),
        (("--bogus", "1"), "bogus"),
    ],
)
def test_a_mistake_is_one_line(command, arguments, message):
    code, _, error = command(main, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_the_report_on_the_machine_needs_no_packages_of_runs():
    code = "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'yaml', 'tqdm']))"
    code += "; from mosa_fast import info; info.main([])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "backend reference" in found.stdout
