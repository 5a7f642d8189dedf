"""Finds out where peft can adapt each weight of a cascade, or why it cannot, by running the model on its example.

An adapter of peft wraps a module. It computes something else than the merged weight in two cases: another module reads
the weight (found by `Calls`), or peft's layer differs from the module (`fault_of` compares it unmerged and merged).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.check.isolation import call_recorder, isolation
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph import named_weights
from lorasc_fx.graph.copies import unshared
from lorasc_fx.graph.forms import LIKE_ANOTHER
from lorasc_fx.peft.mirror import ADAPTER
from lorasc_fx.plan import Site
from lorasc_fx.quantized import dense
from lorasc_fx.signature import copy_inputs
from lorasc_fx.util.environment import module_of

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of one call of a module."""


class Target(NamedTuple):
    """A parameter that peft adapts.

    Args:
        path: path of the module that holds it.
        leaf: name of the parameter in that module.
        named: whether peft adapts the parameter by its name (`target_parameters`). Otherwise peft wraps the module.
    """

    path: str
    leaf: str
    named: bool

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.leaf}"


class Calls(TorchFunctionMode):
    """Records the calls of modules, and the reads of weights outside of the modules that hold them.

    Args:
        names: {id of a weight: its name}.

    Attributes:
        first: {path: arguments of the first call} of the modules that hold one of the weights.
        reader: {weight name: class of a module that read the weight while no module that holds it was running}.
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

    def leave(self, path: str, module: nn.Module, output: object) -> None:
        """Record the end of a call."""
        self._stack.pop()

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
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


def calls_of(model: nn.Module, names: Iterable[str], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Calls:
    """Run the model once, without side effects, and record the reads of these parameters."""
    parameters = dict(model.named_parameters())
    calls = Calls({id(parameters[name]): name for name in names})
    recorder = call_recorder(model, calls.enter, calls.leave)
    with isolation(model, args, kwargs, calls, recorder, grad=False, seeded=False) as (inputs, named):
        model(*inputs, **named)
    return calls


def targets_of(
    model: nn.Module, sites: Iterable[Site], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[dict[str, tuple[Target, ...]], dict[str, str]]:
    """Return {weight name: peft's targets}, and {weight name: reason} for the weights that peft cannot adapt.

    A tied weight has several targets. The model runs once on the arguments, without side effects.
    """
    sites, targets_by_module, refused = list(sites), dict[str, tuple[Target, ...]](), dict[str, str]()
    calls = calls_of(model, [site.weight for site in sites], args, kwargs)
    names, paths = named_weights(model).names, dict[int, list[str]]()
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    fused = tuple(f"{path}." for path, module in model.named_modules() if _has_fast_path(module))
    for site in sites:
        results: list[Target | str] = []
        for name in names[site.weight]:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if path not in calls.first:
                continue
            if len(paths[id(module)]) > 1:
                both = " and ".join(paths[id(module)])
                results.append(f"its module has the paths {both}, and peft adapts only one of them")
            elif path.startswith(fused):
                results.append(
                    "in eval mode, torch's fused TransformerEncoderLayer does not call the modules that peft adapts"
                )
            else:
                results.append(_target(site, path, leaf, module, calls.first[path]))
        reasons = [result for result in results if isinstance(result, str)]
        if not reasons and (not results or site.weight in calls.reader):
            reader = calls.reader.get(site.weight, "another module")
            reasons = [
                f"{reader} reads it without calling the module that holds it, so that an adapter of peft has no effect"
            ]
        if reasons:
            refused[site.weight] = reasons[0]
        else:
            targets_by_module[site.weight] = tuple(result for result in results if isinstance(result, Target))
    return targets_by_module, refused


def _target(site: Site, path: str, leaf: str, module: nn.Module, call: Call) -> Target | str:
    """Return the target for one name of a weight, or the reason why peft cannot adapt the weight there."""
    if not path:
        return "it is a parameter of the top module, which peft cannot wrap"
    # First choice: peft adapts the module by its path. Second: the parameter by its name (target_parameters).
    fault = fault_of(module, call) if leaf == "weight" else f"peft adapts no {leaf} of a {type(module).__name__}"
    if fault is None:
        return Target(path, leaf, named=False)
    if len(site.shape) != 2 and not (site.kind == "stacked" and site.shape[0] > 1):
        return fault
    if isinstance(module, (nn.RNNBase, ParametrizationList)):
        return f"it is a parameter of a {type(module).__name__}, where peft's target_parameters have no effect"
    return Target(path, leaf, named=True)


def _has_fast_path(module: nn.Module) -> bool:
    """Return whether torch may run a fused implementation of a module, which does not call the modules inside it."""
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


def fault_of(module: nn.Module, call: Call) -> str | None:
    """Compare peft's layer of a module, unmerged and merged, on a recorded call. Return a reason, or None if equal."""
    if getattr(module, "groups", 1) != 1:
        return "peft's adapter of a grouped convolution mixes the groups"
    peft = module_of("peft", "peft")
    args, kwargs = pytree.tree_map_only(torch.Tensor, _in_fp64, copy_inputs(*call))
    config = peft.LoraConfig(r=2, target_modules=["site"], init_lora_weights=False)
    try:
        with quiet(grad=False):  # building peft's layers draws random numbers, and may warn
            torch.manual_seed(0)
            layer: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"site": _copy_in_fp64(module)}))[
                "site"
            ].eval()
            adapted = layer(*args, **kwargs)
            layer.merge(adapter_names=[ADAPTER])
            merged = layer(*args, **kwargs)
            layer.unmerge()
            layer.enable_adapters(False)
            plain = layer(*args, **kwargs)
        change, error = (float((merged - output).abs().max()) for output in (plain, adapted))
    except Exception as fault:  # peft refuses the module, or the module's own code raises
        return f"peft adapts no {type(module).__name__}: {' '.join(str(fault).split())[:200]}"
    if error <= 1e-6 * change + 1e-12 * float(merged.abs().max()):
        return None
    return (
        f"peft's adapter of this {type(module).__name__} does not compute the same as the merged weight "
        f"(relative error of the change: {error / change if change else math.inf:.2g})"
    )


def _in_fp64(value: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the CPU, in fp64 if it is floating-point. Some accelerators (MPS) have no fp64."""
    host = dense(value.detach()).to("cpu", copy=True)
    return host.double() if host.is_floating_point() else host


def _copy_in_fp64(module: nn.Module) -> nn.Module:
    """Return a copy of a module with copies of its tensors in fp64."""
    copied = unshared(module, {})
    for inner in copied.modules():
        for name, parameter in inner._parameters.items():
            inner._parameters[name] = None if parameter is None else nn.Parameter(_in_fp64(parameter), False)
        for name, buffer in inner._buffers.items():
            inner._buffers[name] = None if buffer is None else _in_fp64(buffer)
    return copied
