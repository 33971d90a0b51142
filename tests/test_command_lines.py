"""What all commands have in common: they are listed, and they start at once."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mosa_fast
from mosa_fast import info, train
from mosa_fast.__main__ import COMMANDS, describe, main
from mosa_fast.data import check
from mosa_fast.ops import backends

PACKAGE = Path(mosa_fast.__file__).parent
HELP = """
import contextlib, io, json, runpy, sys
heavy = {}
for command in json.loads(sys.argv[1]):
    sys.argv = [command, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(command, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, command
    assert f"usage: python -m {command} " in out.getvalue(), command
    heavy[command] = sorted({"torch", "torchvision", "timm", "matplotlib"} & sys.modules.keys())
print(json.dumps(heavy))
"""


def test_every_command_is_listed_with_a_line(command):
    programs = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text() and path.parent.name != "assets"
    }
    assert programs - {"__main__"} == set(COMMANDS)
    code, out, _ = command(main)
    assert code == 0
    for name in COMMANDS:
        assert len(describe(name)) > 10
        assert f"{name} " in out
        assert describe(name) in out
    assert command(main, "--help")[1] == out
    assert command(main, "train")[0] == 2


def test_only_training_resumes_and_overwrites(command):
    for program in (check, info):
        code, _, error = command(program.main, "--resume")
        assert (code, error) == (2, "error: unrecognized arguments: --resume\n"), program


@pytest.mark.parametrize(("program", "part"), [(train, "configs"), (info, "csrc")])
def test_a_checkout_that_is_not_installed_says_so(command, monkeypatch, program, part):
    """What lies beside the package becomes a part of it when it is installed."""
    monkeypatch.setitem(sys.modules, f"mosa_fast.{part}", None)
    backends._unavailable_reason.cache_clear()  # what an earlier test has found out
    code, _, error = command(program.main)
    assert code == 2
    assert re.fullmatch(rf"error: mosa_fast runs where .*mosa_fast\.{part} .*: pip install -e \.\n", error)


def test_text_is_written_in_utf8_whatever_the_locale():
    """Where nothing says so, Python takes the locale's encoding: a table could not be written under LC_ALL=C."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            name, words = call.func.attr, [word.value for word in call.args if isinstance(word, ast.Constant)]
            is_text = name in ("read_text", "write_text") or (name == "open" and words[:1] in (["w"], ["a"], ["a+"]))
            if is_text and not any(word.arg == "encoding" for word in call.keywords) and "utf-8" not in words:
                found.append(f"{path.name}:{call.lineno}")
    assert found == []


def test_help_is_there_before_torch():
    names = [f"mosa_fast.{name}" for name in COMMANDS]
    done = subprocess.run([sys.executable, "-c", HELP, json.dumps(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [] for name in names}
