"""Packaging of mosa_fast; pyproject.toml configures the tools only."""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Folders that live at the top of the repository and are installed inside the package: a top-level module called
# `kernels` or `configs` would shadow other people's.
MAPPED = {"mosa_fast.kernels": "kernels", "mosa_fast.configs": "configs", "mosa_fast.csrc": "csrc"}
DATA = ["datasets>=3", "webdataset>=0.2"]  # data.name timm: sets of the Hugging Face Hub, webdataset's shards
INT8 = ["torchao>=0.14"]  # frozen backbones with weights in int8
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]  # mosa_fast.export --format onnx, which compares them


def cuda_extension() -> dict:
    """The CUDA C++ extension, with MOSA_FAST_BUILD_CUDA=1 only: nothing else needs torch or a compiler to install."""
    if os.environ.get("MOSA_FAST_BUILD_CUDA") != "1":
        return {}
    sys.path.insert(0, str(HERE))
    from torch.utils import cpp_extension

    from mosa_fast.ops import extension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", extension.ARCHITECTURES)
    built = cpp_extension.CUDAExtension(
        f"mosa_fast.csrc.{extension.file_stem()}",
        [f"csrc/{name}" for name in extension.SOURCES],
        extra_compile_args={"cxx": ["-O2", "-std=c++20"], "nvcc": extension.NVCC_FLAGS},
    )
    return {"ext_modules": [built], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    **cuda_extension(),
    name="mosa_fast",
    version=re.search(r'__version__ = "(.+)"', (HERE / "mosa_fast/version.py").read_text()).group(1),
    description="Mixture of Sparse Adapters (MoSA) for vision transformers, fused and fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["mosa_fast", "mosa_fast.*"]), *MAPPED],
    package_dir=MAPPED,
    package_data={
        # assets/ is no package, so that pretrain.py, which made the weights, stays in the repository.
        "mosa_fast": ["py.typed", *(f"assets/*.{suffix}" for suffix in ("safetensors", "npz", "log", "md"))],
        "mosa_fast.configs": ["*.yaml", "*/*.yaml", "*.md"],
        "mosa_fast.csrc": ["*.cu", "*.cuh", "*.h", "*.cpp"],
    },
    install_requires=[
        "jsonargparse[signatures]>=4.49",  # the command line: typed options, YAML, overrides
        "matplotlib>=3.8",  # curves.png
        "numpy>=1.26",
        "pyyaml>=6",  # config.yaml of a run
        "safetensors>=0.5",  # adapter files
        "timm>=1.0.20",  # the backbones
        "torch>=2.9",
        "torchvision>=0.24",  # transforms and data sets
        "tqdm>=4.66",  # progress bar
    ],
    extras_require={
        "compare": ["peft>=0.17"],  # LoRA as a contender of the benchmarks
        "data": DATA,
        "int8": INT8,
        "log": ["tensorboard>=2.17"],  # curves while a run is running; used where it is installed
        "onnx": ONNX,
        "ray": ["ray>=2.40"],  # sweeps over several machines
        "test": [
            "accelerate>=1.2",  # docs/use.md shows it
            *DATA,
            "hypothesis>=6.100",
            *INT8,
            *ONNX,
            "pytest>=8.2",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
        ],
        "dev": ["build>=1.2", "mypy>=1.15", "ninja>=1.11", "pdoc>=15", "pre-commit>=4", "ruff>=0.14"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
