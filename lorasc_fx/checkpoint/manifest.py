"""The schema of a manifest: the type and range of each field are checked before it is used.

A digest detects damage, not forgery: an edited manifest can have a new digest. So no field is trusted.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lorasc_fx.checkpoint.layout import file_names, is_our_file, sanitized
from lorasc_fx.plan import Plan
from lorasc_fx.state import Expert, Side
from lorasc_fx.util.checks import is_number
from lorasc_fx.util.files import parse_json

LONGEST = 1 << 26
"""Bytes that a manifest has at most; parsed, JSON takes some twenty times as much."""

_KINDS: Mapping[str, tuple[type, str]] = {
    "plan": (dict, "a plan"),
    "files": (dict, "a table of digests"),
    "base": (dict, "a table of digests"),
    "frontend": (str, "the name of a front end"),
    "slow": (dict, "a table of slow states"),
    "trained": (dict, "a table of rules"),
    "idle": (bool, "true or false"),
    "rng": (dict, "a table of random generators"),
    "extra": (dict, "a table"),
}
_OPTIONAL: Mapping[str, tuple[type, str]] = {
    "unapplied_gradients": (list, "a list of names"),
    "tensor_references": (list, "a list of references"),
    "versions": (dict, "a table of versions"),
    "averaged": (int, "a number of stages"),
    "empty_buffers": (list, "a list of names"),
    "shared_buffers": (dict, "a table of names"),
    "shards": (dict, "a table of axes"),
    "model": (dict, "the name of a base"),
}
_SAVED = {"optimizer": {"class": str, "groups": list, "numbers": dict}, "scheduler": {"class": str, "state": dict}}
_DIGEST = re.compile("[0-9a-f]{64}")
VIEWS = ("slow", "start", "average")
"""Views of a slow state that are coefficient vectors of its entry; the ends of stages stand in its "stage_ends"."""
EXPERT_FIELDS: Mapping[str, Side] = {item.name: item.metadata[Side] for item in fields(Expert) if Side in item.metadata}
"""Tensors of an expert, which are named by their field, and how they lie beside the weight."""
_STATE = ("experts", "slow", "start", "noises", "stage_ends", "gone")
"""What an entry must have; it may have the other views."""
_NOISE = ("noise", "seed", "stage", "amplitude")


def parsed(data: bytes) -> Any:
    """Return what JSON text holds; numbers are finite.

    Raises:
        ValueError: it is no such JSON, or nested too deeply.
    """
    return parse_json(data.decode("utf-8"), parse_float=_float, parse_constant=_float)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{sanitized(text)} is no number that JSON can hold")
    return value


def check_kinds(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that lacks a field, or has a field of another kind.

    Raises:
        ValueError: names the field.
    """
    for key, (kind, what) in {**_KINDS, **_OPTIONAL}.items():
        if key in manifest and type(manifest[key]) is not kind:
            raise ValueError(f"{key!r} is {type(manifest[key]).__name__}, not {what}")
        if key in _KINDS and key not in manifest:
            raise ValueError(f"has no {key!r}")
    for key, parts in _SAVED.items():
        held = manifest.get(key)
        if key in manifest and (
            not isinstance(held, dict) or any(type(held.get(part)) is not kind for part, kind in parts.items())
        ):
            raise ValueError(f"{key!r} is not the state of one: it needs {', '.join(parts)}")


def check_fields(manifest: Mapping[str, Any], plan: Plan) -> None:
    """Refuse values that a manifest of this plan cannot have.

    Raises:
        ValueError: names the field.
    """
    names = file_names(max(len(manifest["files"]), 1))
    if odd := next((name for name in manifest["files"] if not is_our_file(name)), None):
        raise ValueError(f"'files' names {sanitized(odd)}, which is no file of a checkpoint")
    if list(manifest["files"]) != names:
        raise ValueError(f"'files' does not name {', '.join(names)}, in this order")
    for name, axis in manifest.get("shards", {}).items():
        if type(axis) is not int or not 0 <= axis < 8:
            raise ValueError(f"'shards': {sanitized(name)} has {sanitized(repr(axis))}, which is no axis of a tensor")
    for key in ("files", "base"):
        for name, digest in manifest[key].items():
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise ValueError(f"{key!r}: {sanitized(name)} has {sanitized(digest)}, which is no digest")
    for name, state in manifest["slow"].items():
        _check_state(sanitized(name), state, plan.stage)
    for name, index in manifest["trained"].items():
        state = manifest["slow"].get(name)
        if state is None or name in plan.by_weight or state["experts"] or state["noises"]:
            raise ValueError(f"'trained': {sanitized(name)} has no slow state of a parameter trained in full")
        if index is not None and (type(index) is not int or not 0 <= index < len(plan.spec.train_rules)):
            raise ValueError(
                f"'trained': {sanitized(name)} has {sanitized(index)}, which is no rule of the spec's train_rules"
            )
    if not plan.spec.keeps_average and any("average" in state for state in manifest["slow"].values()):
        raise ValueError("'slow' holds an average, and the spec keeps none")
    if not 0 <= manifest.get("averaged", 0) < max(plan.stage, 1) or (
        "averaged" in manifest and not plan.spec.keeps_average
    ):
        raise ValueError(f"'averaged' is {manifest['averaged']}, which this plan's stages cannot have made")
    _check_random(manifest["rng"])
    for key in ("unapplied_gradients", "empty_buffers", "versions", "shared_buffers"):
        held = manifest.get(key, ())
        for name in held.values() if isinstance(held, dict) else held:
            if not isinstance(name, str):
                raise ValueError(f"{key!r} holds names, not {sanitized(repr(name))}")
    for reference in manifest.get("tensor_references", ()):
        if not _is_reference(reference):
            raise ValueError(
                f"'tensor_references': {sanitized(repr(reference))} is no reference to what JSON cannot hold"
            )
    if "optimizer" in manifest:
        _check_optimizer(manifest["optimizer"])


def _check_state(name: str, state: Any, stage: int) -> None:
    if not isinstance(state, dict) or not {*_STATE} <= {*state} <= {*_STATE, *VIEWS}:
        raise ValueError(f"'slow': {name} needs {', '.join(_STATE)}, and nothing else")
    if any(not isinstance(part, list) for key, part in state.items() if key != "gone"):
        raise ValueError(f"'slow': {name} holds what is no list")
    for expert in state["experts"]:
        _check_expert(name, expert, stage)
    vectors = [key for key in VIEWS if key in state]
    if any(not is_number(number) for key in vectors for number in state[key]):
        raise ValueError(f"'slow': {name} has coefficients that are no finite numbers")
    if any(len(state[key]) != len(state["experts"]) for key in vectors):
        counts = ", ".join(f"{len(state[key])} {key}" for key in ("experts", *vectors))
        raise ValueError(f"'slow': {name} has {counts}; there is one of each for every expert")
    if state["gone"] != 0 and not _counts(state["gone"], stage):
        raise ValueError(f"'slow': {name} has lost stages that were not: {sanitized(state['gone'])}")
    ends = [pair if isinstance(pair, list) and len(pair) == 2 else (None, ()) for pair in state["stage_ends"]]
    _check_ends(name, [*([state["gone"]] if state["gone"] else []), *(end for end, _ in ends)], stage)
    for _, slow in ends:
        if not isinstance(slow, list) or len(slow) > len(state["slow"]) or not all(map(is_number, slow)):
            raise ValueError(f"'slow': {name} had at the end of a stage what are no coefficients of its experts")
    for noise in state["noises"]:
        if not isinstance(noise, dict) or sorted(noise) != sorted(_NOISE) or not isinstance(noise["noise"], dict):
            raise ValueError(f"'slow': {name} keeps noise that needs {', '.join(_NOISE)}, and nothing else")
        seed = noise["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63 or not _counts(noise["stage"], stage):
            raise ValueError(
                f"'slow': {name} has kept noise with an invalid (seed, stage): {sanitized([seed, noise['stage']])}"
            )
        if not is_number(noise["amplitude"]) or noise["amplitude"] < 0:
            raise ValueError(f"'slow': {name} keeps noise of amplitude {sanitized(noise['amplitude'])}")


def _check_expert(name: str, expert: Any, stage: int) -> None:
    """Check the stage of an expert (0: trained elsewhere), and the names of its tensors: without factors it has rank
    0.
    """
    if not isinstance(expert, dict) or {*expert} != {"stage", "tensors"} or not isinstance(expert["tensors"], list):
        raise ValueError(f"'slow': {name} has an expert without stage and tensors: {sanitized(repr(expert))}")
    if type(expert["stage"]) is not int or not 0 <= expert["stage"] <= stage:
        raise ValueError(f"'slow': {name} has an expert of a stage that was not: {sanitized(expert['stage'])}")
    tensors = expert["tensors"]
    if any(tensors.count(key) > 1 or key not in EXPERT_FIELDS for key in tensors) or ("a" in tensors) != (
        "b" in tensors
    ):
        raise ValueError(f"'slow': {name} has an expert of these tensors: {sanitized(tensors)}")


def _check_ends(name: str, stages: Any, stage: int) -> None:
    """Check the numbers of stages that have ended: unique, in order, and not after the running stage."""
    if not isinstance(stages, list) or any(not _counts(number, stage) for number in stages):
        raise ValueError(f"'stage_ends': {name} has ends of stages that were not: {sanitized(stages)}")
    if any(one >= other for one, other in itertools.pairwise(stages)):
        raise ValueError(f"'stage_ends': {name} has ends of stages out of order: {sanitized(stages)}")


def _counts(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _check_random(states: Mapping[str, Any]) -> None:
    state = states.get("python")
    try:
        version, words, gauss = state if isinstance(state, list) else []
        if gauss is not None and not is_number(gauss):
            raise ValueError("its gauss is no number")
        if any(type(word) is not int or not 0 <= word < 2**32 for word in words):
            raise ValueError("its words are no numbers of 32 bits")
        random.Random().setstate((version, tuple(words), gauss))
    except (TypeError, ValueError, OverflowError) as fault:
        raise ValueError(f"'rng': is no state of Python's random generator: {sanitized(str(fault))}") from fault

    numpy = states.get("numpy")
    if numpy is not None and not _is_numpy(numpy):
        raise ValueError("'rng': is no state of numpy's random generator")


def _is_numpy(state: Any) -> bool:
    """Whether a state is one of numpy's default generator; numpy itself does not look at the position in it."""
    parts = {"bit_generator", "state", "has_gauss", "gauss"}
    if not isinstance(state, dict) or set(state) != parts or state["bit_generator"] != "MT19937":
        return False
    if not isinstance(state["state"], dict) or set(state["state"]) != {"key", "pos"}:
        return False
    key, position = state["state"].get("key"), state["state"].get("pos")
    words = isinstance(key, list) and len(key) == 624 and all(type(word) is int and 0 <= word < 2**32 for word in key)
    spare = type(state.get("has_gauss")) is int and state["has_gauss"] in (0, 1) and is_number(state.get("gauss"))
    return words and spare and type(position) is int and 0 <= position <= 624


def _is_reference(reference: Any) -> bool:
    if not isinstance(reference, dict) or not isinstance(reference.get("path"), list) or len(reference) != 2:
        return False
    path = reference["path"]
    keys = all(isinstance(key, str) or (type(key) is int and key >= 0) for key in path)
    tensor = str(reference.get("tensor", ""))
    return (
        keys
        and (reference.get("number") in ("inf", "-inf", "nan") or tensor.startswith("reference/"))
        and len(path) > 1
        and path[0] in ("extra", "optimizer", "scheduler")
    )


def _check_optimizer(saved: Mapping[str, Any]) -> None:
    host = saved.get("host", [])
    if not isinstance(host, list) or any(not isinstance(name, str) for name in host):
        raise ValueError("'optimizer': 'host' is no list of names")
    count = 0
    for group in saved["groups"]:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError("'optimizer': has a group without parameters")
        count += len(group["params"])
    for index, entries in saved["numbers"].items():
        if not index.isdecimal() or int(index) >= count or not isinstance(entries, dict):
            raise ValueError(f"'optimizer': holds the state of parameter {sanitized(index)}, of {count}")


def optimizer_index(name: str, groups: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Return the parameter and the name that a tensor `optimizer/INDEX/NAME` has.

    Raises:
        ValueError: it has neither, or the optimizer has fewer parameters.
    """
    _, _, rest = name.partition("/")
    index, _, key = rest.partition("/")
    count = sum(len(group["params"]) for group in groups)
    if not index.isdecimal() or len(index) > 9 or int(index) >= count or not key:
        raise ValueError(f"{sanitized(name)} is no state of one of {count} parameters")
    return int(index), key
