"""A model whose modules compute with an adapter: for `generate`, which runs Python and caches that no graph holds.

The copy shares parameters and submodules' tensors with the model, and has hooks of its own, so the model is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lorasc_fx.branch.conv import ConvCall
from lorasc_fx.branch.given import FIRST_AXIS, Pair, at_lookup, beside, beside_conv
from lorasc_fx.errors import StateError
from lorasc_fx.graph.copies import unshared
from lorasc_fx.graph.forms import form_of
from lorasc_fx.plan import Site

Factors = Callable[[str], Pair]
"""Returns the factors of a weight for the current call."""


class _Node:
    """A call of a module, as forms read it."""

    op, target = "call_module", ""
    args: tuple[Any, ...] = ("x",)
    kwargs: Mapping[str, Any] = {}


def hooked(model: nn.Module, sites: Sequence[Site], factors: Factors) -> nn.Module:
    """Return a copy of a model with a hook on each module that holds the weight of a site.

    Args:
        model: shares its tensors with the copy.
        sites: to compute with. A tied weight is hooked in each module that holds it.
        factors: gives the factors at each call.

    Raises:
        StateError: a module does not compute as the form of its weight.
    """
    copy = unshared(model, {})
    for site in sites:
        for name in (site.weight, *site.aliases):
            path, _, leaf = name.rpartition(".")
            module = copy.get_submodule(path)
            hook = _hook(module, site, factors) if leaf == "weight" else None
            if hook is None:
                raise StateError(
                    f"bank: generate runs modules, and {name} ({type(module).__name__}) is used in a way that no hook "
                    "follows. Compute tokens by calls of the bank, which run graphs, or use a cascade with the adapter "
                    "in place (cascade.weights(name))",
                    code="not-available",
                )
            module._forward_hooks = module._forward_hooks.copy()
            module.register_forward_hook(hook)
    return copy


def _hook(module: nn.Module, site: Site, factors: Factors) -> Callable[..., Any] | None:
    """Return the hook for a module, or None for a module that computes otherwise than its weight's form."""
    if type(module).__name__ == "Conv1D" and site.layout == "in_out":  # of transformers, a product
        return lambda _, args, output: beside(output, args[0], factors(site.weight), FIRST_AXIS)
    form = form_of(_Node(), module)
    if form is None or form.layout != site.layout:
        return None
    options = dict(form.reads(_Node(), module).options)
    if isinstance(module, nn.Embedding):
        padding = options["padding_idx"]
        return lambda _, args, output: at_lookup(output, args[0], factors(site.weight), FIRST_AXIS, padding)
    if site.kind == "conv":
        call = ConvCall(**options)
        return lambda _, args, output: beside_conv(output, args[0], factors(site.weight), call, site.shape, FIRST_AXIS)
    return lambda _, args, output: beside(output, args[0], factors(site.weight), FIRST_AXIS)
