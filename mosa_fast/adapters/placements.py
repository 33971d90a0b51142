"""Where adapters read and add in a block (docs/method.md, Placements); each placement owns its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mosa_fast.adapters.linears import LoRALinear, routed_linears
from mosa_fast.adapters.seams import Seam
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter
from mosa_fast.nn.sparse_adapter import DROPOUT, SCALE
from mosa_fast.routing import BlockRouting

Adapters = Sequence[SparseAdapter]
Attend = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One placement.

    Attributes:
        run: (block, its seam, its layers, attend, routing) to the sum that the block gives, where attend() is h, the
            residual stream after the attention.
        parts_at_input: several views part before the block's first product, since that is where they begin to differ.
    """

    run: Callable[[nn.Module, Seam, Any, Attend, BlockRouting | None], Tensor]
    parts_at_input: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterPlacement(Placement):
    """A placement of adapters.

    Attributes:
        adapters: names of a block's adapters, in the order they run.
        activation, scale, dropout: what "auto" means in a MoSAConfig.
        norm: whether an adapter normalises what it reads; what is read inside an MLP is normalised already.
    """

    adapters: tuple[str, ...]
    activation: str
    scale: float
    dropout: float
    norm: Callable[[Seam], bool]

    def make(self, config: MoSAConfig, seam: Seam, width: int, **options: Any) -> dict[str, SparseAdapter]:
        """One block's adapters, by name.

        Args:
            config: of the model; every adapter holds it.
            seam: of the block.
            width: of the block's tokens.
            options: norm_eps, generator, device and dtype of SparseAdapter.
        """
        chosen = {
            name: getattr(self if getattr(config, name) == "auto" else config, name)
            for name in ("activation", "scale", "dropout")
        }
        return {
            name: SparseAdapter.from_config(config, width, norm=self.norm(seam), **chosen, **options)
            for name in self.adapters
        }


def _adaptformer(
    block: nn.Module, seam: Seam, adapters: Adapters, attend: Attend, routing: BlockRouting | None
) -> Tensor:
    """Beside the MLP: `h + mlp(norm2(h)) + s * up(drop(act(down(norm(h)))))`, or inside: `m + s * up(...(down(n)))`."""
    h = attend()
    if not seam.inside:
        return adapters[0](h, seam.mlp(block, h), **routed_arguments(routing, 0))
    n, m = seam.inner(block, h)
    branch = seam.finish(block, adapters[0](n, m, add_input=False, **routed_arguments(routing, 0)))
    if routing is not None and routing.fork:
        h = repeat_batch(h, routing.experts.shape[1])
    return h + branch


def _pfeiffer(block: nn.Module, seam: Seam, adapters: Adapters, attend: Attend, routing: BlockRouting | None) -> Tensor:
    """On the MLP's branch m, with LayerScale and drop-path: `h + m + up(act(down(norm(m))))`."""
    h = attend()
    return adapters[0](seam.mlp(block, h), h, **routed_arguments(routing, 0))


def _houlsby(block: nn.Module, seam: Seam, adapters: Adapters, attend: Attend, routing: BlockRouting | None) -> Tensor:
    """On the stream, after attention and after the MLP: `x + up(act(down(x)))`."""
    h = adapters[0](attend(), **routed_arguments(routing, 0))
    return adapters[1](h + seam.mlp(block, h), **routed_arguments(routing, 1))


def _qkvo(
    block: nn.Module, seam: Seam, linears: Sequence[LoRALinear], attend: Attend, routing: BlockRouting | None
) -> Tensor:
    """In the attention's linears: `h + mlp(norm2(h))`."""
    with routed_linears(linears, routing):
        h = attend()
    return h + seam.mlp(block, h)


PLACEMENTS = {
    "adaptformer": AdapterPlacement(
        run=_adaptformer,
        adapters=("adapter",),
        activation="gelu",
        scale=SCALE,
        dropout=DROPOUT,
        norm=lambda seam: not seam.inside,
    ),
    "pfeiffer": AdapterPlacement(
        run=_pfeiffer, adapters=("adapter",), activation="relu", scale=1.0, dropout=0.0, norm=lambda seam: True
    ),
    "houlsby": AdapterPlacement(
        run=_houlsby,
        adapters=("attention_adapter", "adapter"),
        activation="silu",
        scale=1.0,
        dropout=0.0,
        norm=lambda seam: False,
    ),
}
# Where low-rank pairs are (MoSAConfig.method lora); the name is no choice of MoSAConfig.placement.
QKVO = "qkvo"
_ALL: dict[str, Placement] = {**PLACEMENTS, QKVO: Placement(run=_qkvo, parts_at_input=True)}


def placement_of(name: str) -> Placement:
    """The placement of a block by its name."""
    return _ALL[name]


def repeat_batch(x: Tensor, views: int) -> Tensor:
    """`[B, ...]` to `[V * B, ...]`, view after view."""
    return x.repeat(views, *[1] * (x.ndim - 1))


def routed_arguments(routing: BlockRouting | None, index: int) -> dict[str, Any]:
    """What a block's adapter is called with: its own experts and seed. Only the first one to run parts the views."""
    if routing is None:
        return {}
    return {
        "experts": routing.experts[index],
        "seed": routing.seeds[index],
        "fork": routing.fork and index == 0,
        "prepared": None if routing.prepared is None else routing.prepared[index],
    }
