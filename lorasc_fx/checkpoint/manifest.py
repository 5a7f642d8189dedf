"""The schema of a manifest. The type and range of each field are checked before the field is used.

The digest detects damage, but not forgery, because an edited manifest can have a new digest. Fields are checked against
each other only if neither torch nor the decoder would notice a contradiction.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from lorasc_fx.branch import Side
from lorasc_fx.cascade.inputs import is_description
from lorasc_fx.checkpoint.layout import FORMAT, canonical, file_names, sanitized
from lorasc_fx.errors import CheckpointError
from lorasc_fx.plan import Plan
from lorasc_fx.spec import Noise
from lorasc_fx.state import Expert
from lorasc_fx.util.checks import is_number
from lorasc_fx.util.decode import Check, decode
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.fingerprint import text_digest

MAX_MANIFEST_BYTES = 1 << 26
"""Largest accepted manifest. Parsed JSON needs about twenty times as much memory."""
VIEWS = ("slow", "start", "average", "velocity")
"""Views of a weight that its entry stores as coefficients. The views of ended stages are in "stage_ends"."""
EXPERT_FIELDS: Mapping[str, Side] = {item.name: item.metadata[Side] for item in fields(Expert) if Side in item.metadata}
"""The tensor fields of an expert, and the side of the weight that each of them belongs to."""


def _is_expert(tensors: list[str]) -> bool:
    return len({*tensors} & {*EXPERT_FIELDS}) == len(tensors) and ("a" in tensors) == ("b" in tensors)


def _is_random(state: list[Any]) -> bool:
    """Return whether this is a state of Python's random generator."""
    try:
        version, words, gauss = state
        if version != random.Random().getstate()[0]:  # setstate would accept and convert older versions
            return False
        if any(type(word) is not int or not 0 <= word < 2**32 for word in words):
            return False
        random.Random().setstate((version, tuple(words), gauss))
    except (TypeError, ValueError, OverflowError):
        return False
    return gauss is None or is_number(gauss)


def _is_reference(reference: dict[str, Any]) -> bool:
    """Return whether this is a path with the name of a tensor, or with a number that JSON cannot represent."""
    path, tensor = reference.get("path"), str(reference.get("tensor", ""))
    return (
        len(reference) == 2
        and isinstance(path, list)
        and len(path) > 1
        and path[0] in ("extra", "optimizer", "scheduler")
        and all(isinstance(key, str) or (type(key) is int and key >= 0) for key in path)
        and (reference.get("number") in ("inf", "-inf", "nan") or tensor.startswith("reference/"))
    )


def _is_optimizer(saved: dict[str, Any]) -> bool:
    count = sum(len(group["params"]) for group in saved["groups"])
    return all(index.isdecimal() and int(index) < count for index in saved["numbers"])


def _up_to(maximum: int) -> Check:
    return Check(lambda number: 0 <= number <= maximum, f"give an integer from 0 to {maximum}")


Digest = Annotated[str, Check(re.compile("[0-9a-f]{64}").fullmatch, "a digest has 64 hexadecimal digits")]
Word = Annotated[int, _up_to(2**32 - 1)]
Stage = Annotated[int, _up_to(2**31 - 1)]
Coefficients = list[float]
Group = Annotated[dict[str, Any], Check(lambda group: isinstance(group.get("params"), list), "give a group of params")]


class ExpertEntry(TypedDict):
    """One expert of a weight. Stage 0 is an imported expert. An expert without factors has rank 0."""

    stage: Stage
    tensors: Annotated[list[str], Check(_is_expert, f"give some of {', '.join(EXPERT_FIELDS)}, a and b together")]


class NoiseEntry(TypedDict):
    """Noise that a stage has left in a weight (`noise.keep`)."""

    noise: Noise
    seed: Annotated[int, _up_to(2**63 - 1)]
    stage: Stage
    amplitude: Annotated[float, Check(lambda amplitude: amplitude >= 0, "give a number of 0 or more")]


class WeightEntry(TypedDict):
    """The slow state of one weight, without its tensors."""

    experts: list[ExpertEntry]
    slow: Coefficients
    start: Coefficients
    average: NotRequired[Coefficients]
    velocity: NotRequired[Coefficients]
    noises: list[NoiseEntry]
    stage_ends: list[tuple[Stage, Coefficients]]
    gone: Stage


class Mersenne(TypedDict):
    """The state of numpy's Mersenne Twister."""

    key: Annotated[list[Word], Check(lambda key: len(key) == 624, "give 624 words")]
    pos: Annotated[int, _up_to(624)]


class Numpy(TypedDict):
    """The state of numpy's global generator. It is checked here because numpy does not check the position."""

    bit_generator: Literal["MT19937"]
    state: Mersenne
    has_gauss: Annotated[int, _up_to(1)]
    gauss: float


class Generators(TypedDict):
    """The states of Python's and numpy's random generators. The states of torch's generators are tensors."""

    python: Annotated[list[Any], Check(_is_random, "give the state of Python's random generator")]
    numpy: NotRequired[Numpy | None]


Optimizer = TypedDict(
    "Optimizer",
    {"class": str, "groups": list[Group], "numbers": dict[str, dict[str, Any]], "host": NotRequired[list[str]]},
)
Scheduler = TypedDict("Scheduler", {"class": str, "state": dict[str, Any]})


class Manifest(TypedDict):
    """The content of a version, except its tensors."""

    format: int
    digest: str
    plan: dict[str, Any]
    files: dict[str, Digest]
    base: dict[str, Digest]
    frontend: str
    inputs: NotRequired[
        Annotated[
            dict[str, Any], Check(is_description, "give the shapes of the arguments of a call, see cascade/inputs.py")
        ]
    ]
    slow: dict[str, WeightEntry]
    trained: dict[str, Stage | None]
    idle: bool
    rng: Generators
    extra: dict[str, Any]
    unapplied_gradients: NotRequired[list[str]]
    tensor_references: NotRequired[
        list[Annotated[dict[str, Any], Check(_is_reference, "give a path, and a tensor or number")]]
    ]
    versions: NotRequired[dict[str, str]]
    averaged: NotRequired[Stage]
    losses: NotRequired[list[tuple[Stage, Annotated[float, Check(lambda loss: loss > 0, "give a number above 0")]]]]
    changed_buffers: NotRequired[list[str]]
    empty_buffers: NotRequired[list[str]]
    shared_buffers: NotRequired[dict[str, str]]
    shards: NotRequired[dict[str, Annotated[int, _up_to(7)]]]
    optimizer: NotRequired[
        Annotated[Optimizer, Check(_is_optimizer, "it has the state of more parameters than its groups have")]
    ]
    scheduler: NotRequired[Scheduler]


def parsed(data: bytes) -> Any:
    """Parse a JSON text. All numbers must be finite.

    Raises:
        ValueError: the text is not JSON, has inf or nan, or is nested too deeply.
    """
    return parse_json(data.decode("utf-8"), parse_float=_float, parse_constant=_float)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{sanitized(text)} is not a number in JSON")
    return value


def plan_of(manifest: Any) -> Plan:
    """Check a manifest and return its plan.

    Raises:
        ValueError: the manifest was changed after it was written, or a field is missing or contradicts its plan.
        CheckpointError: another version of lorasc-fx wrote it, or its plan is invalid.
    """
    written = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if type(written) is not int or written != FORMAT:
        raise CheckpointError(
            f"has format {sanitized(repr(written))}, but this version of lorasc-fx reads format {FORMAT}: load it with "
            "the version that wrote it",
            code="format-not-supported",
        )
    if manifest.get("digest") != text_digest(canonical(manifest)):
        raise ValueError("differs from its own digest: the file is damaged, or was edited")
    decode(Manifest, manifest)
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    names = file_names(max(len(manifest["files"]), 1))
    if list(manifest["files"]) != names:
        raise ValueError(
            f"files names {sanitized(', '.join(manifest['files']))}, not {', '.join(names)}, in this order"
        )
    for name, state in manifest["slow"].items():
        counts = {key: len(state[key]) for key in ("experts", *VIEWS) if key in state}
        if len({*counts.values()}) > 1:
            shown = ", ".join(f"{count} {key}" for key, count in counts.items())
            raise ValueError(f"slow: {sanitized(name)} has {shown}, but each view needs one coefficient per expert")
    return plan
