import pytest
import torch
from bank_cases import CASES, PAIRS, BankCase, operator_arguments
from kernel_cases import make

import mosa_fast as mosa
from mosa_fast.ops import adapter_bank, sparse_adapter, sparse_lora

BY_NAME = {case.name: case for case in CASES}
MERGED = torch.full((1, 2), -1, dtype=torch.int32)


def double(arguments):
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "adapters",
        "tasks_that_nobody_asks_for",
        "no_norm",
        "no_skip",
        "update_alone",
        "silu",
        "odd_widths",
        "feature_maps",
    ],
)
def test_each_sample_goes_through_its_tasks_adapter(name):
    a = double(make(BY_NAME[name], torch.float32, "cpu"))
    out = adapter_bank(**a)
    for sample, task in enumerate(BY_NAME[name].tasks):
        own = slice(sample, sample + 1)
        norm = [None if a[key] is None else a[key][task] for key in ("norm_weight", "norm_bias")]
        weights = (a["down_weight"][task], a["down_bias"][[task]], a["up_weight"][task], a["up_bias"][[task]])
        alone = sparse_adapter(
            a["x"][own],
            None if a["skip"] is None else a["skip"][own],
            *norm,
            *weights,
            *(None, None, None, MERGED),
            activation=a["activation"],
            add_input=a["add_input"],
            eps=a["eps"],
        )
        torch.testing.assert_close(out[own], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["low_rank_pairs", "low_rank_pairs_of_odd_widths"])
def test_each_sample_gets_its_tasks_low_rank_pairs(name):
    case = BY_NAME[name]
    a = double(make(case, torch.float32, "cpu"))
    out = adapter_bank(**a)
    for sample, task in enumerate(case.tasks):
        own = slice(sample, sample + 1)
        pair = (a["down_weight"][task], a["up_weight"][task], None, None, None, MERGED.expand(2, 1, 2))
        alone = sparse_lora(a["x"][own], a["skip"][own], *pair, columns=case.columns)
        torch.testing.assert_close(out[own], alone, rtol=0, atol=1e-12)


def test_rows_of_zeros_add_nothing():
    a = make(BY_NAME["adapters"], torch.float64, "cpu")
    wider = dict(a)
    for name, size in (("down_weight", (0, 0, 0, 5)), ("down_bias", (0, 5)), ("up_weight", (0, 5))):
        wider[name] = torch.nn.functional.pad(a[name], size)
    torch.testing.assert_close(adapter_bank(**wider), adapter_bank(**a), rtol=0, atol=1e-12)


def test_an_empty_batch():
    assert adapter_bank(**make(BY_NAME["empty_batch"], torch.float32, "cpu")).shape == (0, 5, 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    a = make(BankCase("x", **PAIRS), torch.float32, "cpu")
    exact = adapter_bank(**double(a))
    with torch.autocast("cpu", dtype):
        mixed = adapter_bank(**a | {"skip": a["skip"].to(dtype)})
    half = adapter_bank(**a | {"x": a["x"].to(dtype), "skip": a["skip"].to(dtype)})
    for found in (mixed, half):
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x must be floating point \[N, ..., D\], got float32 \[4\]"),
        (
            {"down_weight": torch.zeros(3, 16, 95)},
            r"down_weight must be floating point \[3, 16, 96\], got float32 \[3, 16,",
        ),
        (
            {"up_weight": torch.zeros(2, 96, 16)},
            r"up_weight must be floating point \[3, W, r\], got float32 \[2, 96, 16",
        ),
        ({"columns": [(0, 50), (40, 96)]}, "columns must be ascending ranges within the 96 columns of the output"),
        ({"columns": [(0, 50), (50, 96)]}, "down_weight must have 16 rows .* for each of 2 targets"),
        ({"norm_bias": None}, "norm_bias is None, but the other is not"),
        ({"tasks": torch.zeros(3, dtype=torch.int32)}, r"tasks must be int32 \[4\], .* got int32 \[3\]"),
        ({"tasks": torch.zeros(4, dtype=torch.int64)}, r"tasks must be int32 \[4\], .* got int64 \[4\]"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu, identity, got 'tanh'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        adapter_bank(**make(BY_NAME["adapters"], torch.float32, "cpu") | change)


def test_an_output_of_another_width_cannot_have_x_added():
    a = make(BY_NAME["low_rank_pairs"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="96 wide and cannot be added to an output of 192"):
        adapter_bank(**a | {"add_input": True})


@pytest.mark.parametrize("name", ["low_rank_pairs", "adapters", "skip_of_another_dtype", "no_skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_output_may_take_the_memory_of_skip(name, dtype):
    a = make(BY_NAME[name], dtype, "cpu")
    expected = adapter_bank(**a)
    out = adapter_bank(**a, overwrite_skip=True)
    assert torch.equal(out, expected)
    assert (out is a["skip"]) is (a["skip"] is not None)


def test_skip_is_not_overwritten_where_its_memory_does_not_do():
    a = make(BY_NAME["low_rank_pairs"], torch.float32, "cpu")
    strided = a | {"skip": a["skip"].transpose(0, 1).contiguous().transpose(0, 1)}
    narrow = make(BY_NAME["adapters"], torch.float32, "cpu")
    narrow["skip"] = narrow["skip"].half()
    for given in (strided, narrow):
        before = given["skip"].clone()
        adapter_bank(**given, overwrite_skip=True)
        assert torch.equal(given["skip"], before)


def test_there_is_no_gradient():
    a = make(BY_NAME["adapters"], torch.float32, "cpu")
    a["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="adapter_bank is for evaluation: it has no gradient"):
        adapter_bank(**a).sum().backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="adapter_bank is for evaluation: it has no gradient"):
        torch.func.jvp(lambda x: adapter_bank(**a | {"x": x}), (a["x"],), (a["x"],))


def test_the_output_shares_no_memory_and_nothing_is_written_to():
    a = make(BY_NAME["adapters"], torch.float32, "cpu")
    before = {key: value.clone() for key, value in a.items() if isinstance(value, torch.Tensor)}
    adapter_bank(**a).zero_()
    for key, value in before.items():
        assert torch.equal(a[key], value), key


@pytest.mark.parametrize("name", ["adapters", "low_rank_pairs", "empty_batch"])
def test_opcheck(name):
    arguments = operator_arguments(BY_NAME[name])
    for operator in (torch.ops.mosa_fast.adapter_bank.default, torch.ops.mosa_fast.adapter_bank_.default):
        torch.library.opcheck(operator, [*arguments, "reference"])


def test_compiled_code_serves_any_tasks():
    compiled = torch.compile(adapter_bank, fullgraph=True, backend="aot_eager")
    a = make(BY_NAME["adapters"], torch.float32, "cpu")
    for tasks in ((2, 0, 0, 1), (1, 1, 1, 1), (0, 2, 1, 0)):
        a["tasks"] = torch.tensor(tasks, dtype=torch.int32)
        with torch.compiler.set_stance("fail_on_recompile" if tasks != (2, 0, 0, 1) else "default"):
            assert torch.equal(compiled(**a), adapter_bank(**a))


def test_compiled_code_may_overwrite_skip():
    a = make(BY_NAME["low_rank_pairs"], torch.float32, "cpu")
    linear = torch.nn.Linear(96, 192).requires_grad_(False)

    def projection(x):
        return adapter_bank(**a | {"x": x, "skip": linear(x)}, overwrite_skip=True)

    torch.testing.assert_close(torch.compile(projection, fullgraph=True)(a["x"]), projection(a["x"]))


def test_cuda_has_no_kernel_for_it(monkeypatch):
    monkeypatch.setattr("mosa_fast.ops.backends.unavailable_reason", lambda name: None)
    with (
        mosa.backend("cuda"),
        pytest.raises(RuntimeError, match="no kernels for adapter_bank; use one of reference, tri"),
    ):
        adapter_bank(**make(BY_NAME["adapters"], torch.float32, "cpu"))
