"""Tell whether a model runs the same operators in train and eval mode, so that one graph serves both.

Equal outputs are not enough: a new model may have two biases of zeros, one for each mode. So the two executions must
call the same operators with the same arguments, where each tensor is the same parameter, buffer, input or earlier
result. Then a trace of each mode would give the same graph for inputs of these sizes. A model that reads the values of
tensors can be traced only if it does not read them during the trace. So the graph of the first mode must have no
operator that depends on values (`is_data_dependent`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lorasc_fx.check.guards import Guards
from lorasc_fx.check.observe import Observed, attempt, difference_of, observe, tensors_in
from lorasc_fx.check.preflight import Preflight, generators, trial
from lorasc_fx.check.process_state import ObserverMode
from lorasc_fx.signature import is_opaque_leaf, leaves
from lorasc_fx.util.torch_private import has_storage

_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def is_data_dependent(graph: fx.Graph) -> bool:
    """Whether an operator of a graph returns a number, or a tensor of a shape, that depends on values of tensors."""
    return any(not _DATA_DEPENDENT.isdisjoint(getattr(node.target, "tags", ())) for node in graph.nodes)


def same_in_current_mode(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], captured: Guards
) -> tuple[Guards, Observed] | None:
    """Compare an execution in the current mode with one in the mode of a capture. Leaves the model unchanged.

    Args:
        model: the model. The parameters that training changes must require gradients.
        args, kwargs: arguments of the call.
        captured: guards of the capture, in another mode.

    Returns:
        (guards on the current state, record of the execution in the current mode). None if the executions differ, or if
        state other than the modes of modules has changed since the capture.
    """
    with captured.modes_restored():
        if not captured.hold():
            return None
        before = _record(model, args, kwargs, captured)
    current = captured.renewed(model)
    after = before and _record(model, args, kwargs, current)
    if before is None or after is None or before[0] != after[0]:
        return None
    return None if difference_of(after[1], before[1]) is not None else (current, after[1])


def _record(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], guards: Guards
) -> tuple[_Operators, Observed] | None:
    """Run the model, and return its operators and results. None if no graph could replace this execution."""
    operators = _Operators(model)
    with trial(model, torch.is_grad_enabled()):
        seen, _ = attempt(observe, operators.record, model, args, kwargs, gradients=False)
        operators.calls.append(generators())
        if seen is None or not guards.hold() or Preflight(seen).obstacles:
            return None
    return operators, seen


class _Operators(ObserverMode, TorchDispatchMode):
    """Records the operators of one execution. Two records are equal if the executions compute the same from all inputs.

    Attributes:
        calls: each function of torch that the model calls, and (operator, gradient mode, arguments) of each operator,
            then the output. A tensor is described by its name, or by the operator that returned it.
        constants: copies of the tensors that have neither a name nor an operator, such as constants in Python code.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self.calls: list[Any] = []
        self.constants: list[torch.Tensor] = []
        self._tensors = WeakTensorKeyDictionary()
        self._storages: dict[int, str] = {}

    def record(self, *args: object, **kwargs: object) -> Any:
        """Run the model, and record its operators."""
        inputs = {f"input {index}": leaf for index, leaf in enumerate(leaves(args, kwargs))}
        for name, value in [*self._model.named_parameters(), *self._model.named_buffers(), *inputs.items()]:
            if isinstance(value, torch.Tensor):
                self._tensors[value] = name
                if has_storage(value):
                    self._storages.setdefault(value.untyped_storage()._cdata, name)
        with self, _Functions(self):
            output = self._model(*args, **kwargs)
        self.calls += [self.described(output), [self._tensor(value) for value in tensors_in(output)]]
        return output

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, torch.is_grad_enabled(), self.described((args, kwargs or {}))))
        output = func(*args, **(kwargs or {}))
        for index, value in enumerate(pytree.tree_leaves(output)):
            if isinstance(value, torch.Tensor) and value not in self._tensors:
                self._tensors[value] = (len(self.calls), index)
        return output

    def described(self, values: object) -> Any:
        """Return (structure of a pytree, [description of each leaf])."""
        flat, spec = pytree.tree_flatten(values, is_leaf=is_opaque_leaf)
        return spec, [self._tensor(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf) for leaf in flat]

    def _tensor(self, tensor: torch.Tensor) -> Any:
        """Describe a tensor: by its name, by the call that returned it, as a view of a named tensor, or as constant."""
        if tensor not in self._tensors:
            storage = tensor.untyped_storage()._cdata if has_storage(tensor) else None
            if storage in self._storages:
                layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
                return self._storages[storage], *layout
            self._tensors[tensor] = ("constant", len(self.constants))
            self.constants.append(tensor.detach().clone())
        return self._tensors[tensor]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Operators) or len(self.constants) != len(other.constants):
            return False
        return self.calls == other.calls and all(
            one.dtype == two.dtype and torch.equal(one, two)
            for one, two in zip(self.constants, other.constants, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


_TENSOR: Any = torch.Tensor
_UNKNOWN = (
    _TENSOR.register_hook,
    _TENSOR.register_post_accumulate_grad_hook,
    _TENSOR.grad_fn.__get__,
    _TENSOR.requires_grad_,
    _TENSOR.requires_grad.__set__,
    _TENSOR.data.__set__,
)
"""Functions that may change values or gradients without an operator. Executions that call one are never equal."""


class _Functions(ObserverMode, TorchFunctionMode):
    """Records the functions of torch that a model calls. Some functions read values without calling an operator."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self._operators.calls.append(object() if func in _UNKNOWN else func)
        return func(*args, **(kwargs or {}))
