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
from mosa_fast.ops.call import describe
from mosa_fast.routing import as_seed

SCALE = DROPOUT = 0.1  # AdaptFormer's, since a layer that stands alone is an adapter beside a branch


class SparseAdapter(MixtureLayer):
    """A bottleneck adapter whose weights are split among experts (paper, section 3).

    `y = x + skip + scale * up_e(drop(act(down_e(norm(x)))))`: parallel to a frozen branch whose output is `skip`.
    A training pass computes with one expert of each split projection; evaluation with all of them merged, always
    from the current weights.

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
        """
        return sparse_adapter(
            x,
            skip,
            **self._arguments(x, experts, seed),
            activation=self.activation,
            add_input=add_input,
            fork=fork,
            eps=1.0 if self.norm is None else self.norm.eps,
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
        return adapted_mlp(x, **mlp, **self._arguments(x, experts, seed), fork=fork)

    def _arguments(self, x: Tensor, experts: Tensor | None, seed: Tensor | int | None) -> dict[str, Any]:
        """What the operators take of this layer: its weights, their experts, the dropout and its seed."""
        if x.shape[-1] != self.down.weight.shape[1]:
            raise ValueError(f"x must be [N, ..., {self.down.weight.shape[1]}], got {describe(x)}")
        norm, dropout = self.norm, self.dropout if self.training else 0.0
        # Nothing is taken from torch's random state where nothing is random.
        random = dropout > 0 or (experts is None and self.draws_experts)
        key = as_seed(seed if random else 0, x.device)
        down_init = self.down.init
        if experts is None:
            own, down_init = self.own_experts(key, x.device)
            experts = own[0]
        return {
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
            "down_weight": self.down.weight,
            "down_bias": self.down.bias_rows(),
            "up_weight": self.up.weight,
            "up_bias": self.up.bias_rows(),
            "down_init": down_init,
            "down_owner": self.down.owner,
            "up_owner": self.up.owner,
            "experts": experts,
            "scale": self.scale,
            "dropout": dropout,
            "seed": key,
        }

    @property
    def merged_parameters(self) -> int:
        """Number of trained values that remain after merging: weights, one bias vector each, norm, trained scale."""
        norm = 0 if self.norm is None else sum(parameter.numel() for parameter in self.norm.parameters())
        return super().merged_parameters + norm

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"activation={self.activation}, {super().extra_repr()}, dropout={self.dropout}"
