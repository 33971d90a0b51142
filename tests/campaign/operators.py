"""Calls of the operators drawn at random, against the reference in float64 and against the formulas, loop by loop.

Run as a program it prints what it counted: Triton decides at its import whether it interprets, so that the interpreter
needs a process of its own. `python operators.py BACKEND CALLS SEED`
"""

import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a program
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from kernel_cases import EAGER_FACTOR, LIMITS, Case, differentiable, error
from lora_cases import LoRACase

from mosa_fast.ops import backend, sparse_adapter, sparse_lora
from mosa_fast.ops.arguments import SparseAdapterCall, SparseLoRACall

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
DTYPES = {"reference": (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
INTERPRETED = (torch.float32, torch.float16)  # what Triton's interpreter can compute with
# Three times what the cases that were chosen by hand keep to: among thousands some are worse conditioned. x in float64
# meets weights in float32.
LIMIT = {dtype: 3 * limit for dtype, limit in LIMITS.items()} | {torch.float64: 1e-6}
PERTURBATIONS, SENSITIVE = 16, 16.0


def draw_ids(dice, experts):
    """A pair of experts: mostly some that there are, sometimes merged, rarely one that owns nothing."""
    return tuple(dice.choice((-1, experts + 3, *[dice.randrange(experts)] * 8)) for _ in range(2))


def draw_case(dice):
    experts = dice.choice((1, 2, 3, 4, 8, dice.randint(9, 255), 255))
    groups = dice.choice((1, 1, 2, 2, 3))
    fork = dice.random() < 0.4
    samples = 0 if dice.random() < 0.03 else dice.randint(1, 3) * (1 if fork else groups)
    shape = dice.choice(((), (dice.randint(1, 3), dice.randint(1, 3)), (1,)))
    common = {"samples": samples, "fork": fork, "shape": shape, "tokens": dice.randint(1, 9)}
    common |= {"split_down": dice.random() < 0.7, "split_up": dice.random() < 0.7, "init": dice.random() < 0.6}
    scale = dice.choice((0.7, 0.0, -1.5, torch.tensor(0.3), torch.tensor([2.0])))
    dtypes = (None, None, torch.float32)
    if dice.random() < 0.3:
        targets, part = dice.randint(1, 4), dice.randint(1, 24)
        gap = dice.randint(0, 3)
        columns = tuple((index * (part + gap), index * (part + gap) + part) for index in range(targets))
        return LoRACase(
            "random",
            width=dice.randint(1, 70),
            out_width=columns[-1][1] + dice.randint(0, 3),
            columns=columns,
            rank=dice.randint(1, 17),
            num_experts=experts,
            experts=tuple(tuple(draw_ids(dice, experts) for _ in range(groups)) for _ in range(targets)),
            y_dtype=dice.choice(dtypes),
            scale=scale,
            **common,
        )
    width = dice.randint(1, 70)
    return Case(
        "random",
        width=width,
        bottleneck=dice.randint(1, 24),
        experts=experts,
        groups=tuple(draw_ids(dice, experts) for _ in range(groups)),
        # Over a few columns a norm's variance may be near eps, where any arithmetic is ill-conditioned.
        norm=width > 8 and dice.random() < 0.7,
        skip=dice.random() < 0.6,
        skip_dtype=dice.choice(dtypes),
        add_input=dice.random() < 0.7,
        activation=dice.choice([*ACTIVATIONS]),
        scale=scale,
        dropout=dice.choice((0.0, 0.0, 0.4)),
        seed=dice.choice((5, (2**40 + 17, 6))),
        **common,
    )


def restride(dice, tensor):
    """The same values, lying in memory in another way."""
    way = dice.choice(("as it is", "as it is", "transposed", "every second", "reversed"))
    if way == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "every second" and tensor.ndim > 0:
        room = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        room[..., ::2] = tensor
        return room[..., ::2]
    if way == "reversed" and tensor.ndim > 1:
        order = range(tensor.ndim - 1, -1, -1)
        return tensor.permute(*order).contiguous().permute(*order)
    return tensor


def call_of(arguments):
    return (sparse_lora, SparseLoRACall) if "columns" in arguments else (sparse_adapter, SparseAdapterCall)


def outcome(name, arguments, grad, dtype=None):
    """Output and gradients with a backend; dtype: of everything, None: as it is."""
    operator, call = call_of(arguments)
    leaves = {}
    for key, value in arguments.items():
        if key in differentiable(call) and isinstance(value, torch.Tensor):
            value = value.detach() if dtype is None else value.detach().to(dtype)
            leaves[key] = value.requires_grad_()
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and dtype is not None:
            leaves[key] = value.to(dtype)
    with backend(name):
        out = operator(**arguments | leaves)
        asked = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(out, list(asked.values()), grad.to(out.dtype), allow_unused=True)
    return {"out": out.detach()} | {k: g for k, g in zip(asked, grads, strict=True) if g is not None}


def by_hand(a):
    """The output in float64, sample by sample, from the formulas in docs/method.md; no dropout."""
    a = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in a.items()}
    is_lora, x = "columns" in a, a["x"]
    table = a["experts"] if is_lora else a["experts"][None]
    groups, count = table.shape[1], len(x)
    per_group = count if a["fork"] else count // groups
    total = groups * count if a["fork"] else count
    rest = a["y"] if is_lora else a["skip"]
    scale = float(a["scale"])
    outs = []
    for sample in range(total):
        source = sample % count if a["fork"] else sample
        ids = table[:, sample // per_group].tolist()
        tokens = x[source]
        given = 0 if rest is None else rest[source]
        if is_lora:
            out, rank, row = given.clone(), a["up_weight"].shape[1], 0
            for target, (start, stop) in enumerate(a["columns"]):
                rows, ups = slice(target * rank, (target + 1) * rank), slice(row, row + stop - start)
                down = owned(a, "down", ids[target][0], rows, a["num_experts"])
                up = owned(a, "up", ids[target][1], ups, a["num_experts"])
                out[..., start:stop] += scale * (tokens @ down.T @ up.T)
                row += stop - start
            outs.append(out)
            continue
        normed = tokens
        if a["norm_weight"] is not None:
            normed = F.layer_norm(tokens, tokens.shape[-1:], a["norm_weight"], a["norm_bias"], a["eps"])
        (down_id, up_id) = ids[0]
        down = owned(a, "down", down_id, slice(None), len(a["down_bias"]))
        up = owned(a, "up", up_id, slice(None), len(a["up_bias"]))
        hidden = ACTIVATIONS[a["activation"]](normed @ down.T + bias_of(a, "down", down_id))
        update = hidden @ up.T + bias_of(a, "up", up_id)
        outs.append(given + scale * update + (tokens if a["add_input"] else 0))
    return torch.stack(outs) if outs else None


def owned(a, part, expert, rows, experts):
    weight, owner = a[f"{part}_weight"][rows], a[f"{part}_owner"]
    if owner is None:
        return weight
    init = a.get(f"{part}_init")
    start = torch.zeros_like(weight) if init is None else init[rows]
    mask = 1 / experts if expert == -1 else (owner[rows].int() == expert).double()
    return start + (weight - start) * mask


def bias_of(a, part, expert):
    rows = a[f"{part}_bias"]
    if a[f"{part}_owner"] is None:
        return rows[0]
    if expert == -1:
        return rows.mean(0)
    return rows[expert] if expert < len(rows) else torch.zeros_like(rows[0])


def trouble_of(case, dtype, name, dice):
    """What is wrong with a backend's results on a case; None: nothing."""
    arguments = case.make(dtype, "cpu", dice.randrange(2**30))
    strided = {k: restride(dice, v) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in arguments.items()}
    operator, _ = call_of(arguments)
    with backend("reference"):
        shape = operator(**arguments).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(dice.randrange(2**30)))
    # One rounding of the gradient, the same for all.
    ours = outcome(name, strided, grad.to(dtype))
    truth = outcome("reference", arguments, grad.to(dtype), torch.float64)
    eager = ours if name == "reference" else outcome("reference", arguments, grad.to(dtype))
    hand = by_hand(arguments) if not getattr(case, "dropout", 0.0) else None
    if hand is not None and error(hand, truth["out"].double()) > 1e-11:
        return f"the float64 reference is not the formula: {error(hand, truth['out']):.1e}"
    for key, expected in truth.items():
        if ours[key].shape != expected.shape or ours[key].dtype != eager[key].dtype:
            return f"{key} is {ours[key].dtype} {list(ours[key].shape)}, expected {list(expected.shape)}"
        if not ours[key].isfinite().all():
            return f"{key} is not finite"
        wrong, own = (distance(found[key], expected, truth["out"], grad) for found in (ours, eager))
        if wrong > LIMIT[dtype] and (name == "reference" or wrong > EAGER_FACTOR * own):
            sensitive = sensitivity(arguments, grad.to(dtype), key, truth, torch.finfo(dtype).eps)
            if wrong > SENSITIVE * sensitive:
                return f"{key}: error {wrong:.1e}, eager {own:.1e}, one rounding {sensitive:.1e}"
    return None


def sensitivity(arguments, grad, key, truth, eps):
    """What one rounding of every input does to a result: large where a ReLU is near its kink, or terms cancel."""
    generator, most = torch.Generator().manual_seed(0), 0.0
    for _ in range(PERTURBATIONS):
        moved = {
            k: v.double() * (1 + eps * torch.randn(v.shape, generator=generator, dtype=torch.float64))
            if isinstance(v, torch.Tensor) and v.is_floating_point()
            else v
            for k, v in arguments.items()
        }
        value = outcome("reference", moved, grad, torch.float64)[key]
        most = max(most, distance(value, truth[key], truth["out"], grad))
    return most


def distance(value, truth, out, grad):
    """Relative error; of a single number, which is a sum over all tokens, relative to what might be summed."""
    if truth.numel() > 1:
        return error(value, truth)
    return ((value.double() - truth).norm() / (out.norm() * grad.norm()).clamp_min(1e-30)).item()


def main(name, calls, seed):
    """Counts as JSON: calls, and what was wrong with those that were."""
    torch.set_num_threads(1)
    dice, wrong = random.Random(seed), []
    for index in range(calls):
        case, dtype = draw_case(dice), dice.choice(DTYPES.get(name, INTERPRETED))
        try:
            trouble = trouble_of(case, dtype, name, dice)
        except Exception as crash:
            trouble = f"{type(crash).__name__}: {crash}".splitlines()[0]
        if trouble is not None:
            wrong.append(f"call {index}, {dtype}: {trouble}")
    print(json.dumps({"tried": calls, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
