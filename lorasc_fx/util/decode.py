"""Convert plain data (JSON, TOML, arguments) to dataclasses, and check that each field has its annotated type.

A condition that a type cannot express is a `Check` in an `Annotated` type:

    Rank = Annotated[int, Check(lambda rank: rank >= 1, "a rank is an integer of 1 or more")]

    @dataclass(frozen=True)
    class Rule:
        pattern: str
        ranks: tuple[Rank, ...] = ()

An error message names the field by its path: `rules[1].ranks[0] is -1; a rank is an integer of 1 or more`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lorasc_fx.errors import SpecError, nearest

T = TypeVar("T")
FieldPath = tuple[Any, ...]
_MAX_SHOWN = 80
"""Maximum number of characters of a value that a message shows."""
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
"""What an error tells the user to give, for types without a `Check`, in the words of TOML: "give a list"."""


class Check(NamedTuple):
    """A condition on a value that already has the right type.

    Args:
        accepts: returns whether the value is valid.
        remedy: advice what to give instead, as a clause for the error message.
        names: the valid names if the value is a name. The error message suggests the nearest one.
    """

    accepts: Callable[[Any], Any]
    remedy: str
    names: Collection[str] = ()

    def __hash__(self) -> int:
        """Return a hash without `names`, which may be a dict. Annotations must be hashable."""
        return hash((self.accepts, self.remedy))


class Conflict(NamedTuple):
    """Fields whose values may be valid alone, but cannot be combined.

    Args:
        fields: names of the fields. `noise.keep` is the field `keep` of the field `noise`.
        holds: function of the values of these fields that returns whether they are in conflict.
        why: the reason, as a clause for the error message.
        remedy: advice what to set instead, as a sentence for the error message.
    """

    fields: tuple[str, ...]
    holds: Callable[..., Any]
    why: str
    remedy: str


def choice(names: Iterable[str]) -> Check:
    """Return a check that a value is one of these names."""
    valid = tuple(names)
    return Check(valid.__contains__, f"give one of {', '.join(valid)}", valid)


def decode(hint: object, value: Any, path: FieldPath = ()) -> Any:
    """Convert a value to an annotated type. A table becomes a dataclass, and a list becomes a tuple.

    Args:
        hint: the type, perhaps `Annotated` with checks.
        value: plain data.
        path: position of the value in the data, for error messages: field names and list indices.

    Raises:
        SpecError: the value, or a value inside it, has the wrong type or is invalid.
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
        pairs = enumerate(zip(kinds, value, strict=True))
        value = origin(decode(item_kind, item, (*path, index)) for index, (item_kind, item) in pairs)
    elif origin is dict:
        value = {decode(parts[0], key, path): decode(parts[1], item, (*path, key)) for key, item in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind) and not isinstance(value, kind):
        value = _table(kind, value, path)
    for check in checks:
        if not check.accepts(value):
            raise _wrong(path, value, check)
    return value


def check(instance: object, *path: str, conflicts: Iterable[Conflict] = ()) -> None:
    """Decode and check the fields of a frozen dataclass. Called in its `__post_init__`.

    Args:
        instance: the dataclass. Its fields are replaced by their decoded values.
        path: position of the instance in the data, for error messages.
        conflicts: combinations of values that are refused.

    Raises:
        SpecError: a field has the wrong type or is invalid, or fields are in conflict.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        object.__setattr__(instance, name, decode(hint, getattr(instance, name), (*path, name)))
    for conflict in conflicts:
        values = [functools.reduce(getattr, name.split("."), instance) for name in conflict.fields]
        if conflict.holds(*values):
            pairs = zip(conflict.fields, values, strict=True)
            settings = [f"{path_text((*path, name))}={_shortened(value)}" for name, value in pairs]
            raise SpecError(
                f"{settings[0]} cannot be combined with {' and '.join(settings[1:])}: {conflict.why}. "
                f"{conflict.remedy}",
                code="conflicting-options",
            )


def check_names(cls: object, names: Iterable[object], path: FieldPath) -> None:
    """Check that all names are fields of a class. `cls.OTHER_NAMES` is {name in another library: our field}.

    Raises:
        SpecError: some names are unknown. The message lists each one with our name for it, or with the nearest field.
    """
    field_names, other_names = list(_hints(cls)), getattr(cls, "OTHER_NAMES", {})
    if unknown := [name for name in names if name not in field_names][:20]:
        entries = [
            f"{name!r} (here {other_names[name]})"
            if name in other_names
            else f"{_shown(name)}{nearest(str(name), field_names)}"
            for name in unknown
        ]
        raise SpecError(
            f"{path_text(path) or 'the table'} has no field {', '.join(entries)}; known: {', '.join(field_names)}",
            code="unknown-name",
        )


def checks_names(cls: type[T]) -> type[T]:
    """Decorate a dataclass, so that an unknown argument raises the SpecError of `check_names` and not a TypeError."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def checked(self: object, *args: object, **kwargs: object) -> None:
        check_names(cls, kwargs, (cls.__name__,))
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def path_text(path: FieldPath) -> str:
    """Return a path as text, such as `spec.rules[2].rank`."""
    text = ""
    for part in path:
        is_name = isinstance(part, str) and len(part) <= _MAX_SHOWN and part.replace(".", "").isidentifier()
        text += f"{'.' if text else ''}{part}" if is_name else f"[{_shown(part)}]"
    return text


def _split(hint: object) -> tuple[Any, list[Check]]:
    """Return the type in an annotation, and the checks."""
    if get_origin(hint) is Literal:
        return str, [choice(get_args(hint))]
    kind, *checks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return kind, checks


def _fits(hint: object, value: object) -> bool:
    """Whether a value has this type. Items of lists and tables are not checked."""
    kind, _ = _split(hint)
    if get_origin(kind) in _UNIONS:
        return any(_fits(part, value) for part in get_args(kind))
    kind = get_origin(kind) or kind
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is float:  # accept an int, but not inf or nan
        return is_number(value)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return True
    # A bool is an int in Python, but is not accepted for one.
    return kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))


def _table(cls: Any, data: Mapping[Any, Any], path: FieldPath) -> Any:
    """Return a table converted to a dataclass. An unknown or missing key is an error."""
    check_names(cls, data, path)
    hints = _hints(cls)
    for field in fields(cls):
        if field.name not in data and field.default is field.default_factory is MISSING:
            raise SpecError(f"{path_text((*path, field.name))} is missing; {_remedy(hints[field.name])}")
    values = {name: decode(hints[name], value, (*path, name)) for name, value in data.items()}
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return {field name: annotated type} of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _remedy(hint: object) -> str:
    """Return the remedy for a value that does not have the annotated type."""
    kind, checks = _split(hint)
    if checks and get_origin(kind) not in (tuple, list):
        return checks[0].remedy
    if get_origin(kind) in _UNIONS:
        return _remedy(get_args(kind)[0])
    kind = get_origin(kind) or kind
    return f"give {_REMEDIES.get(kind) or f'{kind.__name__}(...), or a table of its fields'}"


def _wrong(path: FieldPath, value: object, check: Check) -> SpecError:
    suggestion = nearest(str(value)[:_MAX_SHOWN], check.names) if check.names else ""
    return SpecError(f"{path_text(path)} is {_shown(value)}; {check.remedy}{suggestion}")


def _shown(value: object) -> str:
    """Return a value as text for a message: its shortened repr, or "empty"."""
    return "empty" if isinstance(value, (str, tuple, list, dict)) and not value else _shortened(value)


def _shortened(value: object) -> str:
    """Return the repr of a value, cut to a length that is readable in a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def is_integer(value: object, minimum: int) -> TypeGuard[int]:
    """Whether a value is an integer of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number that can be converted to a float without rounding."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and float(value) == value
    except OverflowError:
        return False
