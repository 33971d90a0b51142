"""Kernels that Triton has compiled are launched again without asking it, and only where it would choose the same."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.machine_code.ahead_of_time import launches
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


@pytest.mark.skipif(backends.interpreted(), reason="Triton interprets here")
@pytest.mark.parametrize("call", [adapter_call, bank_call, lora_call])
def test_triton_compiles_for_no_number(call):
    for launched in launches(call(), "sm_90"):
        for parameter in launched.kernel.params:
            value = launched.arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, f"{launched.name}'s {parameter.name}"


@pytest.mark.skipif(backends.interpreted(), reason="Triton interprets here")
@pytest.mark.parametrize("call", [adapter_call, bank_call, lora_call])
def test_constants_come_last(call):
    for launched in launches(call(), "sm_90"):
        constant = [parameter.is_constexpr for parameter in launched.kernel.params]
        assert constant == sorted(constant), launched.name
