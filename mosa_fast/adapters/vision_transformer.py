"""timm's VisionTransformer with an adapter in every block.

The classes below are swapped in for those of a model's own modules, in place: every parameter keeps its timm name.
Attention masks, which timm's forward also takes, are not supported.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mosa_fast.backbones.frozen import draws_random_numbers
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter
from mosa_fast.routing import Routing, as_seed, draw


class AdaptedBlock(Block):
    """A timm Block whose `adapter` runs parallel to its MLP: `h + mlp(norm2(h)) + s * up(down(norm(h)))`.

    The adapter reads the residual stream h and sits outside LayerScale and drop-path (METHOD: Placements).
    """

    adapter: SparseAdapter

    def forward(  # type: ignore[override]
        self, x: Tensor, experts: Tensor | None = None, seed: Tensor | None = None, fork: bool = False
    ) -> Tensor:
        """`[N, T, D]` to the same, or to `[V * N, T, D]` with `fork`; see SparseAdapter.forward."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        branch = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self.adapter(x, branch, experts, seed=seed, fork=fork)


class AdaptedVisionTransformer(VisionTransformer):
    """A VisionTransformer whose blocks are AdaptedBlocks and whose forward can run several views at once.

    Attributes:
        mosa_config: what was put in.
    """

    mosa_config: MoSAConfig

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        views: int = 1,
        experts: Tensor | None = None,
        seed: Tensor | int | None = None,
        block_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits of one or more stochastic views of the images (of the merged model in evaluation).

        All views share one pass up to the first random operation; the first adapter turns B samples into V * B.

        Args:
            images: `[B, 3, H, W]`.
            views: number of views V when `experts` is None.
            experts: int32 `[blocks, V, 2]`, the (down, up) experts of every block and view; -1 is merged. None: drawn
                once per forward in training, merged in evaluation.
            seed: of draws and dropout: an int, or an int64 tensor as `mosa_fast.routing.step_seed` makes it. None:
                fresh, from torch's random state.
            block_outputs: a list that receives every block's output, `[V * B, T, D]`.

        Returns:
            `[V * B, classes]`, view after view.
        """
        routing = self._route(images.device, views, experts, seed)
        merged_views = views if routing is None else 1  # views of a merged model are all alike
        features = self.forward_features(images, routing, block_outputs)
        logits = self.forward_head(features)
        return logits if merged_views == 1 else torch.cat([logits] * merged_views)

    def _route(
        self, device: torch.device, views: int, experts: Tensor | None, seed: Tensor | int | None
    ) -> Routing | None:
        if experts is None and not self.training:
            return None
        # Nothing is taken from torch's random state where nothing is random.
        seed = as_seed(seed if self.training else 0, device)
        layers = len(self.blocks)
        if experts is not None:
            if experts.ndim != 3 or experts.shape[0] != layers or experts.shape[2] != 2:
                raise ValueError(f"experts must be int32 [{layers}, V, 2], got {list(experts.shape)}")
            return Routing(experts, draw(seed, layers, 1, self.mosa_config.experts).seeds)
        return draw(seed, layers, views, self.mosa_config.experts)

    def forward_features(  # type: ignore[override]
        self, x: Tensor, routing: Routing | None = None, block_outputs: list[Tensor] | None = None
    ) -> Tensor:
        """Tokens after the last block and norm, `[V * B, T, D]`."""
        views = 1 if routing is None else routing.experts.shape[1]
        forked = views == 1
        if not forked and (draws_random_numbers(self.pos_drop) or draws_random_numbers(self.patch_drop)):
            x, forked = x.repeat(views, 1, 1, 1), True
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if not forked and draws_random_numbers(self.blocks[0]):
            x, forked = x.repeat(views, 1, 1), True
        for index, block in enumerate(self.blocks):
            experts, seed = (None, None) if routing is None else (routing.experts[index], routing.seeds[index])
            if self.grad_checkpointing and self.training:
                # Saving the random state waits for the GPU: only where the frozen block draws from it.
                draws = draws_random_numbers(block)
                x = checkpoint(block, x, experts, seed, not forked, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = block(x, experts, seed, not forked)
            forked = True
            if block_outputs is not None:
                block_outputs.append(x)
        return self.norm(x)


_adapted_classes: dict[type, type] = {VisionTransformer: AdaptedVisionTransformer}


def adapted_class(original: type) -> type[AdaptedVisionTransformer]:
    """The class that stands in for `original`, VisionTransformer or a subclass of it."""
    if original not in _adapted_classes:
        _adapted_classes[original] = type(f"Adapted{original.__name__}", (AdaptedVisionTransformer, original), {})
    return _adapted_classes[original]
