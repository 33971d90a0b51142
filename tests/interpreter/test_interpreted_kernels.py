"""The Triton kernels in Triton's interpreter, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, Case, check, compare, make, poisoned, run, variant

from mosa_fast.ops import backend, sparse_adapter, sparse_adapter_triton
from mosa_fast.ops.prepare_weights import TENSORS, MasterWeights, PreparedWeights, layouts_of, prepare_weights
from mosa_fast.ops.reference import expert_bias, expert_weight
from mosa_fast.ops.slots import Slots

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def raw_float16(monkeypatch):
    """The interpreter has no bfloat16, so float16 is treated as that is."""
    monkeypatch.setattr(sparse_adapter_triton, "RAW_DTYPES", (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, dtype):
    check(case, dtype, "cpu")


def test_rows_without_structure_keep_float16_in_its_range(monkeypatch):
    monkeypatch.undo()
    arguments = make(Case("constant row"), torch.float16, "cpu")
    arguments["x"][0, 0] = 0.0  # 1 / std is 1,000
    arguments["scale"] = 300.0
    gradients = run("triton", arguments, ("down_weight", "up_weight", "norm_weight", "norm_bias"))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@st.composite
def random_cases(draw):
    experts = draw(st.integers(1, 5))
    groups = draw(st.integers(1, 3))
    pair = st.tuples(st.integers(-1, experts - 1), st.integers(-1, experts - 1))
    fork = draw(st.booleans())
    return Case(
        "random",
        width=draw(st.integers(1, 140)),
        bottleneck=draw(st.integers(1, 40)),
        samples=draw(st.integers(1, 3)) * (1 if fork else groups),
        tokens=draw(st.integers(1, 40)),
        experts=experts,
        groups=tuple(draw(st.lists(pair, min_size=groups, max_size=groups))),
        split_down=draw(st.booleans()),
        split_up=draw(st.booleans()),
        init=draw(st.booleans()),
        norm=draw(st.booleans()),
        skip=draw(st.booleans()),
        add_input=draw(st.booleans()),
        fork=fork,
        activation=draw(st.sampled_from(["gelu", "relu", "silu"])),
        dropout=draw(st.sampled_from([0.0, 0.4])),
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(random_cases(), st.sampled_from(DTYPES))
def test_shapes_and_options_at_random(case, dtype):
    # A norm over one or two columns has a variance near eps, where any arithmetic is ill-conditioned.
    check(case if case.width > 8 else variant(case, norm=False), dtype, "cpu")


@pytest.mark.parametrize("skip_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_rounds_the_products_only(skip_dtype):
    arguments = make(Case("autocast", skip_dtype=skip_dtype, dropout=0.2, width=72), torch.float32, "cpu")
    oracle = run("reference", arguments, dtype=torch.float64)
    eager = run("reference", arguments, autocast=torch.float16)
    with poisoned():
        ours = run("triton", arguments, autocast=torch.float16)
    assert ours["out"].dtype == torch.float32
    compare(ours, eager, oracle, torch.float16)


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_a_narrower_skip_gets_its_gradient_without_a_cast(autocast):
    """Beside a float32 stream the kernel towards x writes it: no other kernel reads the output's gradient for it."""
    arguments = make(Case("stream", skip_dtype=torch.float16), torch.float32, "cpu")
    x, skip = arguments["x"].requires_grad_(), arguments["skip"].requires_grad_()
    with backend("triton"), torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = sparse_adapter(**arguments)
    grad = torch.randn_like(out)
    with torch.profiler.profile() as profile:
        _, grad_skip = torch.autograd.grad(out, [x, skip], grad)
    assert torch.equal(grad_skip, grad.half())
    assert not {"aten::to", "aten::_to_copy"} & {event.name for event in profile.events()}


def test_non_contiguous_and_expanded_inputs():
    arguments = make(Case("strided"), torch.float32, "cpu")
    strided = dict(arguments)
    strided["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["skip"] = arguments["skip"][:1].expand_as(arguments["x"])
    strided["up_weight"] = arguments["up_weight"].T.contiguous().T
    strided["down_owner"] = arguments["down_owner"].T.contiguous().T
    assert not strided["x"].is_contiguous()
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in strided.items()}
    with backend("triton"):
        assert torch.equal(sparse_adapter(**strided), sparse_adapter(**plain))
    results, expected = run("triton", strided), run("triton", plain)
    for key, value in expected.items():
        assert torch.equal(results[key], value), key


def test_expanded_output_gradient():
    arguments = make(Case("sum"), torch.float32, "cpu")
    arguments["x"].requires_grad_()
    gradients = []
    for name in ("triton", "reference"):
        with backend(name):
            gradients += torch.autograd.grad(sparse_adapter(**arguments).sum(), arguments["x"])
    torch.testing.assert_close(*gradients)


def test_the_same_inputs_give_the_same_bits():
    arguments = make(CASES[0], torch.float16, "cpu")
    first, second = run("triton", arguments), run("triton", arguments)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("rows", [16, 32])
def test_dropout_does_not_depend_on_the_grid(rows, monkeypatch):
    """With an identity of weights the output shows which activations were kept: those that the map says."""
    from mosa_fast.ops import triton_tiles
    from mosa_fast.ops.philox import dropout_keep, dropout_scale

    monkeypatch.setattr(triton_tiles, "tile_of", lambda *_: triton_tiles.Tile(rows, 64, stages=1))
    size, samples, tokens = 20, 4, 11
    seed = torch.tensor([-(2**62) + 3, 2**31 - 2])
    out = sparse_adapter_with(
        x=torch.ones(samples, tokens, size),
        down_weight=torch.eye(size),
        up_weight=torch.eye(size),
        experts=torch.tensor([[0, 0], [0, 0]], dtype=torch.int32),
        dropout=0.37,
        seed=seed,
        activation="relu",
    )
    kept = dropout_keep(seed, 0.37, 2, samples // 2, tokens, size).flatten(0, 1)
    torch.testing.assert_close(out, kept * dropout_scale(0.37))


def test_weights_that_nobody_in_the_batch_owns_get_a_zero_gradient():
    arguments = make(Case("owned", groups=((0, 2), (1, 2))), torch.float32, "cpu")
    gradients = run("triton", arguments)
    assert not gradients["down_weight"][arguments["down_owner"] == 2].any()
    assert gradients["down_weight"][arguments["down_owner"] != 2].all()
    assert not gradients["up_weight"][arguments["up_owner"] != 2].any()
    assert not gradients["down_bias"][2].any()
    assert not gradients["up_bias"][:2].any()


def test_saved_tensors_and_inputs_are_not_written():
    arguments = make(Case("twice", dropout=0.2), torch.float32, "cpu")
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    arguments["x"].requires_grad_()
    with backend("triton"):
        out = sparse_adapter(**arguments)
        first = torch.autograd.grad(out.sum(), arguments["x"], retain_graph=True)[0]
        second = torch.autograd.grad(out.sum(), arguments["x"])[0]
    assert torch.equal(first, second)
    for key, value in before.items():
        assert torch.equal(arguments[key], value), key


def test_without_gradients_nothing_is_saved(monkeypatch):
    from mosa_fast.ops import sparse_adapter_triton

    saves = []
    forward = sparse_adapter_triton.forward

    def recorded(call, out, saved):
        saves.append(any(tensor.numel() for tensor in saved))
        forward(call, out, saved)

    monkeypatch.setattr(sparse_adapter_triton, "forward", recorded)
    arguments = make(Case("inference"), torch.float32, "cpu")
    with backend("triton"):
        plain = sparse_adapter(**arguments)
        arguments["up_weight"].requires_grad_()
        trained = sparse_adapter(**arguments)
        with torch.no_grad():
            sparse_adapter(**arguments)
    assert saves == [False, True, False]
    assert torch.equal(plain, trained)


def test_a_second_derivative_is_refused():
    arguments = make(Case("second"), torch.float32, "cpu")
    arguments["x"].requires_grad_()
    with backend("triton"):
        (gradient,) = torch.autograd.grad(sparse_adapter(**arguments).square().sum(), arguments["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_float64_is_refused_by_name():
    arguments = make(Case("double"), torch.float64, "cpu")
    with backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve: float64"):
        sparse_adapter(**arguments)


def sparse_adapter_with(**arguments):
    """The operator with the kernels, on dense weights without biases unless they are given."""
    width, bottleneck = arguments["up_weight"].shape
    defaults = dict.fromkeys(("skip", "norm_weight", "norm_bias", "down_init", "down_owner", "up_owner"))
    defaults |= {"down_bias": torch.zeros(1, bottleneck), "up_bias": torch.zeros(1, width), "add_input": False}
    with backend("triton"):
        return sparse_adapter(**defaults | arguments)


def prepared_for(arguments, dtype=torch.float32, experts=None):
    masters = MasterWeights(*(arguments[name] for name in MasterWeights._fields))
    experts = arguments["experts"] if experts is None else experts
    (prepared,) = prepare_weights([masters], experts[None], dtype, "triton")
    return prepared


def test_weights_that_were_prepared_before_give_the_same_bits():
    arguments = make(CASES[0], torch.float32, "cpu")
    own = run("triton", arguments)
    given = run("triton", arguments | {"prepared": prepared_for(arguments)})
    for key, value in own.items():
        assert torch.equal(given[key], value), key


def test_weights_that_were_prepared_for_another_call_are_refused():
    arguments = make(CASES[0], torch.float32, "cpu")
    other_dtype = prepared_for(arguments, torch.float16)
    other_groups = prepared_for(arguments, experts=arguments["experts"][:1])
    with backend("triton"):
        for wrong, message in (
            (other_dtype, r"its down must be float32 \[2, 16, 128\], got float16 \[2, 16, 128\]"),
            (other_groups, r"its down must be float32 \[2, 16, 128\], got float32 \[1, 16, 128\]"),
        ):
            with pytest.raises(ValueError, match=message):
                sparse_adapter(**arguments, prepared=wrong)


@pytest.mark.parametrize("name", TENSORS)
def test_every_prepared_tensor_is_checked(name):
    arguments = make(CASES[0], torch.float32, "cpu")
    prepared = prepared_for(arguments)
    for wrong, message in (
        (getattr(prepared, name)[:1], f"its {name} must be"),
        (getattr(prepared, name).bfloat16(), f"its {name} must be"),
        (getattr(prepared, name).to("meta"), f"prepared's {name} is on meta"),
    ):
        with backend("triton"), pytest.raises(ValueError, match=message):
            sparse_adapter(**arguments, prepared=prepared._replace(**{name: wrong}))


def test_weights_that_were_prepared_for_another_backend_are_prepared_again():
    """As when a checkpointed block is recomputed where another backend serves: ranks are padded as its tiles are."""
    arguments = make(CASES[0], torch.float32, "cpu")
    prepared = prepared_for(arguments)
    layouts = layouts_of(Slots(False, 2, 2), 16, 96, torch.float32, "cuda")
    other = PreparedWeights(*(torch.full(shape, torch.nan, dtype=dtype) for shape, dtype in layouts), "cuda")
    assert other.down.shape != prepared.down.shape
    own, given = run("triton", arguments), run("triton", arguments | {"prepared": other})
    for key, value in own.items():
        assert torch.equal(given[key], value), key


def test_prepared_weights_are_those_of_the_groups_and_padded_with_zeros():
    case = variant(CASES[0], width=40, bottleneck=5, groups=((0, 2), (-1, 1)))
    a = make(case, torch.float32, "cpu")
    prepared = prepared_for(a)
    down = expert_weight(a["down_weight"], a["down_init"], a["down_owner"], a["experts"][:, 0], case.experts)
    up = expert_weight(a["up_weight"], None, a["up_owner"], a["experts"][:, 1], case.experts)
    folded = down * a["norm_weight"]
    torch.testing.assert_close(prepared.down[:, :5, :40], folded)
    torch.testing.assert_close(prepared.up[:, :40, :5], up)
    assert prepared.down.shape == (2, 16, 64)
    assert prepared.up.shape == (2, 64, 16)
    for padded, own in ((prepared.down, folded), (prepared.up, up), (prepared.up_bias, prepared.up_bias[:, :40])):
        torch.testing.assert_close(padded.abs().sum(), own.abs().sum())
    bias = expert_bias(a["down_bias"], a["down_owner"], a["experts"][:, 0])[:, 0] + down @ a["norm_bias"]
    torch.testing.assert_close(prepared.vectors[:, 0, :5], bias)
    torch.testing.assert_close(prepared.vectors[:, 1, :5], folded.sum(-1), atol=1e-5, rtol=1e-5)
