"""A configuration field and its facts, in one place: type, default, range, and where and when it may be set.

A field is written `lr: float = option(1e-3, low=0.0)`. Its type says what it may hold, Literal types what there is to
choose from; `option` adds the rest. Checks, `--help`, resumption and the data families read the facts from here.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

KEY = "facts"  # of a dataclass field's metadata
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
NULL = "null"  # what recipes and command lines write for None


@dataclass(frozen=True)
class Facts:
    """What a field's type does not say.

    Attributes:
        low, high: the smallest and the largest value.
        above, below: bounds that are not values themselves.
        cap: a largest value that no use comes near, against slips; the range in words does not mention it.
        families: the data families that the option is for; empty: all.
        free: whether a resumed run may change it, because it changes no result.
        note: what follows the field's docstring in `--help`.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    cap: float | None = None
    families: tuple[str, ...] = ()
    free: bool = False
    note: str = ""

    def holds(self, number: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words, as they follow "must be"; empty where there is none."""
        low, high, above, below = (
            None if v is None else f"{v:g}" for v in (self.low, self.high, self.above, self.below)
        )
        if low and high:
            return f"{low} to {high}"
        if low and below:
            return f"in [{low}, {below})"
        if above and below:
            return f"between {above} and {below}"
        bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound)

    @property
    def help(self) -> str:
        """What `--help` adds to the field's docstring."""
        sentences = [self.note] if self.note else []
        if self.range:
            sentences.append(f"{self.range[0].upper()}{self.range[1:]}.")
        if self.families:
            sentences.append(f"Only for {listed(self.families, 'and')}.")
        if self.free:
            sentences.append("A resumed run may change it.")
        return " ".join(sentences)


def option(default: Any, **facts: Any) -> Any:
    """A dataclass field with its default and its facts (see `Facts`)."""
    return field(default=default, metadata={KEY: Facts(**facts)})


def facts_of(config: type, prefix: str = "") -> dict[str, Facts]:
    """The facts of every field of a dataclass, by name; fields of sections as "section.field"."""
    found: dict[str, Facts] = {}
    for name, hint in _hints(config).items():
        if is_dataclass(hint):
            found |= facts_of(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found | {f"{prefix}{f.name}": f.metadata.get(KEY, Facts()) for f in fields(config)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping with sections inside as one of full names, as "section.field"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def check_fields(config: Any, prefix: str = "", kind: type | None = None) -> None:
    """Raise ValueError for a field of a dataclass, or of its sections, with a wrong type or a value out of range.

    Args:
        config: an instance; or, before there is one, something with the same attributes.
        prefix: what its fields' names begin with in messages, as "optim.".
        kind: the dataclass, where `config` is no instance of it; None: it is.
    """
    owner = kind or type(config)
    for f in fields(owner):
        name, value, hint = f"{prefix}{f.name}", getattr(config, f.name), _hints(owner)[f.name]
        if not is_dataclass(hint):
            check_value(name, value, hint, f.metadata.get(KEY, Facts()))
        elif kind is not None or isinstance(value, hint):  # type: ignore[arg-type]
            check_fields(value, f"{name}.", kind and hint)  # type: ignore[arg-type]
        else:
            raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}")  # type: ignore[union-attr]


def check_value(name: str, value: object, hint: Any, facts: Facts) -> None:
    """Raise ValueError, naming the option, unless a value is of the type and in the range."""
    alternatives, choices, kinds = _alternatives(hint)
    if value is None and type(None) in alternatives:
        return
    # True == 1, so that equality alone would take one for the other.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return
    if not any(_is_of(value, kind) for kind in kinds):
        if choices and (not kinds or isinstance(value, str)):
            check_choice(name, value, choices)
        raise ValueError(f"{name} must be {_words(kinds, choices)}, got {value!r}")
    if value == "":
        raise ValueError(f"{name} must not be empty")
    if isinstance(value, Real) and not isinstance(value, bool):
        if not isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if not facts.holds(value):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be {facts.range}, got {value}")
        if facts.cap is not None and value > facts.cap:  # type: ignore[operator]
            raise ValueError(f"{name} must be at most {facts.cap:,}, got {value}")


def words_of(config: type, option: str) -> str | None:
    """What an option, named as "section.field", may hold, in words; None where there is no such option."""
    section, _, rest = option.partition(".")
    hint = _hints(config).get(section)
    if hint is None or is_dataclass(hint):
        return words_of(hint, rest) if rest and hint is not None else None  # type: ignore[arg-type]
    alternatives, choices, kinds = _alternatives(hint)
    return " or ".join([_words(kinds, choices), *([NULL] if type(None) in alternatives else [])])


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`, of the same type."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError(f"{name} must be one of {listed(choices)}, got {value!r}")


def _alternatives(hint: Any) -> tuple[tuple[Any, ...], list[Any], list[Any]]:
    """The types that a hint allows, its choices, and those of its types that have words."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [c for a in alternatives if get_origin(a) is Literal for c in get_args(a)]
    return alternatives, choices, [a for a in alternatives if a in KINDS]


def _words(kinds: Sequence[Any], choices: Sequence[Any]) -> str:
    return " or ".join([*(KINDS[kind] for kind in kinds), *([f"one of {listed(choices)}"] if choices else [])])


def counted(number: int, thing: str) -> str:
    """A number of things in words: "1 step", "2,000 steps"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _is_of(value: object, kind: type) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)


def listed(choices: Sequence[object], last: str = "") -> str:
    """The choices with commas between them, and with the word `last` before the last one."""
    *most, end = map(str, choices)
    if not most or not last:
        return ", ".join([*most, end])
    return f"{', '.join(most)} {last} {end}"


@cache
def _hints(config: Any) -> dict[str, Any]:
    return get_type_hints(config)
