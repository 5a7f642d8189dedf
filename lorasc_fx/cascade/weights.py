"""The weights of a cascade: views inside `weights(...)`, permanent folds, and moves to other devices and dtypes.

`placed` puts weights in place of W_t, and restores W_t at the end of the block. A quantized weight cannot hold a delta.
Its folded value is a dense tensor, or a dense tensor quantized again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.branch.deltas import rounded
from lorasc_fx.cascade.graphs import Graphs
from lorasc_fx.cascade.run import Planned, Run, WeightValues, reserve, weights_to_write
from lorasc_fx.cascade.transition import at_stage, check_rounding, ended
from lorasc_fx.errors import SpecError, StateError, named, nearest
from lorasc_fx.parameters import Holder, holders_of, substituted
from lorasc_fx.quantized import QuantizedLinear, dense, is_quantized, quantized_in, quantizer_of, writable
from lorasc_fx.shards import local
from lorasc_fx.spec import OWN_GRID, CascadeSpec
from lorasc_fx.state import Kept, Scratch, SlowWeights, ViewName, loss_of
from lorasc_fx.util.torch_private import set_version_counter
from lorasc_fx.util.undo import PROCESS, AllOrNothing, Block, Undo, isolated

Value = TypeVar("Value")

VIEW_NAMES: tuple[ViewName, ...] = ("slow", "fast", "base", "averaged")
FOLDED: tuple[ViewName, ...] = ("slow", "averaged")
"""The views that a fold can write."""

_VERSIONS = itertools.count(1 << 24)
"""Version counters for parameters whose weights are replaced. torch counts writes from 0 and does not reach them."""


def check_view(call: str, view: str, spec: CascadeSpec, names: Sequence[str] = FOLDED) -> None:
    """Raise StateError if `view` is not one of these names, or is "averaged" and the spec keeps no average."""
    if view not in names:
        raise StateError(
            f"{call}: {view!r} is not a view of the weights. Give one of {', '.join(names)}{nearest(str(view), names)}",
            code="unknown-name",
        )
    if view == "averaged" and not spec.average:
        raise StateError(
            f"{call}: the spec keeps no average of the slow weights. Give it average=True",
            code="not-available",
        )


def folded_weights(run: Run, view: str, call: str) -> WeightValues:
    """Return the weights that a fold writes. They include the slow update of a running stage that has trained."""
    check_view(call, view, run.plan.spec)
    slow = ended(run, call)
    check_rounding(run, call, slow)
    return WeightValues(slow, "averaged" if view == "averaged" else "slow")


@isolated
def placed(undo: Block, run: Run, view: str | None, stage: int | None, value: Value) -> Value:
    """Put other weights in place; see `Cascade.weights`. Returns `value`, for `with ... as`.

    `isolated` makes this a context manager: the steps in `undo` run when the block ends.
    """
    run.check_alive("weights")
    if stage is not None and view is not None:
        raise StateError(
            f"weights({view!r}, stage={stage!r}): give either a view or a stage, not both", code="conflicting-options"
        )
    if stage is None:
        check_view(f"weights({view!r})", str(view), run.plan.spec, VIEW_NAMES)
    # Leave inference mode: DTensors cannot be read or written in it.
    with torch.inference_mode(False), torch.no_grad(), run.exclusive("weights", sharded=True):
        before = Before(run)
        if stage is not None:
            weights = WeightValues(at_stage(run.slow, stage, "weights"), "slow" if stage else "base")
        else:
            checked: ViewName = next(name for name in VIEW_NAMES if name == view)
            weights = WeightValues(
                run.slow, checked, learners={**run.branches_by_weight(), **before.trained}, plan=run.plan
            )
        # Compute everything that needs memory before the first write.
        quantized = run.slow.quantized if weights.view != "base" else ()
        dense = weights.dense(quantized, before.parameters) if quantized else {}
        replaced = {id(before.parameters[name]): nn.Parameter(value, False) for name, value in dense.items()}
        undo(before.restore)
        noisy = run.is_noisy
        for name, parameter in writable(before.parameters).items():
            if weights.matches(name, local(parameter), noisy):
                before.matching.add(name)
        for holder in before.places:
            if id(holder.value) in replaced:
                holder.put(replaced[id(holder.value)])
        for name, out in weights_to_write(run, before.parameters):
            if name not in before.matching:
                weights.write(name, out)
        run.placed = stage if stage is not None else str(view)
        run.note_placed(before.matching)
        # With other versions, the backward of a graph that saved W_t raises, instead of using other weights.
        before.set_versions(next(_VERSIONS))
    return value


class Before:
    """Snapshot of a run's parameters, to restore them after other weights were in place.

    It copies parameters trained in full and running statistics. `restore` computes all other weights again.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.parameters = run.present(run.slow.states)
        self.trained = {name: local(self.parameters[name]).detach().clone() for name in run.slow.trained}
        dense = writable(self.parameters)
        self.versions = {name: local(value)._version for name, value in dense.items() if not value.is_inference()}
        # FSDP itself replaces sharded parameters and their memory, so only their values are restored.
        self.owned = {} if run.is_sharded else self.parameters
        self.places = holders_of(run.model, self.owned.values())
        self.memory = [(parameter, parameter.data) for name, parameter in dense.items() if name in self.owned]
        self.reserve = reserve(self.parameters, run.is_noisy, narrow=True)
        self.matching: set[str] = set()  # weights that have their new values already
        self.changed: str | None = None  # the first weight that was written inside the `with`
        norms = (module for module in run.model.modules() if isinstance(module, _BatchNorm))
        statistics = {id(buffer): buffer for norm in norms for buffer in norm.buffers(recurse=False)}
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in statistics.values()]

    def restore(self) -> None:
        """Restore the weights of the running stage. If that raises, try once more."""
        run = self.run
        self.reserve.clear()  # the memory that restoring needs
        with torch.inference_mode(False), torch.no_grad(), run.lock, AllOrNothing() as again:
            again(self._write)
            self.changed = run.changed(run.placed_checksums)
            self._write(self.matching if self.changed is None else ())
        if self.changed is not None:
            raise StateError(
                f"weights: {self.changed} was written inside the with block (by a training step, load_state_dict, "
                "half, .data). The previous weights are restored, and the write is lost. Train the cascade outside the "
                "block. To cast or change these weights, use a copy (copy.deepcopy(model) inside the block), or the "
                "model after release",
                code="inside-weights",
            )

    def _write(self, unchanged: Collection[str] = ()) -> None:
        """Write the weights of the running stage, except `unchanged` ones. May be called again after an exception."""
        run, scratch = self.run, Scratch()
        weights = WeightValues(run.slow, None, plan=run.plan)
        for holder in self.places:
            if holder.exists:
                holder.put(holder.value)
        for parameter, memory in self.memory:  # a cast or an assignment to `.data` inside the block may replace it
            if parameter.dtype != memory.dtype or parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory
        for name, out in weights_to_write(run, self.parameters):
            if name in unchanged:
                continue
            if name in self.trained:
                out.copy_(self.trained[name])
                continue
            try:
                weights.write(name, out, scratch)
            except (MemoryError, RuntimeError):  # out of memory; harmless if the block had not written this weight yet
                if run.placed is not None or self.versions.get(name) != out._version:
                    raise
        for buffer, value in self.buffers:
            if not _is_unchanged(value, buffer):  # after a write, the backward of earlier calls would raise
                buffer.copy_(value)
        run.placed, run.placed_checksums = None, {}
        if self.changed is None:
            self.set_versions()  # the weights are restored, so autograd graphs that saved them are valid

    def set_versions(self, version: int | None = None) -> None:
        """Set the version counters of the parameters to `version`, or to their old values if it is None."""
        parameters, versions = list[torch.Tensor](), list[int]()
        for name, before in self.versions.items():
            if name in self.owned:
                parameters.append(self.parameters[name])
                versions.append(before if version is None else version)
        set_version_counter(tuple(parameters), tuple(versions))


def folded_state(run: Run, call: str, quantized: Requantize, view: str) -> dict[str, torch.Tensor]:
    """Return a copy of the model's state dict with the folded weights. Tied parameters share one tensor.

    See `Cascade.folded_state_dict` for the arguments. `call` is the name of the method in messages.
    """
    folded: dict[str, torch.Tensor] = {}
    by_parameter: dict[int, torch.Tensor] = {}
    for name, value, compute in folded_each(run, call, quantized, view):
        if not isinstance(value, nn.Parameter):
            folded[name] = compute()
            continue
        if id(value) not in by_parameter:
            by_parameter[id(value)] = compute()
        folded[name] = by_parameter[id(value)]
    return folded


def folded_each(
    run: Run, call: str, quantized: Requantize = None, view: str = "slow"
) -> Iterator[tuple[str, Any, Callable[[], torch.Tensor]]]:
    """Yield (name, current value, function that returns the folded value) for each entry of the model's state dict.

    Values are computed lazily, so that a caller who writes them to a file needs memory for one at a time.
    """
    weights, parameters = folded_weights(run, view, call), run.parameters_by_name()
    names = {name: parameters[name] for name in check_quantized(call, weights.slow, quantized)}
    # Quantized weights that become dense are represented by placeholders in `changed`.
    changed = {
        name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), False)
        for name, value in names.items()
    }
    with substituted(run.model, changed):  # a layer saves dense and packed weights under different names
        entries = run.model.state_dict(keep_vars=True)
    names_by_id = {id(parameter): name for name, parameter in {**parameters, **changed}.items()}
    for key, value in entries.items():
        name = names_by_id.get(id(value), "")
        current = parameters[name] if name in changed else value
        yield key, current, partial(_folded, weights, name, current)


def _folded(weights: WeightValues, name: str, value: Any) -> Any:
    """Return the folded value of a weight with a slow state. Return a copy of any other entry of the state dict."""
    slow = weights.slow
    # A quantized weight that has not trained stays quantized.
    if name in slow.states and (not is_quantized(value) or slow.states[name].unmerged("slow") is not None):
        return weights.value(name, value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def write_fold(run: Run, quantized: Requantize, view: str, undo: Undo) -> None:
    """Write the folded weights into the user's parameters, and drop the slow state; see `Cascade.release`."""
    weights, parameters = folded_weights(run, view, "release"), run.parameters_by_name()
    if quantized is None and run.plan.spec.grid == OWN_GRID:
        quantized = "requantize"
    weights = replace(weights, own_grid=quantized == "dequantize")
    dense = weights.dense(check_quantized("release", weights.slow, quantized, modules=True), parameters)
    trained = {name: local(parameters[name]).detach().clone() for name in run.slow.trained}
    holders = holders_of(run.model, [parameters[name] for name in dense])
    written = run.present(weights.slow.states)
    run.commit(Planned(run.plan, SlowWeights(), written, weights, dense, current=trained), undo)
    _requantize(run, holders, {id(parameters[name]): name for name in dense}, quantized, undo)


log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize", "requantize"] | Callable[[nn.Module], object] | None
"""How a fold treats quantized weights that have trained. None raises an error. "dequantize" leaves them dense.
"requantize" quantizes them again with the settings of their layer. A callable gets each module with its dense weight,
and quantizes it in place."""


def check_quantized(call: str, slow: SlowWeights, how: Requantize, modules: bool = False) -> list[str]:
    """Check the argument `quantized` of a fold, and return the names of the quantized weights that the fold changes.

    Args:
        slow: the slow weights to fold.
        how: the argument `quantized` of the call.
        modules: whether the fold writes into modules, which can be quantized again. Otherwise it returns tensors.
    """
    if not (how in (None, "dequantize") or (modules and (how == "requantize" or callable(how)))):
        options = ", 'requantize' or a callable that quantizes a module" if modules else ""
        raise SpecError(f"{call}: quantized is {how!r}. Give None or 'dequantize'{options}")
    names = [name for name, state in slow.states.items() if state.unmerged("slow") is not None]
    if names and how is None:
        raise StateError(
            f"{call}: {named(names, 1)} is quantized, and its dtype cannot represent the trained weight; nothing was "
            "changed. Give quantized='dequantize' for dense weights"
            + (
                ", quantized='requantize' to quantize them again with the settings of their layer, or a callable that "
                "quantizes a module in place"
                if modules
                else ". release(quantized='requantize') quantizes them again. save and export.peft keep the branches"
            ),
            code="quantized-not-supported",
        )
    return names


def _requantize(run: Run, holders: Iterable[Holder], names: Mapping[int, str], how: Requantize, undo: Undo) -> None:
    """Quantize dense weights again unless `how` is "dequantize", and log how much of their changes remains.

    `holders` are the places of the dense weights in the model. The `value` of a holder is the old quantized weight.
    `names` is {id of the old weight: its name}.
    """
    weights = [holder for holder in holders if holder.store is holder.module._parameters]
    # Read all dense weights first, because quantizing a module replaces its weight.
    exact = {id(holder.value): holder.module._parameters[holder.leaf] for holder in weights}
    for holder in weights:
        module, leaf, old, trained_weight = holder.module, holder.leaf, holder.value, exact[id(holder.value)]
        assert old is not None
        assert trained_weight is not None
        kind = type(module.layer if isinstance(module, QuantizedLinear) else module).__name__
        if how == "requantize":
            _requantize_like(old, module, kind, trained_weight, undo)
        elif callable(how):
            how(module)
        else:
            log.info("%s of %s was dequantized to %s", leaf, kind, trained_weight.dtype)
            continue
        current = module._parameters[leaf]
        if current is None or not is_quantized(current):
            raise StateError(
                f"release: quantized={how!r} did not quantize the {leaf} of {kind}; nothing was changed. Give a "
                "callable that quantizes its module in place",
                code="quantized-not-supported",
            )
        name, before = names[id(old)], dense(old).double()
        trained = rounded(run.plan.by_weight[name].options.grid, trained_weight.detach(), old).double()
        run.kept[name] = kept = Kept.of(trained - before, dense(current).double() - before)
        log.info("%s was quantized again: %.3f of its change kept, error %.3g", name, *kept)
    if run.kept and (loss := loss_of(run.kept)):
        run.warned.once("change-rounded-away", f"release: {loss}")


def _requantize_like(old: torch.Tensor, module: nn.Module, kind: str, weight: nn.Parameter, undo: Undo) -> None:
    """Quantize a dense weight again, with the settings of the old weight or of its layer."""
    quantize = quantizer_of(old)
    if quantize is None:
        raise StateError(
            f"release: quantized='requantize' is not supported for {kind}, because its weight cannot be quantized "
            "again without more information; nothing was changed. Give quantized='dequantize', or a callable that "
            "quantizes a module in place, such as torchao's lambda module: quantize_(module, config)",
            code="quantized-not-supported",
        )
    with torch.no_grad():
        requantized = quantize(weight.detach())
    if isinstance(module, QuantizedLinear):
        undo(partial(module.set_layer, module.layer))
        module.set_layer(requantized)
    else:
        undo(partial(setattr, module, "weight", weight))
        module.weight = nn.Parameter(requantized, False)


Change = Callable[[torch.Tensor], torch.Tensor]
"""Moves or casts one tensor."""


def move(run: Run, graphs: Graphs, cascade: nn.Module, fn: Change, recurse: bool) -> None:
    """Move or cast the model and the branches of a run. If anything raises, nothing is changed."""
    with PROCESS, run.lock, AllOrNothing() as undo:
        run.check_alive("to")
        # `to` with the current device and dtype changes nothing, and must not drop the graphs.
        parameters, trained = run.parameters_by_name(), run.present(run.slow.trained)
        tensors = [*(value.data for value in parameters.values()), *run.model.buffers(), *run.branches.parameters()]
        if all(_is_unchanged(tensor.data, fn(tensor.data)) for tensor in tensors):
            return
        run.check_ready("to")
        dtypes = {name: value.dtype for name, value in parameters.items()}
        for name, state in run.slow.states.items():
            if state.grid and fn(torch.empty(0, dtype=dtypes[name])).dtype != dtypes[name]:
                raise StateError(
                    f"to: {name} trains on a grid, and its folds round to {dtypes[name]} first. Move the cascade "
                    "without a cast, cast the model before you adapt it, or cast it after release",
                    code="not-available",
                )
        # Fingerprints identify the base that was adapted, so compute them before its values change.
        if run.digests or any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in set(dtypes.values())):
            run.fingerprints()
        changed_buffers = run.changed_buffers()
        unmoved = [name for name, value in trained.items() if not run.slow.moved({name: value})]
        undo(partial(setattr, graphs, "example", graphs.example))
        undo(_tensors_restorer(run, cascade))
        if recurse:
            _replace_quantized(run.model, fn)
            run.model._apply(fn)
            run.branches._apply(_at_least_fp32(fn))
        graphs.drop(undo)
        graphs.example = pytree.tree_map_only(torch.Tensor, fn, graphs.example)
        # A cast rounds weights a second time. Compute the cast weights again from W0, so that they are rounded once.
        cast = [name for name, value in run.weights_by_name().items() if value.dtype != dtypes[name]]
        run.commit(Planned(run.plan, run.slow, run.present([*cast, *unmoved])), undo)
        run.note_weights()
        run.note_frozen()
        run.note_buffers(changed_buffers)


def _is_unchanged(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether `after` equals `before` and is of the same kind. `to("cpu:0")` makes an equal copy."""
    if is_traceable_wrapper_subclass(before) and type(after) is type(before):  # a quantized weight
        names, context = before.__tensor_flatten__()
        after_names, after_context = after.__tensor_flatten__()
        alike = (names, context, before.dtype) == (after_names, after_context, after.dtype)
        return alike and all(_is_unchanged(getattr(before, name), getattr(after, name)) for name in names)
    if type(before) is not torch.Tensor or type(after) is not torch.Tensor:
        return False
    kind = (before.device, before.dtype, before.is_pinned())
    if kind != (after.device, after.dtype, after.is_pinned()):
        return False
    bits = [value.view(torch.uint8) if value.dtype.itemsize == 1 else value for value in (before, after)]
    return torch.equal(*bits)  # torch cannot compare fp8 values


def _at_least_fp32(fn: Change) -> Change:
    """Return a function that moves and casts factors like `fn`, but never to a dtype narrower than fp32."""

    def change(factor: torch.Tensor) -> torch.Tensor:
        value = fn(factor)
        return value if value.dtype.itemsize >= 4 else factor.to(value.device, torch.float32)

    return change


def _tensors_restorer(run: Run, cascade: nn.Module) -> Callable[[], None]:
    """Return a function that restores the current parameters and buffers of every module, and their memory."""
    modules = [(module, dict(module._parameters), dict(module._buffers)) for module in cascade.modules()]
    # Some modules (nn.LSTM) keep parameters in lists as well, and `_apply` writes into them.
    lists = [
        (store, list(store)) for module in cascade.modules() for store in vars(module).values() if type(store) is list
    ]
    data = [
        (value, value.data, value.grad, None if value.grad is None else value.grad.data, value.requires_grad)
        for value in cascade.parameters()
    ]

    def restore() -> None:
        for module, parameters, buffers in modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for store, values in lists:
            store[:] = values
        for value, memory, gradient, gradient_memory, requires_grad in data:
            value.grad = None  # torch refuses new data whose dtype or device differs from the gradient's
            value.data = memory
            value.requires_grad_(requires_grad)
            if gradient is not None and gradient_memory is not None:
                gradient.data = gradient_memory
            value.grad = gradient
        run.note_weights()
        run.note_frozen()

    return restore


def _replace_quantized(model: nn.Module, fn: Change) -> None:
    """Move or cast quantized weights into new parameters.

    `nn.Module._apply` would swap the tensors of old and new parameters, which raises if a weak reference to one exists.
    """
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            continue
        parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        for name, parameter in quantized_in(parameters).items():
            if id(parameter) not in new:  # tied weights stay tied
                new[id(parameter)] = nn.Parameter(fn(parameter.detach()), False)
            module._parameters[name] = new[id(parameter)]
