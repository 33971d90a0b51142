"""The reference operator against hand-written arithmetic, and the checks in front of every backend."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.machine_code.calls import shape_of
from mosa_fast.ops import sparse_adapter
from mosa_fast.ops.arguments import SparseAdapterCall

D, R, E, N, T = 10, 6, 3, 4, 5


def arguments(dtype=torch.float64, **changes):
    generator = torch.Generator().manual_seed(0)

    values = {"experts": torch.tensor([[1, 2]], dtype=torch.int32), "scale": 0.7, "eps": 1e-5}
    sizes = {"...": (N, T), "D": D, "r": R, "E": E}
    for name, facts in SparseAdapterCall.TENSORS.items():
        if facts.shape is None or name in values:
            continue
        shape = shape_of(facts, sizes)
        if facts.dtype == torch.uint8:
            values[name] = torch.randint(E, shape, generator=generator).to(torch.uint8)
        else:
            values[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values | changes


def by_hand(a, activation=F.gelu):
    """One group, one sample after the other, straight from the formulas."""
    down_id, up_id = a["experts"][0].tolist()

    def owned(weight, init, owner, expert):
        if owner is None:
            return weight
        part = torch.full_like(weight, 1 / E) if expert == -1 else (owner == expert).to(weight.dtype)
        return init + (weight - init) * part

    def bias(rows, owner, expert):
        return rows[0] if owner is None else rows.mean(0) if expert == -1 else rows[expert]

    x = a["x"]
    normed = x if a["norm_weight"] is None else F.layer_norm(x, (D,), a["norm_weight"], a["norm_bias"], a["eps"])
    zero = torch.zeros_like(a["down_weight"]) if a["down_init"] is None else a["down_init"]
    down = owned(a["down_weight"], zero, a["down_owner"], down_id)
    up = owned(a["up_weight"], torch.zeros_like(a["up_weight"]), a["up_owner"], up_id)
    hidden = activation(normed @ down.T + bias(a["down_bias"], a["down_owner"], down_id))
    update = hidden @ up.T + bias(a["up_bias"], a["up_owner"], up_id)
    return x + (0 if a["skip"] is None else a["skip"]) + a["scale"] * update


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": torch.tensor([[-1, -1]], dtype=torch.int32)},
        {"experts": torch.tensor([[0, -1]], dtype=torch.int32)},
        {"skip": None},
        {"norm_weight": None, "norm_bias": None},
        {"down_init": None},
        {"down_owner": None, "down_bias": torch.ones(1, R, dtype=torch.float64)},
        {"up_owner": None, "up_bias": torch.ones(1, D, dtype=torch.float64)},
    ],
)
def test_forward_equals_the_formulas(changes):
    a = arguments(**changes)
    torch.testing.assert_close(sparse_adapter(**a), by_hand(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "stored", "limit"), [(torch.float64, torch.float32, 1e-12), (torch.float32, torch.bfloat16, 1e-5)]
)
def test_a_scale_is_not_rounded_as_weights_are_stored(dtype, stored, limit):
    a = arguments(stored, x=torch.randn(N, T, D, dtype=dtype), skip=None, down_init=None, add_input=False)
    exact = {
        name: value.double() if getattr(value, "is_floating_point", bool)() else value for name, value in a.items()
    }
    torch.testing.assert_close(sparse_adapter(**a).double(), sparse_adapter(**exact), rtol=limit, atol=limit)


def test_a_trained_scale_may_have_any_number_of_dimensions():
    a = arguments(experts=torch.tensor([[0, 1], [2, 0]], dtype=torch.int32))
    scale = torch.full((1, 1, 1, 1), a["scale"], dtype=torch.float64)
    torch.testing.assert_close(sparse_adapter(**a | {"scale": scale}), sparse_adapter(**a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("silu", F.silu)])
def test_activations(name, function):
    a = arguments()
    torch.testing.assert_close(sparse_adapter(**a, activation=name), by_hand(a, function), rtol=1e-12, atol=1e-12)


def test_add_input_false_leaves_x_out():
    a = arguments()
    torch.testing.assert_close(sparse_adapter(**a) - a["x"], sparse_adapter(**a, add_input=False))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_groups_equal_separate_calls(dropout):
    a = arguments()
    pairs = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    together = sparse_adapter(**a | {"experts": pairs}, dropout=dropout, seed=9)
    if dropout == 0:  # with dropout the view is part of the counter, so separate calls draw other numbers
        halves = [
            sparse_adapter(**a | {"x": a["x"][s], "skip": a["skip"][s], "experts": pairs[g : g + 1]})
            for g, s in enumerate((slice(0, 2), slice(2, 4)))
        ]
        torch.testing.assert_close(together, torch.cat(halves))
    doubled = {key: torch.cat([a[key], a[key]]) for key in ("x", "skip")}
    forked = sparse_adapter(**a | {"experts": pairs}, fork=True, dropout=dropout, seed=9)
    unforked = sparse_adapter(**a | doubled | {"experts": pairs}, dropout=dropout, seed=9)
    torch.testing.assert_close(forked, unforked)


def test_every_sample_may_have_its_own_experts():
    a = arguments()
    pairs = torch.tensor([[0, 1], [2, 0], [1, 1], [-1, 2]], dtype=torch.int32)
    out = sparse_adapter(**a | {"experts": pairs})
    for n in range(N):
        one = a | {"x": a["x"][n : n + 1], "skip": a["skip"][n : n + 1], "experts": pairs[n : n + 1]}
        torch.testing.assert_close(out[n : n + 1], by_hand(one))


def test_an_id_out_of_range_owns_nothing():
    a = arguments(experts=torch.tensor([[0, E]], dtype=torch.int32))
    torch.testing.assert_close(sparse_adapter(**a), a["x"] + a["skip"])


def test_gradients_reach_only_what_the_expert_owns():
    a = arguments()
    leaves = {k: a[k].clone().requires_grad_() for k in ("down_weight", "up_weight", "down_bias", "up_bias")}
    sparse_adapter(**a | leaves).square().sum().backward()
    for weight, owner, expert in (("down_weight", "down_owner", 1), ("up_weight", "up_owner", 2)):
        gradient = leaves[weight].grad
        assert gradient[a[owner] != expert].eq(0).all()
        assert gradient[a[owner] == expert].ne(0).all()
    assert leaves["down_bias"].grad[[0, 2]].eq(0).all()
    assert leaves["up_bias"].grad[[0, 1]].eq(0).all()


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gradcheck(fork, activation):
    a = arguments(experts=torch.tensor([[1, 2], [0, -1]], dtype=torch.int32))
    names = [k for k in a if isinstance(a[k], torch.Tensor) and a[k].is_floating_point() and k != "down_init"]
    scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    a["x"], a["skip"] = a["x"][:2, :2], a["skip"][:2, :2]

    def function(scale, *tensors):
        values = a | dict(zip(names, tensors, strict=True))
        return sparse_adapter(**values | {"scale": scale}, fork=fork, activation=activation, dropout=0.3, seed=4)

    assert torch.autograd.gradcheck(function, (scale, *(a[k].clone().requires_grad_() for k in names)))


def test_autocast_sets_the_dtype_of_the_products_only():
    a = arguments(torch.float32)
    a["skip"] = a["skip"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_adapter(**a)
    assert out.dtype == torch.float32
    # By hand: the two products in bfloat16, everything else in float32.
    down_id, up_id = a["experts"][0].tolist()
    normed = F.layer_norm(a["x"], (D,), a["norm_weight"], a["norm_bias"], a["eps"])
    down = a["down_init"] + (a["down_weight"] - a["down_init"]) * (a["down_owner"] == down_id)
    hidden = F.gelu((normed.bfloat16() @ down.bfloat16().T).float() + a["down_bias"][down_id])
    up = a["up_weight"] * (a["up_owner"] == up_id)
    update = (hidden.bfloat16() @ up.bfloat16().T).float() + a["up_bias"][up_id]
    torch.testing.assert_close(out, a["x"] + a["skip"] + a["scale"] * update, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, sparse_adapter(**a), rtol=1e-3, atol=1e-3)
    half = sparse_adapter(**a | {"x": a["x"].bfloat16(), "skip": None})
    assert half.dtype == torch.bfloat16
    weight = a["up_weight"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sparse_adapter(**a | {"up_weight": weight}).sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, T, D), (4, 1, D), (4, D), (4, 2, 3, D)])
def test_shapes_of_x(shape):
    x = torch.randn(shape, dtype=torch.float64)
    a = arguments(x=x, skip=None, experts=torch.tensor([[1, 2], [0, 0]], dtype=torch.int32))
    assert sparse_adapter(**a).shape == shape
    assert sparse_adapter(**a, fork=True).shape == (2 * shape[0], *shape[1:])


def test_expanded_and_transposed_inputs():
    a = arguments()
    x = a["x"].mT.contiguous().mT
    skip = a["skip"][:1].expand(N, -1, -1)
    expected = sparse_adapter(**a | {"skip": skip.contiguous()})
    torch.testing.assert_close(sparse_adapter(**a | {"x": x, "skip": skip}), expected)


def test_output_never_aliases_the_input():
    a = arguments(skip=None)
    before = a["x"].clone()
    sparse_adapter(**a).zero_()
    assert torch.equal(a["x"], before)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scale", [0.7, torch.tensor(0.7)])
def test_backward_copies_nothing_for_a_sum_in_place(groups, fork, dense, scale):
    changes = {"up_owner": None, "up_bias": torch.zeros(1, D, dtype=torch.float64)} if dense else {}
    changes["scale"] = scale
    a = arguments(experts=torch.tensor([[1, 2]] * groups, dtype=torch.int32), **changes)
    nodes, found = [sparse_adapter(**a | {"x": a["x"].requires_grad_()}, fork=fork).grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(node.name())
        nodes += [function for function, _ in node.next_functions if function is not None]
    assert "AccumulateGrad" in str(found)
    assert "CopySlices" not in str(found)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["x", "skip", "experts", "up_weight"])
def test_any_tensor_alone_can_be_mapped_over(name, recorded):
    a = arguments(experts=torch.tensor([[1, 2], [0, 1]], dtype=torch.int32))
    values = torch.stack([a[name], a[name].flip(-1) if name == "experts" else 2 * a[name]])
    with torch.set_grad_enabled(recorded):
        found = torch.func.vmap(lambda value: sparse_adapter(**a | {name: value}))(values)
        expected = torch.stack([sparse_adapter(**a | {name: value}) for value in values])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_numbers_are_the_same_with_and_without_gradients(groups, dense):
    a = arguments(torch.float32)
    a["experts"] = a["experts"][:groups]
    if dense:
        a |= {"up_owner": None, "up_bias": a["up_bias"][:1]}
    a["skip"] = torch.randn_like(a["x"], dtype=torch.float64)  # of another dtype than the sums
    out = sparse_adapter(**a | {"x": a["x"].requires_grad_()})
    with torch.no_grad():
        assert torch.equal(out, sparse_adapter(**a))


def test_compiles_without_a_graph_break():
    a = arguments(torch.float32)
    compiled = torch.compile(sparse_adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**a, dropout=0.2, seed=3), sparse_adapter(**a, dropout=0.2, seed=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(D, dtype=torch.float64)}, r"x must be .*\[N, ..., D\], got float64 \[10\]"),
        ({"x": torch.zeros(N, T, D, dtype=torch.int64)}, "x must be floating point"),
        ({"skip": torch.zeros(N, D)}, r"skip must be floating point \[4, 5, 10\], got float32 \[4, 10\]"),
        ({"norm_bias": None}, "norm_bias is None"),
        ({"down_weight": torch.zeros(R, D + 1)}, r"down_weight must be .* \[6, 10\], got float32 \[6, 11\]"),
        ({"up_weight": torch.zeros(R, D)}, r"up_weight must be .* \[10, 6\]"),
        ({"down_init": torch.zeros(R)}, "down_init must be"),
        ({"down_owner": torch.zeros(R, D)}, "down_owner must be uint8"),
        ({"up_owner": torch.zeros(R, D, dtype=torch.uint8)}, r"up_owner must be uint8 \[10, 6\]"),
        ({"down_bias": torch.zeros(R)}, r"down_bias must be floating point \[E, 6\]"),
        ({"up_owner": None}, r"up_bias must be \[1, 10\] for a dense projection"),
        ({"down_bias": torch.zeros(257, R)}, "down_bias is for 257 experts, but owners, uint8, tell at most 256 apart"),
        ({"experts": torch.zeros(1, 2)}, r"experts must be int32 \[V, 2\], got float32"),
        ({"experts": torch.zeros(0, 2, dtype=torch.int32)}, r"experts must be int32 \[V, 2\], got int32 \[0, 2\]"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int32)}, "3 groups, which do not divide the 4 samples"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"scale": torch.ones(2)}, "scale must be a number or a one-element"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed must be int64 \[1\] or \[2\]"),
        ({"experts": torch.zeros(1, 2, dtype=torch.int32, device="meta")}, "experts is on meta, but x is on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_adapter(**arguments(**changes))
