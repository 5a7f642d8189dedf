"""The autograd graph behind the outputs of a run, as plain data.

What a backward pass computes is a function of its nodes, of what they have saved, and of how they are connected. So two
runs whose descriptions are equal have equal gradients, bit for bit, and neither backward pass has to be run. A node
whose class is not torch's own, or that keeps what Python does not see, has no description; nor have hooks, which the
caller has to look for.
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
"""Beginnings of the names of nodes that do not show all that they keep."""
_SAME_SHAPE = {f"{name}Backward0" for name in ("Expand", "ReshapeAlias", "Slice", "UnsafeView", "View")}
"""Nodes that hand on the gradient as it is where they change no size: tracers write `x[:]` where Python has none."""
_SAME_BACKWARD = {"ReshapeAliasBackward0": "ViewBackward0"}
"""Nodes that compute the same backward: under a dispatch mode torch records `reshape` as a view."""
_SIZES = "_saved_self_sym_sizes"
_ALIAS = "AliasBackward0"


class _NotVisible(Exception):
    """A node keeps what cannot be compared."""


def describe(
    outputs: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Description | None:
    """Return a description of the graph behind some tensors, or None where not all of it is visible.

    Args:
        outputs: from which a backward pass would begin.
        parameters: by name, into which no run writes: what is saved of their memory is told by name, and all else by
            a checksum of its values.
        inputs: other leaves, by name.
    """
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # these addresses and ops are not the model's
            return _Describer(parameters, inputs).graph(outputs)
    except (_NotVisible, RuntimeError):  # torch refuses a saved tensor that was written since, as the backward would
        return None


class _Describer:
    """Numbers nodes in the order in which they are reached from the outputs, and reads each once."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        self._names = {id(leaf): name for name, leaf in (*inputs.items(), *parameters.items())}
        self._memory: dict[int, Any] = {
            leaf.untyped_storage().data_ptr(): name for name, leaf in parameters.items() if type(leaf) in _PLAIN
        }
        self._held: list[torch.UntypedStorage] = []  # an address is only good while its memory lives

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
            raise _NotVisible(name)  # of what needs no gradient the size is hidden
        takes = tuple([(tuple(taken.shape), taken.dtype, taken.device) for taken in node._input_metadata])
        if (variable := getattr(node, "variable", None)) is not None:
            if variable._backward_hooks:
                raise _NotVisible("a hook")
            return name, takes, self._names.get(id(variable))
        saved = tuple([self._value(getattr(node, key)) for key in _saved(kind)])
        return _SAME_BACKWARD.get(name, name), takes, saved

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return type(value), repr(value)
        raise _NotVisible(type(value).__name__)

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise _NotVisible(type(tensor).__name__)
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._memory:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._memory[address] = (storage.nbytes(), checksum(whole))
            self._held.append(storage)
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        return (*layout, tensor.is_conj(), tensor.is_neg(), self._memory[address])


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _saved(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]


def _passes_on(node: Any) -> tuple[Any, int] | None:
    """Return where a node hands on its gradient unchanged; None for any other node."""
    name = type(node).__name__
    if name not in (*_SAME_SHAPE, _ALIAS) or len(node.next_functions) != 1 or len(node._input_metadata) != 1:
        return None
    same = name == _ALIAS or tuple(getattr(node, _SIZES, ())) == tuple(node._input_metadata[0].shape)
    after: tuple[Any, int] = node.next_functions[0]
    return after if same and after[0] is not None else None
