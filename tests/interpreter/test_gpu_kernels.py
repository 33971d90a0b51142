"""What `benchmarks/gpu.sh` times on a GPU, at tiny sizes in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.spec import Spec
from mosa_fast.ops import triton_tiles
from mosa_fast.ops.triton_tiles import INTERPRETER, tile_of

CPU = torch.device("cpu")
SPEC = Spec("operator", "test_vit", 1, "fp32", tokens=5, repeats=1)  # the interpreter knows no bfloat16
BROKEN = replace(INTERPRETER, rows=17)  # no power of two
D, R = gpu_kernels.WIDTH, 64
KERNELS = ["sparse_adapter_fwd_kernel", "sparse_adapter_bwd_input_kernel", "sparse_adapter_bwd_weight_kernel"]


def test_every_launch_is_timed_beside_the_model():
    model = {("plain", 10, KERNELS[0]): {"us": 7.0, "bound": "L2"}}
    rows = gpu_kernels.time_kernels(SPEC, "plain", CPU, model)
    assert [row["kernel"] for row in rows if row["kernel"] in KERNELS] == KERNELS
    assert all(0 < row["low"] <= row["us"] <= row["high"] for row in rows)
    assert {row["kernel"]: row["model_us"] for row in rows if row["model_us"] is not None} == {KERNELS[0]: 7.0}


def tiles_of(*tiles):
    return dict.fromkeys(gpu_kernels.TILES, tiles)


def test_the_first_tile_is_the_tables():
    streams = {"plain": torch.bfloat16, "autocast": torch.float32}
    for (kind, kernel), tiles in gpu_kernels.TILES.items():
        assert tiles[0] == tile_of("sparse_adapter", kernel, D, R, torch.bfloat16, "sm_90", streams[kind])


@pytest.mark.parametrize(
    ("name", "chips"),
    [("NVIDIA H100 80GB HBM3", {"H100"}), ("NVIDIA H200", {"H200"}), ("NVIDIA A100-SXM4-80GB", {"A100"}), ("L4", {})],
)
def test_the_model_is_that_of_this_gpu(monkeypatch, name, chips):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert {row["chip"] for row in gpu_kernels.expected(CPU).values()} == set(chips)


def test_a_tile_that_does_not_compile_does_not_stop_the_others():
    rows = gpu_kernels.time_tiles(SPEC, "plain", CPU, tiles_of(BROKEN, INTERPRETER))
    for kernel in KERNELS[:2]:
        failed, timed = (row for row in rows if row["kernel"] == kernel)
        assert "power of 2" in failed["reason"]
        assert "us" not in failed
        assert timed["us"] > 0
    assert triton_tiles.choose.__module__ == triton_tiles.__name__  # the table's choice is back


def test_tiles_of_which_none_compiles_have_reasons_and_no_times():
    rows = gpu_kernels.time_tiles(SPEC, "plain", CPU, tiles_of(BROKEN))
    assert len(rows) == 2
    assert all("reason" in row and "us" not in row for row in rows)
    assert "power of 2" in gpu_kernels.show(rows)


def test_products_with_a_wider_hidden_layer():
    rows = gpu_kernels.time_products(8, 16, (32, 48), CPU, repeats=1)
    assert [row["product"] for row in rows] == ["N = 32", "K = 32", "N = 48", "K = 48"]
    assert all(row["us"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["kernels", "tiles", "products"])
def test_without_a_gpu_it_says_so(command, part):
    code, _, errors = command(gpu_kernels.main, part)
    assert code == 2
    assert "this needs a GPU" in errors
