import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosa_fast.partition import check_owner_map, owner_map

SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, experts=st.integers(1, 255), seed=st.integers(0, 2**31))
def test_parts_are_disjoint_complete_and_even(shape, experts, seed):
    owners = owner_map(shape, experts, torch.Generator().manual_seed(seed))
    assert owners.shape == shape
    assert owners.dtype == torch.uint8
    sizes = torch.bincount(owners.flatten().long(), minlength=experts)
    assert len(sizes) == experts
    assert sizes.max() - sizes.min() <= 1


def test_a_seed_fixes_the_map_and_another_changes_it():
    first, again, other = (owner_map((32, 32), 4, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_owners_are_spread_uniformly_over_positions():
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([owner_map((8, 8), 4, generator) for _ in range(2000)])
    frequency = (maps == 0).float().mean(0)
    assert (frequency - 0.25).abs().max() < 0.05  # five standard errors


@pytest.mark.parametrize("experts", [0, 256, -1])
def test_number_of_experts_out_of_range_is_refused(experts):
    with pytest.raises(ValueError, match="experts must be 1 to 255"):
        owner_map((4, 4), experts)


def test_values_from_a_file_are_checked():
    check_owner_map(torch.tensor([0, 3], dtype=torch.uint8), 4, "owner")
    with pytest.raises(ValueError, match="owner names expert 4"):
        check_owner_map(torch.tensor([0, 4], dtype=torch.uint8), 4, "owner")
    with pytest.raises(ValueError, match="uint8"):
        check_owner_map(torch.tensor([0, 3]), 4, "owner")
