"""The API reference, made from the docstrings: `python docs/make_api.py FOLDER` writes it as HTML.

Whatever pdoc warns of is an error, but for annotations that are imported for type checkers only.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc

import mosa_fast

# What users call; everything else is reached from here.
MODULES = (
    "mosa_fast",
    "mosa_fast.config",
    "mosa_fast.data.parts",
    "mosa_fast.data.transforms",
    "mosa_fast.methods",
    "mosa_fast.ops.sparse_adapter",
    "mosa_fast.ops.sparse_lora",
    "mosa_fast.routing",
    "mosa_fast.run_folder",
)


def main(folder: Path) -> None:
    """Write the pages."""
    for name in mosa_fast.__all__:  # they are imported when they are asked for, which pdoc does not do
        setattr(mosa_fast, name, getattr(mosa_fast, name))
    for module in MODULES:
        import_module(module)
    pdoc.render.configure(docformat="google", footer_text=f"mosa_fast {mosa_fast.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        others = "|".join(f"{module.removeprefix('mosa_fast.')}$" for module in MODULES[1:])
        pdoc.pdoc(*MODULES, rf"!mosa_fast\.(?!{others})", output_directory=folder)
    print(f"{folder / 'index.html'}: {len(MODULES)} modules, {len(mosa_fast.__all__)} names of the package")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
