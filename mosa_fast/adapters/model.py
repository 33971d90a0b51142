"""Adapters in a timm model, by composition: timm's own forward runs, through blocks that own timm's.

Why it is built so: docs/design.md, How adapters get into a model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters import hub
from mosa_fast.adapters.adapter_file import (
    check_adapter,
    keep_training,
    load_trained_state,
    read_adapter,
    shown,
    without_data,
)
from mosa_fast.adapters.block import AdaptedBlock, routed
from mosa_fast.adapters.inside_mlp import is_inside
from mosa_fast.adapters.linears import put_loras
from mosa_fast.adapters.passes import all_disabled, blocks_and_others, checkpoints_by_itself, draw_routing, repeated
from mosa_fast.adapters.placements import PLACEMENTS, QKVO
from mosa_fast.adapters.seams import call_quantised_qkv, carries_samples, find_blocks, seam_of
from mosa_fast.adapters.wrapper import Wrapper, unwrapped
from mosa_fast.backbones.frozen import hold_statistics, parts_samples
from mosa_fast.backbones.heads import classifiers, heads
from mosa_fast.config import MoSAConfig
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.nn.mixture import adapters


class AdaptedModel(Wrapper):
    """A timm model whose blocks have adapters, and which can run several views of its images in one pass.

    It answers to the timm model's names too: `model.head`, `model.forward_features(images)`, `model.group_matcher()`.

    Attributes:
        backbone: the timm model; calling it by itself works in evaluation only.
        classes: names of the classes, by label; None: unknown. Set them, and adapter files hold them.
        preprocessing: what evaluation does to an image before the model sees it; the same.
    """

    CHILD = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.classes: list[str] | None = None
        self.preprocessing: Preprocessing | None = None
        self.backbone = backbone

    @property
    def mosa_config(self) -> MoSAConfig:
        """What was put in (after `merge`, with one expert): the configuration that every adapter holds."""
        return next(adapters(self)).config

    def forward(
        self,
        images: Any,
        views: int = 1,
        experts: Tensor | None = None,
        seed: Tensor | int | None = None,
        block_outputs: list[Tensor] | None = None,
        **arguments: Any,
    ) -> Any:
        """Logits of one or more stochastic views of the images (of the merged model in evaluation).

        All views are one pass up to the first random operation: the first adapter turns B samples into V * B, or
        the input is repeated, where the frozen backbone draws random numbers before it or the arguments hold
        something for every image.

        Args:
            images: `[B, 3, H, W]`, or what else the timm model takes.
            views: number of views V when `experts` is None.
            experts: int32 `[adapters, V, 2]`, the (down, up) experts of every adapter (of every target of low-rank
                pairs) and view; -1 is merged. Ids are not checked, which would wait for the device: one that is out of
                range owns nothing. None: drawn once per forward in training, merged in evaluation.
            seed: of draws and dropout: an int, or an int64 tensor as `mosa_fast.routing.step_seed` makes it. None:
                fresh, from torch's random state.
            block_outputs: a list that receives every block's output, `[V * B, ...]`.
            arguments: of the timm model's forward, such as attn_mask.

        Returns:
            `[V * B, classes]`, view after view.

        Raises:
            ValueError: there is no view, or experts has another shape.
            RuntimeError: gradient checkpointing was switched on in the backbone.
        """
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        blocks, others = blocks_and_others(self.backbone)
        if all_disabled(blocks) or (experts is None and not self.training):
            with routed(blocks, None, block_outputs=block_outputs):
                logits = self.backbone(images, **arguments)
            views = views if experts is None else experts.shape[1]
            return logits if views == 1 else repeated(logits, views)  # all alike, where no experts are active
        # Nothing is taken from torch's random state where nothing is random.
        routing = draw_routing(blocks, views, experts, seed if self.training else 0)
        views = routing.experts.shape[1]
        per_sample = {name for name, value in arguments.items() if carries_samples(name, value)}
        fork = views > 1
        counted = any(seam_of(block.block).counts_images for block in blocks)
        if fork and (
            counted or per_sample or not isinstance(images, Tensor) or any(map(parts_samples, (self.backbone, *others)))
        ):
            images, fork = repeated(images, views), False
            arguments |= {name: repeated(arguments[name], views) for name in per_sample}
        with routed(blocks, routing, fork=fork, block_outputs=block_outputs):
            return self.backbone(images, **arguments)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # The timm model's other ways through its blocks: one view, drawn once.
        if name in ("forward_features", "forward_intermediates", "get_intermediate_layers"):
            return functools.partial(self._one_view, value)
        return value

    def _one_view(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.training or all_disabled(blocks := blocks_and_others(self.backbone)[0]):
            return method(*args, **kwargs)
        with routed(blocks, draw_routing(blocks, 1, None, None)):
            return method(*args, **kwargs)

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Inside this context the model gives the frozen backbone's own answer, through the trained head.

        Blocks compute what timm's do, adapters and low-rank pairs are left out, nothing is drawn for them, and they get
        no gradient. The mode stays: in training the head learns, and what the backbone itself drops is dropped. Several
        views are one pass, repeated; `experts` only say how many they are. A model under torch.compile is compiled
        once more.
        """
        blocks = blocks_and_others(self.backbone)[0]
        before = [block.disabled for block in blocks]
        try:
            for block in blocks:
                block.disabled = True
            yield
        finally:
            for block, was in zip(blocks, before, strict=True):
                block.disabled = was

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode; BatchNorm of the frozen backbone stays in evaluation (docs/design.md, Frozen stays frozen)."""
        super().train(mode)
        hold_statistics(self)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each adapted block in the backward pass, with the same experts and dropout."""
        if any(checkpoints_by_itself(m) for m in self.backbone.modules() if not isinstance(m, AdaptedBlock)):
            self.backbone.set_grad_checkpointing(False)  # type: ignore[operator]
        for block in blocks_and_others(self.backbone)[0]:
            block.grad_checkpointing = enable

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the timm model's; what it makes anew (position embeddings) stays frozen if it was."""
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        self.backbone.set_input_size(*args, **kwargs)  # type: ignore[operator]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained.get(name, True))

    def group_matcher(self, coarse: bool = False) -> Any:
        """The timm model's patterns of parameter groups (for layer decay), for this model's names."""
        groups: Any = self.backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
        if callable(groups):  # CaiT's gives the group of a name
            return lambda name: groups(name.removeprefix(f"{self.CHILD}."))
        return {name: _prefix_patterns(patterns) for name, patterns in groups.items()}

    def save_pretrained(self, folder: str | Path, run: str | Path | None = None) -> None:
        """Write a folder to share: the adapter file, config.json for the Hub, and a model card (docs/sharing.md).

        Args:
            folder: made where it is not there; `from_pretrained` reads it.
            run: folder of the run that trained the model: the card gets its data, accuracy and numbers of weights.

        Raises:
            ValueError: `run` is not the folder of a finished run, or trained another model.
            OSError: a file cannot be written.
        """
        hub.save_pretrained(self, folder, run)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        backbone: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> AdaptedModel:
        """The model of a folder that `save_pretrained` or a run wrote, or of a repository on the Hugging Face Hub.

        Args:
            name_or_folder: the folder, its adapter file, or the repository, "user/name".
            backbone: the frozen timm model; None: made by timm as the file says, with its pretrained weights.
            revision: of the repository: a branch, tag or commit.
            token: of the Hub; None: the one that `hf auth login` keeps.

        Returns:
            The model, with its `classes` and `preprocessing` where the file has them.

        Raises:
            ValueError: it can't be loaded, or the backbone is not the one that the adapters were trained on.
        """
        path, backbone = hub.find_pretrained(name_or_folder, backbone, revision=revision, token=token)
        return load_adapter(backbone, path)

    def push_to_hub(
        self,
        repository: str,
        *,
        run: str | Path | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Adapters of mosa_fast",
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the Hugging Face Hub, made where it is not there.

        Args:
            repository: "user/name".
            run: folder of the run that trained the model, for the model card.
            private: whether a new repository can be seen by nobody else.
            token: of the Hub, with the right to write; None: the one that `hf auth login` keeps.
            commit_message: of the commit.

        Returns:
            The repository's address.
        """
        return hub.push_to_hub(self, repository, run=run, private=private, token=token, commit_message=commit_message)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the timm model wants spared from weight decay."""
        names = getattr(self.backbone, "no_weight_decay", set)
        return {f"{self.CHILD}.{name}" for name in names()}


def adapt(model: nn.Module, config: MoSAConfig | None = None) -> AdaptedModel:
    """Put a mixture of sparse adapters into every block of a timm model.

    The backbone is frozen; the adapters and the classification head are trained. The adapted model is called as
    `model(images, views=2)` in training, which gives `[2 * B, classes]`, and as `model(images)` in evaluation.

    Args:
        model: a timm model of a family that `mosa_fast.adapters.seams` knows; its blocks are replaced in place.
        config: what to put in; the paper's defaults when None.

    Returns:
        A model around the given one.

    Raises:
        ValueError: the model is of another kind, or has adapters already; or the configuration is no MoSAConfig.
    """
    config = MoSAConfig() if config is None else config
    if not isinstance(config, MoSAConfig):
        raise ValueError(f"config must be a MoSAConfig, got {config!r}")
    if any(isinstance(module, AdaptedBlock) for module in model.modules()):
        raise ValueError("the model has adapters already; make a new one, or merge(model) and go on with that")
    found = list(find_blocks(model))
    checkpoints = any(map(checkpoints_by_itself, model.modules()))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    adapted_blocks = []
    for parent, name, block in found:
        norm: Any = block.norm2
        options = {
            "generator": generator,
            "device": norm.weight.device,
            # Master weights are float32 under a half-precision backbone.
            "dtype": torch.promote_types(norm.weight.dtype, torch.float32),
        }
        call_quantised_qkv(block)
        if config.method == "lora":
            put_loras(block, config, **options)
            adapted_block = AdaptedBlock(block, QKVO, form=config.form)
        else:
            width, placement = norm.weight.numel(), PLACEMENTS[config.placement]
            made = placement.make(config, seam_of(block), width, norm_eps=norm.eps, **options)
            adapted_block = AdaptedBlock(block, config.placement, made, form=config.form)
        is_inside(adapted_block)  # a form that cannot be is refused, before anything is put in
        adapted_blocks.append((parent, name, adapted_block))
    for parent, name, adapted_block in adapted_blocks:
        parent.register_module(name, adapted_block)
    for module in classifiers(model):
        module.requires_grad_(True)
    adapted = AdaptedModel(model).train(model.training)
    if checkpoints:
        adapted.set_grad_checkpointing(True)
    return adapted


def load_adapter(model: nn.Module, path: str | Path) -> AdaptedModel:
    """Read a file of `save_adapter` into a model.

    Args:
        model: the same backbone, in any precision: a plain timm model, which gets adapters and a head of the file's
            size in place, or one that was adapted with the same configuration.
        path: the file.

    Returns:
        The adapted model: the given one, or one around it; with the file's `classes` and `preprocessing`.

    Raises:
        ValueError: the file is not an adapter file, is broken, or does not fit the model, which then is as it was: the
            message names what differs (configuration, tensors, the backbone's weights, classes).
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = read_adapter(Path(path))
    model = unwrapped(model)
    adapted: AdaptedModel | None = model if isinstance(model, AdaptedModel) else None
    if adapted is not None:
        if adapted.mosa_config.to_dict() != metadata.config.to_dict():
            raise ValueError(f"{path} was saved with {metadata.config}, but the model has {adapted.mosa_config}")
        if None not in (metadata.classes, adapted.classes) and list(adapted.classes or ()) != metadata.classes:
            raise ValueError(f"{path} is for {shown(metadata.classes)}, but the model is for {shown(adapted.classes)}")
    # Checked on a copy without data first, so that a file that does not fit leaves the model as it was.
    check_adapter(
        adapted or prepare(without_data(model), metadata.config, tensors), model, tensors, metadata, str(path)
    )
    if adapted is None:
        adapted = prepare(model, metadata.config, tensors)
    load_trained_state(adapted, tensors, str(path))
    keep_training(adapted, tensors)
    adapted.classes = metadata.classes or adapted.classes
    adapted.preprocessing = metadata.preprocessing or adapted.preprocessing
    return adapted


def prepare(model: nn.Module, config: MoSAConfig, tensors: dict[str, Tensor]) -> AdaptedModel:
    """Adapters, and a head of the file's size, for a plain model."""
    timm_model: Any = model
    own = [path for path, module in model.named_modules() if any(module is head for head in heads(model))]
    sizes = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and any(name.startswith(f"{path}.") for path in own)
    ]
    if sizes and sizes[0] != timm_model.num_classes:
        timm_model.reset_classifier(sizes[0])
    return adapt(model, config)


def _prefix_patterns(patterns: Any) -> Any:
    """Regular expressions, alone or in pairs and lists, for names that begin with the backbone's."""
    if isinstance(patterns, str):
        # timm matches from the start of a name: without `^` the patterns mean the same, and can follow the prefix.
        unanchored = re.sub(r"(^|[|(])\^", r"\1", patterns)
        return rf"^{AdaptedModel.CHILD}\.(?:{unanchored})"
    if isinstance(patterns, (list, tuple)):
        return type(patterns)(_prefix_patterns(item) for item in patterns)
    return patterns  # None, or numbers by which timm sorts a group: they name no parameter
