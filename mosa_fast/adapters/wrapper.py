"""A module that stands in for another one, which it owns as a child."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

# What torch.compile and activation checkpointing call the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


class Wrapper(nn.Module):
    """A module around another one, whose names it answers to: its own are looked up first, then the child's.

    Setting a name that only the child has sets it there. A subclass registers the child last, under the name `CHILD`.
    """

    CHILD: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Through __dict__: while a copy or a pickle is being restored there is no child yet.
            child = self.__dict__.get("_modules", {}).get(self.CHILD)
            if child is None:
                raise
            return getattr(child, name)

    def __setattr__(self, name: str, value: Any) -> None:
        child = self.__dict__.get("_modules", {}).get(self.CHILD)
        if child is None or self._is_own(name) or not hasattr(child, name):
            super().__setattr__(name, value)
        else:
            setattr(child, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self._modules[self.CHILD], name)

    def _is_own(self, name: str) -> bool:
        own = (self.__dict__, self._modules, self._parameters, self._buffers)
        return hasattr(type(self), name) or any(name in names for names in own)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, checkpointing's and DistributedDataParallel's wrappers."""
    for name in (*WRAPPED, "module"):
        inner = model._modules.get(name)
        if inner is not None and len(model._modules) == 1:
            return unwrapped(inner)
    return model


def unwrapped_name(name: str) -> str:
    """A parameter's or module's name without the wrappers of torch.compile and checkpointing in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
