"""Compiling the kernels for chips that are not here: what the launchers would launch, recorded and compiled."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mosa_fast.ops import (
    adapter_bank_triton,
    launching,
    prepare_weights,
    prepare_weights_triton,
    sparse_adapter_triton,
    sparse_lora_triton,
    triton_launching,
    triton_tiles,
)
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.call import Call
from mosa_fast.ops.evaluation_operator import EVALUATION_OPERATORS
from mosa_fast.ops.prepare_weights import MasterWeights, Preparation
from mosa_fast.ops.registration import OPERATORS
from mosa_fast.ops.triton_tiles import Tile

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
LAUNCHERS = {
    "sparse_adapter": sparse_adapter_triton,
    "sparse_lora": sparse_lora_triton,
    "adapter_bank": adapter_bank_triton,
}
MULTIPROCESSORS = 132  # an H100's: decides only whether a slice of the weight gradients has one segment or more
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch.

    Attributes:
        shared: bytes.
        local, stack: bytes of spills.
        sass: instructions.
        ttgir, ptx: what it was made from: Triton's own form, in which loops are pipelined, and what Triton hands on.
    """

    name: str
    tile: Tile
    shared: int
    registers: int = 0
    local: int = 0
    stack: int = 0
    sass: str = ""
    ttgir: str = ""
    ptx: str = ""

    def count(self, mnemonic: str) -> int:
        """How many instructions of this mnemonic there are."""
        return len(re.findall(rf"\b{mnemonic}\b", self.sass))


@contextmanager
def recording(architecture: str, multiprocessors: int) -> Iterator[list[Launch]]:
    """Record launches instead of running them, with the tiles of this architecture."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
        arguments = arguments | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
        launches.append(Launch(kernel, math.prod(grid), tile, arguments))

    with (
        mock.patch.object(triton_launching, "launch", record),
        mock.patch.object(triton_tiles, "architecture_of", return_value=architecture),
        mock.patch.object(launching, "multiprocessors", return_value=multiprocessors),
    ):
        yield launches


def launches(c: Call, architecture: str, multiprocessors: int = MULTIPROCESSORS) -> list[Launch]:
    """What a forward and a backward (if it has one) of this call launch, with every gradient wanted."""
    launchers = LAUNCHERS[c.NAME]
    if isinstance(c, SparseAdapterCall):
        prepared = prepare_weights.results(preparation(c, 1), "triton")
        c = replace(c, **{f"prepared_{name}": tensor[0] for name, tensor in prepared.tensors().items()})
    with recording(architecture, multiprocessors) as recorded:
        if c.NAME in EVALUATION_OPERATORS:
            launchers.forward(c, EVALUATION_OPERATORS[c.NAME].result(c))
            return recorded
        out, *saved = OPERATORS[c.NAME].results(c, True)
        launchers.forward(c, out, saved)
        gradients = {
            name: torch.empty_like(value)
            for name, value in c.tensors().items()
            if value is not None and c.TENSORS[name].gradient is not None
        }
        if c.ONLY_ADDED in gradients and gradients[c.ONLY_ADDED].dtype == out.dtype and not c.fork:
            del gradients[c.ONLY_ADDED]  # the output's gradient is its own
        launchers.backward(c, out, saved, gradients)
    return recorded


def preparing(c: SparseAdapterCall, layers: int, architecture: str) -> list[Launch]:
    """What is launched to prepare the weights of so many layers, each as those of this call."""
    call = preparation(c, layers)
    with recording(architecture, MULTIPROCESSORS) as recorded:
        prepare_weights_triton.forward(call, prepare_weights.results(call, "triton"))
    return recorded


def preparation(c: SparseAdapterCall, layers: int) -> Preparation:
    """The call that prepares the weights of so many layers."""
    tensors = (getattr(c, name) for name in MasterWeights._fields)
    lists = [[] if tensor is None else [tensor] * layers for tensor in tensors]
    return Preparation.of(lists, c.experts.expand(layers, *c.experts.shape), c.product_dtype)


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile what was recorded as the just-in-time compiler would with aligned pointers."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, tuple):  # of tensors
            signature[parameter.name] = tuple(TYPES[tensor.dtype] for tensor in value)
            attributes |= {(index, place): ALIGNED for place in range(len(value))}
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
    made = {"name": launch.name, "tile": launch.tile, "shared": compiled.metadata.shared}
    if architecture.startswith("sm_"):
        made |= {form: compiled.asm[form] for form in ("ttgir", "ptx")} | _disassemble(compiled.asm["cubin"])
    return Compiled(**made)


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
