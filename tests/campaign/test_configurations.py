"""Configurations with values of all kinds: a run ends well or with one line and exit code 2, and never hangs.

The options and what they may hold are read from the configuration's fields, so that a new option is tried as well.
"""

import signal
from contextlib import contextmanager
from typing import Literal, get_args, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tally import campaign

from mosa_fast.config import TrainConfig
from mosa_fast.options import facts_of
from mosa_fast.train import main

SEED = 15
LIMIT_S = 120  # of one run
BASE = {
    "model": {"name": "test_vit", "pretrained": False},
    "data": {"name": "digits", "shots": 1, "image_size": 32},
    "adapter": {"bottleneck": 4},
    "optim": {"epochs": 1, "batch_size": 10},
    "tensorboard": False,
}
# Right values of numbers that would take long: of all other numbers their least one and some more.
QUICK = {
    "optim.epochs": [1, 2],
    "data.shots": [1, 2, None],
    "data.image_size": [None, 16, 32, 48],
    "model.name": ["test_vit", "test_vit2", "embedded", "resnet18"],
    "model.pretrained": [False],
    "model.checkpoint": [None, "nowhere.npz", "."],
    "compile": [False],
    "device": ["auto", "cpu", "cuda:7", "meta", "nonsense"],
    "out": ["run", "run/below", "/dev/null/x"],
    "wandb": [None],
    "data.workers": [0, 1, 2],
    "data.download": [False],
}
ODD = [
    *(None, "", "nonsense", "nan", "1e3", "\u00e4\u2028", "a\nb", "\x00", "../..", "~"),
    *(0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1.0, -0.5, 1e308, float("nan"), float("inf"), True, False),
    *([], [1], {}, {"lr": 1}, [[]]),
]


def hint_of(option):
    hint = TrainConfig
    for name in option.split("."):
        hint = get_type_hints(hint)[name]
    return hint


def right_values(option, facts):
    """Some values that an option may hold."""
    if option in QUICK:
        return QUICK[option]
    hint = hint_of(option)
    kinds = get_args(hint) or (hint,)
    choices = list(get_args(hint)) if getattr(hint, "__origin__", None) is Literal else []
    for kind in kinds:
        if getattr(kind, "__origin__", None) is Literal:
            choices += get_args(kind)
        if kind is bool:
            choices += [False, True]
        elif kind in (int, float):
            least = facts.low if facts.low is not None else facts.above or 0
            choices += [kind(n) for n in (least, least + 1, 3, 0.5) if facts.holds(kind(n))]
        elif kind is type(None):
            choices.append(None)
    return choices or ["nonsense"]


OPTIONS = {name: facts for name, facts in facts_of(TrainConfig).items() if name not in BASE or name == "tensorboard"}
SECTIONS = {name.partition(".")[0] for name in OPTIONS if "." in name}


@st.composite
def changes(draw):
    """Some options with a right value or an odd one; rarely an option or a section that there is not."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS.keys() - SECTIONS)), min_size=1, max_size=3, unique=True))
    found = {}
    for name in names:
        right = st.sampled_from(right_values(name, OPTIONS[name]))
        found[name] = draw(st.one_of(right, right, st.sampled_from(ODD)))
    if draw(st.integers(0, 9)) == 0:
        found[draw(st.sampled_from(["optim", "adapter", "data.lr", "nothing", "base", "grid"]))] = draw(
            st.sampled_from(ODD)
        )
    return found


def text_of(changed):
    """A recipe that says so."""
    recipe = {name: dict(value) if isinstance(value, dict) else value for name, value in BASE.items()}
    for name, value in changed.items():
        section, _, field = name.partition(".")
        if not field:
            recipe[section] = value
        elif isinstance(recipe.setdefault(section, {}), dict):
            recipe[section][field] = value
    return yaml.safe_dump(recipe, sort_keys=False)


@contextmanager
def limit(seconds):
    def ring(*_):
        raise TimeoutError(f"no end in {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(arguments, capsys, command=main):
    """(what is wrong or None, exit code) of a run, or of another command."""
    capsys.readouterr()
    try:
        with limit(LIMIT_S):
            command(arguments)
        return None, 0
    except SystemExit as left:
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        clear = left.code == 2 and errors == lines[-1:] and len(errors[0]) > len("error: ")
        return None if clear else f"code {left.code}, {lines[-3:]}", 2
    except BaseException as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300], -1


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_ends_well_or_with_one_line(tmp_path, monkeypatch, capsys, examples):
    monkeypatch.chdir(tmp_path)
    with campaign("configurations, mutated", SEED, record=examples > 100) as tally:

        @seed(SEED)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(changes())
        def run_one(changed):
            (tmp_path / "recipe.yaml").write_text(text_of(changed), encoding="utf-8")
            trouble, code = outcome(["--config=recipe.yaml", "--overwrite"], capsys)
            tally.add(None if trouble is None else f"{changed}: {trouble}", ended_well=int(code == 0))

        run_one()
