"""Match the patterns of a spec: kinds of sites, or globs on the names of weights and of their modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lorasc_fx.errors import UnknownTarget, listed, nearest
from lorasc_fx.spec import KINDS, CascadeSpec


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a glob matches one of the names, or the name of a module around one of them."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def targeted(patterns: Sequence[str], kind: str, names: Iterable[str]) -> bool:
    """Whether one of the patterns is this kind of site, or matches one of the names."""
    names = tuple(names)
    return any(pattern == kind if pattern in KINDS else matches(pattern, names) for pattern in patterns)


def check_patterns(
    spec: CascadeSpec, weights: Mapping[str, tuple[str, ...]], parameters: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise an error for a pattern of the spec that matches nothing.

    Args:
        spec: `targets` and `rules` must match weight matrices. `exclude`, `train` and `untie` may match any parameter.
        weights: {first name of a weight matrix: all of its names}.
        parameters: {first name of a parameter: all of its names}.

    Raises:
        UnknownTarget: a pattern matches nothing. The message has the field, the pattern, and similar names.
    """
    # Each item: field, pattern, names that it may match, and the noun for a message.
    matrices, every = (weights, "weight"), (parameters, "parameter")
    patterns = [("targets", pattern, *matrices) for pattern in spec.targets]
    patterns += [("exclude", pattern, *every) for pattern in spec.exclude]
    patterns += [("rules", rule.pattern, *matrices) for rule in spec.rules]
    patterns += [("train", pattern, *every) for pattern in spec.train]
    patterns += [("untie", pattern, *every) for pattern in spec.untie]
    for field, pattern, candidates, noun in patterns:
        if pattern in KINDS and field in ("targets", "rules"):
            continue
        names = [name for group in candidates.values() for name in group]
        if not matches(pattern, names):
            if matches(f"*.{pattern}", names):  # `target_modules` of peft matches the end of a name
                raise UnknownTarget(
                    f"{field}: {pattern!r} matches no {noun}, because a pattern must match a name from its start; "
                    f"give {f'*.{pattern}'!r}"
                )
            modules = sorted({name.rpartition(".")[0] for name in names} - {""})
            kinds = KINDS if candidates is weights else ()
            hint = nearest(pattern.removesuffix(".*"), [*names, *modules, *kinds])
            kinds_hint = f"; kinds: {', '.join(kinds)}" if kinds and pattern.isidentifier() else ""
            raise UnknownTarget(f"{field}: {pattern!r} matches no {noun}{hint or listed(names)}{kinds_hint}")


def trained_by(spec: CascadeSpec, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return {first name: all names} of the parameters that the spec trains in full and does not exclude."""
    return {
        name: group
        for name, group in names.items()
        if any(matches(pattern, group) for pattern in spec.train)
        and not any(matches(pattern, group) for pattern in spec.exclude)
    }
