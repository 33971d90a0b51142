"""Kernels that Triton has compiled are launched again without asking it, and only where it would choose the same."""

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from benchmarks.machine_code.ahead_of_time import TARGETS, launches, preparing
from benchmarks.machine_code.calls import adapter_call, bank_call, lora_call
from mosa_fast.ops import backends, triton_launching
from mosa_fast.ops.triton_tiles import Tile

TILE = Tile(16, 32)


class Kernel:
    """A stand-in for one of Triton's: it counts what it compiles, and records what is launched, and how."""

    arg_names = ("x_ptr", "rows", "scale", "WIDTH", "BLOCK_ROWS", "BLOCK_COLUMNS")
    constexprs = (3, 4, 5)

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def launch_and_compile(*values, **options):
            self.compiled += 1
            self.launched.append((grid, self.compiled, values))
            return Compiled(self, self.compiled)

        return launch_and_compile


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *values: self.kernel.launched.append((grid, self.number, values))


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(triton_launching, "KEEPS_COMPILED", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()

    def launched(x, rows=100, scale=0.5, width=64, grid=(7,), tile=TILE):
        arguments = {"x_ptr": x, "rows": rows, "scale": scale, "WIDTH": width, "unnamed": 0}
        triton_launching.launch(kernel, grid, tile, arguments)
        return kernel.launched[-1]

    return launched


def test_a_kernel_is_compiled_once_and_launched_with_what_it_is_given(launch):
    x, other = torch.zeros(64), torch.ones(64)
    assert launch(x) == ((7,), 1, (x, 100, 0.5, 64, 16, 32))
    grid, number, values = launch(other, rows=2, scale=0.25, grid=(3, 2))
    assert (grid, number, values[1:]) == ((3, 2, 1), 1, (2, 0.25, 64, 16, 32))
    assert values[0] is other


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(65)[1:]},  # no vectors of 16 bytes
        {"x": None},
        {"rows": 2**31},
        {"width": 32},
        {"tile": Tile(32, 32)},
        {"tile": Tile(16, 32, warps=8)},
        {"tile": Tile(16, 32, stages=3)},
    ],
)
def test_another_is_compiled_for_what_makes_a_difference(launch, changed):
    launch(torch.zeros(64))
    assert launch(**{"x": torch.zeros(64)} | changed)[1] == 2
    assert launch(**{"x": torch.zeros(64)} | changed)[1] == 2
    assert launch(torch.zeros(64))[1] == 1


def test_tensors_in_tuples_make_the_same_difference(launch):
    assert launch((torch.zeros(64), torch.zeros(64)))[1] == 1
    assert launch((torch.zeros(64), torch.zeros(65)[1:]))[1] == 2
    assert launch((torch.ones(64), torch.ones(64)))[1] == 1


def test_another_device_has_kernels_of_its_own(launch, monkeypatch):
    launch(torch.zeros(64))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert launch(torch.zeros(64))[1] == 2


def recorded():
    """A launch of every kernel."""
    call = adapter_call()
    return [
        *preparing(call, 2, "sm_90"),
        *(launched for each in (call, bank_call(), lora_call()) for launched in launches(each, "sm_90")),
    ]


def changed(value):
    """What an argument at run time may be instead: what Triton compiles another kernel for, and what it does not."""
    if isinstance(value, torch.Tensor):
        return [torch.zeros(64, dtype=value.dtype), torch.zeros(65, dtype=value.dtype)[1:], value.to(torch.int64), None]
    if isinstance(value, tuple):
        return [(*value[:-1], last) for last in changed(value[-1])]
    return [1, 16, 17, 2**31] if isinstance(value, int) else [1.0]


@pytest.mark.skipif(backends.interpreted(), reason="Triton interprets here")
@pytest.mark.parametrize("launched", recorded(), ids=lambda launched: launched.name)
def test_a_kernel_is_kept_for_what_triton_would_choose_it_for(launched):
    kernel = launched.kernel
    choose = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(TARGETS["sm_90"]))
    values = [launched.arguments[name] for name in kernel.arg_names]
    constant = [parameter.is_constexpr for parameter in kernel.params]
    assert constant == sorted(constant), "constants come last"
    runtime = values[: constant.count(False)]
    variants = [runtime]
    for index, value in enumerate(runtime):
        variants += [[*runtime[:index], other, *runtime[index + 1 :]] for other in changed(value)]
    ours, theirs = [], []
    for variant in variants:
        _, specialization, _ = choose(*variant, *values[len(variant) :], **launched.tile.options())
        ours.append(tuple(map(triton_launching._compiled_for, variant)))
        theirs.append(str(specialization))
    assert len(set(theirs)) > 1
    assert len(set(ours)) == len(set(theirs)) == len(set(zip(ours, theirs, strict=True)))
