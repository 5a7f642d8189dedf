"""The weights of a graph module: names, tied weights, and shared memory.

The owner of the weights is a child of the graph module (the live model) or the graph module itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.branch import Branch
from lorasc_fx.graph.record import Record
from lorasc_fx.shards import local
from lorasc_fx.util.torch_private import FakeTensor

BRANCHES = "branches"
"""Name of the child of a graph module that contains the branches. It is not part of the model."""


@dataclass(frozen=True)
class Weights:
    """The parameters of a module. A tied parameter occurs once and has several names.

    Args:
        parameters: {first name: parameter}.
        names: {first name: all names of the parameter, in the order of `named_parameters`}.
        canonical: {any name of a parameter: its first name}.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[str, tuple[str, ...]]
    canonical: dict[str, str]

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """{first name: all names} of the parameters with two or more axes."""
        return {name: names for name, names in self.names.items() if self.parameters[name].dim() > 1}


def named_weights(owner: nn.Module) -> Weights:
    """Return the parameters of a module, without the parameters of inserted branches."""
    first_names: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    names: dict[str, list[str]] = {}
    canonical: dict[str, str] = {}
    has_branches = isinstance(owner, fx.GraphModule) and branches_in(owner) is not None
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        if has_branches and name.startswith(f"{BRANCHES}."):
            continue
        canonical_name = first_names.setdefault(id(parameter), name)
        parameters.setdefault(canonical_name, parameter)
        names.setdefault(canonical_name, []).append(name)
        canonical[name] = canonical_name
    return Weights(parameters, {name: tuple(ties) for name, ties in names.items()}, canonical)


def branches_in(graph_module: nn.Module) -> dict[str, Branch] | None:
    """Return {key: branch} for a graph module, or None if it has no branches.

    A child `branches` that contains anything else belongs to the user's model, and gives None too.
    """
    holder = graph_module._modules.get(BRANCHES)
    # `fx.GraphModule(root, graph)` copies the ModuleDict as a plain Module.
    if type(holder) not in (nn.ModuleDict, nn.Module) or holder is None or holder._parameters or holder._buffers:
        return None
    branches = {key: branch for key, branch in holder._modules.items() if isinstance(branch, Branch)}
    only_branches = len(branches) == len(holder._modules) and (branches or isinstance(holder, nn.ModuleDict))
    return branches if only_branches else None


def owner_of(graph_module: fx.GraphModule, record: Record) -> nn.Module:
    """Return the module that owns the weights of the graph: the live model, or the graph module itself."""
    return graph_module.get_submodule(record.owner) if record.owner else graph_module


def module_at(root: nn.Module, target: str) -> nn.Module | None:
    """Return the submodule with a dotted name, or None if there is none."""
    module: nn.Module | None = root
    for part in target.split("."):  # `_modules` of a TorchScript module has no `get`
        module = module._modules[part] if module is not None and part in module._modules else None
    return module


def called_module(node: fx.Node) -> nn.Module | None:
    """Return the module that a `call_module` node calls, or None for another node or a graph without a module."""
    owner = node.graph.owning_module
    return module_at(owner, str(node.target)) if owner is not None and node.op == "call_module" else None


def scripted_weights(owner: nn.Module) -> dict[str, str]:
    """Return {name of a parameter inside TorchScript: path of the outermost TorchScript module that contains it}."""
    paths: dict[str, str] = {}
    for path, module in owner.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            for leaf, _ in module.named_parameters(remove_duplicate=False):
                paths.setdefault(f"{path}.{leaf}".lstrip("."), path)
    return paths


@dataclass(frozen=True)
class Memory:
    """The location and layout of a strided tensor in memory. Two equal views of one tensor have equal locations."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory | None:
        """Return the location of a tensor, or None for a quantized, sparse, fake or empty one."""
        bare = local(tensor.detach())
        if is_traceable_wrapper_subclass(bare) or isinstance(bare, FakeTensor):
            return None
        if bare.layout is not torch.strided or not bare.numel():
            return None
        return cls(bare.device, bare.dtype, tuple(bare.shape), bare.stride(), bare.data_ptr())

    @property
    def end(self) -> int:
        """Address of the first byte after the last entry."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Whether the tensor has more entries than addresses, like an expanded tensor."""
        return math.prod(self.shape) * self.dtype.itemsize > self.end - self.start


def shared_memory(model: nn.Module) -> dict[str, str]:
    """Return {name: sentence} for parameters that share memory with another tensor of a model or with themselves.

    A fold into such a parameter would also change the other tensor or entry. Tensors share memory if their ranges of
    addresses overlap. A tied weight, which is one Parameter with two names, does not count.
    """
    parameters = dict(model.named_parameters())
    tensors = [*parameters.items(), *model.named_buffers(), *_plain_attributes(model)]
    memories = [(memory, name) for name, value in tensors if (memory := Memory.of(value))]
    memories.sort(key=lambda item: (str(item[0].device), item[0].start))
    sentences: dict[str, str] = {}
    # Visit the tensors in the order of their addresses. `active` has the earlier ones that overlap the current one.
    active: list[tuple[Memory, str]] = []
    for memory, name in memories:
        if name in parameters and memory.overlaps_itself:
            sentences.setdefault(name, "is expanded: several of its entries share one address")
        active = [item for item in active if item[0].device == memory.device and item[0].end > memory.start]
        for _, earlier_name in active:
            for parameter, tensor in ((name, earlier_name), (earlier_name, name)):
                if parameter in parameters:
                    sentences.setdefault(parameter, f"shares memory with {tensor}: a fold of it would change both")
        active.append((memory, name))
    return sentences


def _plain_attributes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, tensor) for plain attributes of modules that are tensors or lists, tuples or dicts of tensors.

    Skips attributes that a forward pre-hook recomputes in each call. `torch.nn.utils.spectral_norm` makes them aliases
    of the parameter until the first call.
    """
    for prefix, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        computed = [getattr(hook, "name", None) for hook in hooks]  # hooks of torch.nn.utils have the attribute's name
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or name in computed:
                continue
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            for tensor in items:
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                    yield f"{prefix}.{name}".removeprefix("."), tensor
