"""A copy of a model whose modules add an adapter by forward hooks.

`AdapterBank.generate` runs this copy, because a graph does not contain the Python code and the caches of `generate`.
The copy shares all tensors with the model but not the hooks, so the model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lorasc_fx.branch.placements import ConvCall, GivenFactors, at_lookup, beside, beside_conv
from lorasc_fx.errors import StateError
from lorasc_fx.graph.copies import unshared
from lorasc_fx.graph.forms import StoredCall, form_of
from lorasc_fx.plan import Site


def hooked(model: nn.Module, sites: Sequence[Site], factors: Mapping[str, GivenFactors]) -> nn.Module:
    """Return a copy of a model with a hook on each module that holds the weight of a site.

    Args:
        model: the model, which shares its tensors with the copy.
        sites: the sites with factors. For a tied weight, each module that has the weight gets a hook.
        factors: factors by weight name.

    Raises:
        StateError: a module uses a weight in an operator whose branch cannot be added to the output of the module.
    """
    copy = unshared(model, {})
    for site in sites:
        for name in (site.weight, *site.aliases):
            path, _, leaf = name.rpartition(".")
            module = copy.get_submodule(path)
            hook = _hook(module, site, factors[site.weight]) if leaf == "weight" else None
            if hook is None:
                raise StateError(
                    f"bank: generate adds adapters by hooks on modules, but {type(module).__name__} uses {name} in a "
                    "way that a hook cannot follow. Generate tokens by calls of the bank, which run graphs",
                    code="not-available",
                )
            module._forward_hooks = module._forward_hooks.copy()  # the copy must not add hooks to the original
            module.register_forward_hook(hook)
    return copy


def _hook(module: nn.Module, site: Site, pair: GivenFactors) -> Callable[..., Any] | None:
    """Return the forward hook that adds the branch of a site to the output of a module.

    None if the module computes another kind of operator than the one for which the weight was adapted.
    """
    if type(module).__name__ == "Conv1D" and site.layout == "in_out":  # a linear layer of transformers, [in, out]
        return lambda _, args, output: beside(output, args[0], pair)
    call_of_module = StoredCall("", "call_module", "", ("x",), {})  # `form_of` takes a call
    form = form_of(call_of_module, module)
    if form is None or form.layout != site.layout:
        return None
    options = dict(form.reads(call_of_module, module).options)
    if isinstance(module, nn.Embedding):
        return lambda _, args, output: at_lookup(output, args[0], pair, options["padding_idx"])
    if site.kind == "conv":
        return lambda _, args, output: beside_conv(output, args[0], pair, ConvCall(**options), site.shape)
    return lambda _, args, output: beside(output, args[0], pair)
