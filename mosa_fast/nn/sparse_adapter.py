"""The adapter layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.config import MoSAConfig
from mosa_fast.nn.mixture import MixtureLayer
from mosa_fast.nn.projection import SparseProjection
from mosa_fast.ops import adapted_mlp, sparse_adapter
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.call import describe, product_dtype
from mosa_fast.ops.prepare_weights import MasterWeights, PreparedWeights, prepare_weights
from mosa_fast.ops.reference import MERGED
from mosa_fast.options import Facts, check_value
from mosa_fast.routing import as_seed

SCALE = DROPOUT = 0.1  # AdaptFormer's, since a layer that stands alone is an adapter beside a branch


class SparseAdapter(MixtureLayer):
    """A bottleneck adapter whose weights are split among experts (paper, section 3).

    `y = x + skip + scale * up_e(drop(act(down_e(norm(x)))))`: parallel to a frozen branch whose output is `skip`.
    A training pass computes with one expert of each split projection; evaluation with all of them merged, always
    from the current weights (`mosa_fast.nn.kept` says which writes to them it can see).

    Args:
        dim: width D of the tokens.
        bottleneck: width r of the adapter.
        experts: number of experts E, 1 to 255.
        activation: "gelu" (exact), "relu" or "silu".
        scale: factor on the output: a number, or "trainable" (learned, from 1.0).
        dropout: probability of dropping a hidden activation.
        share, bias, merge, routing: see `MoSAConfig`.
        norm: normalise what is read, with a LayerNorm of the adapter's own.
        norm_eps: its eps (norm2's of the block it sits in).
        generator: CPU generator of owner maps and initial weights; torch's global one when None.

    Shapes:
        x: `[N, ..., dim]`; skip: the same or None; result: the same, or `[V * N, ..., dim]` with `fork`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        experts: int = 4,
        *,
        activation: str = "gelu",
        share: str = "down",
        scale: float | str = SCALE,
        dropout: float = DROPOUT,
        bias: str = "per_expert",
        merge: str = "mean",
        routing: str = "random",
        norm: bool = True,
        norm_eps: float = 1e-6,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_value("dim", dim, int, Facts(low=1))
        for name, value in (("activation", activation), ("dropout", dropout)):
            if value == "auto":
                raise ValueError(f"{name} must be given to a layer: 'auto' is for a placement in a model to choose")
        config = MoSAConfig(
            bottleneck=bottleneck,
            experts=experts,
            activation=activation,  # type: ignore[arg-type]
            share=share,  # type: ignore[arg-type]  # checked by the config
            scale=scale,  # type: ignore[arg-type]
            dropout=dropout,
            bias=bias,  # type: ignore[arg-type]
            merge=merge,  # type: ignore[arg-type]
            routing=routing,  # type: ignore[arg-type]
        )
        super().__init__(config, device, dtype)
        self.activation = activation
        self.norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype) if norm else None
        self.down = SparseProjection(
            dim,
            bottleneck,
            experts,
            split=share != "down",
            zero_init=False,
            bias=config.bias,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.up = SparseProjection(
            bottleneck,
            dim,
            experts,
            split=share != "up",
            zero_init=True,
            bias=config.bias,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.dropout = dropout

    @classmethod
    def from_config(
        cls,
        config: MoSAConfig,
        dim: int,
        *,
        activation: str,
        scale: float | str,
        dropout: float,
        **options: Any,
    ) -> SparseAdapter:
        """One adapter of a model: it holds the very configuration that the model was given.

        Args:
            config: of the model.
            dim: width D of the tokens.
            activation, scale, dropout: what the placement makes of the configuration's.
            options: norm, norm_eps, generator, device, dtype.
        """
        adapter = cls(
            dim,
            config.bottleneck,
            config.experts,
            activation=activation,
            share=config.share,
            scale=scale,
            dropout=dropout,
            bias=config.bias,
            merge=config.merge,
            routing=config.routing,
            **options,
        )
        adapter.config = config
        return adapter

    @property
    def draws(self) -> int:
        """Pairs of experts that a pass draws."""
        return 1

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        experts: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
        fork: bool = False,
        add_input: bool = True,
        prepared: PreparedWeights | None = None,
    ) -> Tensor:
        """Apply the adapter.

        Args:
            x: `[N, ..., dim]`.
            skip: output of the frozen branch, added to the result.
            experts: int32 `[V, 2]`, the (down, up) expert of each group of samples. None: drawn in training, merged in
                evaluation; expert 0 in both, where the configuration's routing is fixed. The id -1 is always the mean
                merge, also where the layer's own merge is joint.
            seed: of the dropout and of the draw: an int, or int64 `[1]` or `[2]` (`mosa_fast.routing`). None: fresh.
            fork: let each of the V groups read all of x.
            add_input: add x to the result.
            prepared: what a model prepared of these weights for these experts, with those of its other layers
                (`mosa_fast.ops.prepare_weights`); used where it is of the products' dtype and for the backend that
                serves.
        """
        if prepared is not None and prepared.down.dtype != product_dtype(x):
            prepared = None
        weights, experts, options, kept = self._pass(x, experts, seed)
        if kept is not None:
            prepared = self._prepared_for_evaluation(x, kept)
        return sparse_adapter(
            x,
            skip,
            *weights,
            experts,
            activation=self.activation,
            add_input=add_input,
            fork=fork,
            eps=1.0 if self.norm is None else self.norm.eps,
            prepared=prepared,
            **options,
        )

    def with_mlp(
        self,
        x: Tensor,
        mlp: Mapping[str, Any],
        experts: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
        fork: bool = False,
    ) -> Tensor:
        """Apply the adapter and the frozen MLP beside it: `forward`, with the MLP's branch as its skip.

        Args:
            x: `[N, ..., dim]`.
            mlp: norm2 with its eps, fc1, fc2 and LayerScale of the block, by the names that
                `mosa_fast.ops.adapted_mlp` has for them.
            experts, seed, fork: as forward's.
        """
        weights, experts, options, _ = self._pass(x, experts, seed)
        return adapted_mlp(x, **mlp, **weights._asdict(), experts=experts, fork=fork, **options)

    def _pass(
        self, x: Tensor, experts: Tensor | None, seed: Tensor | int | None
    ) -> tuple[MasterWeights, Tensor, dict[str, Any], tuple[Tensor | None, ...] | None]:
        """What a pass computes with.

        Returns:
            The weights, their experts, the operators' scale, dropout and seed, and, where the weights are those that
            evaluation keeps, what they were made from.
        """
        down = self.down  # to look up a module's child takes as long as ten plain attributes
        width = down.weight.shape[1]
        if x.shape[-1] != width:
            raise ValueError(f"x must be [N, ..., {width}], got {describe(x)}")
        dropout = self.dropout if self.training else 0.0
        # Nothing is taken from torch's random state where nothing is random.
        random = dropout > 0 or (experts is None and self.draws_experts)
        key = as_seed(seed if random else 0, x.device)
        options = {"scale": self.scale, "dropout": dropout, "seed": key}
        sources = self.kept_sources()
        if experts is not None:
            return self.weights(down.init), experts, options, None
        if sources is not None:
            weights, experts = self._kept.get(sources, "merged", self._merged_weights)
            return weights, experts, options, sources
        own, down_init = self.own_experts(key, x.device)
        return self.weights(down_init), own[0], options, None

    def weights(self, down_init: Tensor | None) -> MasterWeights:
        """The weights as the operator takes them. down_init: W0 of the down-projection, where the pass has it."""
        norm, down, up = self.norm, self.down, self.up
        norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
        return MasterWeights(
            norm_weight,
            norm_bias,
            down.weight,
            down.bias_rows(),
            up.weight,
            up.bias_rows(),
            down_init,
            down.owner,
            up.owner,
        )

    def sources(self) -> tuple[Tensor | None, ...]:
        """All that evaluation's weights are made from: kernels multiply the norm's into them."""
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        return *super().sources(), *norm

    def _merged_weights(self) -> tuple[MasterWeights, Tensor]:
        """The weights of a dense adapter that computes what evaluation does, and the experts that it is called with."""
        down_weight, down_bias, up_weight, up_bias = self.merged()
        assert down_bias is not None
        assert up_bias is not None
        experts = torch.full((1, 2), MERGED, dtype=torch.int32, device=down_weight.device)
        merged = self.weights(None)._replace(
            down_weight=down_weight,
            down_bias=down_bias,
            up_weight=up_weight,
            up_bias=up_bias,
            down_owner=None,
            up_owner=None,
        )
        return merged, experts

    def _prepared_for_evaluation(self, x: Tensor, sources: tuple[Tensor | None, ...]) -> PreparedWeights | None:
        """What kernels read of the merged weights; None for the reference, and for what the operator will refuse."""
        if not x.is_floating_point() or x.device != self.down.weight.device:
            return None
        backend = resolve_backend(x.device, x.dtype, SparseAdapterCall.NAME)
        if backend == "reference":
            return None
        dtype = product_dtype(x)

        def prepare() -> PreparedWeights:
            weights, experts = self._kept.get(sources, "merged", self._merged_weights)
            return prepare_weights([weights], experts[None], dtype, backend)[0]

        return self._kept.get(sources, (backend, dtype), prepare)

    @property
    def merged_parameters(self) -> int:
        """Number of trained values that remain after merging: weights, one bias vector each, norm, trained scale."""
        norm = 0 if self.norm is None else sum(parameter.numel() for parameter in self.norm.parameters())
        return super().merged_parameters + norm

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"activation={self.activation}, {super().extra_repr()}, dropout={self.dropout}"
