"""Which tile a kernel gets, and the opt-in search."""

import json

import pytest
import torch

pytest.importorskip("triton")
import triton
from ahead_of_time import launches, problem

from mosa_fast.kernels import tuning

KEY = tuning.Key("forward", 768, 64, torch.bfloat16, "sm_90", torch.bfloat16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._searched.cache_clear()
    yield tuning.cache_file()
    tuning._searched.cache_clear()


def test_tiles_do_not_depend_on_the_number_of_tokens():
    few, many = ([launch.tile for launch in launches(problem(tokens=t), "sm_90")] for t in (1, 50_000))
    assert few == many


def test_the_table_comes_before_the_default(monkeypatch):
    measured = tuning.Tile(256, 32, 16, 5)
    monkeypatch.setitem(tuning.TABLE, KEY, measured)
    forward, backward, *_ = launches(problem(), "sm_90")
    assert forward.tile == measured
    assert backward.tile == tuning.default_tile(tuning.Key("backward_input", *list(vars(KEY).values())[1:]))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120", "gfx1100"])
def test_unknown_chips_get_shorter_pipelines(architecture):
    key = tuning.Key(*list(vars(KEY).values())[:4], architecture, torch.bfloat16)
    assert tuning.default_tile(key).stages < tuning.default_tile(KEY).stages


@pytest.mark.parametrize("bottleneck", [1, 16, 17, 100, 255, 256])
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_bottleneck_has_a_tile(kernel, bottleneck):
    for dtype in (torch.float32, torch.bfloat16):
        for fork in (False, True):
            key = tuning.Key(kernel, 768, bottleneck, dtype, "sm_90", torch.float32, fork)
            assert isinstance(tuning.default_tile(key), tuning.Tile)


def test_search_keeps_the_fastest_that_fits(cache, monkeypatch):
    times = {tile: 1.0 + index for index, tile in enumerate(reversed(tuning.candidates(KEY)))}
    too_large, fastest, *_ = times

    def do_bench(function, **options):
        return function()

    def run(tile):
        if tile == too_large:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return times[tile]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert tuning.search(KEY, run) == fastest
    tuning._searched.cache_clear()  # as another process would read it
    assert tuning._searched() == {str(KEY): fastest}
    assert json.loads(cache.read_text())[str(KEY)]["rows"] == fastest.rows


def test_a_broken_cache_file_is_searched_again(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    assert tuning._searched() == {}
