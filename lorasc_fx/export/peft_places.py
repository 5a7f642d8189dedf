"""Where peft can adapt each weight of a cascade, or the reason why it cannot; and what it saves of full training.

Parameters trained in full go with their modules (`modules_to_save`), or are biases of adapted modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lorasc_fx.export.peft_check import Calls, calls_of, fault_of, read_through
from lorasc_fx.export.peft_layout import PREFIX, Conv1d, Parameter, Place, key_path, layout_of, wrap_counts
from lorasc_fx.graph import named_weights
from lorasc_fx.plan import Site

__all__ = ["Saved", "places_of", "save_whole"]


def places_of(
    model: nn.Module, sites: Iterable[Site], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, tuple[Place, ...]], dict[str, str]]:
    """Return the places at which peft adapts each site's weight (a tied one has several), and the reasons of the rest.

    The model runs twice on the arguments, without a trace, and each module of interest once more in fp64.
    """
    sites = list(sites)
    finder = _Finder.of(model, calls_of(model, [site.weight for site in sites], args, kwargs))
    found: dict[str, tuple[Place, ...]] = {}
    refused: dict[str, str] = {}
    for site in sites:
        places = finder.places(site)
        if isinstance(places, str):
            refused[site.weight] = places
        else:
            found[site.weight] = places
    faults = read_through(model, [place.path for each in found.values() for place in each], args, kwargs)
    for name, places in list(found.items()):
        fault = next((faults[place.path] for place in places if place.path in faults), None)
        if fault is not None:
            refused[name] = fault
            del found[name]
    every = [place for places in found.values() for place in places]
    if any(place.is_parameter for place in every):  # peft takes none of them beside fan_in_fan_out
        for name, places in found.items():
            found[name] = tuple(
                replace(place, layout=Parameter()) if isinstance(place.layout, Conv1d) else place for place in places
            )
    return found, refused


@dataclass(frozen=True)
class _Finder:
    """A model's modules and what a run of it showed.

    Args:
        modules: by first path.
        paths: all paths of a module, by its identity.
        holders: by weight, the paths of the modules that hold it, and its name in each.
        encoders: paths of torch's encoder layers whose fused path passes adapters over.
        calls: of the run.
    """

    modules: Mapping[str, nn.Module]
    paths: Mapping[int, tuple[str, ...]]
    holders: Mapping[str, tuple[tuple[str, str], ...]]
    encoders: tuple[str, ...]
    calls: Calls

    @classmethod
    def of(cls, model: nn.Module, calls: Calls) -> _Finder:
        """Look at a model."""
        paths: dict[int, tuple[str, ...]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths[id(module)] = (*paths.get(id(module), ()), path)
        modules = dict(model.named_modules())
        holders: dict[str, tuple[tuple[str, str], ...]] = {}
        canonical = named_weights(model).canonical
        for path, module in modules.items():
            for leaf, value in module._parameters.items():
                if value is not None:
                    name = canonical[f"{path}.{leaf}".lstrip(".")]
                    holders[name] = (*holders.get(name, ()), (path, leaf))
        encoders = tuple(path for path, module in modules.items() if _passes_over(module))
        return cls(modules, paths, holders, encoders, calls)

    def places(self, site: Site) -> tuple[Place, ...] | str:
        """Return where peft adapts a site's weight, or why it does not."""
        called = [(path, leaf) for path, leaf in self.holders[site.weight] if path in self.calls.first]
        if not called:
            return self._read_by(site.weight)
        found = []
        for path, leaf in called:
            place = self._place(site, path, leaf)
            if isinstance(place, str):
                return place
            found.append(place)
        return self._read_by(site.weight) if site.weight in self.calls.reader else tuple(found)

    def _place(self, site: Site, path: str, leaf: str) -> Place | str:
        module = self.modules[path]
        if len(self.paths[id(module)]) > 1:
            return f"its module is held as {' and as '.join(self.paths[id(module)])}, and peft adapts one of them"
        if any(path.startswith(f"{encoder}.") for encoder in self.encoders):
            return "in eval mode torch's fused TransformerEncoderLayer does not call what peft adapts"
        if not path:
            return "it is a parameter of the top module, which peft cannot wrap"
        layout = layout_of(module, leaf, len(site.shape))
        if layout is not None:
            place = Place(path, leaf, layout)
            fault = fault_of(place, module, self.calls.first[path])
            if fault is None:
                return place
        elif getattr(module, "groups", 1) != 1:
            fault = "peft's adapter of a grouped convolution mixes the groups"
        else:
            fault = f"peft adapts no {type(module).__name__} of {len(site.shape)} axes"
        if len(site.shape) != 2 and not (site.kind == "experts" and site.shape[0] > 1):
            return fault
        if isinstance(module, (nn.RNNBase, ParametrizationList)):
            return f"{type(module).__name__} keeps it where peft's adapter of a parameter does not reach"
        return Place(path, leaf, Parameter.of(module))

    def _read_by(self, weight: str) -> str:
        reader = self.calls.reader.get(weight, "another module")
        return f"{reader} reads it from outside its own module, where no adapter of peft computes"


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


def save_whole(model: nn.Module, trained: Iterable[str], places: Sequence[Place]) -> tuple[Saved, dict[str, str]]:
    """Return what peft saves for the parameters trained in full, and the reasons of those that it cannot.

    Args:
        model: the user's own.
        trained: names of the parameters.
        places: that are adapted.
    """
    weights, wraps = named_weights(model), wrap_counts(places)
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


def _passes_over(module: nn.Module) -> bool:
    """Whether torch's fused path may run in place of the modules inside this one."""
    if not isinstance(module, nn.TransformerEncoderLayer) or (
        "forward" in vars(type(module)) and (type(module).forward is not nn.TransformerEncoderLayer.forward)
    ):
        return False
    attention: Any = module.self_attn
    return bool(
        attention.batch_first
        and attention.in_proj_bias is not None
        and module.activation_relu_or_gelu
        and module.norm1.eps == module.norm2.eps
        and attention.num_heads % 2 == 0
    )
