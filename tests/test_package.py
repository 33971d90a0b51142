import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "timm", "triton", "torchvision", "numpy", "matplotlib", "jsonargparse")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    out = run(f"import sys, mosa_fast; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


def test_the_layer_needs_neither_timm_nor_a_gpu():
    out = run(
        "import sys\nfrom mosa_fast import SparseAdapter\nSparseAdapter(8, 4)\nimport torch\n"
        "print([m for m in ('timm', 'triton', 'torchvision', 'jsonargparse') if m in sys.modules],"
        " torch.cuda.is_initialized())"
    )
    assert out.strip() == "[] False"


def test_a_training_from_code_needs_no_parser_of_options():
    out = run("import sys; sys.modules['jsonargparse'] = None; from mosa_fast.training.loop import train; print(train)")
    assert "function train" in out


def test_every_public_name_exists():
    import mosa_fast

    for name in mosa_fast.__all__:
        assert getattr(mosa_fast, name) is not None


def test_no_top_level_module_shadows_other_packages():
    import mosa_fast.configs
    import mosa_fast.csrc
    import mosa_fast.kernels  # noqa: F401

    code = "import importlib.util as u; print([n for n in ('kernels', 'configs', 'csrc') if u.find_spec(n)])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.prefix
    ).stdout
    assert out.strip() == "[]"


def test_the_wheel_holds_the_embedded_files_and_not_the_script_that_made_them(tmp_path):
    # What build_py gathers is what the wheel packs.
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    embedded = {path.name for path in (tmp_path / "mosa_fast" / "assets").iterdir()}
    assert {"backbone.safetensors", "digits.npz", "README.md"} <= embedded
    assert not any(name.endswith(".py") for name in embedded)
