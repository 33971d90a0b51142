"""Operators without gradients, registered with torch.library: schemas and fakes, by a `Call`'s fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mosa_fast.ops.call import Call
from mosa_fast.ops.registration import NAMESPACE, beyond_reverse_mode, contiguous, define, launchers, library

EVALUATION_OPERATORS: dict[str, EvaluationOperator] = {}  # by name


class EvaluationOperator:
    """An operator whose backward is an error.

    `mosa_fast::NAME` takes the call's arguments and the backend's name, and returns the output; `mosa_fast::NAME_`
    writes it over the tensor that is only added. The reference is behind both as well: what it does may depend on
    values, which torch.compile cannot trace.

    Args:
        call: as `Operator`'s.
        result: memory for the output.
        reference: (call, out) fills the output, which may be the tensor that is only added.
    """

    def __init__(
        self, call: type[Call], result: Callable[[Any], Tensor], reference: Callable[[Any, Tensor], None]
    ) -> None:
        name = self.name = call.NAME
        self.call, self.result, self.reference = call, result, reference
        EVALUATION_OPERATORS[name] = self
        overwritten = call.SCHEMA | {call.ONLY_ADDED: f"Tensor(a!) {call.ONLY_ADDED}"}
        define(name, f"({', '.join([*call.SCHEMA.values(), 'str backend'])}) -> Tensor")
        define(f"{name}_", f"({', '.join([*overwritten.values(), 'str backend'])}) -> ()")
        self.op = getattr(torch.ops.mosa_fast, name).default
        self.op_in_place = getattr(torch.ops.mosa_fast, f"{name}_").default
        library.impl(name, self._forward, "CompositeExplicitAutograd")
        library.impl(f"{name}_", self._forward_in_place, "CompositeExplicitAutograd")
        library.impl(name, self._without_gradient, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=library)
        torch.library.register_fake(f"{NAMESPACE}::{name}_", lambda *arguments: None, lib=library)

    def __call__(self, call: Call, backend: str, overwrite: bool = False) -> Tensor:
        """Run a backend on a checked call; overwrite: the tensor that is only added may become the output."""
        added: Tensor | None = getattr(call, call.ONLY_ADDED)
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors().values())
        if beyond_reverse_mode(recorded):
            raise RuntimeError(no_gradient(self.name))
        if overwrite and added is not None and added.is_contiguous() and not recorded:
            self.op_in_place(*call.values(), backend)
            return added
        out: Tensor = self.op(*call.values(), backend)
        return out

    def _forward(self, *arguments: Any) -> Tensor:
        *values, backend = arguments
        call = self.call.of(map(contiguous, values))
        out = self.result(call)
        self._fill(call, out, backend)
        return out

    def _forward_in_place(self, *arguments: Any) -> None:
        *values, backend = arguments
        call = self.call.of(map(contiguous, values))
        self._fill(call, getattr(call, call.ONLY_ADDED), backend)

    def _fill(self, call: Call, out: Tensor, backend: str) -> None:
        if backend == "reference":
            self.reference(call, out)
        elif out.numel():
            with torch.cuda.device_of(call.x):  # kernels run on the current device
                launchers(self.name, backend).forward(call, out)

    def _fake(self, *arguments: Any) -> Tensor:
        *values, _backend = arguments
        return self.result(self.call(*values))

    def _without_gradient(self, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            out: Tensor = _Evaluated.apply(self, *arguments)
            return out
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments)


class _Evaluated(torch.autograd.Function):
    """An operator that is for evaluation only."""

    @staticmethod
    def forward(ctx: Any, operator: EvaluationOperator, *arguments: Any) -> Tensor:
        ctx.name = operator.name
        with torch._C._AutoDispatchBelowAutograd():
            return operator.op(*arguments)

    @staticmethod
    def backward(ctx: Any, _gradient: Any) -> None:
        raise RuntimeError(no_gradient(ctx.name))


def no_gradient(name: str) -> str:
    """Why an operator of this name cannot be differentiated."""
    return f"{name} is for evaluation: it has no gradient"
