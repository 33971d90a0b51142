"""A timm block with its adapters, and what it computes with in a pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mosa_fast.adapters.inside_mlp import frozen_mlp, is_inside
from mosa_fast.adapters.linears import bypassed_linears, linears_of
from mosa_fast.adapters.placements import placement_of, repeat_batch, routed_arguments
from mosa_fast.adapters.seams import seam_of
from mosa_fast.adapters.wrapper import Wrapper
from mosa_fast.backbones.frozen import draws_random_numbers
from mosa_fast.nn import SparseAdapter
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.call import product_dtype_of
from mosa_fast.ops.prepare_weights import PreparedWeights, prepare_weights
from mosa_fast.routing import BlockRouting, Routing

NOT_ROUTED = (
    "an adapted block in training was not told which experts to use: call the adapted model itself, as in "
    "model(images, views=2) or model.forward_features(images), or evaluate with model.eval(). Wrappers that checkpoint "
    "the blocks forget them, too: call model.set_grad_checkpointing() instead"
)


class AdaptedBlock(Wrapper):
    """A timm block, untouched, with its adapters.

    Attributes:
        block: timm's.
        placement: the name of one (`placement_of`).
        linears: those in the block that have low-rank pairs, in the order in which a routing counts their targets.
        adapter_names: of its other adapters, in the order they run.
        routing: what the adapters compute with in the pass that is running; None between passes.
        outputs: receives the output of the pass that is running, if anybody wants it; None between passes.
        disabled: compute what timm's block does, without the adapters.
        form: of the adapter, as in MoSAConfig.form.
        grad_checkpointing: recompute this block in the backward pass in place of keeping its activations.
    """

    CHILD = "block"

    form = "auto"  # of blocks that were pickled before there was a choice, too

    def __init__(
        self,
        block: nn.Module,
        placement: str,
        adapters: Mapping[str, SparseAdapter] | None = None,
        *,
        form: str = "auto",
    ) -> None:
        super().__init__()
        self.form = form
        self.placement = placement
        self.linears = linears_of(block)
        self.adapter_names = tuple(adapters or ())
        self.routing: BlockRouting | None = None
        self.outputs: list[Tensor] | None = None
        self.disabled = False
        self.grad_checkpointing = False
        for name, adapter in (adapters or {}).items():
            self.add_module(name, adapter)
        self.block = block
        self.train(block.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's block, `[N, ...]` to the same; `[V * N, ...]` where the routing parts the views here.

        Raises:
            RuntimeError: there is no routing in training.
        """
        routing = self.routing
        if routing is None and self.training and not self.disabled:
            raise RuntimeError(NOT_ROUTED)
        if (
            routing is not None
            and routing.fork
            and (placement_of(self.placement).parts_at_input or draws_random_numbers(self.block))
        ):
            x, routing = repeat_batch(x, routing.experts.shape[1]), routing._replace(fork=False)
        values = x.numel() * (routing.experts.shape[1] if routing is not None and routing.fork else 1)
        # Decided here and not in a recomputation, which backward may ask for under other settings.
        run = self._run_frozen if self.disabled else self._run_inside if is_inside(self, values) else self._run
        if self.grad_checkpointing and self.training:
            # To save torch's random state, the host waits for the GPU: done only where the frozen block draws from it.
            draws = draws_random_numbers(self.block)
            out = checkpoint(run, x, routing, args, kwargs, use_reentrant=False, preserve_rng_state=draws)
        else:
            out = run(x, routing, args, kwargs)
        if self.outputs is not None:
            self.outputs.append(out)
        return out

    def _run(self, x: Tensor, routing: BlockRouting | None, args: Any, kwargs: Any) -> Tensor:
        seam, run = seam_of(self.block), placement_of(self.placement).run
        attend = functools.partial(seam.attention, self.block, x, *args, **kwargs)
        return seam.output(self.block, run(self.block, seam, self.linears or self.adapters(), attend, routing))

    def _run_inside(self, x: Tensor, routing: BlockRouting | None, args: Any, kwargs: Any) -> Tensor:
        seam, arguments = seam_of(self.block), routed_arguments(routing, 0)
        arguments.pop("prepared", None)  # for kernels
        stream = seam.attention(self.block, x, *args, **kwargs)
        return seam.output(self.block, self.adapters()[0].with_mlp(stream, frozen_mlp(self), **arguments))

    def _run_frozen(self, x: Tensor, routing: BlockRouting | None, args: Any, kwargs: Any) -> Tensor:
        # Here and not around the pass, so that a recomputation in the backward pass leaves the pairs out, too.
        with bypassed_linears(self.linears):
            return self.block(x, *args, **kwargs)

    def adapters(self) -> list[Any]:
        """This block's SparseAdapters in the order they run, or SparseLoRAs in that of their linears."""
        # By name, since an adapter may have been wrapped since; a wrapped linear is called by timm.
        return [linear.lora for linear in self.linears] or [getattr(self, name) for name in self.adapter_names]

    @property
    def draws(self) -> int:
        """Pairs of experts that a pass draws for this block."""
        return sum(adapter.draws for adapter in self.adapters())


@contextmanager
def routed(
    blocks: Sequence[AdaptedBlock],
    routing: Routing | None,
    *,
    fork: bool = False,
    block_outputs: list[Tensor] | None = None,
) -> Iterator[None]:
    """Inside this context the blocks compute with the experts and seeds of a routing.

    Args:
        blocks: in the order they run.
        routing: of all their adapters; None: evaluation, merged.
        fork: the first block is given B samples and makes V * B of them; False: blocks are given all views.
        block_outputs: receives every block's output.
    """
    try:
        for block in blocks:
            block.outputs = block_outputs
        if routing is not None:
            sizes = [block.draws for block in blocks]
            prepared = prepared_weights(blocks, routing.experts)
            parts = zip(blocks, routing.experts.split(sizes), routing.seeds.split(sizes), strict=True)
            first = 0
            for index, (block, experts, seeds) in enumerate(parts):
                own = None if prepared is None else prepared[first : first + sizes[index]]
                block.routing = BlockRouting(experts, seeds, fork and index == 0, own)
                first += sizes[index]
        yield
    finally:
        for block in blocks:
            block.routing = block.outputs = None


def prepared_weights(blocks: Sequence[AdaptedBlock], experts: Tensor) -> list[PreparedWeights] | None:
    """What kernels read of the weights of all adapters in the blocks, for these experts `[adapters, V, 2]`.

    None where nothing is prepared: for the reference, for low-rank pairs, where an adapter is not what it was made as
    (wrapped, say), on several devices, and for what the operator will refuse: each layer then does by itself.
    """
    layers = [adapter for block in blocks for adapter in block.adapters()]
    if any(type(layer) is not SparseAdapter for layer in layers):
        return None
    if experts.dtype != torch.int32 or any(experts.device != layer.down.weight.device for layer in layers):
        return None
    # The stream's dtype, which a block is yet to be given: should it be another one, the layers prepare by themselves.
    stream = next(p.dtype for p in blocks[0].block.parameters() if p.is_floating_point())
    backend = resolve_backend(experts.device, stream, SparseAdapterCall.NAME)
    if backend == "reference":
        return None
    weights = [layer.weights(layer.down.init) for layer in layers]
    if any((w.norm_weight is None) != (w.norm_bias is None) for w in weights):
        return None
    return prepare_weights(weights, experts, product_dtype_of(experts.device, stream), backend)
