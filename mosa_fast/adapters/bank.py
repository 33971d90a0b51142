"""Many tasks on one frozen backbone: their merged adapters and heads, and batches in which every sample has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.adapter_file import (
    check_adapter,
    metadata_of,
    read_adapter,
    timm_names,
    trained_state,
    without_data,
)
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.fold import merge
from mosa_fast.adapters.gate import Gate
from mosa_fast.adapters.metadata import Metadata
from mosa_fast.adapters.model import AdaptedModel, prepare
from mosa_fast.adapters.seams import carries_samples, find_blocks
from mosa_fast.adapters.stacking import put_stacks, take_stacks
from mosa_fast.adapters.wrapper import Wrapper, unwrapped
from mosa_fast.backbones.heads import classifiers, heads
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.nn.mixture import adapters
from mosa_fast.nn.stacks import TaskStack, told


class AdapterBank(Wrapper):
    """N tasks' merged adapters and heads on one frozen backbone, for evaluation (docs/serving.md).

    One forward serves a batch in which every sample names its task:

        bank = mosa.AdapterBank(timm_model, {"cub": "cub.safetensors", "cars": "cars.safetensors"})
        logits = bank(images, tasks=["cub", "cars", "cub"])

    It computes what each task's model does alone in evaluation. Merged weights are prepared once, when a task is added.
    There are no gradients: a task is trained by itself, on an adapted model. Threads may call a bank at the same time,
    and `add` and `remove` wait for them. The bank answers to the timm model's names, too.

    Args:
        model: the timm model that all tasks were trained on, whatever its head; its blocks and head are replaced in
            place.
        tasks: adapter files, or adapted models, by the task's name; more can be added later.

    Attributes:
        backbone: the timm model.

    Raises:
        ValueError: the model is of another kind or has adapters already, or a task cannot be added (`add`). The model
            is then as it was.
        FileNotFoundError: so is it when a task's file does not exist.
    """

    CHILD = "backbone"

    def __init__(self, model: nn.Module, tasks: Mapping[str, str | Path | nn.Module] | None = None) -> None:
        super().__init__()
        if any(isinstance(module, AdaptedBlock) for module in model.modules()):
            raise ValueError(
                "the model has adapters already: a bank takes a plain timm model, and tasks as files or models"
            )
        for _ in find_blocks(model):
            pass  # it can be adapted
        if len(classifiers(model)) > len(heads(model)):
            raise ValueError("a bank holds linear heads, but this model's attention pooling is trained with its task")
        # What a task's tensors are checked against. In a tuple, since it is no part of the bank: it has no data.
        self._structure = (without_data(model),)
        self._gate = Gate()
        self._kind: str | None = None
        self._tasks: dict[str, Metadata] = {}
        self._heads: dict[str, nn.Module] = {}  # the timm model's own, while stacks are in their places
        modes = {module: module.training for module in model.modules()}
        gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self.backbone = model.requires_grad_(False).eval()
        self.training = False
        try:
            for name, source in (tasks or {}).items():
                self.add(name, source)
        except BaseException:
            self._put_back()
            for module, training in modes.items():
                module.training = training
            for parameter, wanted in gradients.items():
                parameter.requires_grad_(wanted)
            raise

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order in which they were added."""
        return tuple(self._tasks)

    def add(self, name: str, source: str | Path | nn.Module) -> None:
        """Add a task.

        Args:
            name: what samples call it.
            source: an adapter file, or an adapted model on the same backbone, which is left as it is.

        Raises:
            ValueError: there is a task of that name; or its adapters do not fit the model or the other tasks (another
                placement, activation or low-rank targets; sizes and scales may differ); or it was trained on another
                backbone, or more of it than adapters and head. The bank is then as it was.
            FileNotFoundError: there is no such file.
        """
        with self._gate.changing():
            if name in self._tasks:
                raise ValueError(f"the bank has a task {name!r} already: remove it first")
            adapted, metadata = self._merged(f"task {name!r}", source)
            kind = _kind(adapted)
            if self._kind is None:
                self._heads = put_stacks(self.backbone, adapted)
                self._kind = kind
            elif self._kind != kind:
                raise ValueError(
                    f"task {name!r} has {kind}, but those of the bank have {self._kind}: one bank holds one kind"
                )
            for path, stack in self._stacks():
                stack.append_layer(adapted.backbone.get_submodule(path))
            self._tasks[name] = metadata

    def remove(self, name: str) -> None:
        """Take a task out. With the last one the timm model gets its own blocks and heads back, frozen.

        Raises:
            ValueError: there is no such task.
        """
        with self._gate.changing():
            index = self._index(name)
            if len(self._tasks) == 1:
                self._put_back()
                return
            for _, stack in self._stacks():
                stack.remove(index)
            del self._tasks[name]

    def classes(self, name: str) -> list[str] | None:
        """The names of a task's classes, by label; None where its file has none.

        Raises:
            ValueError: there is no such task.
        """
        self._index(name)
        return self._tasks[name].classes

    def preprocessing(self, name: str) -> Preprocessing | None:
        """What a task does to its images, which it is the caller's part to do; None where its file does not say.

        Raises:
            ValueError: there is no such task.
        """
        self._index(name)
        return self._tasks[name].preprocessing

    @torch.no_grad()
    def forward(self, images: Any, tasks: str | Sequence[str], **arguments: Any) -> Tensor:
        """Logits of a batch, each sample by its own task.

        Args:
            images: `[B, 3, H, W]`, or what else the timm model takes.
            tasks: B names; or one, of all samples.
            arguments: of the timm model's forward, such as attn_mask.

        Returns:
            `[B, most classes of a task in the bank]`; -inf past the classes of a sample's own task.

        Raises:
            ValueError: there is no such task, or not a name for every sample.
        """
        samples = len(images if isinstance(images, Tensor) else next(iter(images.values())))
        names = [tasks] * samples if isinstance(tasks, str) else list(tasks)
        if len(names) != samples:
            raise ValueError(f"tasks must name the task of each of the {samples} images, got {len(names)} names")
        # What is traced cannot wait: nobody changes a bank while its compiled form runs (docs/serving.md).
        with nullcontext() if torch.compiler.is_compiling() else self._gate.passing():
            return self._logits(images, names, arguments)

    def _logits(self, images: Any, names: Sequence[str], arguments: dict[str, Any]) -> Tensor:
        """`forward`, while nobody changes the tasks."""
        samples = len(names)
        index = {name: self._index(name) for name in dict.fromkeys(names)}
        indices = [index[name] for name in names]
        device = next(self.backbone.parameters()).device
        # Neighbours of one task share its weights' way to the processor; sorted here, once, since later there is more.
        order = sorted(range(samples), key=indices.__getitem__)
        moved = order != list(range(samples))
        if moved:
            places = torch.tensor(order, device=device)
            images = _reordered(images, places)
            per_sample = {name for name, value in arguments.items() if carries_samples(name, value)}
            arguments |= {name: arguments[name][places] for name in per_sample}
        with told(torch.tensor(sorted(indices), dtype=torch.int32, device=device)):
            logits: Tensor = self.backbone(images, **arguments)
        if moved:
            logits = torch.empty_like(logits).index_copy_(0, places, logits)
        return logits

    def train(self, mode: bool = True) -> AdapterBank:
        """A bank only evaluates.

        Raises:
            ValueError: mode is True.
        """
        if mode:
            raise ValueError("an AdapterBank only evaluates: train each task on an adapted model of its own")
        return super().train(False)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"tasks={', '.join(self._tasks)}"

    def _index(self, name: str) -> int:
        if name not in self._tasks:
            raise ValueError(f"the bank has no task {name!r}; it has {', '.join(self._tasks) or 'none'}")
        return list(self._tasks).index(name)

    def _stacks(self) -> Iterator[tuple[str, Any]]:
        for path, module in self.backbone.named_modules():
            if isinstance(module, TaskStack):
                yield path, module

    def _merged(self, task: str, source: str | Path | nn.Module) -> tuple[AdaptedModel, Metadata]:
        """A task's merged adapters and heads, in an adapted model whose backbone has no data; and facts of the task."""
        if isinstance(source, nn.Module):
            given: Any = unwrapped(source)
            if not isinstance(given, AdaptedModel):
                raise ValueError(f"{task} must be an adapter file or an adapted model, got a {type(given).__name__}")
            tensors = trained_state(given)
            metadata = metadata_of(given, tensors)
        else:
            task = f"{task} ({source})"
            tensors, metadata = read_adapter(Path(source))
        adapted = prepare(copy.deepcopy(self._structure[0]), metadata.config, tensors)
        trained = sorted(tensors.keys() - trained_state(adapted).keys() & set(timm_names(adapted).values()))
        if trained:
            more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
            raise ValueError(f"{task} has trained weights of the backbone, which tasks share: {trained[0]}{more}")
        check_adapter(adapted, self.backbone, tensors, metadata, task)
        device = next(self.backbone.parameters()).device
        own = {timm_name: name for name, timm_name in timm_names(adapted).items()}
        given_tensors = {own[name]: tensor for name, tensor in tensors.items()}
        parts = {id(module) for module in (*adapters(adapted), *heads(adapted.backbone))}
        for path, module in adapted.named_modules():
            if id(module) in parts:
                module.to_empty(device=device)
                module.load_state_dict({key: given_tensors[f"{path}.{key}"] for key in module.state_dict()})
        return merge(adapted).requires_grad_(False), metadata

    def _put_back(self) -> None:
        """Put the timm model's own blocks and heads where the stacks are: nothing is left of the tasks."""
        take_stacks(self.backbone, self._heads, self._structure[0])
        self._heads, self._tasks, self._kind = {}, {}, None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdapterBank:
        """As nn.Module's, through which a module moves: the timm model's heads, set aside, come along."""
        for head in self._heads.values():
            head._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _kind(adapted: AdaptedModel) -> str:
    """What tasks of one bank must have in common."""
    config = adapted.mosa_config
    if config.method == "lora":
        return f"low-rank pairs on {config.targets}"
    return f"{config.placement} adapters with {next(adapters(adapted)).activation}"


def _reordered(images: Any, places: Tensor) -> Any:
    """Images in another order: a tensor, or a dictionary of them."""
    if isinstance(images, Mapping):
        return {name: value[places] for name, value in images.items()}
    return images[places]
