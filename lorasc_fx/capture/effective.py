"""Make a model compute with effective weights `f(weight)`, in forward and in code that its backward runs again.

`f` is the branch of the weight: for LoRA, `W + s B A`. It is used for models that run eagerly instead of as a graph.

torch.utils.checkpoint, reversible blocks, adjoint methods and hooks run code of the model in backward, long after the
call. So `f(weight)` is computed each time that a module reads its parameter: checkpointed regions then store no copy of
it, and each inner backward has its own autograd graph. Two kinds of reads get the effective weight: reads inside a
running call, and reads in the backward of a node that a call has created. All other reads get the parameter itself.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.errors import StateError
from lorasc_fx.parameters import holders
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.undo import Undo, isolated

Effective = Callable[[torch.Tensor], torch.Tensor]

MAX_SPANS = 1 << 17
"""Maximum number of calls remembered. Autograd graphs of more calls would not fit in memory."""

_MARK = "_lorasc_effective"
"""Attribute of effective weights. Also the key under which the metadata of autograd nodes keeps a call alive."""


class _Parameters(dict[str, Any]):
    """The `_parameters` dict of one module, which returns effective weights. Pickled and copied as a plain dict.

    Args:
        parameters: the parameters of the module, by attribute name.
        sites: weight name in the model, by attribute name, of the parameters that have an effective weight.
        reader: computes the effective weights.
    """

    def __init__(self, parameters: Mapping[str, Any], sites: Mapping[str, str], reader: EffectiveWeights) -> None:
        super().__init__(parameters)
        self.sites = dict(sites)
        # Weak, because the dict may stay in a module for longer than the cascade lives.
        self.reader: ReferenceType[EffectiveWeights] = ref(reader)

    def _read(self, leaf: str, value: Any) -> Any:
        reader = self.reader() if leaf in self.sites else None
        return value if reader is None else reader.read(self.sites[leaf], value)

    def __getitem__(self, leaf: str) -> Any:
        return self._read(leaf, super().__getitem__(leaf))

    def __setitem__(self, leaf: str, value: Any) -> None:
        """Set a parameter. If the value is an effective weight, set the parameter that it was computed from.

        functional_call does this: it reads all parameters, replaces them, and writes the old values.
        """
        reader = self.reader()
        if reader is not None and getattr(value, _MARK, False) and leaf in self.sites:
            value = reader.parameters[self.sites[leaf]]
        super().__setitem__(leaf, value)

    def get(self, leaf: str, default: Any = None) -> Any:
        """Return the current value."""
        return self._read(leaf, super().get(leaf, default))

    def items(self) -> Any:
        """Return names and current values, each computed lazily."""
        return ((leaf, self._read(leaf, value)) for leaf, value in super().items())

    def values(self) -> Any:
        """Return the current values, each computed lazily."""
        return (value for _, value in self.items())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))


class _Call:
    """One call of the model.

    Autograd numbers the nodes that a thread creates. A call owns the nodes from `begin` up to, but not including,
    `end`. `values` are its effective weights by name, if each is computed once per call.
    """

    def __init__(self) -> None:
        self.begin: int = torch._C._autograd._get_sequence_nr()
        self.end: int | None = None
        self.values: dict[str, torch.Tensor] = {}

    def owns(self, number: int) -> bool:
        """Whether the autograd node with this sequence number was created in the call."""
        return self.begin <= number and (self.end is None or number < self.end)


class EffectiveWeights:
    """Makes the modules of a model read effective weights, during its calls and in their backward.

    Args:
        model: the model to call.
        effective: a function for each weight, by name, that maps the parameter to its effective weight.
    """

    once = False
    """Whether each effective weight is computed once for a call and its backward. That is needed for code that asks for
    the gradients of tensors in `model.parameters()`: each read must then return the same tensor. It costs the memory of
    these weights until the backward is over."""

    def __init__(self, model: nn.Module, effective: Mapping[str, Effective]) -> None:
        self.model = model
        self._local = threading.local()  # running calls, spans and the current backward of each thread
        self._spans: list[tuple[list[int], list[int]]] = []  # of each thread: begins and ends of its calls
        self._calls: WeakSet[_Call] = WeakSet()
        # RNNs keep a second list of their weights, which forward replaces by effective weights.
        self._recurrent = [
            (module, {name: vars(module)[name] for name in ("_flat_weights", "_flat_weight_refs")})
            for module in model.modules()
            if isinstance(module, nn.RNNBase)
        ]
        self.read_as(effective)

    def read_as(self, effective: Mapping[str, Effective]) -> None:
        """Replace the functions. Earlier calls whose backward has not run yet use the new functions too."""
        self.effective = dict(effective)
        self.parameters = {name: self.model.get_parameter(name) for name in self.effective}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._lists = [
            (holder, names[id(holder.value)])
            for holder in holders(self.model)
            if isinstance(holder.store, list) and id(holder.value) in names
            if not isinstance(holder.module, nn.RNNBase)  # an RNN builds its list from `_parameters` in each forward
        ]
        self._open = False

    def open(self) -> None:
        """Replace the `_parameters` dict of every module that holds one of the weights."""
        if self._open:
            return
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for module in self.model.modules():
            parameters: Any = vars(module).get("_parameters")
            if type(parameters) in (dict, _Parameters):
                sites = {leaf: names[id(value)] for leaf, value in parameters.items() if id(value) in names}
                if sites:
                    vars(module)["_parameters"] = _Parameters(parameters, sites, self)
        self._open = True

    def close(self) -> None:
        """Restore the plain `_parameters` dict of every module. The next call replaces it again."""
        self._open = False
        for module in self.model.modules():
            parameters = vars(module).get("_parameters")
            if isinstance(parameters, _Parameters) and parameters.reader() is self:
                vars(module)["_parameters"] = dict(parameters)

    def read(self, name: str, value: Any) -> Any:
        """Return the value that a module reads as a weight.

        Args:
            name: name of the weight in the model.
            value: the stored value. An effective weight replaces it only if it is the parameter itself.

        Raises:
            StateError: the effective weights of the call to which this backward belongs were freed.
        """
        number = self._node_number() if value is self.parameters[name] else None
        if number is None:
            return value
        if not self.once:
            return self._computed(name)
        call = next((call for call in self._calls if call.owns(number)), None)
        if call is None:
            raise StateError(
                f"The backward of {type(self.model).__name__} reads the weight {name}, but the output of the call "
                "that it belongs to was freed. Keep a tensor of that output until the backward is over.",
                code="backward-not-supported",
            )
        # Inner code may run without gradients, but the next read of this value may need its autograd history.
        with torch.enable_grad():
            if name not in call.values:
                call.values[name] = self._computed(name)
            return call.values[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with effective weights."""
        self.open()
        with _running(self) as call:
            output = self.model(*args, **kwargs)
        if self.once:  # keep the call, and with it its values, alive until the autograd graph is freed
            for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                    cast("dict[str, Any]", leaf.grad_fn.metadata).setdefault(_MARK, []).append(call)
        return output

    @property
    def running(self) -> tuple[_Call, ...]:
        """The running calls of this thread, outermost first."""
        return getattr(self._local, "running", ())

    def _node_number(self) -> int | None:
        """Return the sequence number of an autograd node of the call that this thread computes for.

        Returns None if the thread computes neither a call nor a backward of one.
        """
        if self.running:
            return self.running[-1].begin
        task: int = torch._C._current_graph_task_id()
        if task < 0:  # no backward is running
            return None
        backward: tuple[int, int] | None = getattr(self._local, "backward", None)
        if backward is not None and task > backward[0]:  # an inner backward, as in reentrant checkpointing
            return backward[1]
        # The node whose backward runs may also come from code outside the model, such as a loss with parameters.
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else -1
        if not self._is_of_a_call(number):
            self._local.backward = None
            return None
        if backward is None or backward[0] != task:
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)
        self._local.backward = (task, number)
        return number

    def _computed(self, name: str) -> torch.Tensor:
        """Compute an effective weight, and mark it for `_Parameters.__setitem__`."""
        parameter = self.parameters[name]
        value = self.effective[name](parameter)
        if value is not parameter:
            setattr(value, _MARK, True)
        return value

    def _is_of_a_call(self, number: int) -> bool:
        """Whether an autograd node was created in a call.

        Each thread numbers its nodes independently, and a node does not show its thread. So all threads are searched.
        """
        for begins, ends in self._spans:
            index = bisect_right(begins, number) - 1
            if index >= 0 and number < ends[index]:
                return True
        return False

    def _remember(self, begin: int, end: int) -> None:
        """Record the nodes of a call on this thread, as a span of sequence numbers."""
        if begin == end:  # the call created no nodes, so it has no backward
            return
        if not hasattr(self._local, "spans"):
            self._local.spans = ([], [])
            self._spans.append(self._local.spans)
        begins, ends = self._local.spans
        while begins and begin <= ends[-1]:  # merge adjacent and nested spans
            begin = min(begin, begins.pop())
            ends.pop()
        begins.append(begin)
        ends.append(end)
        if len(begins) > MAX_SPANS:  # drop the older half: the autograd graphs of these calls must have been freed
            del begins[: MAX_SPANS // 2], ends[: MAX_SPANS // 2]

    def _backward_ends(self) -> None:
        """Reset the thread when a backward is over. The autograd engine calls this."""
        self._local.backward = None
        self.restore_lists()

    def begin(self) -> _Call:
        """Start a call on this thread: from now on, its reads get effective weights."""
        call = _Call()
        if self.once:
            self._calls.add(call)
        self._local.running = (*self.running, call)
        # A read from a list cannot be intercepted, so put the effective weights into the lists.
        for holder, name in self._lists:
            holder.put(self._computed(name))
        return call

    def end(self, running: tuple[_Call, ...]) -> None:
        """End the calls that were started after the calls in `running`, and remember their autograd nodes."""
        for call in self.running[len(running) :]:
            call.end = torch._C._autograd._get_sequence_nr()
            self._remember(call.begin, call.end)
        self._local.running = running
        if not running:
            self._local.backward = None
        self.restore_lists()

    def restore_lists(self) -> None:
        """Put the parameters into the lists of modules again."""
        for holder, name in self._lists:
            holder.put(self.parameters[name])
        for module, attributes in self._recurrent:
            vars(module).update(attributes)


@isolated
def _running(undo: Undo, weights: EffectiveWeights) -> _Call:
    """Context manager: make this thread read effective weights inside the block."""
    undo(partial(weights.end, weights.running))
    return weights.begin()
