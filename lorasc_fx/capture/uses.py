"""Find the weights that an eager call uses, by the four rules of graph/flow.py, applied to tensors instead of nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.capture.captured import read_live
from lorasc_fx.capture.effective import METADATA, form_of_function, has_form
from lorasc_fx.check.isolation import isolation
from lorasc_fx.check.process_state import ObserverMode, eager
from lorasc_fx.graph.forms import (
    ADDED_FIRST,
    CONTRACTIONS,
    LIKE_ANOTHER,
    SCALES,
    FunctionForm,
    StoredCall,
    WeightForm,
    has_weight_argument,
    registered_form,
)

_READS_NO_VALUE = {"__get__", "detach", "requires_grad_"}
"""Names of functions outside METADATA that do not use the values of a tensor. `__get__` is the name of any getter."""


@dataclass(frozen=True)
class Uses:
    """The weights that a call used.

    Args:
        kinds: {weight: kind of its site, such as `linear`, or "" if it was used in an unknown way}.
        beside: the weights whose branch can be added to the output of every op that used them.
        graph: a graph for `matching`, which finds layouts, registered forms and placements in it. It has one node for
            each form by which a weight was read. A weight that another function also read has no node.
    """

    kinds: Mapping[str, str]
    beside: frozenset[str]
    graph: fx.GraphModule


def uses_in_a_call(model: nn.Module, args: object, kwargs: Mapping[str, object]) -> Uses:
    """Run the model once, and return the weights that it uses.

    Model, inputs and random generators are left unchanged.
    """
    watcher = _Watcher(model)
    with isolation(model, args, kwargs, eager(), watcher, seeded=False) as (inputs, named):
        model(*inputs, **named)
    graph = fx.Graph()
    x = graph.placeholder("x")
    direct = {name: forms for name, forms in watcher.forms.items() if name not in watcher.mixed}
    for name, forms in direct.items():
        for form in forms:
            op = "call_function" if callable(form.targets[0]) else "call_method"
            arguments = {form.x: x} if isinstance(form, FunctionForm) else {}
            graph.create_node(op, form.targets[0], (), {**arguments, form.weight: graph.get_attr(name)})
    graph.output(None)
    beside = {name for name, forms in direct.items() if all(isinstance(form, FunctionForm) for form in forms)}
    kinds = dict.fromkeys(sorted(watcher.seen), "") | watcher.kinds
    return Uses(kinds, frozenset(beside), read_live(model, graph, model))


class _Watcher(ObserverMode, TorchFunctionMode):
    """Follows the weights through a call, and records which forms use them.

    Args:
        model: its parameters are followed. Its buffers count as constants.

    Attributes:
        seen: names of the weights whose values were used.
        forms: {weight: forms of the calls that read the weight directly}, with None as the value of each form.
        mixed: names of the matrices that any other call read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.forms: dict[str, dict[FunctionForm | WeightForm, None]] = {}
        self.mixed: set[str] = set()
        self._names = {id(value): name for name, value in model.named_parameters()}
        self._matrices = {name for name, value in model.named_parameters() if value.dim() > 1}
        self._kinds: dict[int, dict[str, str]] = {rule: {} for rule in (1, 2, 3, 4)}  # weight name -> kind
        # {id of a tensor without inputs in it: weights from which it was computed}. A constant has an empty set.
        self._sources: dict[int, set[str]] = {id(value): {name} for name, value in model.named_parameters()}
        self._sources |= {id(value): set() for value in model.buffers()}
        # {id of a tensor that is a product of weights and an input: these weights}
        self._scaled: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # an id is valid only while its tensor lives

    @property
    def kinds(self) -> dict[str, str]:
        """{weight: kind of its site}. If several rules apply to a weight, the rule with the lowest number counts."""
        return {name: kind for kinds in reversed(self._kinds.values()) for name, kind in kinds.items()}

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, torch.Tensor)]
        weights = self._weights(tensors)
        if name not in _READS_NO_VALUE and func not in METADATA:
            self.seen |= weights
            self._record_form(StoredCall("", "call_function", func, tuple(args), kwargs or {}), weights)
        form = registered_form(func)
        kind = CONTRACTIONS.get(name) if form is None else form.kind
        inputs = [tensor for tensor in tensors if id(tensor) not in self._sources]
        if weights and (kind == "embedding" or any(tensor.is_floating_point() for tensor in inputs)):
            # Rule 1: the weight is multiplied by an input or looked up. addmm only adds its first operand.
            added = args[0] if name in ADDED_FIRST else None
            self._note(1, self._weights([tensor for tensor in tensors if tensor is not added]), kind)
            if name in SCALES:
                self._follow(output, self._scaled, weights)
        elif weights:
            # Rule 2: the weight is multiplied by a constant. Rule 4: an integer input selects rows of the weight.
            # In both cases, follow the output like the weight itself.
            self._note(2, weights, kind)
            self._note(4, weights if inputs and id(args[0]) in self._sources else (), "embedding")
            self._follow(output, self._sources, weights)
        # Rule 3: the weight, scaled by an input, is the weight of a linear or a convolution: `linear(x, g * W)`.
        scaled = set().union(*(self._scaled.get(id(tensor), set()) for tensor in tensors))
        if scaled and kind is not None and len(args) > 1 and id(args[1]) in self._scaled and has_weight_argument(name):
            self._note(3, self._scaled[id(args[1])], kind)
        elif scaled and (name in SCALES or not any(id(tensor) not in self._scaled for tensor in inputs)):
            self._follow(output, self._scaled, scaled | weights)
        return output

    def _record_form(self, call: StoredCall, weights: set[str]) -> None:
        """Record in `forms` that a call reads one weight by a form, or in `mixed` that it reads weights otherwise."""
        form, matrices = form_of_function(call.target), weights & self._matrices
        if form is not None and (isinstance(form, WeightForm) or has_form(call, form)):
            name = self._names.get(id(form.argument(call, form.weight)), "")
            if matrices == {name}:
                self.forms.setdefault(name, {})[form] = None
                return
        self.mixed |= matrices

    def _weights(self, tensors: list[torch.Tensor]) -> set[str]:
        """Return the weights from which at least one of the tensors was computed."""
        return set().union(*(self._sources.get(id(tensor), set()) for tensor in tensors))

    def _note(self, rule: int, weights: Iterable[str], kind: str | None) -> None:
        """Record under a rule that a site of this kind uses the weights. No-op if `kind` is None."""
        for weight in weights if kind is not None else ():
            # A convolution takes precedence: products of its weight may only compute a norm.
            if weight not in self._kinds[rule] or kind == "conv":
                self._kinds[rule][weight] = kind or ""

    def _follow(self, output: object, record: dict[int, set[str]], weights: set[str]) -> None:
        """Record these weights for each tensor of the output in `record`, which is `_sources` or `_scaled`."""
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                record.setdefault(id(leaf), weights)
                self._alive.append(leaf)
