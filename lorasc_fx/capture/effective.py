"""Make a model compute with effective weights `W + s B A`, in forward and in code that its backward runs again.

Models that run eagerly use this. A module reads a weight from its dict `_parameters`. This file replaces the dict by
one that returns an `AdaptedWeight` instead of the parameter. If the module passes that tensor to an op of the table of
forms, the branch is added to the output of the op.

torch.utils.checkpoint, reversible blocks and hooks run code of the model in backward, long after the call. So a branch
is computed each time that a module reads the weight. Then checkpointed regions do not store the result, and each inner
backward has its own autograd graph. Two kinds of reads get the effective weight: reads inside a running call, and reads
in the backward of an autograd node that a call has created. All other reads get the parameter itself.
"""

from __future__ import annotations

import functools
import threading
import types
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, Placement
from lorasc_fx.errors import CaptureError
from lorasc_fx.graph.forms import FunctionForm, StoredCall, WeightForm, built_in_form, registered_form
from lorasc_fx.quantized import is_quantized
from lorasc_fx.util.torch_private import current_autograd_node, current_backward, sequence_number
from lorasc_fx.util.undo import Undo, isolated

MAX_SPANS = 1 << 17
"""Maximum number of remembered calls of a thread. Autograd graphs of more calls would not fit in memory."""

_MARK = "_lorasc_effective"
"""Name of the attribute that marks a tensor as a merged weight."""


class AdaptedWeight(torch.Tensor):
    """The tensor that a module reads instead of a weight. The branch is added to the output of an op that has a form.
    Any other op gets `W + s B A`.

    The tensor has the shape, dtype and device of the weight, but no values: C++ code that reads it gets nan. In
    backward, its autograd node passes a gradient of the weight on to the branch. So a custom autograd.Function computes
    the right gradients, although it does not call `__torch_function__`.

    Attributes:
        weight: the parameter.
        branch: the branch of the weight.
        plain: the same tensor as a plain torch.Tensor.
        merged: the last result of `merge`. It stays alive because Python code may use its address.
    """

    weight: torch.Tensor
    branch: Branch
    plain: torch.Tensor
    merged: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, branch: Branch) -> AdaptedWeight:
        """Return a new tensor for one read of a weight."""
        factors = [factor for factor in branch.parameters() if factor.requires_grad]
        plain: torch.Tensor = _GradientOfWeight.apply((weight, branch), *factors)  # type: ignore[no-untyped-call]
        adapted = plain.as_subclass(AdaptedWeight)
        adapted.weight, adapted.branch, adapted.plain = weight, branch, plain
        return adapted

    def merge(self) -> torch.Tensor:
        """Return `W + s B A`.

        Raises:
            CaptureError: the weight is quantized.
        """
        if is_quantized(self.weight):
            name = self.branch.weight_name
            raise CaptureError(
                f"{name} is quantized, and the model uses it in an op other than a linear layer, where its branch "
                f"would have no effect. Exclude it (exclude=({name!r},)).",
                code="quantized-not-supported",
            )
        self.merged = self.branch.function_at(Placement.WEIGHT)(self.weight)
        return self.merged

    def fits(self, form: FunctionForm) -> bool:
        """Whether the branch can be added to the output of an op of this form."""
        return Placement.BESIDE in self.branch.placements and self.branch.transposed == (form.layout == "in_out")

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(args[0].weight, *args[1:], **kwargs)
        if func in _AUTOGRAD_STATE:
            return func(args[0].plain, *args[1:], **kwargs)
        form = form_of_function(func)
        if isinstance(form, FunctionForm):
            call = StoredCall("", "call_function", func, tuple(args), kwargs)
            adapted = form.argument(call, form.weight)
            alone = sum(isinstance(value, cls) for value in (*args, *kwargs.values())) == 1
            if alone and isinstance(adapted, cls) and has_form(call, form) and adapted.fits(form):
                output = func(
                    *(adapted.weight if value is adapted else value for value in args),
                    **{key: adapted.weight if value is adapted else value for key, value in kwargs.items()},
                )
                reading = form.reads(call, None)
                return adapted.branch(output, reading.x, **{"at": Placement.BESIDE, **reading.options})
        args, kwargs = pytree.tree_map_only(cls, cls.merge, (tuple(args), kwargs))
        return func(*args, **kwargs)


class _GradientOfWeight(torch.autograd.Function):
    """Computes the gradients of a branch's trainable parameters from the gradient of the effective weight.

    The arguments are (weight, branch), and these parameters. The output is nan, in the shape of the weight.
    """

    @staticmethod
    def forward(read: tuple[torch.Tensor, Branch], *factors: torch.Tensor) -> torch.Tensor:
        weight, _ = read
        return _nan(weight.dtype, weight.device).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: torch.Tensor) -> None:
        ctx.read, *factors = inputs
        ctx.save_for_backward(*factors)  # backward raises if they were changed after the read

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight, branch), factors = ctx.read, ctx.saved_tensors
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            merged = branch.function_at(Placement.WEIGHT)(weight)
            return None, *torch.autograd.grad(merged, factors, gradient, create_graph=differentiable, allow_unused=True)


@functools.cache
def _nan(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def form_of_function(func: object) -> FunctionForm | WeightForm | None:
    """Return the form of a function or tensor method that `__torch_function__` gets, or None."""
    if isinstance(func, (types.MethodDescriptorType, types.WrapperDescriptorType)):
        func = func.__name__.strip("_")
    return built_in_form(func) or registered_form(func)


def has_form(call: StoredCall, form: FunctionForm) -> bool:
    """Whether the arguments of a call match a form, and the form needs no graph. Only `stacked` forms need one."""
    fits = form.kind != "stacked" and all(form.argument(call, name) in (None, value) for name, value in form.plain)
    fits = fits and all((form.argument(call, name) or 0) >= 0 for name in form.counted)
    fits = fits and all(form.argument(call, name) is not None for name in form.needs)
    weight = form.argument(call, form.weight)
    return fits and isinstance(weight, torch.Tensor) and weight.dim() == form.dims


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


METADATA = {
    *_getters("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_quantized"),
    *_getters("itemsize", "nbytes"),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_contiguous),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.element_size, torch.Tensor.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
"""Functions that do not use the values of a tensor."""
_AUTOGRAD_STATE = _getters("requires_grad", "grad_fn", "is_leaf")
"""Functions that read the autograd state of a tensor."""


class _Parameters(dict[str, Any]):
    """The `_parameters` dict of one module, which returns effective weights. Pickled and copied as a plain dict.

    Args:
        parameters: {attribute name: parameter}, the original dict of the module.
        sites: {attribute name: weight name in the model} of the parameters that have an effective weight.
        reader: computes the effective weights.
    """

    def __init__(self, parameters: Mapping[str, object], sites: Mapping[str, str], reader: EffectiveWeights) -> None:
        super().__init__(parameters)
        self.sites = dict(sites)
        # Weak, because the dict may stay in a module for longer than the cascade lives.
        self.reader: ReferenceType[EffectiveWeights] = ref(reader)

    def _read(self, leaf: str, value: object) -> Any:
        reader = self.reader() if leaf in self.sites else None
        return value if reader is None else reader.read(self.sites[leaf], value)

    def __getitem__(self, leaf: str) -> Any:
        return self._read(leaf, super().__getitem__(leaf))

    def __setitem__(self, leaf: str, value: object) -> None:
        """Store a parameter under its name. If `value` is an effective weight, store the parameter that it came from.

        `functional_call` sets effective weights: it reads all parameters, replaces them, and writes back what it read.
        """
        reader = self.reader()
        effective = isinstance(value, AdaptedWeight) or getattr(value, _MARK, False)
        if reader is not None and effective and leaf in self.sites:
            value = reader.parameters[self.sites[leaf]]
        super().__setitem__(leaf, value)

    def get(self, leaf: str, default: object = None) -> Any:
        """Return the parameter or its effective weight, or the default."""
        return self._read(leaf, super().get(leaf, default))

    def items(self) -> Any:
        """Return an iterator of (name, value), like `get`. Each effective weight is computed when it is reached."""
        return ((leaf, self._read(leaf, value)) for leaf, value in super().items())

    def values(self) -> Any:
        """Return an iterator of the values of `items`."""
        return (value for _, value in self.items())

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return (dict, (dict(self),))


class EffectiveWeights:
    """Makes the modules of a model read effective weights, during calls of this object and in their backward.

    Args:
        model: the model to call.

    Attributes:
        merges: whether a read returns `W + s B A`. Otherwise it returns an `AdaptedWeight`.
        branches: {weight name: branch} of the weights that have an effective weight.
    """

    merges = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._local = threading.local()  # running calls, spans and the current backward of each thread
        self._spans: list[tuple[list[int], list[int]]] = []  # per thread: first and end numbers of its calls' nodes
        self._recurrent = [
            (module, {name: vars(module)[name] for name in ("_flat_weights", "_flat_weight_refs")})
            for module in model.modules()
            if isinstance(module, nn.RNNBase)
        ]
        self.read_with({})

    def read_with(self, branches: Mapping[str, Branch]) -> None:
        """Replace the branches. Reads in the backward of earlier calls use the new branches too."""
        self.branches = dict(branches)
        self.parameters = {name: self.model.get_parameter(name) for name in self.branches}
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

    def read(self, name: str, value: object) -> Any:
        """Return the value that a module reads as a weight.

        Args:
            name: name of the weight in the model.
            value: the value in `_parameters`. It is replaced only if it is the parameter of this name.
        """
        if value is not self.parameters[name] or self._node_number() is None:
            return value
        if not self.merges:
            return AdaptedWeight.of(value, self.branches[name])
        merged = self.branches[name].function_at(Placement.WEIGHT)(value)
        if merged is not value:
            setattr(merged, _MARK, True)  # for `_Parameters.__setitem__`
        return merged

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call the model with effective weights."""
        self.open()
        with _running(self):
            return self.model(*args, **kwargs)

    @property
    def running(self) -> tuple[int, ...]:
        """The sequence number of the first autograd node of each running call of this thread, outermost call first."""
        return getattr(self._local, "running", ())

    def _node_number(self) -> int | None:
        """Return the sequence number of an autograd node of the call that this thread is running or differentiating.

        Returns None if the thread runs neither a call nor the backward of one.
        """
        if self.running:
            return self.running[-1]
        task: int = current_backward()
        if task < 0:  # no backward is running
            return None
        backward: tuple[int, int] | None = getattr(self._local, "backward", None)
        if backward is not None and task > backward[0]:  # an inner backward, as in reentrant checkpointing
            return backward[1]
        # The running node may also come from code outside the model, such as a loss with parameters.
        node = current_autograd_node()
        number = node._sequence_nr() if node is not None else -1
        if not self._is_of_a_call(number):
            self._local.backward = None
            return None
        if backward is None or backward[0] != task:
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)
        self._local.backward = (task, number)
        return number

    def _is_of_a_call(self, number: int) -> bool:
        """Whether the autograd node with this sequence number was created in a call.

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
        if len(begins) > MAX_SPANS:  # drop the older half: memory cannot hold the autograd graphs of so many calls
            del begins[: MAX_SPANS // 2], ends[: MAX_SPANS // 2]

    def _backward_ends(self) -> None:
        """Reset the state of this thread. The autograd engine calls this at the end of a backward."""
        self._local.backward = None
        self.restore_lists()

    def begin(self) -> None:
        """Start a call on this thread. From now on, modules that this thread runs read effective weights."""
        self._local.running = (*self.running, sequence_number())

    def end(self, running: tuple[int, ...]) -> None:
        """End the calls that started after those in `running`, an earlier `self.running`. Keep their autograd nodes."""
        for begin in self.running[len(running) :]:
            self._remember(begin, sequence_number())
        self._local.running = running
        if not running:
            self._local.backward = None
        self.restore_lists()

    def restore_lists(self) -> None:
        """Restore the lists of weights that RNNs keep. Their forward has filled the lists with effective weights."""
        for module, attributes in self._recurrent:
            vars(module).update(attributes)


@isolated
def _running(undo: Undo, weights: EffectiveWeights) -> None:
    """Context manager: make this thread read effective weights inside the block."""
    undo(partial(weights.end, weights.running))
    weights.begin()
