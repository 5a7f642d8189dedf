"""The autograd graph behind the outputs of a run, as plain data.

The gradients follow from the nodes, the values that they have saved, and their connections. So two runs with equal
descriptions have equal gradients, bit for bit, and no backward pass has to run. There is no description of a node whose
class is not torch's, or that saves something that Python cannot read. Hooks do not show: the caller checks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lorasc_fx.util.fingerprint import checksum

Description = tuple[Any, ...]
"""Equal for graphs that compute the same."""

_OPAQUE = ("AsStrided", "BlockDiag", "CopySlices", "DelayedError", "Error", "MkldnnRnn", "NativeDropout", "ToDense")
"""Prefixes of the names of nodes that do not show everything they have saved."""
_SAME_SHAPE = {f"{name}Backward0" for name in ("Expand", "ReshapeAlias", "Slice", "UnsafeView", "View")}
"""Nodes that pass the gradient on unchanged if they change no size. Tracers add such nodes, for example `x[:]`."""
_SAME_BACKWARD = {"ReshapeAliasBackward0": "ViewBackward0"}
"""Nodes with the same backward: under a dispatch mode, torch records `reshape` as a view."""
_SIZES = "_saved_self_sym_sizes"
_ALIAS = "AliasBackward0"


class _NotVisible(Exception):
    """A node has saved something that cannot be compared."""


def describe(
    outputs: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Description | None:
    """Return a description of the graph behind some tensors, or None if a part of it is not visible.

    Args:
        outputs: where a backward pass would start.
        parameters: by name. No run writes into them, so saved views of them are described by name, and all other
            tensors by a checksum.
        inputs: other leaves, by name.
    """
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # modes must not see what happens here
            return _Describer(parameters, inputs).graph(outputs)
    except (_NotVisible, RuntimeError):  # torch raises for a saved tensor that was written in place since
        return None


class _Describer:
    """Numbers nodes in the order in which they are reached from the outputs, and reads each once."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        self._names = {id(leaf): name for name, leaf in (*inputs.items(), *parameters.items())}
        self._memory: dict[int, Any] = {
            leaf.untyped_storage().data_ptr(): name for name, leaf in parameters.items() if type(leaf) in _PLAIN
        }
        self._alive: list[torch.UntypedStorage] = []  # an address is valid only while its memory lives

    def graph(self, outputs: Sequence[torch.Tensor]) -> Description:
        numbers: dict[Any, int] = {}
        roots: list[Any] = []
        waiting: list[Any] = []

        def edge(node: Any, index: int) -> Any:
            while node is not None and (after := _passes_on(node)) is not None:
                node, index = after
            if node is None:
                return None
            if node not in numbers:
                numbers[node] = len(numbers)
                waiting.append(node)
            return numbers[node], index

        described = []
        for output in outputs:
            node = output.grad_fn
            roots.append(edge(node, output.output_nr) if node is not None else self._names.get(id(output)))
        while waiting:
            node = waiting.pop()
            edges = tuple([edge(*after) for after in node.next_functions])
            described.append((numbers[node], *self._node(node), edges))
        return tuple(roots), tuple(described)

    def _node(self, node: Any) -> tuple[Any, ...]:
        kind = type(node)
        name = kind.__name__
        if getattr(torch._C._functions, name, None) is not kind or name.startswith(_OPAQUE):
            raise _NotVisible(name)
        if name.startswith("Cat") and any(after is None for after, _ in node.next_functions):
            raise _NotVisible(name)  # the size of an input without a gradient is hidden
        takes = tuple([(tuple(taken.shape), taken.dtype, taken.device) for taken in node._input_metadata])
        if (variable := getattr(node, "variable", None)) is not None:
            if variable._backward_hooks:
                raise _NotVisible("a hook")
            return name, takes, self._names.get(id(variable))
        saved = tuple([self._value(getattr(node, key)) for key in dir(kind) if key.startswith("_saved_")])
        return _SAME_BACKWARD.get(name, name), takes, saved

    def _value(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return type(value), repr(value)
        plain = type(value) in _PLAIN and value.layout is torch.strided
        if not plain or value.is_nested or value.is_meta:
            raise _NotVisible(type(value).__name__)
        tensor = value.detach()
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._memory:
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._memory[address] = (storage.nbytes(), checksum(memory))
            self._alive.append(storage)
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        return (*layout, tensor.is_conj(), tensor.is_neg(), self._memory[address])


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _passes_on(node: Any) -> tuple[Any, int] | None:
    """Return the next node if this one passes its gradient on unchanged, otherwise None."""
    name = type(node).__name__
    if name not in (*_SAME_SHAPE, _ALIAS) or len(node.next_functions) != 1 or len(node._input_metadata) != 1:
        return None
    same = name == _ALIAS or tuple(getattr(node, _SIZES, ())) == tuple(node._input_metadata[0].shape)
    after: tuple[Any, int] = node.next_functions[0]
    return after if same and after[0] is not None else None
