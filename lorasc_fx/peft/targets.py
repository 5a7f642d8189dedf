"""Finds out where peft can adapt each weight of a cascade, or why it cannot, and what it saves completely.

An adapter of peft replaces a module by a wrapper. Two things can go wrong without an error. Each is tried by running
the model on its example:

- The adapter computes when its module is called, but others read the weight without calling the module (`calls_of`).
- The module is not a plain layer of torch, so that the adapter is another function than the merged weight. Examples are
  a convolution with a dilation or another padding mode, or an embedding that does more than look up (`fault_of`, in
  fp64 on a recorded call).

Parameters trained in full are saved with their modules (`modules_to_save`), or are biases of adapted modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Factors
from lorasc_fx.check.isolation import call_recorder, isolation
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph import named_weights
from lorasc_fx.graph.forms import LIKE_ANOTHER
from lorasc_fx.parameters import substituted
from lorasc_fx.peft.format import (
    CONV1D,
    PARAMETER,
    PREFIX,
    Target,
    key_path,
    layout_of,
    parameter_layout,
    wrap_counts,
)
from lorasc_fx.plan import Site
from lorasc_fx.quantized import dense
from lorasc_fx.signature import copy_inputs


def targets_of(
    model: nn.Module, sites: Iterable[Site], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, tuple[Target, ...]], dict[str, str]]:
    """Return what peft adapts for each site's weight (several modules for a tied one), and for the others the reason.

    The model runs on the arguments, without side effects, and each module of interest once more in fp64.
    """
    sites = list(sites)
    finder = _Finder(model, calls_of(model, [site.weight for site in sites], args, kwargs))
    by_weight: dict[str, tuple[Target, ...]] = {}
    refused: dict[str, str] = {}
    for site in sites:
        targets = finder.targets(site)
        if isinstance(targets, str):
            refused[site.weight] = targets
        else:
            by_weight[site.weight] = targets
    if any(target.is_parameter for targets in by_weight.values() for target in targets):
        # peft does not accept target_parameters together with fan_in_fan_out, which Conv1D needs.
        for name, targets in by_weight.items():
            by_weight[name] = tuple(
                replace(target, layout=PARAMETER) if target.layout is CONV1D else target for target in targets
            )
    return by_weight, refused


class _Finder:
    """Finds the targets of sites, from a model's modules and a recorded run."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.calls = calls
        self.modules = dict(model.named_modules())  # by first path
        self.paths: dict[int, tuple[str, ...]] = {}  # all paths of a module, by id
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)] = (*self.paths.get(id(module), ()), path)
        self.holders: dict[str, tuple[tuple[str, str], ...]] = {}  # module path and name there, by weight
        canonical = named_weights(model).canonical
        for path, module in self.modules.items():
            for leaf, value in module._parameters.items():
                if value is not None:
                    name = canonical[f"{path}.{leaf}".lstrip(".")]
                    self.holders[name] = (*self.holders.get(name, ()), (path, leaf))
        self.encoders = [path for path, module in self.modules.items() if _has_fast_path(module)]

    def targets(self, site: Site) -> tuple[Target, ...] | str:
        """Return what peft adapts for a site's weight, or why it cannot adapt it."""
        called = [(path, leaf) for path, leaf in self.holders[site.weight] if path in self.calls.first]
        if not called:
            return self._read_by(site.weight)
        targets = []
        for path, leaf in called:
            target = self._target(site, path, leaf)
            if isinstance(target, str):
                return target
            targets.append(target)
        return self._read_by(site.weight) if site.weight in self.calls.reader else tuple(targets)

    def _target(self, site: Site, path: str, leaf: str) -> Target | str:
        module = self.modules[path]
        if len(self.paths[id(module)]) > 1:
            return f"its module has the paths {' and '.join(self.paths[id(module)])}, and peft adapts only one of them"
        if any(path.startswith(f"{encoder}.") for encoder in self.encoders):
            return "in eval mode torch's fused TransformerEncoderLayer does not call what peft adapts"
        if not path:
            return "it is a parameter of the top module, which peft cannot wrap"
        layout = layout_of(module, len(site.shape)) if leaf == "weight" else None
        if layout is not None:
            target = Target(path, leaf, layout)
            fault = fault_of(target, module, self.calls.first[path])
            if fault is None:
                return target
        elif getattr(module, "groups", 1) != 1:
            fault = "peft's adapter of a grouped convolution mixes the groups"
        else:
            fault = f"peft adapts no {type(module).__name__} of {len(site.shape)} axes"
        if len(site.shape) != 2 and not (site.kind == "experts" and site.shape[0] > 1):
            return fault
        if isinstance(module, (nn.RNNBase, ParametrizationList)):
            return f"{type(module).__name__} keeps it where peft's adapter of a parameter has no effect"
        return Target(path, leaf, parameter_layout(module, len(site.shape)))

    def _read_by(self, weight: str) -> str:
        reader = self.calls.reader.get(weight, "another module")
        return f"{reader} reads it outside of its own module, where an adapter of peft has no effect"


@dataclass(frozen=True)
class Saved:
    """What is saved besides factors.

    Args:
        modules: paths of modules that are saved completely, none inside another.
        keys: name of the parameter or buffer for each key in the file.
        biases: whether biases of adapted modules are among them.
    """

    modules: tuple[str, ...]
    keys: Mapping[str, str]
    biases: bool


def save_whole(model: nn.Module, trained: Iterable[str], targets: Sequence[Target]) -> tuple[Saved, dict[str, str]]:
    """Return what peft saves for the parameters trained in full, and the reason for each one that it cannot save.

    Args:
        model: the user's own.
        trained: names of the parameters.
        targets: what is adapted.
    """
    weights, wraps = named_weights(model), wrap_counts(targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = dict.fromkeys(target.path for target in targets)
    refused: dict[str, str] = {}
    saved_paths: dict[str, str] = {}
    biases: dict[str, str] = {}
    for parameter in trained:
        for name in weights.names[parameter]:
            path, _, leaf = name.rpartition(".")
            if path in adapted and leaf == "bias":
                depth = "base_layer." * wraps.get(path, 1)
                biases[f"{PREFIX}{key_path(path, wraps)}.{depth}bias"] = parameter
            elif not path:
                refused[parameter] = "it is a parameter of the top module, and peft saves only modules inside it"
            elif inside := next((other for other in adapted if _within(other, path)), None):
                refused[parameter] = f"its module holds {inside}, which is adapted, and peft saves complete modules"
            elif any(_within(path, other) for other in wraps):
                refused[parameter] = "peft wraps a module above it, and then does not find it"
            else:
                saved_paths.setdefault(path, parameter)
    for path in modules:  # peft saves every module whose path ends like this
        meant = next((other for other in saved_paths if path.endswith(other) and path != other), None)
        if meant is None or path in saved_paths:
            continue
        if any(_within(other, path) or _within(path, other) for other in adapted):
            refused[saved_paths[meant]] = f"{meant} also means {path} to peft, which is adapted"
        else:
            saved_paths[path] = saved_paths[meant]
    outer = tuple(
        path for path in saved_paths if not any(_within(path, other) for other in saved_paths if other != path)
    )
    for path in outer:
        hidden = next((other for other in adapted if re.match(rf"(^|.*\.){path}($|\..*)", other)), None)
        if hidden is not None:
            refused[saved_paths[path]] = f"saving {path} excludes {hidden} from what peft adapts"
    keys = {
        f"{PREFIX}{path}.{name}": f"{path}.{name}"
        for path in outer
        for name in modules[path].state_dict(keep_vars=True)
    }
    named = {key: weights.canonical.get(name, name) for key, name in keys.items()}
    return Saved(outer, {**named, **biases}, bool(biases)), refused


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _has_fast_path(module: nn.Module) -> bool:
    """Whether torch's fused implementation may run instead of the modules inside this one."""
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


# ---- whether an adapter does the same as the delta of its weight, found by running the model


Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of one call of a module."""


class Calls(TorchFunctionMode):
    """Records the calls of modules, and which modules are running when torch computes a tensor from a weight.

    Args:
        names: of the weights, by id.

    Attributes:
        first: the first call of each module that holds one of the weights, by its first path.
        reader: class of a module that read a weight while no module that holds it was running, by weight.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.first: dict[str, Call] = {}
        self.reader: dict[str, str] = {}
        self._names, self._stack = names, list[nn.Module]()

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record the start of a call."""
        self._stack.append(module)
        if path not in self.first and any(id(value) in self._names for value in module._parameters.values()):
            self.first[path] = copy_inputs(args, kwargs)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        """Record the end of a call."""
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs or {})
        weights = [leaf for leaf in pytree.tree_leaves(read) if id(leaf) in self._names]
        if not weights or name == "requires_grad_":
            return output
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output)):
            held = {id(value) for module in self._stack for value in module._parameters.values()}
            reader = type(self._stack[-1]).__name__ if self._stack else "the model"
            for weight in weights:
                if id(weight) not in held:
                    self.reader.setdefault(self._names[id(weight)], reader)
        return output


def calls_of(model: nn.Module, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Run the model once, without side effects, and return who read the parameters of these names."""
    parameters = dict(model.named_parameters())
    calls = Calls({id(parameters[name]): name for name in names})
    recorder = call_recorder(model, calls.enter, calls.leave)
    with isolation(model, args, kwargs, calls, recorder, grad=False, seeded=False) as (inputs, named):
        model(*inputs, **named)
    return calls


def fault_of(target: Target, module: nn.Module, call: Call) -> str | None:
    """Return what is wrong with peft's adapter of a target, for a message, or None.

    Args:
        target: a module that peft adapts by its name.
        module: the module.
        call: arguments that the module was called with.
    """
    # On the host, because some accelerators (MPS) have no fp64.
    values = {name: value.cpu() for name, value in module.named_buffers()}
    values |= {name: dense(value.detach()).cpu().double() for name, value in module.named_parameters()}
    weight = values[target.leaf]
    shapes = (weight.shape[0], 2), (2, math.prod(weight.shape[1:]))
    source = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes)
    pair = Factors(b, a)
    delta = (pair.b @ pair.a).view(weight.shape)
    try:
        with quiet(grad=False):  # building peft's layers draws random numbers, and may warn
            base = _run(module, values, call)
            full = _run(module, values | {target.leaf: weight + delta}, call)
            adapted = base + _term(target, module, pair, weight, _wide(call)[0][0])
            moved, gap = (float((full - other).abs().max()) for other in (base, adapted))
    except Exception as fault:  # whatever the module's own code raises, peft's adapter would fail likewise
        return f"peft's adapter of {type(module).__name__} cannot be tested: {type(fault).__name__}: {fault}"
    if gap <= 1e-6 * moved + 1e-12 * float(full.abs().max()):
        return None
    return (
        f"peft's adapter of this {type(module).__name__} does not compute what its merged weight would "
        f"(off by {gap / moved if moved else math.inf:.2g} of the change)"
    )


def _run(module: nn.Module, values: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    with isolation(module, *_wide(call), substituted(module, values), grad=False) as (inputs, named):
        output = module(*inputs, **named)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it returns {type(output).__name__}, not a tensor")
    return output


def _wide(call: Call) -> Call:
    """Return copies of a call's arguments on the host, with floating-point tensors in fp64."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.cpu().double() if leaf.is_floating_point() else leaf.cpu()

    widened: Call = pytree.tree_map(widen, copy_inputs(*call))
    return widened


def _term(target: Target, module: nn.Module, pair: Factors, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return what peft's layer adds to the module's output, built as peft builds it."""
    lora_a, lora_b = target.layout.to_peft(pair, weight.shape)
    if isinstance(module, nn.Embedding):
        looked_up = F.embedding(
            x,
            lora_a.t(),
            module.padding_idx,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
            module.sparse,
        )
        scale = getattr(module, "embed_scale", None)
        return looked_up @ lora_b.t() * (1.0 if scale is None else scale)
    if target.layout.is_conv:
        kind: Any = type(module)
        out, rank, *ones = lora_b.shape
        down = kind(weight.shape[1], rank, module.kernel_size, module.stride, module.padding, bias=False)
        up = kind(rank, out, tuple(ones), tuple(ones), bias=False)
        with substituted(down, {"weight": lora_a}), substituted(up, {"weight": lora_b}):
            term: torch.Tensor = up(down(x))
            return term
    return F.linear(F.linear(x, lora_a), lora_b)
