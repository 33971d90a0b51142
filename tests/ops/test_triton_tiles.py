"""Which tile a kernel gets."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.machine_code.ahead_of_time import launches
from benchmarks.machine_code.calls import adapter_call
from mosa_fast.ops import triton_tiles
from mosa_fast.ops.backends import KERNELS
from mosa_fast.ops.registration import OPERATORS


def test_tiles_do_not_depend_on_the_number_of_tokens():
    few, many = ([launch.tile for launch in launches(adapter_call(tokens=t), "sm_90")] for t in (1, 50_000))
    assert few == many


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120", "gfx1100"])
def test_unknown_chips_get_shorter_pipelines(architecture):
    few, many = (
        triton_tiles.tile_of("sparse_adapter", "forward", 768, 64, torch.bfloat16, chip, torch.bfloat16)
        for chip in (architecture, "sm_90")
    )
    assert few.stages < many.stages


@pytest.mark.parametrize("bottleneck", [1, 16, 17, 100, 255, 256])
@pytest.mark.parametrize("kernel", triton_tiles.KERNELS)
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name in KERNELS["triton"]])
def test_every_bottleneck_has_a_tile(operator, kernel, bottleneck):
    for dtype in (torch.float32, torch.bfloat16):
        for fork in (False, True):
            tile = triton_tiles.tile_of(operator, kernel, 768, bottleneck, dtype, "sm_90", torch.float32, fork)
            assert isinstance(tile, triton_tiles.Tile)
