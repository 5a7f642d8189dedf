"""Let a model read effective weights, `f(weight)`, during a call and wherever its backward runs the model's code again.

Code that runs again in backward (torch.utils.checkpoint, reversible blocks, adjoint methods, hooks) reads the weights
long after the call. So a value is computed each time a module reads its parameter: a checkpointed region keeps no copy
of it, and each inner backward has its own graph. A read counts if it comes from a running call, or from a backward at a
node that a call has made. All other reads get the parameter.
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


class _Parameters(dict[str, Any]):
    """The parameters of one module, some of them read as effective weights. Pickled and copied as a plain dict."""

    def __init__(self, held: Mapping[str, Any], sites: Mapping[str, str], reader: EffectiveWeights) -> None:
        super().__init__(held)
        self.sites = dict(sites)
        self.reader: ReferenceType[EffectiveWeights] = ref(reader)

    def _read(self, leaf: str, value: Any) -> Any:
        reader = self.reader() if leaf in self.sites else None
        return value if reader is None else reader.read(self.sites[leaf], value)

    def __getitem__(self, leaf: str) -> Any:
        return self._read(leaf, super().__getitem__(leaf))

    def __setitem__(self, leaf: str, value: Any) -> None:
        """Set a parameter. For an effective weight that is written back, as functional_call does, set its parameter."""
        reader = self.reader()
        if reader is not None and getattr(value, _MARK, False) and leaf in self.sites:
            value = reader.parameters[self.sites[leaf]]
        super().__setitem__(leaf, value)

    def get(self, leaf: str, default: Any = None) -> Any:
        """Return the current value."""
        return self._read(leaf, super().get(leaf, default))

    def items(self) -> Any:
        """Return names and current values, each computed lazily."""
        reader = self.reader()
        if reader is None or not reader.reading:  # most reads of all parameters, such as an optimizer's, want these
            return super().items()
        return ((leaf, self._read(leaf, value)) for leaf, value in super().items())

    def values(self) -> Any:
        """Return the current values, each computed lazily."""
        return (value for _, value in self.items())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (dict, (dict(self),))


class _Call:
    """A call of the model: the sequence numbers of its autograd nodes, and its effective weights if they are kept."""

    def __init__(self) -> None:
        self.begin: int = torch._C._autograd._get_sequence_nr()
        self.end: int | None = None
        self.values: dict[str, torch.Tensor] = {}

    def holds(self, number: int) -> bool:
        """Whether a node with this sequence number was made in the call."""
        return self.begin <= number and (self.end is None or number < self.end)


class EffectiveWeights:
    """Replaces reads of some weights of a model, during its calls and in their backward.

    Args:
        model: whose modules read.
        effective: computes the value to read from each weight, by name.
    """

    once = False
    """Whether each value is computed once for a call and its backward. Code that asks for gradients of the tensors in
    `model.parameters()` needs that. It costs the memory of these weights."""

    def __init__(self, model: nn.Module, effective: Mapping[str, Effective]) -> None:
        self.model = model
        self._local = threading.local()
        self._spans: list[tuple[list[int], list[int]]] = []
        self._calls: WeakSet[_Call] = WeakSet()
        self._recurrent = [
            (module, {name: vars(module)[name] for name in ("_flat_weights", "_flat_weight_refs")})
            for module in model.modules()
            if isinstance(module, nn.RNNBase)
        ]
        self.read_as(effective)

    def read_as(self, effective: Mapping[str, Effective]) -> None:
        """Replace the effective weights, also for earlier calls whose backward has not run yet."""
        self.effective = dict(effective)
        self.parameters = {name: self.model.get_parameter(name) for name in self.effective}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._lists = [
            (holder, names[id(holder.value)])
            for holder in holders(self.model)
            if isinstance(holder.store, list) and id(holder.value) in names
            if not isinstance(holder.module, nn.RNNBase)  # they collect their lists again in each forward
        ]
        self._open = False

    def open(self) -> None:
        """Intercept reads in every module that holds one of the weights."""
        if self._open:
            return
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for module in self.model.modules():
            held: Any = vars(module).get("_parameters")
            if type(held) in (dict, _Parameters):
                sites = {leaf: names[id(value)] for leaf, value in held.items() if id(value) in names}
                if sites:
                    vars(module)["_parameters"] = _Parameters(held, sites, self)
        self._open = True

    def close(self) -> None:
        """Restore the parameters of every module. The next call opens again."""
        self._open = False
        for module in self.model.modules():
            held = vars(module).get("_parameters")
            if isinstance(held, _Parameters) and held.reader() is self:
                vars(module)["_parameters"] = dict(held)

    @property
    def reading(self) -> bool:
        """Whether a read on this thread gets effective weights."""
        return self._node_number() is not None

    def read(self, name: str, value: Any) -> Any:
        """Return what a module reads.

        Args:
            name: of the weight.
            value: what the module holds: the parameter, or something that replaces it.

        Raises:
            StateError: the kept values of the call that this backward belongs to are gone.
        """
        number = self._node_number() if value is self.parameters[name] else None
        if number is None:
            return value
        if not self.once:
            return self._computed(name)
        call = next((running for running in self._calls if running.holds(number)), None)
        if call is None:
            raise StateError(
                f"{type(self.model).__name__} computes with {name} in backward, where the output of the call that this "
                "backward belongs to is gone; keep a tensor of that output until the backward is over",
                code="backward-not-supported",
            )
        with torch.enable_grad():
            if name not in call.values:
                call.values[name] = self._computed(name)
            return call.values[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self.open()
        with _running(self) as call:
            output = self.model(*args, **kwargs)
        if self.once:  # the values live as long as the autograd graph
            for leaf in pytree.tree_leaves(output, is_leaf=is_opaque_leaf):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                    cast("dict[str, Any]", leaf.grad_fn.metadata).setdefault(_MARK, []).append(call)
        return output

    @property
    def running(self) -> tuple[_Call, ...]:
        """The running calls of this thread."""
        return getattr(self._local, "running", ())

    def _node_number(self) -> int | None:
        """Return a sequence number of the call that this thread reads for, or None."""
        if self.running:
            return self.running[-1].begin
        task: int = torch._C._current_graph_task_id()
        if task < 0:
            return None
        backward: tuple[int, int] | None = getattr(self._local, "backward", None)
        if backward is not None and task > backward[0]:  # a backward inside the backward of a node
            return backward[1]
        # The node that runs now was made in a call, or in code that has nothing to do with the model.
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
        parameter = self.parameters[name]
        value = self.effective[name](parameter)
        if value is not parameter:
            setattr(value, _MARK, True)
        return value

    def _is_of_a_call(self, number: int) -> bool:
        """Whether a node was made in a call. Each thread counts by itself, and a node does not tell its thread."""
        for begins, ends in self._spans:
            index = bisect_right(begins, number) - 1
            if index >= 0 and number < ends[index]:
                return True
        return False

    def _remember(self, begin: int, end: int) -> None:
        if begin == end:
            return
        if not hasattr(self._local, "spans"):
            self._local.spans = ([], [])
            self._spans.append(self._local.spans)
        begins, ends = self._local.spans
        while begins and begin <= ends[-1]:  # adjacent or nested spans become one
            begin = min(begin, begins.pop())
            ends.pop()
        begins.append(begin)
        ends.append(end)
        if len(begins) > MAX_SPANS:  # drop the older half, whose graphs can no longer be alive
            del begins[: MAX_SPANS // 2], ends[: MAX_SPANS // 2]

    def _backward_ends(self) -> None:
        self._local.backward = None
        self.restore_lists()

    def begin(self) -> _Call:
        """Start reading effective weights on this thread."""
        call = _Call()
        if self.once:
            self._calls.add(call)
        self._local.running = (*self.running, call)
        for holder, name in self._lists:
            holder.put(self._computed(name))
        return call

    def end(self, running: tuple[_Call, ...]) -> None:
        """Return to the calls that were running before. From now on, the backward of the ended ones is recognized."""
        for call in self.running[len(running) :]:
            call.end = torch._C._autograd._get_sequence_nr()
            self._remember(call.begin, call.end)
        self._local.running = running
        if not running:
            self._local.backward = None
        self.restore_lists()

    def restore_lists(self) -> None:
        """Restore the parameters in lists of modules."""
        for holder, name in self._lists:
            holder.put(self.parameters[name])
        for module, held in self._recurrent:
            vars(module).update(held)


@isolated
def _running(undo: Undo, weights: EffectiveWeights) -> _Call:
    """Read effective weights on this thread inside the block."""
    undo(partial(weights.end, weights.running))
    return weights.begin()
