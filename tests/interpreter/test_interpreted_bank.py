"""adapter_bank's kernel in Triton's interpreter."""

import pytest
import torch
from bank_cases import CASES, OF_ADAPTERS, BankCase, operator_arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check, compare, make, poisoned, run

from mosa_fast.ops import adapter_bank, backend

DTYPES = [torch.float32, torch.float16]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output(case, dtype):
    check(case, dtype, "cpu")


@st.composite
def random_cases(draw):
    number, width = draw(st.integers(1, 4)), draw(st.integers(1, 140))
    add_input = draw(st.booleans())
    out_width = width if add_input else draw(st.integers(1, 140))
    ends = sorted(draw(st.sets(st.integers(0, out_width), min_size=2, max_size=6)))
    return BankCase(
        "random",
        width=width,
        out_width=out_width,
        columns=tuple(zip(ends[::2], ends[1::2], strict=False)),
        bottleneck=draw(st.integers(1, 20)),
        tokens=draw(st.integers(1, 40)),
        tasks=tuple(draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=4))),
        number=number,
        absent=draw(st.sampled_from([(), OF_ADAPTERS, OF_ADAPTERS[:2], ("skip",) if add_input else ()])),
        activation=draw(st.sampled_from(["gelu", "relu", "silu", "identity"])),
        add_input=add_input,
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(random_cases(), st.sampled_from(DTYPES))
def test_shapes_and_options_at_random(case, dtype):
    check(case, dtype, "cpu")


def test_autocast_rounds_the_products_only():
    arguments = make(BankCase("autocast", skip_dtype=torch.float16), torch.float32, "cpu")
    oracle = run("reference", arguments, dtype=torch.float64)
    eager = run("reference", arguments, autocast=torch.float16)
    with poisoned():
        ours = run("triton", arguments, autocast=torch.float16)
    assert ours["out"].dtype == torch.float32
    compare(ours, eager, oracle, torch.float16)


def test_non_contiguous_and_expanded_inputs():
    arguments = make(BY_NAME["adapters"], torch.float32, "cpu")
    strided = dict(arguments)
    strided["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["skip"] = arguments["skip"][:1].expand_as(arguments["skip"])
    strided["up_weight"] = arguments["up_weight"].mT.contiguous().mT
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in strided.items()}
    assert torch.equal(run("triton", strided)["out"], run("triton", plain)["out"])


def test_a_sample_gives_the_same_bits_in_any_company():
    arguments = make(BankCase("company", tasks=(2, 0, 1, 2)), torch.float16, "cpu")
    together = run("triton", arguments)["out"]
    order = [3, 1, 0, 2]
    moved = {key: arguments[key][order] for key in ("x", "skip", "tasks")}
    assert torch.equal(run("triton", arguments | moved)["out"], together[order])


@pytest.mark.parametrize("name", ["adapters", "low_rank_pairs", "empty_batch"])
def test_opcheck(name):
    arguments = operator_arguments(BY_NAME[name])
    for operator in (torch.ops.mosa_fast.adapter_bank.default, torch.ops.mosa_fast.adapter_bank_.default):
        torch.library.opcheck(operator, [*arguments, "triton"])


@pytest.mark.parametrize("name", ["low_rank_pairs", "adapters", "tokens_that_fill_no_block"])
def test_the_output_may_take_the_memory_of_skip(name):
    arguments = make(BY_NAME[name], torch.float32, "cpu")
    with backend("triton"):
        expected = adapter_bank(**arguments)
        out = adapter_bank(**arguments, overwrite_skip=True)
    assert out is arguments["skip"]
    assert torch.equal(out, expected)


def test_compile_without_graph_breaks():
    compiled = torch.compile(adapter_bank, fullgraph=True)
    arguments = make(BY_NAME["adapters"], torch.float32, "cpu")
    with backend("triton"):
        torch.testing.assert_close(compiled(**arguments), adapter_bank(**arguments))
