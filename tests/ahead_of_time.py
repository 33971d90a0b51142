"""Compiling the kernels for chips that are not here: what the launchers would launch, recorded and compiled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from kernel_cases import shape_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mosa_fast.ops import (
    adapter_bank_triton,
    launching,
    sparse_adapter_triton,
    sparse_lora_triton,
    triton_launching,
    triton_tiles,
)
from mosa_fast.ops.call import AdapterBankCall, Call, SparseAdapterCall, SparseLoRACall
from mosa_fast.ops.evaluation_operator import EVALUATION_OPERATORS
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
    tile: Tile
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch. shared: bytes; local, stack: bytes of spills; sass: instructions."""

    name: str
    tile: Tile
    shared: int
    registers: int = 0
    local: int = 0
    stack: int = 0
    sass: str = ""

    def count(self, mnemonic: str) -> int:
        """How many instructions of this mnemonic there are."""
        return len(re.findall(rf"\b{mnemonic}\b", self.sass))


def without_data(
    kind: type[Call], sizes: dict[str, Any], dtypes: dict[str, torch.dtype], absent: Sequence[str], **given: Any
) -> Any:
    """A call on tensors of these sizes, by their letters, that have no data; float32 unless `dtypes` or facts say."""
    for name, facts in kind.TENSORS.items():
        if name not in given:
            dtype = facts.dtype or dtypes.get(name, torch.float32)
            shape = () if name in absent else shape_of(facts, sizes)
            given[name] = None if name in absent else torch.empty(shape, dtype=dtype, device="meta")
    return kind(**given)


def adapter_call(
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
) -> SparseAdapterCall:
    """A call of sparse_adapter: by default the costliest one, both projections split, norm, gelu and dropout."""
    absent = () if split else ("down_init", "down_owner", "up_owner")
    return without_data(
        SparseAdapterCall,
        {"...": (2 * groups, tokens), "D": width, "r": bottleneck, "V": groups, "E": experts if split else 1},
        {"x": dtype, "skip": dtype},
        absent if norm else (*absent, "norm_weight", "norm_bias"),
        scale_tensor=torch.empty(1, device="meta") if scale_tensor else None,
        seed=torch.empty(2, dtype=torch.int64, device="meta") if dropout else None,
        activation=activation,
        scale=0.1,
        dropout=dropout,
        add_input=True,
        fork=fork,
        eps=1e-6,
        product_dtype=product_dtype or dtype,
    )


def lora_call(
    width: int = 768,
    out_width: int = 2304,
    columns: tuple[int, ...] = (0, 768, 1536, 2304),
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    *,
    groups: int = 2,
    experts: int = 4,
    product_dtype: torch.dtype | None = None,
    split: bool = True,
    fork: bool = False,
    scale_tensor: bool = False,
) -> SparseLoRACall:
    """A call of sparse_lora: by default q and v of ViT-B's fused qkv, both projections split."""
    targets, trained = len(columns) // 2, sum(columns[1::2]) - sum(columns[::2])
    product_dtype = product_dtype or dtype
    sizes = {"...": (2 * groups, 197), "D": width, "O": out_width, "W": trained, "r": rank, "R": targets * rank}
    return without_data(
        SparseLoRACall,
        sizes | {"T": targets, "V": groups},
        {"x": dtype, "y": product_dtype},  # under autocast a linear gives the products' dtype
        () if split else ("down_init", "down_owner", "up_owner"),
        scale_tensor=torch.empty(1, device="meta") if scale_tensor else None,
        columns=columns,
        num_experts=experts,
        scale=1.0,
        fork=fork,
        product_dtype=product_dtype,
    )


def bank_call(
    width: int = 768,
    bottleneck: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out_width: int | None = None,
    columns: tuple[int, ...] | None = None,
    pairs: bool = False,
    product_dtype: torch.dtype | None = None,
    activation: str = "gelu",
    add_input: bool = True,
) -> AdapterBankCall:
    """A call of adapter_bank with 64 tasks: by default adapters with norm and gelu; or low-rank pairs on a linear."""
    product_dtype = product_dtype or dtype
    samples, out_width = 128, out_width or width
    columns = columns or (0, out_width)
    sizes = {"...": (samples, 197), "D": width, "O": out_width, "N": 64, "r": bottleneck}
    sizes |= {"R": len(columns) // 2 * bottleneck, "W": sum(columns[1::2]) - sum(columns[::2])}
    return without_data(
        AdapterBankCall,
        sizes,
        {"x": dtype, "skip": product_dtype},  # under autocast a linear gives the products' dtype
        ("norm_weight", "norm_bias", "down_bias", "up_bias") if pairs else (),
        tasks=torch.empty(samples, dtype=torch.int32, device="meta"),
        columns=columns,
        activation="identity" if pairs else activation,
        add_input=add_input and not pairs,
        eps=1e-6,
        product_dtype=product_dtype,
    )


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Record launches instead of running them, with the tiles of this architecture."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
        arguments = arguments | {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
        launches.append(Launch(kernel, tile, arguments))

    with (
        mock.patch.object(triton_launching, "launch", record),
        mock.patch.object(triton_tiles, "architecture_of", return_value=architecture),
        mock.patch.object(launching, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield launches


def launches(c: Call, architecture: str) -> list[Launch]:
    """What a forward and a backward (if it has one) of this call launch, with every gradient wanted."""
    launchers = LAUNCHERS[c.NAME]
    with recording(architecture) as recorded:
        if c.NAME in EVALUATION_OPERATORS:
            launchers.forward(c, EVALUATION_OPERATORS[c.NAME].result(c))
            return recorded
        out, *saved = OPERATORS[c.NAME].results(c, True)
        launchers.forward(c, out, saved)
        gradients = {
            name: torch.empty_like(value)
            for name, value in c.tensors().items()
            if value is not None and c.TENSORS[name].gradient is not None and (name != c.ONLY_ADDED or c.fork)
        }
        launchers.backward(c, out, saved, gradients)
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
