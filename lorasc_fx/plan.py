"""The plan of an adaptation: which weights are adapted and how, as plain data that converts to and from JSON.

A plan contains no tensors and no graph nodes, so all graphs of a cascade share it, and a checkpoint can store it. A
`Refusal` is not a part of the plan, because it names a node of one graph.
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
"""Version of the JSON format."""

MAX_ENTRIES = 2**40
"""Maximum number of entries of a weight. A larger number in a file means that the file is damaged."""

Count = Annotated[int, Check(lambda count: 1 <= count < 2**31, "give an integer of 1 or more")]
Size = Annotated[int, Check(lambda size: 0 <= size <= MAX_ENTRIES, "give the length of an axis")]
Name = Annotated[str, Check(bool, "give the name of a weight")]


class Reason(enum.Enum):
    """Reasons why a weight matrix does not get a branch."""

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
    def requested(self) -> bool:
        """Whether the user's spec asks for no branch. If not, tell the user that the weight cannot be adapted."""
        return self in (Reason.NOT_TARGETED, Reason.EXCLUDED, Reason.TRAINED)


@dataclass(frozen=True)
class Refusal:
    """A weight matrix that does not get a branch.

    Args:
        weight: name of the weight in the model.
        node: name of the graph node that causes the refusal, or "" if no node does.
        reason: the reason, for programs.
        sentence: the reason, for people.
    """

    weight: str
    node: str
    reason: Reason
    sentence: str

    def __str__(self) -> str:
        return f"{self.weight}: {self.reason.value} ({self.sentence})"


@dataclass(frozen=True)
class Site:
    """An adapted weight, and the description of its branch.

    Args:
        weight: name of the weight in the model. For a tied weight, the first of its names in `named_parameters`.
        kind: one of `lorasc_fx.spec.KINDS`.
        shape: shape of the weight: [out, in], [out, in/groups, *kernel], or [matrices, out, in].
        options: options of the branch.
        aliases: the other names of a tied weight.
        layout: `out_in`, or `in_out` if the weight is stored transposed (transformers' Conv1D).
        placement: where the branch computes: `beside` the op, `merged` into the op, or on the `weight`. Nodes that do
            not allow this placement use another one (docs/algorithm.md, "Placements").
        dropout: probability that an entry of the branch's input is set to zero in train mode.
        form: name of the form that matched the weight, if `lorasc_fx.graph.register_form` added it. "" for a built-in
            form.
    """

    weight: Name
    kind: Annotated[str, choice(KINDS)]
    shape: Annotated[tuple[Size, ...], Check(lambda shape: len(shape) > 1, "give the shape of a matrix")]
    options: SiteOptions
    aliases: tuple[Name, ...] = ()
    layout: Annotated[str, choice(("out_in", "in_out"))] = "out_in"
    placement: Annotated[str, choice(PLACEMENTS)] = "beside"
    dropout: Dropout = 0.0
    form: str = ""

    @property
    def rank(self) -> int:
        """Rank of the branch."""
        return self.options.rank

    @cached_property
    def scale(self) -> float:
        """Factor s in the delta `s B A`, such as `lora_alpha / rank`."""
        return self.options.scale

    @property
    def key(self) -> str:
        """Key of the branch in `Cascade.branches`: the name of the weight with "/" for ".".

        A key is a name of a child module, so it must not contain dots.
        """
        return self.weight.replace("/", "//").replace(".", "/")

    @property
    def stacked(self) -> bool:
        """Whether the first axis of the weight counts matrices, each with its own pair of factors."""
        return self.kind == "stacked"

    @cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape [out, in] of the weight as a matrix. All axes after the first are flattened.

        For stacked matrices, the shape [out, in] of one matrix.
        """
        rows, *others = self.shape[1:] if self.stacked else self.shape
        columns = math.prod(others)
        return (rows, columns) if self.layout == "out_in" else (columns, rows)

    @cached_property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the factors A and B: [rank, in] and [out, rank].

        For stacked matrices, both have an additional first axis, which counts the matrices.
        """
        out, columns = self.matrix_shape
        stack = self.shape[:1] if self.stacked else ()
        return (*stack, self.rank, columns), (*stack, out, self.rank)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters of the branch, as {name: shape}."""
        shapes: dict[str, tuple[int, ...]] = self.options.method.shapes(self)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of entries of all parameters of the branch."""
        return sum(map(math.prod, self.parameter_shapes.values()))


@dataclass(frozen=True)
class Plan:
    """Spec, sites and stage of an adaptation.

    Args:
        spec: the spec given to `adapt`.
        sites: adapted weights, in the order in which they were found.
        stage: number of the running stage; the first is 1.
    """

    spec: CascadeSpec
    sites: tuple[Site, ...] = ()
    stage: Count = 1

    def site(self, weight: str) -> Site | None:
        """Return the site of the weight with this name, or None."""
        return self.by_weight.get(weight)

    @cached_property
    def by_weight(self) -> Mapping[str, Site]:
        """The sites, as {weight name: site}."""
        return {site.weight: site for site in self.sites}

    def with_sites(self, sites: tuple[Site, ...]) -> Plan:
        """Return the plan with more sites. Sites that the plan already has are not replaced."""
        planned = self.by_weight
        return replace(self, sites=self.sites + tuple(site for site in sites if site.weight not in planned))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        sites = [asdict(site) for site in self.sites]
        return json.dumps(
            {"format": FORMAT, "stage": self.stage, "spec": self.spec.to_dict(), "sites": sites}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Build a plan from the result of `to_json`.

        Raises:
            CheckpointError: the text is not a plan, has another format version, or is inconsistent.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if type(data["format"]) is not int or data["format"] != FORMAT:
                raise CheckpointError(
                    f"the plan has format {data['format']!r:.40}, but this version of lorasc-fx reads format {FORMAT}. "
                    "Read it with the version that wrote it",
                    code="format-not-supported",
                )
            plan: Plan = decode(cls, {name: value for name, value in data.items() if name != "format"}, ("plan",))
            for site in plan.sites:
                _check_site(site)
            names = [name for site in plan.sites for name in (site.weight, *site.aliases)]
            if len(set(names)) != len(names):
                raise ValueError("a weight has two sites")
            return plan
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as fault:
            raise CheckpointError(f"this is not a plan: {type(fault).__name__}: {str(fault)[:300]}") from fault


def _check_site(site: Site) -> None:
    """Raise ValueError if the fields of a site from a file contradict each other."""
    if site.stacked and len(site.shape) != 3:
        raise ValueError(f"shape is {site.shape}, not [matrices, out, in]")
    if fault := site.options.method.fault(site):
        raise ValueError(f"{site.weight} {fault}")
    if site.placement not in {*site.options.method.placements, *(["weight"] if site.options.grid else [])}:
        raise ValueError(f"placement is {site.placement}, which adapter {site.options.adapter} does not support")
