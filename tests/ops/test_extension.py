"""The CUDA C++ kernels on the host: the same sources, emulated block by block, against PyTorch and the reference."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_cases import CASES, Case, check, compare, make, poisoned, run

import mosa_fast.csrc
from mosa_fast.ops import backends, extension, philox, reference, slots, sparse_adapter_cuda
from mosa_fast.ops.arguments import SparseAdapterCall

CSRC = Path(mosa_fast.csrc.__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None,
    reason="needs a host C++ compiler and ninja",
)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The backend `cuda` on the CPU, built by the host compiler."""
    folder = str(tmp_path_factory.mktemp("extensions"))
    environment = {extension.EMULATE_VARIABLE: "1", "TORCH_EXTENSIONS_DIR": folder, "MAX_JOBS": "1"}
    with mock.patch.dict(os.environ, environment):
        for cached in (backends._unavailable_reason, extension.operators):
            cached.cache_clear()
        yield
    for cached in (backends._unavailable_reason, extension.operators):
        cached.cache_clear()


LARGE = [
    Case("chunks_of_ranks", width=200, bottleneck=130, tokens=130, dropout=0.1, scale=torch.tensor(0.3)),
    Case("chunks_of_a_fork", width=72, bottleneck=72, samples=2, tokens=40, fork=True, dropout=0.2),
    Case("many_rows", width=64, bottleneck=16, samples=2, tokens=333, scale=torch.tensor(0.3)),
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_output_and_gradients(emulation, case, dtype):
    check(case, dtype, "cpu", "cuda")


@needs_compiler
@pytest.mark.parametrize("skip_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_the_products_only(emulation, skip_dtype):
    case = Case("autocast", skip_dtype=skip_dtype, dropout=0.2, width=72)
    arguments = make(case, torch.float32, "cpu")
    oracle = run("reference", arguments, dtype=torch.float64)
    eager = run("reference", arguments, autocast=torch.bfloat16)
    with poisoned():
        ours = run("cuda", arguments, autocast=torch.bfloat16)
    assert ours["out"].dtype == torch.float32
    compare(ours, eager, oracle, torch.bfloat16)


@needs_compiler
def test_the_same_inputs_give_the_same_bits(emulation):
    arguments = make(CASES[0], torch.bfloat16, "cpu")
    first, second = run("cuda", arguments), run("cuda", arguments)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# A C interface to single functions of numerics.h.
FUNCTIONS = r"""
#include "numerics.h"
using namespace mosa_fast;
extern "C" {
void words(uint64_t key, const uint32_t* c, uint32_t* out) {
  const Words w = philox(key, c[0], c[1], c[2], c[3]);
  for (int i = 0; i < 4; ++i) out[i] = w.lane[i];
}
void factors(const int64_t* seed, int64_t first, int64_t tokens, int64_t threshold, int64_t group, int64_t row,
             int channel, float* out) {
  Sizes sizes = {};
  sizes.first_sample = first, sizes.tokens = tokens, sizes.dropout_threshold = threshold;
  dropout_factors(seed, sizes, 1.0f, group, row, channel, out);
}
float act(float z, int kind) { return activate(z, kind); }
float slope(float z, int kind) { return activation_derivative(z, kind); }
float owned(int owner, int expert, int experts) { return ownership(owner, expert, experts); }
float half_to_float(uint16_t bits) { return to_float(Float16{bits}); }
int float_to_half(float value) { return from_float<Float16>(value).bits; }
int float_to_bfloat(float value) { return from_float<BFloat16>(value).bits; }
}
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    (folder / "f.cpp").write_text(FUNCTIONS)
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{CSRC}", "f.cpp", "-o", "f.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "f.so"))
    for name in ("act", "slope"):
        getattr(library, name).argtypes = [ctypes.c_float, ctypes.c_int]
    for name in ("act", "slope", "owned", "half_to_float"):
        getattr(library, name).restype = ctypes.c_float
    for name in ("float_to_half", "float_to_bfloat"):
        getattr(library, name).argtypes = [ctypes.c_float]
    return library


@needs_compiler
@pytest.mark.parametrize("seed", [(5,), (-(2**62) + 3, 2**31 - 2), (2**40 + 17, 6)])
def test_dropout_draws_the_same_numbers(functions, seed):
    views, samples, tokens, channels = 2, 3, 5, 24
    threshold = philox.dropout_threshold(0.37)
    expected = philox.dropout_keep(torch.tensor(seed), 0.37, views, samples, tokens, channels)
    key, out = (ctypes.c_int64 * 2)(*seed, *[0] * (2 - len(seed))), (ctypes.c_float * 8)()
    for view in range(views):
        for row in range(samples * tokens):
            for channel in range(0, channels, 8):
                long = ctypes.c_int64
                functions.factors(
                    key, long(len(seed) == 2), long(tokens), long(threshold), long(view), long(row), channel, out
                )
                kept = expected[view, row // tokens, row % tokens, channel : channel + 8]
                assert [bool(v) for v in out] == kept.tolist()


@needs_compiler
@pytest.mark.parametrize("kind", range(3))
def test_activations_and_derivatives(functions, kind):
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-6, -1e-6])]).requires_grad_()
    double = z.detach().double().requires_grad_()
    hidden = reference.ACTIVATIONS[sparse_adapter_cuda.ACTIVATIONS[kind]](double)
    (slope,) = torch.autograd.grad(hidden.sum(), double)
    for name, expected in (("act", hidden), ("slope", slope)):
        ours = torch.tensor([getattr(functions, name)(v, kind) for v in z.tolist()], dtype=torch.float64)
        torch.testing.assert_close(ours, expected.detach(), rtol=2e-6, atol=4e-7)


@needs_compiler
def test_ownership(functions):
    for expert in (-2, -1, 0, 3, 7, 300):
        owners = torch.arange(256)
        expected = reference.ownership(owners, torch.tensor([expert]), 4, torch.float32)[0]
        assert [functions.owned(owner, expert, 4) for owner in range(256)] == expected.tolist()


@needs_compiler
def test_conversions_of_16_bits(functions):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    halves = bits.view(torch.float16).float()
    ours = torch.tensor([functions.half_to_float(b) for b in range(2**16)])
    assert torch.equal(ours.nan_to_num(7), halves.nan_to_num(7))
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4000, generator=generator) * 10 ** torch.randint(-9, 6, (4000,), generator=generator)
    finite = halves[halves.isfinite()]
    values = torch.cat([values, (finite[:-1] + finite[1:]) / 2])  # ties between neighbours
    for name, dtype in (("float_to_half", torch.float16), ("float_to_bfloat", torch.bfloat16)):
        ours = torch.tensor([getattr(functions, name)(v) for v in values.tolist()], dtype=torch.int32)
        assert torch.equal(ours.to(torch.uint16).view(dtype), values.to(dtype)), name


@needs_compiler
def test_every_tensor_and_gradient_has_an_array(emulation):
    arrays = set(extension.operators().names("arrays"))
    assert arrays >= set(SparseAdapterCall.TENSORS)
    assert arrays >= {f"grad_{name}" for name, facts in SparseAdapterCall.TENSORS.items() if facts.gradient}
    assert f"TILE = {sparse_adapter_cuda.TILE};" in (CSRC / "arguments.h").read_text()
    assert sparse_adapter_cuda.TILE == slots.PADDED_TO  # of prepared weights


@pytest.fixture
def launch(emulation, monkeypatch):
    """What a forward or backward hands to the extension, which a test may spoil, and how to hand it over."""
    run_extension = extension.run
    taken = {}
    monkeypatch.setattr(
        extension, "run", lambda name, *given: (taken.update({name: given}), run_extension(name, *given))
    )
    run("cuda", make(Case("whole", dropout=0.1, scale=torch.tensor(0.3)), torch.float16, "cpu"))
    return taken, run_extension


SPOILED = [
    ("forward", "x", lambda x: x[:1].contiguous(), "x has 480 elements, not 1920"),
    ("forward", "out", lambda out: out.int(), "out cannot be int32"),
    ("forward", "out", lambda out: None, "out is missing"),
    ("forward", "down_bias", lambda bias: bias[:2], "down_bias has 32 elements, not 48"),
    ("forward", "norm_bias", lambda bias: None, "norm_bias is missing"),
    ("forward", "up_weight", lambda weight: weight.T, "up_weight is not contiguous"),
    ("forward", "up_owner", lambda owner: owner.int(), "up_owner cannot be int32"),
    ("forward", "experts", lambda experts: experts.long(), "experts cannot be int64"),
    ("forward", "seed", lambda seed: None, "seed is missing"),
    ("forward", "prepared_down", lambda weight: weight.float(), "prepared_down cannot be float32"),
    ("forward", "prepared_up", lambda weight: weight[:1].contiguous(), "prepared_up has"),
    ("prepare", "prepared_vectors", lambda vectors: None, "prepared_vectors is missing"),
    ("prepare", "down_owner", lambda owner: owner[:-1], "down_owner has"),
    ("backward", "stats", lambda stats: None, "stats is missing"),
    ("backward", "pre", lambda pre: pre[:1], "pre has 16 elements, not 320"),
    ("backward", "partial", lambda partial: partial[:, 1:].contiguous(), "partial has"),
    ("backward", "grad_up_bias", lambda grad: None, "grad_up_bias is missing"),
    ("backward", "grad_scale_tensor", lambda grad: grad.repeat(2), "grad_scale_tensor has 2 elements, not 1"),
]


@needs_compiler
@pytest.mark.parametrize(
    ("operation", "name", "spoil", "message"), SPOILED, ids=lambda value: "changed" if callable(value) else value
)
def test_arrays_are_checked_before_a_launch(launch, operation, name, spoil, message):
    taken, run_extension = launch
    arrays, sizes, numbers = taken[operation]
    with pytest.raises(RuntimeError, match=message):
        run_extension(operation, arrays | {name: spoil(arrays[name])}, sizes, numbers)


@needs_compiler
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["arrays", "sizes", "numbers"])
def test_names_that_the_extension_does_not_know_are_refused(launch, kind):
    taken, run_extension = launch
    given = list(taken["forward"])
    given[kind] = given[kind] | {"bogus": None}
    with pytest.raises(RuntimeError, match="differ in (arrays|sizes|numbers): bogus"):
        run_extension("forward", *given)
    if kind > 0:
        given[kind] = {name: value for name, value in taken["forward"][kind].items() if name not in ("width", "eps")}
        with pytest.raises(RuntimeError, match="differ in (sizes: width|numbers: eps)"):
            run_extension("forward", *given)


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """No emulation, nothing built, no compiler; torch with CUDA."""
    monkeypatch.delenv(extension.EMULATE_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(extension, "installed", lambda: None)
    monkeypatch.setattr(extension, "_nvcc", lambda: None)


def test_reason_without_a_compiler(plain):
    assert "there is no nvcc to build it with" in extension.unavailable_reason()


def test_reason_without_cuda(plain, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert extension.unavailable_reason() == "this torch is built without CUDA"


def test_reason_without_a_gpu(plain, monkeypatch):
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends._unavailable_reason.__wrapped__("cuda") == "no GPU is visible"


def test_reason_when_built_for_another_torch(plain, monkeypatch):
    other = Path(f"{extension.PREFIX}2_9_0_cu128.cpython-311-x86_64-linux-gnu.so")
    monkeypatch.setattr(extension, "installed", lambda: other)
    reason = extension.unavailable_reason()
    assert "is built for torch 2_9_0_cu128, not for the installed" in reason
    assert "MOSA_FAST_BUILD_CUDA=1" in reason
    assert not extension.built()


def test_auto_does_not_wait_for_a_compiler(plain, monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: "no triton" if name == "triton" else None)
    monkeypatch.setattr(extension, "built", lambda: False)
    assert backends._automatic("sparse_adapter") == "reference"
    monkeypatch.setattr(extension, "built", lambda: True)
    assert backends._automatic("sparse_adapter") == "cuda"


def test_the_backend_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import mosa_fast.ops.sparse_adapter_cuda"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_setup_imports_no_torch_unless_asked():
    root = CSRC.parent
    if not (root / "setup.py").exists():
        pytest.skip("needs the repository")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MOSA_FAST_BUILD_CUDA"}
    code = f"__file__ = 'setup.py'; {code}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
