"""sparse_lora's reference against the paper's way, a full copy of every pair for each expert; and its checks."""

import pytest
import torch
from kernel_cases import make, variant
from lora_cases import LoRACase
from torch import nn

from mosa_fast.ops import backend, backends, extension, sparse_lora

CASE = LoRACase("small", width=10, out_width=17, columns=((0, 5), (9, 16)), rank=3, fork=False)
FORKED = variant(CASE, fork=True)


def arguments(case=CASE, **changes):
    values = make(case, torch.float64, "cpu")
    double = {k: v.double() for k, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return values | double | changes


class Copies(nn.Module):
    """One projection of one target: a whole linear for each expert, of which only the owned weights are trained."""

    def __init__(self, weight, init, owner, experts):
        super().__init__()
        self.owner = owner
        start = torch.zeros_like(weight) if init is None else init
        copies = [weight if owner is None else torch.where(owner == e, weight, start) for e in range(experts)]
        self.copies = nn.ParameterList(nn.Parameter(copy.clone()) for copy in copies)

    def forward(self, x, expert):
        if self.owner is None:
            return x @ self.copies[0].T
        weight = torch.stack(list(self.copies)).mean(0) if expert == -1 else self.copies[expert]
        return x @ weight.T

    def gradient(self):
        """Of the one weight that the copies stand for: each copy's where it owns."""
        gradients = [torch.zeros_like(c) if c.grad is None else c.grad for c in self.copies]
        if self.owner is None:
            return gradients[0]
        return sum(gradient * (self.owner == expert) for expert, gradient in enumerate(gradients))


def by_copies(a, case, grad=None):
    """The output and, for a gradient of it, those of the weights, one group and target after the other."""
    pairs, row = [], 0
    for target, (start, stop) in enumerate(case.columns):
        down, up = slice(target * case.rank, (target + 1) * case.rank), slice(row, row + stop - start)
        row = up.stop

        def part(name, rows):
            return None if a[name] is None else a[name][rows]

        pairs.append(
            (
                Copies(a["down_weight"][down], part("down_init", down), part("down_owner", down), case.num_experts),
                Copies(a["up_weight"][up], None, part("up_owner", up), case.num_experts),
            )
        )
    groups = a["experts"].shape[1]
    size = len(a["x"]) if case.fork else len(a["x"]) // groups
    outs = []
    for group in range(groups):
        samples = slice(None) if case.fork else slice(group * size, (group + 1) * size)
        out = a["y"][samples].clone()
        for target, (start, stop) in enumerate(case.columns):
            (down, up), (down_expert, up_expert) = pairs[target], a["experts"][target, group].tolist()
            out[..., start:stop] += a["scale"] * up(down(a["x"][samples], down_expert), up_expert)
        outs.append(out)
    out = torch.cat(outs)
    if grad is None:
        return out
    out.backward(grad)
    return out, torch.cat([p[0].gradient() for p in pairs]), torch.cat([p[1].gradient() for p in pairs])


MERGED = (((-1, -1),), ((-1, -1),))
CASES = [
    CASE,
    FORKED,
    variant(CASE, name="merged", experts=MERGED),
    variant(CASE, name="one_projection_merged", experts=(((0, -1), (-1, 1)), ((2, 2), (-1, -1)))),
    variant(CASE, name="no_init", init=False),
    variant(CASE, name="dense_down", split_down=False, init=False),
    variant(CASE, name="dense_up", split_up=False),
    variant(CASE, name="a_whole_linear", columns=((0, 17),), experts=(((1, 2), (0, 0)),)),
    variant(CASE, name="feature_maps", shape=(2, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name + ("_forked" if case.fork else ""))
def test_equals_a_copy_for_every_expert(case):
    a = arguments(case)
    trained = {k: a[k].clone().requires_grad_() for k in ("down_weight", "up_weight")}
    out = sparse_lora(**a | trained)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, down, up = by_copies(a, case, grad)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.backward(grad)
    torch.testing.assert_close(trained["down_weight"].grad, down, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trained["up_weight"].grad, up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASE, FORKED], ids=["groups", "fork"])
def test_gradcheck(case):
    a = arguments(case)
    names = ("x", "y", "down_weight", "up_weight")
    scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def function(scale, *tensors):
        return sparse_lora(**a | dict(zip(names, tensors, strict=True)) | {"scale": scale})

    assert torch.autograd.gradcheck(function, (scale, *(a[k].clone().requires_grad_() for k in names)))


def test_columns_of_no_target_pass_through():
    a = arguments(variant(CASE, experts=MERGED))
    out = sparse_lora(**a)
    assert torch.equal(out[..., 5:9], a["y"][..., 5:9])
    assert torch.equal(out[..., 16:], a["y"][..., 16:])
    assert out[..., :5].ne(a["y"][..., :5]).all()


def test_an_id_out_of_range_owns_nothing():
    a = arguments(experts=torch.tensor([[[0, 3]], [[1, 9]]], dtype=torch.int32))
    assert torch.equal(sparse_lora(**a), a["y"])


@pytest.mark.parametrize("case", [CASE, variant(CASE, columns=((0, 17),), experts=(((0, 1),),))], ids=["part", "whole"])
def test_output_never_aliases_the_input(case):
    a = arguments(case)
    before = a["y"].clone()
    sparse_lora(**a).zero_()
    assert torch.equal(a["y"], before)


def test_autocast_keeps_the_dtype_of_y():
    a = make(CASE, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_lora(**a | {"y": a["y"].bfloat16()}).dtype == torch.bfloat16
        out = sparse_lora(**a)
    assert out.dtype == torch.float32
    assert not torch.allclose(out, sparse_lora(**a), rtol=1e-3, atol=1e-3)


def test_compiles_without_a_graph_break():
    a = make(CASE, torch.float32, "cpu")
    compiled = torch.compile(sparse_lora, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**a), sparse_lora(**a))


def test_a_backend_without_its_kernels_says_so(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(extension, "built", lambda: True)
    with backend("cuda"), pytest.raises(RuntimeError, match="no kernels for sparse_lora; use one of reference, triton"):
        sparse_lora(**make(CASE, torch.float32, "cpu"))
    assert backends._automatic("sparse_lora") == "triton"
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: "no triton" if name == "triton" else None)
    assert backends._automatic("sparse_lora") == "reference"
    assert backends._automatic("sparse_adapter") == "cuda"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(10, dtype=torch.float64)}, r"x must be floating point \[N, ..., D\], got float64 \[10\]"),
        ({"y": torch.zeros(4, 17)}, r"y must be floating point \[4, 5, O\], got float32 \[4, 17\]"),
        ({"down_weight": torch.zeros(6, 9)}, r"down_weight must be floating point \[6, 10\], got float32 \[6, 9\]"),
        ({"down_init": torch.zeros(3, 10)}, r"down_init must be floating point \[6, 10\]"),
        ({"up_owner": torch.zeros(12, 3)}, r"up_owner must be uint8 \[12, 3\]"),
        ({"experts": torch.zeros(2, 2, dtype=torch.int32)}, r"experts must be int32 \[T, V, 2\]"),
        ({"experts": torch.zeros(2, 3, 2, dtype=torch.int32)}, "3 groups, which do not divide the 4 samples"),
        ({"columns": [(0, 5)]}, "columns must have a range for each of the 2 targets of experts"),
        ({"columns": [(9, 16), (0, 5)]}, "columns must be ascending ranges within the 17 columns of y"),
        ({"columns": [(0, 10), (9, 11)]}, "columns must be ascending ranges"),
        ({"columns": [(0, 5), (12, 19)]}, "columns must be ascending ranges within the 17 columns"),
        ({"columns": [(0, 0), (5, 17)]}, "columns must be ascending ranges"),
        (
            {"columns": [(0, 5), (9, 17)]},
            r"up_weight must have a row for each of the 13 columns, got float64 \[12, 3\]",
        ),
        ({"up_weight": torch.zeros(12, 4), "up_owner": None}, "down_weight must have 4 rows .* for each of 2 targets"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 257}, "num_experts is for 257 experts, but owners, uint8, tell at most 256 apart"),
        ({"scale": torch.ones(2)}, "scale must be a number or a one-element"),
        ({"experts": torch.zeros(2, 1, 2, dtype=torch.int32, device="meta")}, "experts is on meta, but x is on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_lora(**arguments(**changes))
