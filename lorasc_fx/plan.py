"""What is decided: one description per site. Pure data, no tensors, no nodes, no node names.

A `Refusal` names the node that made us refuse, so it belongs to a match (and to people), not to the plan.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from lorasc_fx.errors import CheckpointError
from lorasc_fx.options import ROW_SCALES, SCALES, RowScale
from lorasc_fx.spec import KINDS, PLACEMENTS, CascadeSpec
from lorasc_fx.util.checks import is_integer, is_number

__all__ = ["Plan", "Reason", "Refusal", "Site"]

FORMAT = 1
MOST = 2**31 - 1
"""Of stages, of a rank, of rows: a larger number in a file is none that this package has written."""
ENTRIES = 2**40
"""Of a weight: as much again."""
_LISTS = ("shape", "aliases", "slices", "ranks")
_OPTIONAL = ("form", "use_dora", "ranks", "train_A", "nearest_full_gradient")
"""Fields of a site that are written where they are not the default."""


class Reason(enum.Enum):
    """Why a weight matrix is not a site; the set is closed."""

    NOT_TARGETED = "not-targeted"
    EXCLUDED = "excluded"
    TRAINED = "trained-in-full"
    NO_FORM = "no-form"
    MIXED_USES = "mixed-uses"
    MUTATED = "written-by-forward"
    VECTOR = "vector"
    EMPTY = "empty"
    OPAQUE = "opaque-module"
    NOT_FLOATING = "not-floating"
    QUANTIZED = "quantized"
    SHARED_MEMORY = "shared-memory"

    @property
    def asked(self) -> bool:
        """Whether the user's spec asked for it; the others are ours to explain."""
        return self in (Reason.NOT_TARGETED, Reason.EXCLUDED, Reason.TRAINED)


@dataclass(frozen=True)
class Refusal:
    """A weight matrix that gets no branch: its name, the node that decided (or ""), why, and a sentence for people."""

    weight: str
    node: str
    reason: Reason
    sentence: str

    def __str__(self) -> str:
        return f"{self.weight}: {self.reason.value} ({self.sentence})"


@dataclass(frozen=True)
class Site:
    """One weight that is adapted, and the description of its branch.

    Args:
        weight: the weight's own name in the model; of a tied weight, the first name.
        kind: one of spec.KINDS.
        shape: of the weight: [out, in], [out, in/groups, *kernel], or [experts, out, in].
        rank, lora_alpha, use_rslora: of the branch.
        aliases: the other names of a tied weight.
        layout: `out_in`, or `in_out` for a weight that is stored transposed (transformers' Conv1D).
        slices: numbers of rows of the slices in which a fused weight is used (q, k and v); each slice has a pair of its
            own. Empty where the weight is used whole.
        placement: where the branch computes if a node allows it: `beside` the op, `merged` with it, or on the `weight`;
            on the weight where no op allows another.
        dropout: share of the entries of the branch's input that are zero while it trains, beside an op.
        form: name of the registered form (`lorasc_fx.graph.register_form`) that made it a site; "" for those built in.
        use_dora: each row has a magnitude of its own.
        ranks: rank of the branch in stage 1, 2, ..., the last one goes on; empty for one whose rank stays.
        train_A: whether lora_A is trained.
        nearest_full_gradient: whether the gradient of lora_B is that of the nearest step to full training.
    """

    weight: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    lora_alpha: float
    use_rslora: bool = False
    aliases: tuple[str, ...] = ()
    layout: str = "out_in"
    slices: tuple[int, ...] = ()
    placement: str = "beside"
    dropout: float = 0.0
    form: str = ""
    use_dora: bool = False
    ranks: tuple[int, ...] = ()
    train_A: bool = True
    nearest_full_gradient: bool = False

    def at_stage(self, stage: int) -> Site:
        """Return the site as this stage has it: its rank follows `ranks`."""
        return replace(self, rank=self.ranks[min(stage, len(self.ranks)) - 1]) if self.ranks else self

    @property
    def scale(self) -> float:
        """`lora_alpha / rank`, or `/ sqrt(rank)` under rsLoRA."""
        return SCALES[self.use_rslora].scale(self.rank, self.lora_alpha)

    @property
    def row_scale(self) -> RowScale:
        """The strategy of `use_dora`."""
        return ROW_SCALES[self.use_dora]

    @property
    def key(self) -> str:
        """Name of the branch among the branches: a module name, so it has no dots."""
        return self.weight.replace("/", "//").replace(".", "/")

    @property
    def experts(self) -> int | None:
        """Number of matrices that a weight of kind `experts` stacks, each with a pair of its own; else None."""
        return self.shape[0] if self.kind == "experts" else None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of the weight seen as a matrix (of each, for experts): all but the first axis are flattened."""
        first, *rest = self.shape[1:] if self.experts else self.shape
        columns = math.prod(rest)
        return (first, columns) if self.layout == "out_in" else (columns, first)

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A [rank, in] and lora_B [out, rank], with the axis of experts before them if there is one.

        With slices lora_A is [slices * rank, in]: the A of each slice, one after the other.
        """
        out, columns = self.matrix_shape
        stack = (self.experts,) if self.experts else ()
        return (*stack, max(len(self.slices), 1) * self.rank, columns), (*stack, out, self.rank)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that a branch trains, by name: the factors, and under DoRA the magnitudes [out]."""
        a, b = self.factor_shapes
        return {"lora_A": a, "lora_B": b, **self.row_scale.shapes(self.matrix_shape[0])}

    @property
    def parameters(self) -> int:
        """Number of trainable entries of the branch."""
        return sum(map(math.prod, self.parameter_shapes.values()))


@dataclass(frozen=True)
class Plan:
    """Spec, sites in the model's order, the stage that runs (1 is the first), and where noise is redrawn by the step
    (noise.redraw) how many optimizer steps it has made.
    """

    spec: CascadeSpec
    sites: tuple[Site, ...] = ()
    stage: int = 1
    step: int = 0

    def site(self, weight: str) -> Site | None:
        """Return the site of this weight name, or None."""
        return self.by_weight.get(weight)

    @cached_property
    def by_weight(self) -> Mapping[str, Site]:
        """Sites by their weight's name."""
        return {site.weight: site for site in self.sites}

    def with_sites(self, sites: tuple[Site, ...]) -> Plan:
        """Return the plan with these sites added; a weight that is planned already keeps its branch."""
        known = self.by_weight
        new = tuple(site.at_stage(self.stage) for site in sites if site.weight not in known)
        return replace(self, sites=self.sites + new)

    def at_stage(self, stage: int) -> Plan:
        """Return the same plan at the start of another stage, with the ranks of that one."""
        return replace(self, stage=stage, step=0, sites=tuple(site.at_stage(stage) for site in self.sites))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        sites = [
            {
                field.name: value
                for field in fields(Site)
                if (value := getattr(site, field.name)) != field.default or field.name not in _OPTIONAL
            }
            for site in self.sites
        ]
        step = {"step": self.step} if self.step else {}
        return json.dumps(
            {"format": FORMAT, "stage": self.stage, **step, "spec": self.spec.to_dict(), "sites": sites}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: the text is not a plan of this format.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if type(data["format"]) is not int or data["format"] != FORMAT:
                raise CheckpointError(
                    f"plan has format {data['format']!r:.40}, this version reads {FORMAT}; "
                    "read it by the lorasc-fx that wrote it",
                    code="format-not-supported",
                )
            sites = tuple(_checked(_site(entry)) for entry in data["sites"])
            spec = CascadeSpec.from_dict(data["spec"])
            for rank in (spec.rank, *spec.ranks, *(rule.rank for rule in spec.rules if rule.rank is not None)):
                _count("rank", rank)
            names = [name for site in sites for name in (site.weight, *site.aliases)]
            if len(set(names)) != len(names):
                raise ValueError("a weight has two sites")
            steps = _count("step", data.get("step", 0), least=0)
            plan = cls(spec, sites, _count("stage", data["stage"]), steps)
            if any(site.at_stage(plan.stage) != site for site in plan.sites):
                raise ValueError(f"a site has another rank than its ranks say for stage {plan.stage}")
            return plan
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as fault:
            raise CheckpointError(f"this is not a plan: {type(fault).__name__}: {str(fault)[:300]}") from fault


def _site(entry: dict[str, Any]) -> Site:
    return Site(**{**entry, **{name: tuple(entry[name]) for name in _LISTS if name in entry or name != "ranks"}})


def _checked(site: Site) -> Site:
    """Return a site that was read, whose fields are what they are said to be."""
    for name, value in (("weight", site.weight), *(("aliases", alias) for alias in site.aliases)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}, not the name of a weight")
    if site.kind not in KINDS:
        raise ValueError(f"kind is {site.kind!r}, not one of {', '.join(KINDS)}")
    if len(site.shape) < 2:
        raise ValueError(f"shape is {site.shape}, not that of a matrix")
    for size in site.shape:
        _count("shape", size, least=0, most=ENTRIES)
    if math.prod(max(size, 1) for size in site.shape) > ENTRIES:
        raise ValueError(f"shape is {site.shape}, more than a weight can have")
    if site.kind == "experts" and len(site.shape) != 3:
        raise ValueError(f"shape is {site.shape}, not [experts, out, in]")
    if site.layout not in ("out_in", "in_out"):
        raise ValueError(f"layout is {site.layout!r}, not out_in or in_out")
    for rank in (site.rank, *site.ranks):
        _count("rank", rank)
    for size in site.slices:
        _count("slices", size)
    if site.slices and (sum(site.slices) != site.shape[0] or site.experts or site.layout != "out_in"):
        raise ValueError(f"slices is {site.slices}, which are not the rows of a weight of shape {site.shape}")
    if site.placement not in PLACEMENTS:
        raise ValueError(f"placement is {site.placement!r}, not one of {', '.join(PLACEMENTS)}")
    if not is_number(site.dropout) or not 0 <= site.dropout < 1:
        raise ValueError(f"dropout is {site.dropout!r}, not a share in [0, 1)")
    if not isinstance(site.form, str):
        raise ValueError(f"form is {site.form!r}, not the name of a form")
    for name in ("use_rslora", "train_A", "nearest_full_gradient"):
        if not isinstance(flag := getattr(site, name), bool):
            raise ValueError(f"{name} is {flag!r}, not true or false")
    if not isinstance(site.use_dora, bool) or (site.row_scale.trained and site.placement != "merged"):
        raise ValueError(f"use_dora is {site.use_dora!r}, not true or false, or its branch stands beside its op")
    if (
        isinstance(site.lora_alpha, bool)
        or not isinstance(site.lora_alpha, (int, float))
        or not 0 < float(site.lora_alpha) < math.inf
    ):
        raise ValueError(f"lora_alpha is {site.lora_alpha!r}, not a finite number above 0")
    return site


def _count(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    if not is_integer(value, least):
        raise ValueError(f"{name} is {value!r}, not an integer of {least} or more")
    if value > most:
        raise ValueError(f"{name} is above {most}")
    return value
