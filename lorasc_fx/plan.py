"""What is decided: one description per site. Pure data, no tensors, no nodes, no node names.

A `Refusal` names the node that made us refuse, so it belongs to a match (and to people), not to the plan.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from lorasc_fx.errors import CheckpointError
from lorasc_fx.spec import KINDS, PLACEMENTS, CascadeSpec, Dropout, SiteOptions
from lorasc_fx.util.decode import Check, choice, decode

__all__ = ["Plan", "Reason", "Refusal", "Site", "SiteOptions"]

FORMAT = 1
ENTRIES = 2**40
"""Of a weight: a larger number in a file is none that this package has written."""
Count = Annotated[int, Check(lambda count: 1 <= count < 2**31, "give an integer of 1 or more")]
Size = Annotated[int, Check(lambda size: 0 <= size <= ENTRIES, "give the length of an axis")]
Name = Annotated[str, Check(bool, "give the name of a weight")]


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
        options: of its branch.
        aliases: the other names of a tied weight.
        layout: `out_in`, or `in_out` for a weight that is stored transposed (transformers' Conv1D).
        slices: numbers of rows of the slices in which a fused weight is used (q, k and v); each slice has a pair of its
            own. Empty where the weight is used whole.
        placement: where the branch computes if a node allows it: `beside` the op, `merged` with it, or on the `weight`;
            on the weight where no op allows another.
        dropout: share of the entries of the branch's input that are zero while it trains, beside an op.
        form: name of the registered form (`lorasc_fx.graph.register_form`) that made it a site; "" for those built in.
    """

    weight: Name
    kind: Annotated[str, choice(KINDS)]
    shape: Annotated[tuple[Size, ...], Check(lambda shape: len(shape) > 1, "give that of a matrix")]
    options: SiteOptions
    aliases: tuple[Name, ...] = ()
    layout: Annotated[str, choice(("out_in", "in_out"))] = "out_in"
    slices: tuple[Count, ...] = ()
    placement: Annotated[str, choice(PLACEMENTS)] = "beside"
    dropout: Dropout = 0.0
    form: str = ""

    def at_stage(self, stage: int) -> Site:
        """Return the site as this stage has it."""
        return replace(self, options=self.options.at_stage(stage))

    @property
    def rank(self) -> int:
        """Rank of the branch in the running stage."""
        return self.options.rank

    @property
    def scale(self) -> float:
        """What the branch is multiplied by."""
        return self.options.scale

    @property
    def key(self) -> str:
        """Name of the branch among the branches: a module name, so it has no dots."""
        return self.weight.replace("/", "//").replace(".", "/")

    @property
    def experts(self) -> int | None:
        """Number of matrices that a weight of kind `experts` stacks, each with a pair of its own; else None."""
        return self.shape[0] if self.kind == "experts" else None

    @cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of the weight seen as a matrix (of each, for experts): all but the first axis are flattened."""
        first, *rest = self.shape[1:] if self.experts else self.shape
        columns = math.prod(rest)
        return (first, columns) if self.layout == "out_in" else (columns, first)

    @cached_property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a pair A [rank, in] and B [out, rank], with the axis of experts before them if there is one.

        With slices A is [slices * rank, in]: the A of each slice, one after the other.
        """
        out, columns = self.matrix_shape
        stack = (self.experts,) if self.experts else ()
        return (*stack, max(len(self.slices), 1) * self.rank, columns), (*stack, out, self.rank)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the branch, by name."""
        shapes: dict[str, tuple[int, ...]] = self.options.method.shapes(self)
        return shapes

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
    stage: Count = 1
    step: Annotated[int, Check(lambda step: 0 <= step < 2**31, "give 0 or more")] = 0

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
        sites = [asdict(site) for site in self.sites]
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
            plan: Plan = decode(cls, {name: value for name, value in data.items() if name != "format"}, ("plan",))
            for site in plan.sites:
                _check_site(site)
            names = [name for site in plan.sites for name in (site.weight, *site.aliases)]
            if len(set(names)) != len(names):
                raise ValueError("a weight has two sites")
            if any(site.at_stage(plan.stage) != site for site in plan.sites):
                raise ValueError(f"a site has another rank than its ranks say for stage {plan.stage}")
            return plan
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as fault:
            raise CheckpointError(f"this is not a plan: {type(fault).__name__}: {str(fault)[:300]}") from fault


def _check_site(site: Site) -> None:
    """Refuse a site that was read, whose fields do not belong together."""
    if math.prod(max(size, 1) for size in site.shape) > ENTRIES:
        raise ValueError(f"shape is {site.shape}, more than a weight can have")
    if site.kind == "experts" and len(site.shape) != 3:
        raise ValueError(f"shape is {site.shape}, not [experts, out, in]")
    if site.slices and (sum(site.slices) != site.shape[0] or site.experts or site.layout != "out_in"):
        raise ValueError(f"slices is {site.slices}, which are not the rows of a weight of shape {site.shape}")
    if fault := site.options.method.fault(site):
        raise ValueError(f"{site.weight} {fault}")
    if site.placement not in site.options.method.placements:
        raise ValueError(f"placement is {site.placement}, and {site.options.adapter} computes at another one")
