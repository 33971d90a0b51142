"""Compiling the kernels for chips that are not here: what the launchers would launch, recorded and compiled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mosa_fast.kernels import launching, tuning
from mosa_fast.kernels import sparse_adapter_bwd as sparse_adapter_bwd_module
from mosa_fast.kernels.sparse_adapter import Problem, sparse_adapter_bwd, sparse_adapter_fwd

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MULTIPROCESSORS = 132  # an H100's: decides only whether a slice of the weight gradients has one segment or more
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    tile: tuning.Tile
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch. shared: bytes; local, stack: bytes of spills; sass: instructions."""

    name: str
    tile: tuning.Tile
    shared: int
    registers: int = 0
    local: int = 0
    stack: int = 0
    sass: str = ""

    def count(self, mnemonic: str) -> int:
        """How many instructions of this mnemonic there are."""
        return len(re.findall(rf"\b{mnemonic}\b", self.sass))


def problem(
    width: int = 768,
    bottleneck: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = 2,
    experts: int = 4,
    product_dtype: torch.dtype | None = None,
    activation: str = "gelu",
    dropout: float = 0.1,
    split: bool = True,
    norm: bool = True,
    fork: bool = False,
    scale_tensor: bool = False,
    tokens: int = 197,
) -> Problem:
    """A problem without data: by default the costliest one, both projections split, norm, gelu and dropout."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = experts if split else 1
    return Problem(
        x=tensor(2 * groups, tokens, width, dtype=dtype),
        norm_weight=tensor(width) if norm else None,
        norm_bias=tensor(width) if norm else None,
        down_weight=tensor(bottleneck, width),
        down_bias=tensor(rows, bottleneck),
        up_weight=tensor(width, bottleneck),
        up_bias=tensor(rows, width),
        down_init=tensor(bottleneck, width) if split else None,
        down_owner=tensor(bottleneck, width, dtype=torch.uint8) if split else None,
        up_owner=tensor(width, bottleneck, dtype=torch.uint8) if split else None,
        experts=tensor(groups, 2, dtype=torch.int32),
        scale_tensor=tensor(1) if scale_tensor else None,
        seed=tensor(2, dtype=torch.int64) if dropout else None,
        activation=activation,
        scale=0.1,
        dropout=dropout,
        dropout_threshold=int(dropout * 2**32),
        add_input=True,
        fork=fork,
        eps=1e-6,
        product_dtype=product_dtype or dtype,
    )


@contextmanager
def recording(architecture: str, tile: tuning.Tile | None = None) -> Iterator[list[Launch]]:
    """Record launches instead of running them, with the tiles of this architecture (or one given tile)."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], tile: tuning.Tile, **arguments: Any) -> None:
        launches.append(Launch(kernel, tile, arguments))

    choose: Callable[..., tuning.Tile] = tuning.choose
    if tile is not None:
        choose = lambda *_: tile  # noqa: E731
    with (
        mock.patch.object(launching, "launch", record),
        mock.patch.object(tuning, "architecture", return_value=architecture),
        mock.patch.object(tuning, "choose", choose),
        mock.patch.object(sparse_adapter_bwd_module, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield launches


def launches(p: Problem, architecture: str, *, skip: bool = True, tile: tuning.Tile | None = None) -> list[Launch]:
    """What a forward and a backward of this problem launch."""
    with recording(architecture, tile) as recorded:
        skip_tensor = torch.empty_like(p.x) if skip else None
        out, *saved = sparse_adapter_fwd(p, skip_tensor, save=True)
        sparse_adapter_bwd(
            p,
            out,
            *saved,
            need_x=True,
            skip_dtype=p.x.dtype if skip and p.fork else None,
            need_parameters=True,
            need_scale=p.scale_tensor is not None,
        )
    return recorded


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile what was recorded as the just-in-time compiler would with aligned pointers."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], ALIGNED
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(index,)] = ALIGNED
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=TARGETS[architecture],
        options=launch.tile.options(),
    )
    name = launch.kernel.fn.__name__
    if not architecture.startswith("sm_"):
        return Compiled(name, launch.tile, compiled.metadata.shared)
    return Compiled(name, launch.tile, compiled.metadata.shared, **_disassemble(compiled.asm["cubin"]))


def _disassemble(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and instructions, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    return {"registers": number("REG"), "stack": number("STACK"), "local": number("LOCAL"), "sass": sass}
