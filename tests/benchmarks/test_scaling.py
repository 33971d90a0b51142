"""The scaling plan's arithmetic, against numbers worked out by hand."""

import json

import pytest

from benchmarks.scaling import (
    RESULTS,
    WORLDS,
    Cluster,
    all_recipes,
    all_reduce_seconds,
    buckets,
    exposed_seconds,
    markdown,
    plan,
)

CLUSTER = Cluster(peak=1e12, utilisation=0.5, bandwidth=1e9, latency=1e-5, first_bucket=1_000, bucket=10_000)


def test_an_all_reduce_sends_and_receives_nearly_everything_twice():
    assert all_reduce_seconds(1_000_000, 1, CLUSTER) == 0
    # 4 GPUs: 2 * 3/4 MB at 1 GB/s, and twice two hops of 10 us
    assert all_reduce_seconds(1_000_000, 4, CLUSTER) == pytest.approx(1.5e-3 + 4e-5)


def test_buckets_hold_everything():
    assert buckets(25_000, CLUSTER) == [1_000, 10_000, 10_000, 4_000]
    assert buckets(600, CLUSTER) == [600]


def test_only_the_last_bucket_and_what_does_not_fit_is_exposed():
    first, middle, last = (all_reduce_seconds(size, 8, CLUSTER) for size in (1_000, 10_000, 4_000))
    assert exposed_seconds(15_000, 1.0, 8, CLUSTER) == pytest.approx(last)
    assert exposed_seconds(15_000, 0.0, 8, CLUSTER) == pytest.approx(first + middle + last)


def test_a_recipe_counted_by_hand():
    (row,) = plan(Cluster(), ["fgvc/cub"], decode_seconds=0.01)
    # 12 blocks of norm, dense down with one bias, split up with four biases; a head of 200 classes
    weights = 12 * (2 * 768 + 64 * 768 + 64 + 768 * 64 + 4 * 768) + 200 * 769
    assert (row["trained_weights"], row["reduced_bytes"]) == (weights, 4 * weights)
    # A multiplication with the frozen weights costs 2 operations a weight and token, in forward and in backward; two
    # views, which have the patch embedding and the first attention in common. Attention itself, adapters and head come
    # on top.
    tokens, frozen = 197, 12 * 12 * 768**2
    least = 2 * 2 * tokens * 2 * (frozen - 4 * 768**2)
    assert least < row["gflop_per_image"] * 1e9 < 1.25 * least
    assert row["cores_per_gpu"] == pytest.approx(row["images_per_second"] * 0.01, abs=0.1)
    assert all(0 < fraction < 1 for fraction in row["efficiency"].values())
    assert sorted(row["efficiency"].values(), reverse=True) == list(row["efficiency"].values())


def test_the_stored_plan_is_that_of_its_assumptions():
    results = json.loads(RESULTS.read_text())
    assert [row["recipe"] for row in results["rows"]] == all_recipes()
    names = ["fgvc/cub", "full/cub", "linear/cub"]
    stored = [row for row in results["rows"] if row["recipe"] in names]
    recounted = plan(Cluster(**results["cluster"]), [row["recipe"] for row in stored], results["decode_seconds"])
    assert stored == recounted
    assert list(results["rows"][0]["efficiency"]) == [str(world) for world in WORLDS]
    assert markdown(results) in RESULTS.with_suffix(".md").read_text(encoding="utf-8")
