"""A description of the autograd graph of a run as plain data. Runs with equal descriptions have equal gradients.

The gradients are determined by the nodes of the graph, their saved tensors, and their edges. So if two descriptions are
equal, the gradients are equal (bit for bit, except for grouped products), and no backward pass needs to run. A graph
has no description if it contains an autograd.Function of the user, or a node with saved values that Python cannot read.
A description does not contain hooks: the caller has to check for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes

from lorasc_fx.util.fingerprint import checksum
from lorasc_fx.util.torch_private import DisableTorchFunction, autograd_nodes

Description = tuple[Any, ...]
"""Nested tuples, which are compared by `==`."""

_OPAQUE = ("AsStrided", "BlockDiag", "CopySlices", "DelayedError", "Error", "MkldnnRnn", "NativeDropout", "ToDense")
"""Prefixes of the names of nodes with saved values that Python cannot read."""
_SAME_SHAPE = {f"{name}Backward0" for name in ("Expand", "ReshapeAlias", "Slice", "UnsafeView", "View")}
"""Nodes without effect on the gradient, unless they change the shape. Tracers add some, for example for `x[:]`."""
_SAME_BACKWARD = {"ReshapeAliasBackward0": "ViewBackward0"}
"""Nodes to rename, because their backward is the same. Under a dispatch mode, torch records `reshape` as a view."""
_SIZES = "_saved_self_sym_sizes"
CUSTOM_OP = "GeneratedBackwardFor_"
"""Prefix of the names of the nodes of ops defined by `torch.library`. Each op has one class of nodes."""
_GROUPED = "GroupedMmBackward0"
_GROUPED_FALLBACK = f"{CUSTOM_OP}transformers_grouped_mm_fallback_defaultBackward"
"""Nodes of grouped products. transformers replaces the op of torch by an op of its own while a model is exported, whose
gradients are the same up to rounding."""
_ALIAS = "AliasBackward0"


class _NotReadable(Exception):
    """A node has a saved value that cannot be read or compared."""


def describe(
    outputs: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Description | None:
    """Return a description of the autograd graph of some tensors, or None if a part of the graph cannot be read.

    Args:
        outputs: the tensors from which a backward pass would start.
        parameters: leaves that forward does not write into, by name. Saved views of them are described by this name,
            which is faster than the checksum of the memory that describes any other saved tensor.
        inputs: the other leaves, by name.
    """
    try:
        with DisableTorchFunction(), _disable_current_modes():  # the modes of the caller must not observe this
            return _Describer(parameters, inputs).graph(outputs)
    except (_NotReadable, RuntimeError):  # torch raises if a saved tensor was later written in place
        return None


class _Describer:
    """Reads each node of an autograd graph once. Nodes are numbered in the order of the search from the outputs."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        self._names = {id(leaf): name for name, leaf in (*inputs.items(), *parameters.items())}
        # By address of a storage: the name of a parameter, or size and checksum of the memory.
        self._memory: dict[int, Any] = {
            leaf.untyped_storage().data_ptr(): name for name, leaf in parameters.items() if type(leaf) in _PLAIN
        }
        self._alive: list[torch.UntypedStorage] = []  # an address is valid only while its storage lives

    def graph(self, outputs: Sequence[torch.Tensor]) -> Description:
        """Return the description of the graph behind some tensors."""
        numbers: dict[Any, int] = {}
        roots: list[Any] = []
        waiting: list[Any] = []

        def edge(node: Any, index: int) -> Any:
            """Return the number of a node and the index of its output. No-op nodes are skipped."""
            while node is not None and (after := _after_no_op(node)) is not None:
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
            edges = [edge(*after) for after in node.next_functions]
            while edges and edges[-1] is None:  # the last arguments are constants; nodes of custom ops list them too
                edges.pop()
            described.append((numbers[node], *self._node(node), tuple(edges)))
        return tuple(roots), tuple(described)

    def _node(self, node: Any) -> tuple[Any, ...]:
        """Describe a node: its name, the shapes of incoming gradients, and its saved values or the name of its leaf."""
        kind = type(node)
        name = kind.__name__
        if name == _GROUPED:
            saved = node._saved_self, node._saved_mat2, node._saved_offs
            return _GROUPED, _gradients(node), self._value(saved)
        if name == _GROUPED_FALLBACK:
            return _GROUPED, _gradients(node), self._value((*node.saved_tensors, node.offs))
        if name.startswith(CUSTOM_OP) and issubclass(kind, BackwardCFunction):
            return self._custom_op(node)
        if getattr(autograd_nodes, name, None) is not kind or name.startswith(_OPAQUE):
            raise _NotReadable(name)
        if name.startswith("Cat") and any(after is None for after, _ in node.next_functions):
            raise _NotReadable(name)  # Python cannot read the size of an input that needs no gradient
        gradients = _gradients(node)
        if (variable := getattr(node, "variable", None)) is not None:  # AccumulateGrad, the node of a leaf
            if variable._backward_hooks:
                raise _NotReadable("a hook")
            return name, gradients, self._names.get(id(variable))
        saved = tuple([self._value(getattr(node, key)) for key in dir(kind) if key.startswith("_saved_")])
        return _SAME_BACKWARD.get(name, name), gradients, saved

    def _custom_op(self, node: Any) -> tuple[Any, ...]:
        """Describe the node of an op of `torch.library`: its class, and what its backward reads from the context."""
        attributes = [(name, self._value(value)) for name, value in sorted(vars(node).items())]
        saved = self._value(node.saved_tensors)
        return type(node), _gradients(node), saved, tuple(attributes)

    def _value(self, value: Any) -> Any:
        """Describe a saved value. A tensor is described by its layout, and the name or checksum of its memory."""
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            return type(value), repr(value)
        plain = type(value) in _PLAIN and value.layout is torch.strided
        if not plain or value.is_nested or value.is_meta:
            raise _NotReadable(type(value).__name__)
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


def _gradients(node: Any) -> tuple[Any, ...]:
    """Return shape, dtype and device of the gradients that a node gets."""
    return tuple([(tuple(grad.shape), grad.dtype, grad.device) for grad in node._input_metadata])


def _after_no_op(node: Any) -> tuple[Any, int] | None:
    """Return the next edge if the node passes its gradient on unchanged, otherwise None."""
    name = type(node).__name__
    if name not in (*_SAME_SHAPE, _ALIAS) or len(node.next_functions) != 1 or len(node._input_metadata) != 1:
        return None
    same = name == _ALIAS or tuple(getattr(node, _SIZES, ())) == tuple(node._input_metadata[0].shape)
    after: tuple[Any, int] = node.next_functions[0]
    return after if same and after[0] is not None else None
