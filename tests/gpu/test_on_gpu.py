"""What only a GPU can show: the interpreter's cases in real precision, bfloat16, graphs, compilation, huge tensors."""

import pytest
import torch
from bank_cases import CASES as BANK_CASES
from bank_cases import PAIRS, BankCase
from kernel_cases import CASES, DIFFERENTIABLE, Case, check, compare, error, make, poisoned, run, variant
from lora_cases import CASES as LORA_CASES
from lora_cases import DIFFERENTIABLE as LORA_DIFFERENTIABLE

from mosa_fast.ops import backend, sparse_adapter, sparse_lora
from mosa_fast.ops.backends import unavailable_reason

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VITS = [
    variant(CASES[0], name=f"vit_{width}_{rank}", width=width, bottleneck=rank, samples=4, tokens=197, experts=4)
    for width, rank in ((384, 64), (768, 64), (1024, 16), (1280, 64), (768, 128), (768, 256), (768, 48))
]
VIT_LORA = variant(
    LORA_CASES[0],
    name="q_and_v_of_vit_b",
    width=768,
    out_width=2304,
    columns=((0, 768), (1536, 2304)),
    rank=16,
    tokens=197,
    scale=torch.tensor(0.3),
)
VIT_BANK = BankCase("adapters_of_vit_b", width=768, bottleneck=64, tokens=197, tasks=(7, 0, 3, 3), number=8)
VIT_LORA_BANK = BankCase(
    "q_and_v_of_vit_b_by_task",
    width=768,
    out_width=2304,
    columns=((0, 768), (1536, 2304)),
    tokens=197,
    tasks=(7, 0, 3, 3),
    number=8,
    **PAIRS,
)
GIB = 2**30


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: the reference must not round either."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(params=["triton", "cuda"])
def name(request):
    """Every backend that has kernels."""
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + VITS, ids=str)
def test_output_and_gradients(case, dtype, name):
    check(case, dtype, "cuda", name)


@pytest.fixture
def triton_serves():
    """What is tested with it has Triton kernels only."""
    reason = unavailable_reason("triton")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*BANK_CASES, VIT_BANK, VIT_LORA_BANK], ids=str)
def test_output_of_a_bank(case, dtype, triton_serves):
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LORA_CASES, VIT_LORA, variant(VIT_LORA, name="forked", fork=True)], ids=str)
def test_output_and_gradients_of_lora(case, dtype, triton_serves):
    check(case, dtype, "cuda")


# Small enough for compute-sanitizer; `benchmarks/gpu.sh` selects them by name.
@pytest.mark.parametrize("chosen", LORA_CASES[:5], ids=str)
def test_sanitized_lora(chosen, triton_serves):
    check(chosen, torch.float16, "cuda")


@pytest.mark.parametrize("chosen", ["default", "fork_of_three_groups", "odd_widths", "several_segments_a_slice"])
def test_sanitized(chosen, name):
    check(next(case for case in CASES if case.name == chosen), torch.float16, "cuda", name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip_dtype", [torch.float32, None], ids=str)
def test_autocast(dtype, skip_dtype, name):
    case = variant(VITS[1], skip_dtype=skip_dtype or dtype)
    arguments = make(case, torch.float32, "cuda")
    oracle = run("reference", arguments, dtype=torch.float64)
    eager = run("reference", arguments, autocast=dtype)
    with poisoned():
        ours = run(name, arguments, autocast=dtype)
    compare(ours, eager, oracle, dtype)


def test_auto_selects_the_kernels(monkeypatch):
    from mosa_fast.ops import triton_launching

    launched = []
    launch = triton_launching.launch
    monkeypatch.setattr(triton_launching, "launch", lambda *a, **k: (launched.append(1), launch(*a, **k)))
    with backend("auto"):
        sparse_adapter(**make(CASES[0], torch.bfloat16, "cuda"))
    assert launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(dtype, name):
    arguments = make(variant(VITS[1], samples=64), dtype, "cuda")
    first, second = run(name, arguments), run(name, arguments)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_graph_replay_follows_the_experts(name):
    arguments = make(variant(VITS[1], scale=torch.tensor(0.3)), torch.bfloat16, "cuda")
    for leaf in DIFFERENTIABLE:
        arguments[leaf] = arguments[leaf].detach().requires_grad_()
    leaves = [arguments[leaf] for leaf in DIFFERENTIABLE]
    arguments["seed"] = torch.tensor([5], device="cuda")
    replay(arguments, leaves, lambda: sparse_adapter(**arguments), name, ([[0, 1], [2, 3]], [[-1, 2], [1, -1]]))


def replay(arguments, leaves, operator, name, draws):
    """Capture a step in a CUDA graph, and compare what it gives for other experts and seeds with a step outside."""
    with backend(name):
        grad = torch.randn_like(operator())

    def step():
        with backend(name):
            out = operator()
        return [out, *torch.autograd.grad(out, leaves, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, experts in enumerate(draws, 6):
        arguments["experts"].copy_(torch.tensor(experts, dtype=torch.int32))
        if "seed" in arguments:
            arguments["seed"].fill_(seed)
        graph.replay()
        replayed = [value.detach().clone() for value in captured]
        for value, expected in zip(replayed, step(), strict=True):
            assert torch.equal(value, expected)


def test_graph_replay_of_lora_follows_the_experts(triton_serves):
    arguments = make(VIT_LORA, torch.bfloat16, "cuda")
    for leaf in LORA_DIFFERENTIABLE:
        arguments[leaf] = arguments[leaf].detach().requires_grad_()
    leaves = [arguments[leaf] for leaf in LORA_DIFFERENTIABLE]
    replay(arguments, leaves, lambda: sparse_lora(**arguments), "triton", ([[[2, 0], [1, 1]], [[-1, 2], [0, 1]]],))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_graph_breaks(autocast, name):
    arguments = make(VITS[0], torch.float32, "cuda")
    arguments["seed"] = torch.tensor([5], device="cuda")
    compiled = torch.compile(sparse_adapter, fullgraph=True)

    def step(operator):
        leaves = {key: arguments[key].detach().clone().requires_grad_() for key in DIFFERENTIABLE if key != "scale"}
        with backend(name), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = operator(**arguments | leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    for ours, expected in zip(step(compiled), step(sparse_adapter), strict=True):
        assert error(ours, expected.double()) < 1e-6


def test_more_elements_than_32_bits_count(name):
    width, tokens = 768, 197
    samples = 3_000_000_000 // (width * tokens) + 1
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free memory")
    case = Case("huge", width=width, bottleneck=16, samples=2, tokens=tokens, groups=((0, 1),), dropout=0.1)
    arguments = make(case, torch.bfloat16, "cuda")
    arguments["seed"] = torch.tensor([3], device="cuda")
    arguments["skip"] = None
    small = run(name, arguments, ("x",))
    huge = dict(arguments)
    # The same two samples at both ends, zeros between them; dropout tells samples apart, so the last ones differ.
    huge["x"] = torch.zeros(samples, tokens, width, dtype=torch.bfloat16, device="cuda")
    huge["x"][:2], huge["x"][-2:] = arguments["x"], arguments["x"]
    with backend(name):
        out = sparse_adapter(**huge)
        assert torch.equal(out[:2], small["out"])
        last = arguments | {"seed": torch.tensor([3, samples - 2], device="cuda")}
        expected = run(name, last, ("x",))
        assert torch.equal(out[-2:], expected["out"])
        del out
        x = huge.pop("x").requires_grad_()
        out = sparse_adapter(x=x, **huge)
        grad = torch.zeros_like(out)
        grad[-2:] = 1
        (gradient,) = torch.autograd.grad(out, x, grad)
    leaf = arguments["x"].detach().requires_grad_()
    with backend(name):
        (truth,) = torch.autograd.grad(sparse_adapter(**last | {"x": leaf}).sum(), leaf)
    assert torch.equal(gradient[-2:], truth)
    assert not gradient[:-2].any()


def test_both_kinds_of_kernels_drop_the_same():
    """One activation dropped by one and not by the other is an error of 1e-3 and more."""
    for reason in map(unavailable_reason, ("triton", "cuda")):
        if reason is not None:
            pytest.skip(reason)
    arguments = make(variant(VITS[0], dropout=0.3, seed=(7, 2**31)), torch.float32, "cuda")
    results = [run(kernels, arguments)["out"] for kernels in ("triton", "cuda")]
    assert error(results[0], results[1].double()) < 1e-6


def test_other_batch_sizes_do_not_compile_again():
    """Kernels are specialised on widths and options, not on the number of tokens."""
    from mosa_fast.kernels.sparse_adapter_fwd import sparse_adapter_fwd_kernel as kernel

    counts = []
    for samples in (2, 6, 34):
        with backend("triton"):
            sparse_adapter(**make(variant(VITS[0], samples=samples), torch.bfloat16, "cuda"))
        counts.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert counts[1] == counts[2]
