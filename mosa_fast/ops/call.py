"""What a call of an operator is, and the checks of what it is called with.

A `Call` is a dataclass whose fields are an operator's arguments, in order (`arguments.py` has each operator's).
Whatever has to know the arguments reads the fields: the schemas that torch.library gets, fakes and autograd
(`registration.py`), the checks below, the reference, the names under which kernels are handed tensors, and the tests'
cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    float: "float",
    bool: "bool",
    int: "int",
    tuple[int, ...]: "int[]",
    torch.dtype: "ScalarType",
}
REST = "..."  # in a shape: whatever sizes x has before its last
MAX_EXPERTS = 256  # that owners, uint8, can tell apart
ANY_COUNT = "E"  # in a shape: a size that no other tensor has to agree with

Gradient = Literal["input", "weight", "scale"]


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a tensor argument besides its name.

    shape: each size a number, or a letter that means the same size throughout a call (but see `REST`, `ANY_COUNT`).
        None: the operator checks it itself.
    dtype: None: any floating point.
    gradient: None: it gets none. "weight": it is computed whenever that of another weight, or the scale's, is needed.
    only_added: the operator adds it to its output and never reads it again, so that it is not kept for backward.
    """

    shape: tuple[str | int, ...] | None
    dtype: torch.dtype | None = None
    gradient: Gradient | None = None
    only_added: bool = False


def tensor(shape: str | None, dtype: torch.dtype | None = None, **facts: Any) -> TensorFacts:
    """The facts of a tensor argument, whose sizes are written with spaces between them."""
    sizes = None if shape is None else tuple(int(size) if size.isdigit() else size for size in shape.split())
    return TensorFacts(sizes, dtype, **facts)


class Call:
    """One call of an operator. x is `[N, ..., D]`, and the last sizes of experts are `[V, 2]`.

    Tensors come first, annotated with their facts, then options. A tensor that is not given is None. Inside a
    registered operator all tensors are contiguous, and in its backward the one that is only added is not given.
    product_dtype: of the matrix products.
    """

    NAME: ClassVar[str]  # of the operator
    TENSORS: ClassVar[dict[str, TensorFacts]]
    OPTIONS: ClassVar[tuple[str, ...]]
    SCHEMA: ClassVar[dict[str, str]]  # each argument as torch.library writes it
    ONLY_ADDED: ClassVar[str]  # the name of the tensor that is

    x: Tensor
    experts: Tensor
    fork: bool
    product_dtype: torch.dtype

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is None:
            return  # a part that operators share
        cls.NAME = name
        hints = get_type_hints(cls, include_extras=True)
        parts = [part for part in reversed(cls.__mro__) if part is cls or is_dataclass(part)]  # which have its fields
        hints = {field: hints[field] for part in parts for field in part.__annotations__}  # a dataclass's order
        annotated = {name: get_args(hint) for name, hint in hints.items() if hasattr(hint, "__metadata__")}
        types = {name: annotated[name][0] if name in annotated else hint for name, hint in hints.items()}
        cls.SCHEMA = {name: f"{SCHEMA_TYPES[kind]} {name}" for name, kind in types.items()}
        cls.TENSORS = {name: facts for name, (_, facts) in annotated.items()}
        cls.OPTIONS = tuple(name for name in hints if name not in annotated)
        (cls.ONLY_ADDED,) = (name for name, facts in cls.TENSORS.items() if facts.only_added)

    @classmethod
    def of(cls, values: Iterable[Any]) -> Any:
        """The call with these values, in order: what the constructor makes, in a third of its time."""
        call = object.__new__(cls)
        call.__dict__.update(zip(cls.SCHEMA, values, strict=True))
        return call

    def values(self) -> list[Any]:
        """All arguments, in order."""
        return [getattr(self, name) for name in (*self.TENSORS, *self.OPTIONS)]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    @property
    def width(self) -> int:
        """The width of x, D."""
        return self.x.shape[-1]

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of sums and statistics."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def groups(self) -> int:
        """The number of groups, V."""
        return self.experts.shape[-2]

    @property
    def in_rows(self) -> int:
        """Rows of x, T."""
        return self.x.numel() // self.width

    @property
    def rows_per_group(self) -> int:
        """Rows of one group: all of x when forked."""
        return self.in_rows if self.fork else self.in_rows // self.groups

    @property
    def out_rows(self) -> int:
        """Rows of the output, M."""
        return self.rows_per_group * self.groups

    @property
    def out_samples(self) -> int:
        """Samples of the output: the size of its first dimension."""
        return self.x.shape[0] * (self.groups if self.fork else 1)

    @property
    def tokens(self) -> int:
        """Rows of one sample."""
        return self.in_rows // self.x.shape[0] if self.x.shape[0] else 1

    def check(self) -> None:
        """Check the tensors against their facts, and that the groups divide the samples.

        Raises:
            ValueError: one does not fit; the message names it, what came and what was expected.
        """
        x, device = self.x, self.x.device
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"x must be floating point [N, ..., D], got {describe(x)}")
        sizes: dict[str | int, Any] = {}
        for name, facts in self.TENSORS.items():
            value = getattr(self, name)
            if value is None or facts.shape is None:
                continue
            right_dtype = value.is_floating_point() if facts.dtype is None else value.dtype == facts.dtype
            if not (right_dtype and _agrees(value.shape, facts.shape, sizes)):
                raise ValueError(f"{name} must be {_expected(facts, sizes)}, got {describe(value)}")
            if value.device != device:
                check_device(name, value, x)
        if not self.fork and self.groups and x.shape[0] % self.groups:
            raise ValueError(f"experts has {self.groups} groups, which do not divide the {x.shape[0]} samples of x")


def check_targets(
    ranges: Sequence[tuple[int, int]], y: str, out_width: int, down_weight: Tensor, up_weight: Tensor
) -> None:
    """Raise a ValueError unless ranges of y's columns are ascending, and weights have the rows of its targets."""
    ends = [0, *(end for start_and_stop in ranges for end in start_and_stop), out_width]
    if ends != sorted(ends) or any(start == stop for start, stop in ranges):
        raise ValueError(f"columns must be ascending ranges within the {out_width} columns of {y}, got {ranges}")
    width, rank = sum(stop - start for start, stop in ranges), up_weight.shape[-1]
    if up_weight.shape[-2] != width:
        raise ValueError(f"up_weight must have a row for each of the {width} columns, got {describe(up_weight)}")
    if down_weight.shape[-2] != len(ranges) * rank:
        raise ValueError(
            f"down_weight must have {rank} rows (the rank of up_weight) for each of {len(ranges)} targets, "
            f"got {describe(down_weight)}"
        )


def check_norm(weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise a ValueError unless a norm is there with both or not at all."""
    if (weight is None) != (bias is None):
        missing = "norm_weight" if weight is None else "norm_bias"
        raise ValueError(f"{missing} is None, but the other is not: give both or neither")


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of an operator's matrix products: autocast's where it is on (it leaves float64 alone), else x's."""
    return product_dtype_of(x.device, x.dtype)


def product_dtype_of(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """That of products with an x of this device and dtype."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def check_experts(name: str, count: int) -> None:
    """Raise a ValueError unless owners can tell the experts of a split projection apart; name: what counts them."""
    if count > MAX_EXPERTS:
        raise ValueError(f"{name} is for {count} experts, but owners, uint8, tell at most {MAX_EXPERTS} apart")


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    """Raise a ValueError unless both are on one device."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but x is on {x.device}")


def check_scale(scale: float | Tensor, x: Tensor) -> None:
    """Raise a ValueError unless the scale is a number or a tensor of one."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(f"scale must be a number or a one-element floating point tensor, got {describe(scale)}")
        check_device("scale", scale, x)


def describe(value: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{_name(value.dtype)} [{', '.join(map(str, value.shape))}]"


def _agrees(shape: Sequence[int], expected: Sequence[str | int], sizes: dict[str | int, Any]) -> bool:
    """Whether a shape is what its facts say, given what letters mean so far; new letters get their meaning."""
    if expected[0] == REST:
        last = len(expected) - 1
        rest = tuple(shape[:-last])
        if sizes.setdefault(REST, rest) != rest:
            return False
        shape, expected = shape[-last:], expected[1:]
    if len(shape) != len(expected):
        return False
    for size, letter in zip(shape, expected):  # noqa: B905  # it takes time, and the lengths are equal
        if size < 1:
            return False
        if letter != ANY_COUNT and size != (letter if isinstance(letter, int) else sizes.setdefault(letter, size)):
            return False
    return True


def _expected(facts: TensorFacts, sizes: dict[str | int, Any]) -> str:
    """A tensor's dtype and shape as they should be, for messages: numbers where the letters have a meaning already."""
    assert facts.shape is not None
    known: list[Any] = []
    for letter in facts.shape:
        known += sizes.get(letter, (letter,)) if letter == REST else [sizes.get(letter, letter)]
    return f"{'floating point' if facts.dtype is None else _name(facts.dtype)} [{', '.join(map(str, known))}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
