"""What was trained in full, as peft keeps it: whole modules (`modules_to_save`), and biases of adapted modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorasc_fx.export.peft_layout import PREFIX, Place
from lorasc_fx.graph import named_weights

__all__ = ["Saved", "key_path", "save_whole"]


@dataclass(frozen=True)
class Saved:
    """Modules that are saved whole, and the keys of all that goes to the file.

    Args:
        modules: paths, none inside another.
        keys: of the file, with the name of the parameter or buffer that stands there.
        biases: whether biases of adapted modules are among them.
    """

    modules: tuple[str, ...]
    keys: Mapping[str, str]
    biases: bool


def key_path(path: str, wraps: Mapping[str, int]) -> str:
    """Return a module's path once peft has wrapped modules above it: `wraps` says which, and how often each."""
    parts: list[str] = []
    names = path.split(".")
    for count, name in enumerate(names, start=1):
        parts.append(name)
        if count < len(names):
            parts += ["base_layer"] * wraps.get(".".join(names[:count]), 0)
    return ".".join(parts)


def save_whole(
    model: nn.Module, trained: Iterable[str], places: Sequence[Place], wraps: Mapping[str, int]
) -> tuple[Saved, dict[str, str]]:
    """Return what peft saves for the parameters trained in full, and the reasons of those that it cannot.

    Args:
        model: the user's own.
        trained: names of the parameters.
        places: that are adapted.
        wraps: how often peft wraps a module for its parameters.
    """
    weights = named_weights(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = {place.path: place for place in places}
    refused: dict[str, str] = {}
    whole: dict[str, str] = {}
    biases: dict[str, str] = {}
    for own in trained:
        for name in weights.names[own]:
            path, _, leaf = name.rpartition(".")
            if path in adapted and leaf == "bias":
                depth = "base_layer." * wraps.get(path, 1)
                biases[f"{PREFIX}{key_path(path, wraps)}.{depth}bias"] = own
            elif not path:
                refused[own] = "it is a parameter of the top module, and peft saves modules whole"
            elif inside := next((each for each in adapted if _within(each, path)), None):
                refused[own] = f"its module holds {inside}, which is adapted, and peft saves modules whole"
            elif any(_within(path, each) for each in wraps):
                refused[own] = "peft wraps a module above it, and finds it no more"
            else:
                whole.setdefault(path, own)
    for path in modules:  # peft takes every module whose path ends so
        meant = next((each for each in whole if path.endswith(each) and path != each), None)
        if meant is None or path in whole:
            continue
        if any(_within(each, path) or _within(path, each) for each in adapted):
            refused[whole[meant]] = f"to save {meant} means {path} to peft as well, which is adapted"
        else:
            whole[path] = whole[meant]
    outer = tuple(path for path in whole if not any(_within(path, each) for each in whole if each != path))
    for path in outer:
        hidden = next((each for each in adapted if re.match(rf"(^|.*\.){path}($|\..*)", each)), None)
        if hidden is not None:
            refused[whole[path]] = f"to save {path} excludes {hidden} from what peft adapts"
    keys = {
        f"{PREFIX}{path}.{name}": f"{path}.{name}"
        for path in outer
        for name in modules[path].state_dict(keep_vars=True)
    }
    named = {key: weights.canonical.get(name, name) for key, name in keys.items()}
    return Saved(outer, {**named, **biases}, bool(biases)), refused


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
