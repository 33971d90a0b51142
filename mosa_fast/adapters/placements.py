"""Where adapters read and add in a block (docs/method.md, Placements); each placement owns its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mosa_fast.adapters.seams import Seam
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter
from mosa_fast.nn.sparse_adapter import DROPOUT, SCALE
from mosa_fast.routing import BlockRouting


@dataclass(frozen=True)
class Placement:
    """One placement.

    Attributes:
        run: (block, its seam, its adapters, h, routing) to the block's output, where h is the residual stream after
            the attention.
        adapters: names of a block's adapters, in the order they run.
        scale, dropout: what "auto" means in a MoSAConfig.
    """

    run: Callable[[nn.Module, Seam, Sequence[SparseAdapter], Tensor, BlockRouting | None], Tensor]
    adapters: tuple[str, ...]
    scale: float
    dropout: float

    def make(self, config: MoSAConfig, width: int, **options: Any) -> dict[str, SparseAdapter]:
        """One block's adapters, by name.

        Args:
            config: of the model; every adapter holds it.
            width: of the block's tokens.
            options: norm_eps, generator, device and dtype of SparseAdapter.
        """
        scale = self.scale if config.scale == "auto" else config.scale
        dropout = self.dropout if isinstance(config.dropout, str) else config.dropout
        return {
            name: SparseAdapter.from_config(config, width, scale=scale, dropout=dropout, **options)
            for name in self.adapters
        }


def _adaptformer(
    block: nn.Module, seam: Seam, adapters: Sequence[SparseAdapter], h: Tensor, routing: BlockRouting | None
) -> Tensor:
    """Parallel to the MLP, outside LayerScale and drop-path: `h + mlp(norm2(h)) + s * up(drop(act(down(norm(h)))))`."""
    return adapters[0](h, seam.mlp(block, h), **_routed(routing, 0))


PLACEMENTS = {"adaptformer": Placement(_adaptformer, ("adapter",), scale=SCALE, dropout=DROPOUT)}


def _routed(routing: BlockRouting | None, index: int) -> dict[str, Any]:
    """What a block's adapter is called with: its own experts and seed. Only the first one to run parts the views."""
    if routing is None:
        return {}
    return {"experts": routing.experts[index], "seed": routing.seeds[index], "fork": routing.fork and index == 0}
