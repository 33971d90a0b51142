"""What a layer makes of its weights for evaluation, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

T = TypeVar("T")


class Kept:
    """Results that were made from tensors, by name.

    They are made anew when a tensor is another one, lies elsewhere, or was written to: torch counts writes in place.
    Not counted are writes through `.data` and `.numpy()`, of fused optimizers, of collectives (DDP's broadcast at its
    start), of other processes that share the memory, and of replayed CUDA graphs. Whoever has such a model sets its
    mode again, which drops all that is kept.

    Attributes:
        trained: the layer ran with gradients, so that an optimizer may write to its weights: nothing is kept any more.
    """

    def __init__(self) -> None:
        self.trained = False
        # From what, the results, and what holds the tensors and their memory: a later tensor could have the same
        # identity, address and count otherwise.
        self._made: tuple[Any, dict[Hashable, Any], Any] = (None, {}, ())

    def serves(self, sources: Sequence[Tensor | None]) -> bool:
        """Whether what is made from these tensors now may serve a later pass.

        Not where a graph is being made, which would hold a result and not how it is made; where weights get a gradient;
        or where writes are not counted.
        """
        tensors = [tensor for tensor in sources if tensor is not None]
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self.trained = True
        if self.trained or any(map(_is_special, tensors)):
            return False
        return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def get(self, sources: Sequence[Tensor | None], name: Hashable, make: Callable[[], T]) -> T:
        """The result of this name, made now if it is not there."""
        state: list[Any] = [
            None if t is None else (id(t), t._version, t.data_ptr(), t.dtype, t.device) for t in sources
        ]
        tensors = [tensor for tensor in sources if tensor is not None]
        if tensors[0].is_cuda:  # another stream would not wait for this one
            state.append(torch.cuda.current_stream(tensors[0].device).cuda_stream)
        known, results, _ = self._made
        if known != state:
            results = {}
            # In one step: other threads may be here.
            self._made = state, results, [(tensor, tensor.detach()) for tensor in tensors]
        if name not in results:
            # Tensors of inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                results[name] = make()
        result: T = results[name]
        return result


def _is_special(tensor: Tensor) -> bool:
    """Whether it has no memory of its own, or no count of writes."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not plain or tensor.is_inference()
