"""Finds out where peft can adapt each weight of a cascade, or why it cannot, and which modules it saves completely.

An adapter of peft wraps a module. The wrapped module can silently compute something else than the merged weight, for
two reasons. Both are tested by running the model on its example:

- Another module reads the weight without calling the module that holds it, and so bypasses the adapter (`calls_of`).
- The module is not a plain layer of torch, so that peft's adapter computes another function. Examples are a convolution
  with a dilation or a padding mode, or an embedding with extra operations (`fault_of`, in fp64 on a recorded call).

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
    """Return peft's targets for the weight of each site, and the reason for each weight that peft cannot adapt.

    A tied weight has several targets. The model runs once on the arguments, without side effects. Each module that peft
    would wrap also runs in fp64.
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
    """Finds the targets of sites, from the modules of a model and a recorded run.

    Attributes:
        modules: modules by their first path.
        paths: all paths of a module, by its id.
        holders: the path of the module and the parameter's name in it, for each place that holds a weight.
        encoders: paths of modules in which torch may run a fused implementation.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.calls = calls
        self.modules = dict(model.named_modules())
        self.paths: dict[int, tuple[str, ...]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)] = (*self.paths.get(id(module), ()), path)
        self.holders: dict[str, tuple[tuple[str, str], ...]] = {}
        canonical = named_weights(model).canonical
        for path, module in self.modules.items():
            for leaf, value in module._parameters.items():
                if value is not None:
                    name = canonical[f"{path}.{leaf}".lstrip(".")]
                    self.holders[name] = (*self.holders.get(name, ()), (path, leaf))
        self.encoders = [path for path, module in self.modules.items() if _has_fast_path(module)]

    def targets(self, site: Site) -> tuple[Target, ...] | str:
        """Return peft's targets for the weight of a site, or the reason why peft cannot adapt it."""
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
        """Return the target for one place that holds a weight, or the reason why there is none."""
        module = self.modules[path]
        if len(self.paths[id(module)]) > 1:
            return f"its module has the paths {' and '.join(self.paths[id(module)])}, and peft adapts only one of them"
        if any(path.startswith(f"{encoder}.") for encoder in self.encoders):
            return "in eval mode, torch's fused TransformerEncoderLayer does not call the modules that peft adapts"
        if not path:
            return "it is a parameter of the top module, which peft cannot wrap"
        # First choice: peft adapts the module by its path. Second: the parameter by its name (target_parameters).
        layout = layout_of(module, len(site.shape)) if leaf == "weight" else None
        if layout is not None:
            target = Target(path, leaf, layout)
            fault = fault_of(target, module, self.calls.first[path])
            if fault is None:
                return target
        elif getattr(module, "groups", 1) != 1:
            fault = "peft's adapter of a grouped convolution mixes the groups"
        else:
            fault = f"peft adapts no {type(module).__name__} with a weight of {len(site.shape)} axes"
        if len(site.shape) != 2 and not (site.kind == "experts" and site.shape[0] > 1):
            return fault
        if isinstance(module, (nn.RNNBase, ParametrizationList)):
            return f"it is a parameter of a {type(module).__name__}, where peft's target_parameters have no effect"
        return Target(path, leaf, parameter_layout(module, len(site.shape)))

    def _read_by(self, weight: str) -> str:
        reader = self.calls.reader.get(weight, "another module")
        return f"{reader} reads it without calling the module that holds it, so that an adapter of peft has no effect"


@dataclass(frozen=True)
class SavedModules:
    """The modules that an adapter stores completely, in addition to its factors.

    Args:
        modules: paths of these modules. No module is inside another one.
        keys: name of the parameter or buffer for each key in the file.
        biases: whether `keys` includes biases of adapted modules.
    """

    modules: tuple[str, ...]
    keys: Mapping[str, str]
    biases: bool


def saved_modules(
    model: nn.Module, trained: Iterable[str], targets: Sequence[Target]
) -> tuple[SavedModules, dict[str, str]]:
    """Return the modules that peft must save for parameters trained in full, and the reason for each that it cannot.

    Args:
        model: the user's model.
        trained: names of the parameters.
        targets: the adapted parameters.
    """
    weights, wraps = named_weights(model), wrap_counts(targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = dict.fromkeys(target.path for target in targets)
    refused: dict[str, str] = {}
    saved_paths: dict[str, str] = {}
    biases: dict[str, str] = {}
    # Find the module of each parameter. Biases of adapted modules are stored without their module.
    for parameter in trained:
        for name in weights.names[parameter]:
            path, _, leaf = name.rpartition(".")
            if path in adapted and leaf == "bias":
                depth = "base_layer." * wraps.get(path, 1)
                biases[f"{PREFIX}{key_path(path, wraps)}.{depth}bias"] = parameter
            elif not path:
                refused[parameter] = "it is a parameter of the top module, and peft saves only modules inside it"
            elif inside := next((target for target in adapted if _within(target, path)), None):
                refused[parameter] = f"its module contains {inside}, which is adapted, and peft saves complete modules"
            elif any(_within(path, wrapped) for wrapped in wraps):
                refused[parameter] = "peft wraps a module above it, and then does not find it"
            else:
                saved_paths.setdefault(path, parameter)
    # peft also saves every module whose path ends with one of these paths.
    for path in modules:
        suffix = next((saved for saved in saved_paths if path.endswith(saved) and path != saved), None)
        if suffix is None or path in saved_paths:
            continue
        if any(_within(target, path) or _within(path, target) for target in adapted):
            refused[saved_paths[suffix]] = f"to save {suffix}, peft would also save {path}, which is adapted"
        else:
            saved_paths[path] = saved_paths[suffix]
    outermost = tuple(
        path for path in saved_paths if not any(_within(path, saved) for saved in saved_paths if saved != path)
    )
    # peft does not adapt modules that match a saved one.
    for path in outermost:
        excluded = next((target for target in adapted if re.match(rf"(^|.*\.){path}($|\..*)", target)), None)
        if excluded is not None:
            refused[saved_paths[path]] = f"if {path} is saved completely, peft does not adapt {excluded}"
    keys = {
        f"{PREFIX}{path}.{name}": f"{path}.{name}"
        for path in outermost
        for name in modules[path].state_dict(keep_vars=True)
    }
    named = {key: weights.canonical.get(name, name) for key, name in keys.items()}
    return SavedModules(outermost, {**named, **biases}, bool(biases)), refused


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _has_fast_path(module: nn.Module) -> bool:
    """Return whether torch may run a fused implementation that does not call the modules inside this one."""
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


# ---- whether an adapter computes the same as the merged weight: tested by running the model


Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of one call of a module."""


class Calls(TorchFunctionMode):
    """Records the calls of modules, and the reads of weights outside of the modules that hold them.

    Args:
        names: name of each weight by its id.

    Attributes:
        first: arguments of the first call of each module that holds one of the weights, by the module's first path.
        reader: by weight, the class of the running module when torch computed a tensor from the weight while no module
            that holds it was running.
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
            parameters = {id(value) for module in self._stack for value in module._parameters.values()}
            reader = type(self._stack[-1]).__name__ if self._stack else "the model"
            for weight in weights:
                if id(weight) not in parameters:
                    self.reader.setdefault(self._names[id(weight)], reader)
        return output


def calls_of(model: nn.Module, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Run the model once, without side effects, and record the reads of these parameters."""
    parameters = dict(model.named_parameters())
    calls = Calls({id(parameters[name]): name for name in names})
    recorder = call_recorder(model, calls.enter, calls.leave)
    with isolation(model, args, kwargs, calls, recorder, grad=False, seeded=False) as (inputs, named):
        model(*inputs, **named)
    return calls


def fault_of(target: Target, module: nn.Module, call: Call) -> str | None:
    """Compare peft's adapter of a module with the merged weight. Return the reason if they differ, otherwise None.

    Args:
        target: a module that peft adapts by its path.
        module: the module.
        call: arguments of a recorded call of the module.
    """
    # Compute on the CPU, because some accelerators (MPS) have no fp64.
    values = {name: value.cpu() for name, value in module.named_buffers()}
    values |= {name: dense(value.detach()).cpu().double() for name, value in module.named_parameters()}
    weight = values[target.leaf]
    shapes = (weight.shape[0], 2), (2, math.prod(weight.shape[1:]))
    source = torch.Generator().manual_seed(0)
    pair = Factors(*(torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes))
    delta = (pair.b @ pair.a).view(weight.shape)
    try:
        with quiet(grad=False):  # building peft's layers draws random numbers, and may warn
            base = _run(module, values, call)
            full = _run(module, values | {target.leaf: weight + delta}, call)
            adapted = base + _adapter_term(target, module, pair, weight, _in_fp64(call)[0][0])
            change, error = (float((full - output).abs().max()) for output in (base, adapted))
    except Exception as fault:  # whatever the module's own code raises, peft's adapter would fail likewise
        return f"peft's adapter of {type(module).__name__} cannot be tested: {type(fault).__name__}: {fault}"
    if error <= 1e-6 * change + 1e-12 * float(full.abs().max()):
        return None
    return (
        f"peft's adapter of this {type(module).__name__} does not compute the same as the merged weight "
        f"(relative error of the change: {error / change if change else math.inf:.2g})"
    )


def _run(module: nn.Module, values: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    with isolation(module, *_in_fp64(call), substituted(module, values), grad=False) as (inputs, named):
        output = module(*inputs, **named)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it returns {type(output).__name__}, not a tensor")
    return output


def _in_fp64(call: Call) -> Call:
    """Return copies of a call's arguments on the CPU, with floating-point tensors in fp64."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.cpu().double() if leaf.is_floating_point() else leaf.cpu()

    converted: Call = pytree.tree_map(convert, copy_inputs(*call))
    return converted


def _adapter_term(
    target: Target, module: nn.Module, pair: Factors, weight: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Compute the term that peft's adapter layer adds to the module's output, in the same way as peft."""
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
