"""Read dataclasses from plain data (JSON, TOML, arguments) and check their fields.

The annotations of a class say what its fields hold. What a type cannot say is a `Check` in an `Annotated` type:

    Rank = Annotated[int, Check(lambda rank: rank >= 1, "a rank is an integer of 1 or more")]

    @dataclass(frozen=True)
    class Rule:
        pattern: str
        ranks: tuple[Rank, ...] = ()

An error names the field by its path: `rules[1].ranks[0] is -1; a rank is an integer of 1 or more`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.util.checks import is_number

T = TypeVar("T")
FieldPath = tuple[Any, ...]
_LONGEST = 80
_UNIONS = (Union, UnionType)
_REMEDIES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    tuple: "a list",
    list: "a list",
    dict: "a table",
}


class Check(NamedTuple):
    """A condition on a value of the right type, what to give instead, and the known names if the value is a name."""

    accepts: Callable[[Any], Any]
    remedy: str
    known: Collection[str] = ()

    def __hash__(self) -> int:
        """Hash without the known names, which may be a table: annotations must be hashable."""
        return hash((self.accepts, self.remedy))


class Conflict(NamedTuple):
    """Valid values of several fields that cannot be combined: a condition, the reason, and what to give instead.

    A field of a field is written as `noise.keep`.
    """

    fields: tuple[str, ...]
    holds: Callable[..., Any]
    why: str
    remedy: str


def choice(names: Iterable[str]) -> Check:
    """Return the condition that a value is one of these names."""
    known = tuple(names)
    return Check(known.__contains__, f"give one of {', '.join(known)}", known)


def decode(hint: Any, value: Any, path: FieldPath = ()) -> Any:
    """Convert a value to this type: a table becomes a dataclass, a list becomes a tuple.

    Raises:
        SpecError: the value, or one inside it, is of another type or out of range.
    """
    kind, checks = _split(hint)
    if not _fits(kind, value):
        raise _wrong(path, value, Check(bool, _remedy(hint)))
    origin, parts = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        value = decode(next(part for part in parts if _fits(part, value)), value, path)
    elif origin in (tuple, list):
        kinds = parts if origin is tuple and parts[-1] is not ... else parts[:1] * len(value)
        if len(kinds) != len(value):
            raise _wrong(path, value, Check(bool, f"give {len(kinds)} entries"))
        value = origin(decode(each, item, (*path, n)) for n, (each, item) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict:
        value = {decode(parts[0], key, path): decode(parts[1], item, (*path, key)) for key, item in value.items()}
    elif is_typeddict(kind) or (_is_dataclass(kind) and not isinstance(value, kind)):
        value = _table(kind, value, path)
    for check in checks:
        if not check.accepts(value):
            raise _wrong(path, value, check)
    return value


def check(instance: Any, *path: str, conflicts: Iterable[Conflict] = ()) -> None:
    """Check the fields of a frozen dataclass in its `__post_init__`, and decode lists and tables in them.

    Raises:
        SpecError: a field is of another type or out of range, or fields are in conflict.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        object.__setattr__(instance, name, decode(hint, getattr(instance, name), (*path, name)))
    for conflict in conflicts:
        values = [functools.reduce(getattr, name.split("."), instance) for name in conflict.fields]
        if conflict.holds(*values):
            shown = [f"{path_text((*path, n))} is {_shown(v)}" for n, v in zip(conflict.fields, values, strict=True)]
            raise SpecError(
                f"{' and '.join(shown)}: {conflict.why}; {conflict.remedy}",
                code="conflicting-options",
            )


def check_names(cls: Any, given: Iterable[Any], path: FieldPath) -> None:
    """Refuse names that are not fields of a class, in one error. `cls.OTHER_NAMES` maps names of other libraries."""
    known, others = list(_hints(cls)), getattr(cls, "OTHER_NAMES", {})
    if unknown := [name for name in given if name not in known][:20]:
        told = [
            f"{name!r} (here {others[name]})" if name in others else f"{_shown(name)}{nearest(str(name), known)}"
            for name in unknown
        ]
        raise SpecError(
            f"{path_text(path) or 'the table'} has no field {', '.join(told)}; known: {', '.join(known)}",
            code="unknown-name",
        )


def checks_names(cls: type[T]) -> type[T]:
    """Make a dataclass raise the error of `check_names` for an unknown argument instead of a TypeError."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        check_names(cls, given, (cls.__name__,))
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def path_text(path: FieldPath) -> str:
    """Return a path as `spec.rules[2].rank`."""
    text = ""
    for part in path:
        is_name = isinstance(part, str) and len(part) <= _LONGEST and part.replace(".", "").isidentifier()
        text += f"{'.' if text else ''}{part}" if is_name else f"[{_shown(part)}]"
    return text


def _split(hint: Any) -> tuple[Any, list[Check]]:
    """Split an annotation into its type and its conditions."""
    if get_origin(hint) is Literal:
        return str, [choice(get_args(hint))]
    if get_origin(hint) is NotRequired:
        return _split(get_args(hint)[0])
    kind, *checks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return kind, checks


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has this type, without looking at what is inside it."""
    kind, _ = _split(hint)
    if get_origin(kind) in _UNIONS:
        return any(_fits(part, value) for part in get_args(kind))
    kind = get_origin(kind) or kind
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is float:
        return is_number(value)
    if is_typeddict(kind):
        return isinstance(value, dict)
    if _is_dataclass(kind) and isinstance(value, Mapping):
        return True
    return kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))


def _table(cls: Any, data: Mapping[Any, Any], path: FieldPath) -> Any:
    """Build a dataclass, or a TypedDict, from a table."""
    check_names(cls, data, path)
    hints = _hints(cls)
    for name in _required(cls):
        if name not in data:
            raise SpecError(f"{path_text((*path, name))} is missing; {_remedy(hints[name])}")
    values = {name: decode(hints[name], value, (*path, name)) for name, value in data.items()}
    return cls(**values)


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, or of the keys of a TypedDict."""
    hints = get_type_hints(cls, include_extras=True)
    return hints if is_typeddict(cls) else {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _required(cls: Any) -> Iterable[str]:
    if is_typeddict(cls):
        return [name for name, hint in _hints(cls).items() if get_origin(hint) is not NotRequired]
    unset = dataclasses.MISSING
    return [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is unset]


def _remedy(hint: Any) -> str:
    """Return the remedy for a value of the wrong type."""
    kind, checks = _split(hint)
    if checks and get_origin(kind) not in (tuple, list):
        return checks[0].remedy
    if get_origin(kind) in _UNIONS:
        return _remedy(get_args(kind)[0])
    kind = dict if is_typeddict(kind) else get_origin(kind) or kind
    return f"give {_REMEDIES.get(kind) or f'{kind.__name__}(...), or a table of its fields'}"


def _wrong(path: FieldPath, value: Any, check: Check) -> SpecError:
    near = nearest(str(value)[:_LONGEST], check.known) if check.known else ""
    return SpecError(f"{path_text(path)} is {_shown(value)}; {check.remedy}{near}")


def _shown(value: Any) -> str:
    """Format a value for a message, without control characters and within a line."""
    if isinstance(value, (str, tuple, list, dict)) and not value:
        return "empty"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
