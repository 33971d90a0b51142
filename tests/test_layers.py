"""Imports of mosa_fast point downwards and never in a circle, the lazy ones inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "mosa_fast": "mosa_fast",
    "kernels": "mosa_fast.kernels",
    "csrc": "mosa_fast.csrc",
    "configs": "mosa_fast.configs",
}

# From the bottom up. A name stands for a module, or for a package with all that is in it; the longest that fits counts.
LAYERS = (
    # words and files of a run: no torch, no model
    "options methods config files recipes run_folder run_lock command_line run_options idle_options answers configs "
    "assets version",
    "kernels csrc",
    "ops",  # operators, which launch them
    "partition routing tensor_file",
    "nn",  # layers
    "backbones data",  # timm models and data sets
    "adapters",  # layers into timm models
    "mosa_fast",  # the package's own __init__: what users import
    "training formats",
    "train evaluate predict export sweep sweeps info __main__ assets.pretrain assets.drawings",  # command lines
)


def modules() -> dict[str, ast.Module]:
    """The source of every module, by name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def imports(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For every module, those of ours that it imports, wherever in it."""
    found: dict[str, set[str]] = {}
    for name, tree in sources.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in sources else node.module)
        found[name] &= sources.keys()
    return found


def layer(name: str) -> int:
    """How high a module stands."""
    short = name.removeprefix("mosa_fast.")
    fits = {
        own: level for level, names in enumerate(LAYERS) for own in names.split() if f"{short}.".startswith(f"{own}.")
    }
    if not fits:
        pytest.fail(f"{name} is in no layer: add it to LAYERS")
    return fits[max(fits, key=len)]


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{name} -> {other}" for name, others in graph.items() for other in others if layer(other) > layer(name)]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_downwards():
    assert upward(imports(modules())) == []


def test_no_modules_import_each_other():
    assert circle(imports(modules())) == []


def test_an_arrow_upwards_and_a_circle_would_be_seen():
    sources = modules()
    sources["mosa_fast.data.check"] = ast.parse("def main():\n    from mosa_fast.training.loop import train")
    assert upward(imports(sources)) == ["mosa_fast.data.check -> mosa_fast.training.loop"]
    sources["mosa_fast.config"] = ast.parse("if TYPE_CHECKING:\n    from mosa_fast import run_options")
    assert {"mosa_fast.config", "mosa_fast.run_options"} <= set(circle(imports(sources)))


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports them by name: with TRITON_INTERPRET=1 it collects those of the interpreter as well."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_words_and_files_of_a_run_need_neither_torch_nor_a_model():
    """So that `--help` is quick; what only a type checker reads does not count."""
    for name, tree in modules().items():
        if layer(name) == 0:
            unread = {n for test in ast.walk(tree) if isinstance(test, ast.If) for n in ast.walk(test)}
            for node in ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
                if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in unread:
                    assert not {n.split(".")[0] for n in names} & {"torch", "timm", "torchvision"}, name
