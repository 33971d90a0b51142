"""The registered operator: torch.library's own checks, torch.compile, CUDA-graph rules, on a CPU by interpretation."""

import pytest
import torch
import torch._dynamo.testing
from kernel_cases import CASES, Case, error, make, run, variant
from torch import nn

from mosa_fast.ops import backend, sparse_adapter
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.prepare_weights import MasterWeights, prepare_weights

BY_NAME = {case.name: case for case in CASES}
TENSORS = tuple(SparseAdapterCall.TENSORS)


def operator_arguments(case: Case, dtype=torch.float32):
    """What the Python wrapper hands to torch.ops.mosa_fast.sparse_adapter."""
    values = make(case, dtype, "cpu")
    scale, values["scale_tensor"] = values["scale"], None
    if isinstance(scale, torch.Tensor):
        values["scale_tensor"], values["scale"] = scale, 1.0
    values["seed"] = torch.as_tensor(values["seed"]).reshape(-1) if case.dropout else None
    values["product_dtype"] = dtype
    masters = MasterWeights(*(values[name] for name in MasterWeights._fields))
    (prepared,) = prepare_weights([masters], values["experts"][None], dtype, "triton")
    values |= {f"prepared_{name}": tensor for name, tensor in prepared.tensors().items()}
    for name in case.gradients:
        name = "scale_tensor" if name == "scale" else name
        if values[name] is not None:
            values[name].requires_grad_()
    return [values[name] for name in TENSORS + SparseAdapterCall.OPTIONS] + [True, "triton"]


@pytest.mark.parametrize("name", ["default", "fork", "trainable_scale", "dense", "no_norm", "empty_batch", "no_skip"])
def test_opcheck(name):
    arguments = operator_arguments(variant(BY_NAME[name], width=32, bottleneck=4, samples=BY_NAME[name].samples and 2))
    torch.library.opcheck(torch.ops.mosa_fast.sparse_adapter.default, arguments)


@pytest.mark.parametrize("name", ["default", "fork", "trainable_scale"])
def test_opcheck_of_the_backward(name):
    case = variant(BY_NAME[name], width=32, bottleneck=4, samples=2, gradients=())
    arguments = operator_arguments(case)
    out, *saved = torch.ops.mosa_fast.sparse_adapter(*arguments)
    tensors, options = arguments[: len(TENSORS)], arguments[len(TENSORS) : -2]
    tensors[TENSORS.index("skip")] = None
    needed = [
        (name != "skip" or case.fork) and (name != "scale_tensor" or tensors[TENSORS.index(name)] is not None)
        for name, facts in SparseAdapterCall.TENSORS.items()
        if facts.gradient is not None
    ]
    torch.library.opcheck(
        torch.ops.mosa_fast.sparse_adapter_backward.default,
        [*tensors, *saved, torch.randn_like(out), *options, needed, torch.float32, "triton"],
    )


@pytest.mark.parametrize("name", ["default", "dense", "no_norm", "several_segments_a_slice"])
def test_opcheck_of_the_preparation(name):
    values = make(variant(BY_NAME[name], width=32, bottleneck=4), torch.float32, "cpu")
    masters = [values[field] for field in MasterWeights._fields]
    lists = [[] if tensor is None else [tensor, tensor] for tensor in masters]
    for tensors in lists:
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
    arguments = [*lists, values["experts"].expand(2, -1, -1), torch.float16, "triton"]
    torch.library.opcheck(torch.ops.mosa_fast.prepare_weights.default, arguments)


class Block(nn.Module):
    """A transformer's MLP with the adapter beside it."""

    def __init__(self, case: Case):
        super().__init__()
        arguments = make(case, torch.float32, "cpu")
        self.mlp = nn.Sequential(
            nn.LayerNorm(case.width), nn.Linear(case.width, 40), nn.GELU(), nn.Linear(40, case.width)
        )
        self.options = {}
        for name, value in arguments.items():
            if name in ("x", "skip", "experts"):
                continue
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value, requires_grad=name != "down_init"))
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                self.options[name] = value

    def forward(self, x, experts, seed):
        tensors = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        options = self.options | {"seed": seed}
        return sparse_adapter(x, self.mlp(x), experts=experts, **tensors | options)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_graph_breaks(autocast):
    case = variant(BY_NAME["default"], width=32, bottleneck=4, scale=torch.tensor(0.3), samples=2)
    block = Block(case)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(case.samples, case.tokens, case.width)
    seed = torch.tensor([3])

    def step(model, experts):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        with backend("triton"), torch.autocast("cpu", torch.float16, enabled=autocast):
            out = model(leaf, torch.tensor(experts, dtype=torch.int32), seed)
        out.square().sum().backward()
        return [out.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]

    for experts in ([[0, 2], [1, 1]], [[2, -1], [0, 0]]):
        for ours, expected in zip(step(compiled, experts), step(block, experts), strict=True):
            assert error(ours, expected.double()) < (5e-3 if autocast else 1e-5)


def test_compiled_code_follows_the_selected_backend():
    arguments = make(variant(BY_NAME["default"], width=32, bottleneck=4), torch.float32, "cpu")
    torch._dynamo.reset()
    recorder = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(sparse_adapter, fullgraph=True, backend=recorder)
    for name, calls_kernels in (("reference", False), ("triton", True)):
        with backend(name):
            compiled(**arguments)
        code = str(recorder.graphs[-1].code)
        assert ("mosa_fast.sparse_adapter" in code) == calls_kernels, name


def test_int_seeds_make_the_same_draws_as_tensors():
    arguments = make(BY_NAME["default"], torch.float32, "cpu")
    as_tensor = arguments | {"seed": torch.tensor(arguments["seed"])}
    assert torch.equal(run("triton", arguments)["out"], run("triton", as_tensor)["out"])


def test_forward_for_a_backward_that_was_not_announced():
    arguments = operator_arguments(BY_NAME["default"])
    arguments[-2] = False  # save
    out = torch.ops.mosa_fast.sparse_adapter(*arguments)[0]
    with pytest.raises(RuntimeError, match="save=False"):
        out.sum().backward()
