import torch

from mosa_fast.routing import draw, random_seed, step_seed


def test_draws_are_uniform_and_independent_between_layers_views_and_projections():
    draws = torch.stack([draw(step_seed(7, step), 3, 2, 4).experts for step in range(4000)])  # [steps, 3, 2, 2]
    assert draws.dtype == torch.int32
    frequencies = torch.stack([(draws == e).float().mean(0) for e in range(4)])
    assert (frequencies - 0.25).abs().max() < 0.035  # five standard errors
    flat = draws.flatten(1).float()
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert correlation.abs().max() < 0.08
    assert (draws[1:] == draws[:-1]).float().mean() < 0.3  # steps differ


def test_a_step_is_a_pure_function_of_seed_and_step():
    assert torch.equal(step_seed(1, 5), step_seed(1, torch.tensor(5)))
    assert not torch.equal(step_seed(1, 5), step_seed(1, 6))
    assert not torch.equal(step_seed(1, 5), step_seed(2, 5))


def test_ranks_draw_the_same_experts_and_dropout_keys_but_count_samples_globally():
    first, second = (draw(step_seed(1, 5, first_sample=n), 4, 2, 7) for n in (0, 32))
    assert torch.equal(first.experts, second.experts)
    assert torch.equal(first.seeds[:, 0], second.seeds[:, 0])
    assert second.seeds[:, 1].tolist() == [32] * 4
    assert len(set(first.seeds[:, 0].tolist())) == 4  # layers differ


def test_further_views_and_layers_change_no_draw():
    few, many = draw(step_seed(3, 9), 2, 1, 5), draw(step_seed(3, 9), 6, 3, 5)
    assert torch.equal(few.experts, many.experts[:2, :1])
    assert torch.equal(few.seeds, many.seeds[:2])


def test_every_number_of_experts_is_reached():
    assert set(draw(step_seed(0, 0), 5000, 2, 255).experts.flatten().tolist()) == set(range(255))
    assert draw(step_seed(0, 0), 3, 2, 1).experts.eq(0).all()


def test_fresh_seeds_follow_torch_random_state():
    torch.manual_seed(3)
    first = random_seed(torch.device("cpu"))
    second = random_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, random_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
