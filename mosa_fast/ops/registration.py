"""Operators registered with torch.library, forward and backward: schemas, fakes and autograd, by a `Call`'s fields.

The forward `mosa_fast::NAME` takes the call's arguments, `save` and the backend's name, and returns its output and what
backward needs. The backward `mosa_fast::NAME_backward` returns the gradients that are asked for. The reference needs
none of this: autograd differentiates it. Nothing of a backend is imported before its first call.

torch.library.custom_op would do the same with less code of ours. But for every call it fills in default values that no
argument has, in time that grows with the square of their number: some 90 microseconds for an adapter's forward, on one
core. So the autograd formula is registered one level below it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mosa_fast.ops import launching
from mosa_fast.ops.backends import KERNELS
from mosa_fast.ops.call import Call

NAMESPACE = "mosa_fast"

OPERATORS: dict[str, Operator] = {}  # by name

library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """One operator.

    Args:
        call: what it is called with; its name is the operator's in torch.ops.mosa_fast, and of the modules that launch
            it (`launching.py`).
        saved: names of the tensors that the forward returns for backward.
        results: memory for the output and for the saved tensors; the latter without elements unless asked for (`save`).
            It is the fake as well, so that it may ask for shapes and dtypes only.
    """

    other_derivatives = "the reference backend"  # what has those that the operator has not

    def __init__(
        self,
        call: type[Call],
        saved: Sequence[str],
        results: Callable[[Any, bool], tuple[Tensor, ...]],
    ) -> None:
        name = self.name = call.NAME
        self.call, self.results = call, results
        OPERATORS[name] = self
        self.tensor_count, self.saved_count = len(call.TENSORS), len(saved)
        self.added_index, self.fork_index = list(call.TENSORS).index(call.ONLY_ADDED), call.OPTIONS.index("fork")
        kinds = {n: facts.gradient for n, facts in call.TENSORS.items() if facts.gradient is not None}
        self.differentiable = tuple(kinds)
        self.inputs = frozenset(n for n, kind in kinds.items() if kind == "input")
        self.weights = tuple(n for n, kind in kinds.items() if kind == "weight")
        results_schema = [f"Tensor {result}" for result in ("out", *saved)]
        forward = [*call.SCHEMA.values(), "bool save", "str backend"]
        tensors = call.SCHEMA | {call.ONLY_ADDED: f"Tensor? {call.ONLY_ADDED}"}
        backward = [tensors[tensor] for tensor in call.TENSORS] + results_schema[1:] + ["Tensor grad_out"]
        backward += [call.SCHEMA[option] for option in call.OPTIONS]
        backward += ["bool[] needed", "ScalarType? added_dtype", "str backend"]
        define(name, f"({', '.join(forward)}) -> ({', '.join(results_schema)})")
        define(f"{name}_backward", f"({', '.join(backward)}) -> Tensor[]")
        self.forward_op = getattr(torch.ops.mosa_fast, name).default
        self.backward_op = getattr(torch.ops.mosa_fast, f"{name}_backward").default
        library.impl(name, self._forward, "CompositeExplicitAutograd")
        library.impl(name, self._differentiable_forward, "Autograd")
        library.impl(f"{name}_backward", self._backward, "CompositeExplicitAutograd")
        library.impl(f"{name}_backward", self.differentiable_backward, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake_forward, lib=library)
        torch.library.register_fake(f"{NAMESPACE}::{name}_backward", self._fake_backward, lib=library)

    def __call__(self, call: Call, backend: str) -> Tensor:
        """Run the kernels of a backend on a checked call."""
        values = call.values()
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in values[: self.tensor_count])
        if torch.compiler.is_compiling():
            return self.forward_op(*values, save, backend)[0]
        if beyond_reverse_mode(recorded=save):
            raise RuntimeError(
                f"{self.name} has reverse-mode derivatives only; in a transform of torch.func and in forward-mode "
                f"differentiation use {self.other_derivatives}"
            )
        # What the dispatcher would come back to: that way through C++ takes a tenth of a call's time.
        return self._differentiable_forward(*values, save, backend)[0]

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *values, save, backend = arguments
        call = self.call.of(map(contiguous, values))
        out, *saved = self.results(call, save)
        if out.numel():
            with torch.cuda.device_of(call.x):  # kernels run on the current device
                launchers(self.name, backend).forward(call, out, saved)
        else:
            for tensor in saved:
                tensor.zero_()  # no program comes to write it
        return out, *saved

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *values, save, _backend = arguments
        return self.results(self.call(*values), save)

    def _backward(self, *arguments: Any) -> list[Tensor]:
        call, saved, grad_out, needed, added_dtype, backend = self._backward_arguments(arguments)
        gradients = self.gradients(call, grad_out, needed, added_dtype)
        if grad_out.numel():
            with torch.cuda.device_of(grad_out):
                launchers(self.name, backend).backward(call, grad_out, saved, gradients)
        else:
            for gradient in gradients.values():
                gradient.zero_()
        return [gradients[name] for name in self.chosen(needed)]

    def _fake_backward(self, *arguments: Any) -> list[Tensor]:
        call, _saved, grad_out, needed, added_dtype, _backend = self._backward_arguments(arguments)
        gradients = self.gradients(call, grad_out, needed, added_dtype)
        return [gradients[name] for name in self.chosen(needed)]

    def _backward_arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, list[Tensor], Tensor, list[bool], Any, str]:
        """The call, the saved tensors, the output's gradient, what is needed, and the backend."""
        between = slice(self.tensor_count, self.tensor_count + self.saved_count + 1)
        *saved, grad_out = map(contiguous, arguments[between])
        *values, needed, added_dtype, backend = arguments[: between.start] + arguments[between.stop :]
        return self.call.of(map(contiguous, values)), saved, grad_out, needed, added_dtype, backend

    def chosen(self, needed: Sequence[bool]) -> list[str]:
        """The names of the gradients that are asked for; `needed` goes with `differentiable`."""
        return [name for name, need in zip(self.differentiable, needed, strict=True) if need]

    def gradients(
        self, call: Call, grad_out: Tensor, needed: Sequence[bool], added_dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Memory for the gradients that kernels compute: those asked for, and with one weight's those of all."""
        names = self.chosen(needed)
        if not self.inputs.issuperset(names):
            names += [name for name in self.weights if name not in names and getattr(call, name) is not None]
        gradients = {}
        for name in names:
            if name == call.ONLY_ADDED:
                assert added_dtype is not None
                samples = grad_out.shape[0] // (call.groups if call.fork else 1)
                gradients[name] = launching.empty((samples, *grad_out.shape[1:]), added_dtype, grad_out.device)
            else:
                gradients[name] = launching.empty_like(getattr(call, name))
        return gradients

    def _differentiable_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The forward where autograd may record it."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _Recorded.apply(self, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward_op(*arguments)

    def differentiable_backward(self, *arguments: Any) -> list[Tensor]:
        """The backward where autograd may record it."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return self.recorded_backward(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(*arguments)

    def recorded_backward(self, *arguments: Any) -> list[Tensor]:
        """The backward as autograd records it: so that a second derivative, when one is asked for, is refused."""
        return list(_Refused.apply(self, *arguments))


class _Recorded(torch.autograd.Function):
    """A forward operator with its gradient."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = operator.forward_op(*arguments)
        tensors = list(arguments[: operator.tensor_count])
        added, tensors[operator.added_index] = tensors[operator.added_index], None  # not needed again: not kept alive
        ctx.operator, ctx.options = operator, arguments[operator.tensor_count :]
        ctx.added_dtype = None if added is None else added.dtype
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return out, *saved

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
        operator: Operator = ctx.operator
        *options, save, backend = ctx.options
        if not save:
            raise RuntimeError(f"{operator.name} was called with save=False: there is nothing to differentiate with")
        names = tuple(operator.call.TENSORS)
        gradients: dict[str, Tensor] = {}
        if grad_out is not None:
            needs = ctx.needs_input_grad[1 : len(names) + 1]
            needed = {name for name, need in zip(names, needs, strict=True) if need}
            added = operator.call.ONLY_ADDED
            # The output's gradient is its own, unless groups are summed. A change of dtype is left to the kernel that
            # reads that gradient anyway, if one runs: then no other has to read it again.
            alone = grad_out.dtype == ctx.added_dtype or len(needed) == 1
            if added in needed and alone and not options[operator.fork_index]:
                needed.remove(added)
                gradients[added] = grad_out.to(ctx.added_dtype)
            if needed:
                asked = [name in needed for name in operator.differentiable]
                found = operator.differentiable_backward(
                    *ctx.saved_tensors, grad_out, *options, asked, ctx.added_dtype, backend
                )
                gradients |= zip(operator.chosen(asked), found, strict=True)
        return None, *map(gradients.get, names), *[None] * len(ctx.options)


class _Refused(torch.autograd.Function):
    """A backward operator, whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.name = operator.name
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator.backward_op(*arguments))

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> None:
        raise RuntimeError(f"{ctx.name}'s kernels have no second derivative; use the reference backend for it")


def beyond_reverse_mode(recorded: bool = True) -> bool:
    """Whether derivatives are asked for that operators have not: forward mode's, or those of torch.func's transforms.

    recorded: autograd is to record the call. Where it is not, torch itself maps the operator over samples (vmap).
    """
    if torch.compiler.is_compiling():
        return False  # what a compiler traces is transformed, if at all, by its own means
    return forward_ad._current_level >= 0 or (recorded and torch._C._functorch.maybe_current_level() is not None)


def define(name: str, schema: str) -> None:
    """Add an operator, of this name and schema, to torch's."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


@cache
def launchers(operator: str, backend: str) -> Any:
    """The module that launches an operator's kernels."""
    if operator not in KERNELS.get(backend, ()):
        raise RuntimeError(f"backend {backend!r} has no {operator} kernels")
    return importlib.import_module(f"mosa_fast.ops.{operator}_{backend}")


def contiguous(value: Any) -> Any:
    """An argument, in one piece if it is a tensor."""
    return value.contiguous() if isinstance(value, Tensor) else value
