"""The weights of a graph module: their names, their ties, and the memory that they share.

A child owns them (the live model), or the graph module itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.branch import Branch
from lorasc_fx.graph.record import Record
from lorasc_fx.shards import local

BRANCHES = "branches"
"""Name of the child of a graph module that holds the branches. It does not belong to the model."""


@dataclass(frozen=True)
class Weights:
    """Parameters by name, each once, with all names of each.

    Args:
        parameters: by their first name.
        names: all names of each parameter, the first one first.
        canonical: the first name, by every name.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[str, tuple[str, ...]]
    canonical: dict[str, str]

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """Names of the weight matrices: parameters of two axes or more."""
        return {name: names for name, names in self.names.items() if self.parameters[name].dim() > 1}


def named_weights(owner: nn.Module) -> Weights:
    """Return the parameters of a module without those of inserted branches."""
    first_names: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    names: dict[str, list[str]] = {}
    canonical: dict[str, str] = {}
    ours = f"{BRANCHES}." if isinstance(owner, fx.GraphModule) and held_branches(owner) is not None else None
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        if ours is not None and name.startswith(ours):
            continue
        canonical_name = first_names.setdefault(id(parameter), name)
        parameters.setdefault(canonical_name, parameter)
        names.setdefault(canonical_name, []).append(name)
        canonical[name] = canonical_name
    return Weights(parameters, {name: tuple(ties) for name, ties in names.items()}, canonical)


def held_branches(graph_module: nn.Module) -> dict[str, Branch] | None:
    """Return the branches of a graph module, by key. None without such a child, or if the child is the model's.

    A graph module that was made from the graph of another one has a plain module instead of a ModuleDict.
    """
    holder = graph_module._modules.get(BRANCHES)
    if type(holder) not in (nn.ModuleDict, nn.Module) or holder is None or holder._parameters or holder._buffers:
        return None
    branches = {key: branch for key, branch in holder._modules.items() if isinstance(branch, Branch)}
    ours = len(branches) == len(holder._modules) and (branches or isinstance(holder, nn.ModuleDict))
    return branches if ours else None


def owner_of(graph_module: fx.GraphModule, record: Record) -> nn.Module:
    """Return the module that owns the weights of the graph."""
    return graph_module.get_submodule(record.owner) if record.owner else graph_module


def module_at(root: nn.Module, target: str) -> nn.Module | None:
    """Return the module of this dotted name, or None."""
    module: nn.Module | None = root
    for part in target.split("."):  # the dictionaries of a script module have no `get`
        module = module._modules[part] if module is not None and part in module._modules else None
    return module


def scripted_weights(owner: nn.Module) -> dict[str, str]:
    """Return the parameters in TorchScript modules, each with the path of the outermost such module."""
    paths: dict[str, str] = {}
    for path, module in owner.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            for leaf, _ in module.named_parameters(remove_duplicate=False):
                paths.setdefault(f"{path}.{leaf}".lstrip("."), path)
    return paths


@dataclass(frozen=True)
class Memory:
    """The memory of a strided tensor. Equal for equal views.

    Args:
        device, dtype, shape, stride: of the tensor.
        start: address of the first entry.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory | None:
        """Return the memory of a tensor; None if it has none (meta, quantized, sparse, empty)."""
        bare = local(tensor.detach())
        if is_traceable_wrapper_subclass(bare) or isinstance(bare, FakeTensor):
            return None
        if bare.layout is not torch.strided or bare.is_meta or not bare.numel():
            return None
        return cls(bare.device, bare.dtype, tuple(bare.shape), bare.stride(), bare.data_ptr())

    @property
    def end(self) -> int:
        """Address after the last entry."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the entries fill the memory from start to end."""
        return self.end - self.start == math.prod(self.shape) * self.dtype.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Whether two entries share one address, as in an expanded tensor."""
        axes = sorted((stride, size) for size, stride in zip(self.shape, self.stride, strict=True) if size > 1)
        reach = 0
        for stride, size in axes:
            if stride == 0:
                return True
            if stride <= reach:
                return int(self._mark(self.start, self.end).sum()) < math.prod(self.shape) * self.dtype.itemsize
            reach += (size - 1) * stride
        return False

    def overlaps(self, other: Memory) -> bool:
        """Whether an entry of one shares bytes with an entry of the other."""
        first, last = max(self.start, other.start), min(self.end, other.end)
        if self.device != other.device or first >= last:
            return False
        if self.is_dense and other.is_dense and not (self.overlaps_itself or other.overlaps_itself):
            return True
        low, high = min(self.start, other.start), max(self.end, other.end)
        return bool((self._mark(low, high) & other._mark(low, high)).any())

    def _mark(self, low: int, high: int) -> torch.Tensor:
        """Return for each byte from `low` to `high` whether it belongs to an entry."""
        size = self.dtype.itemsize
        marks = torch.zeros(high - low, dtype=torch.bool, device="cpu")
        strides = (*(stride * size for stride in self.stride), 1)
        marks.as_strided((*self.shape, size), strides, self.start - low).fill_(True)
        return marks


def shared_memory(model: nn.Module) -> dict[str, str]:
    """Return the parameters that share memory with another tensor of the model, or overlap themselves, and why.

    A write into such a parameter changes another tensor. A tie, one Parameter in two places, does not count.
    """
    parameters = dict(model.named_parameters())
    tensors = [*parameters.items(), *model.named_buffers(), *_plain_attributes(model)]
    memories = [(memory, name) for name, value in tensors if (memory := Memory.of(value))]
    memories.sort(key=lambda item: (str(item[0].device), item[0].start))
    sentences: dict[str, str] = {}
    before: list[tuple[Memory, str]] = []
    for memory, name in memories:
        if name in parameters and memory.overlaps_itself:
            sentences.setdefault(name, "is expanded: several of its entries share one address")
        before = [item for item in before if item[0].device == memory.device and item[0].end > memory.start]
        for other, other_name in before:
            if memory.overlaps(other):
                for one, two in ((name, other_name), (other_name, name)):
                    if one in parameters:
                        sentences.setdefault(one, f"shares memory with {two}: a fold of it would change both")
        before.append((memory, name))
    return sentences


def _plain_attributes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that modules hold as plain attributes, or in a list, tuple or dict that is one.

    Skips attributes that a forward pre-hook computes before each call, which `torch.nn.utils.spectral_norm` makes
    aliases of the parameter until then.
    """
    for prefix, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        computed = [getattr(hook, "name", None) for hook in hooks]  # torch.nn.utils names the attribute so
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or name in computed:
                continue
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            for tensor in items:
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                    yield f"{prefix}.{name}".removeprefix("."), tensor
