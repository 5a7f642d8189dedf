"""Where a weight is used: the meetings that flow finds, and what kind of site each makes of it.

A weight may reach an input in several ways. They are looked at in this order, and the first that makes a site counts:

1. what is computed of the weight alone is multiplied with an input, or looked up, or it is the weight of a product
   beside which a branch can stand, whatever is multiplied with it;
2. it is multiplied with a constant in some other form;
3. scaled by an input, it is the weight of a linear or a convolution (a modulated convolution);
4. an input chooses rows of it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from torch import fx

from lorasc_fx.graph.flow import Meeting, constants, inside, looks_up, meetings
from lorasc_fx.graph.form import FunctionForm
from lorasc_fx.graph.forms import SCALES, contraction, form_of, name_of, weighs

__all__ = ["kind_of", "uses_of"]


def uses_of(weight: fx.Node, constant: set[fx.Node]) -> list[Meeting]:
    """Return where a weight is used, in the first way of the module's list that makes a site of it.

    Args:
        weight: a get_attr node, or the node of a branch that stands on one.
        constant: nodes that depend on no input.
    """
    found = list(meetings(weight, constant, stands=_fits))
    if any(kind_of(each) for each in found):
        return found
    with_constants = list(meetings(weight, constant, stands=_contracts))
    if any(kind_of(each) for each in with_constants):
        return with_constants
    scaled = list(meetings(weight, constant, passes=_scales))
    if any(_as_weight(each) for each in scaled):
        return scaled
    looked_up = list(meetings(weight, constant, stands=partial(_is_looked_up, constant)))
    return looked_up if any(kind_of(each) for each in looked_up) else found


def kind_of(meeting: Meeting) -> str | None:
    """Return the kind of site that a meeting makes of its weight, itself or in a region that it runs, or None."""
    kind = contraction(meeting.node, meeting.reads)
    if kind is not None:
        return kind
    if looks_up(meeting.node, ()) and meeting.node.args[0] in meeting.reads:  # flow stops at none that it was not told
        return "embedding"
    for inner in (each for source in meeting.reads for each in inside(meeting.node, source)):
        found = meetings(inner, constants(inner.graph) | {inner})
        kind = next((each for each in map(kind_of, found) if each is not None), None)
        if kind is not None:
            return kind
    return None


def _fits(node: fx.Node, reads: Collection[fx.Node]) -> bool:
    form = form_of(node, None)
    return isinstance(form, FunctionForm) and any(form.fits(node, source) for source in reads)


def _contracts(node: fx.Node, reads: Collection[fx.Node]) -> bool:
    return contraction(node, reads) is not None


def _scales(node: fx.Node, reads: Collection[fx.Node]) -> bool:
    return name_of(node) in SCALES


def _is_looked_up(constant: Collection[fx.Node], node: fx.Node, reads: Collection[fx.Node]) -> bool:
    return looks_up(node, constant) and node.args[0] in reads


def _as_weight(meeting: Meeting) -> bool:
    """Whether the node takes what is made of the weight as its weight, and something else as its input."""
    args = meeting.node.args
    return weighs(name_of(meeting.node)) and len(args) > 1 and args[1] in meeting.reads and args[0] not in meeting.reads
