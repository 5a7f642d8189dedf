"""Values out of a cascade: other weights in place for a while, the folded state dict, and the release.

A quantized weight cannot hold a delta: its fold is dense, or quantized again, if asked to.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.branch.noise import BLOCK
from lorasc_fx.cascade.commit import SPARE, Planned
from lorasc_fx.cascade.experts import WHICH, Weights, added_weights, check_which, folded_weights
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import at_stage
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.parameters import Holder, holders_of, substituted
from lorasc_fx.quantized import QuantizedLinear, dense, is_quantized, library_of
from lorasc_fx.shards import local
from lorasc_fx.state import SlowWeights, Which, arithmetic
from lorasc_fx.util.undo import Block, Undo, commit, isolated

Value = TypeVar("Value")

_VERSIONS = itertools.count(1 << 24)
"""Of weights in place for the time of a `with`; torch counts the writes to a parameter from 0."""


@isolated
def placed(undo: Block, run: Run, which: str | Mapping[str, float] | None, stage: int | None, value: Value) -> Value:
    """Put other weights in place; see `Cascade.weights`. Returns `value`, which is what `with ... as` gets."""
    run.check_alive("weights")
    if stage is not None and which is not None:
        raise StateError(f"weights({which!r}, stage={stage!r}): give one of the two", code="conflicting-options")
    added = isinstance(which, Mapping) or (isinstance(which, str) and which in run.added)
    if stage is None and not added:
        check_which(f"weights({which!r})", str(which), run.plan.spec, (*WHICH, *run.added))
    # DTensors cannot be read or written in inference mode
    with torch.inference_mode(False), run.exclusive("weights", sharded=not added):
        parameters = run.parameters_by_name()
        live = trained_now(run, parameters)
        weights = added_weights(run, which, f"weights({which!r})")
        if stage is not None:
            weights = Weights(at_stage(run.slow, stage, "weights"), "slow" if stage else "base")
        elif weights is None:
            meant: Which = next(name for name in WHICH if name == which)
            weights = Weights(run.slow, meant, learners={**run.branches_by_weight(), **live}, plan=run.plan)
        held, buffers = Held.of(run, parameters), weights.moves(run)
        undo(partial(_put_back, run, parameters, live, held, _reserve(run, parameters)))
        run.keep_buffers([buffer for buffer, _ in buffers])
        run.commit(
            Planned(
                run.plan,
                run.slow,
                run.present(run.slow.states),
                weights.write,
                weights.dense(run.quantized if weights.which != "base" else (), parameters),
                tensors=buffers,
                placed=stage if stage is not None else str(which),
                live=live,
            )
        )
        held.set_versions(placed=True)
    return value


def trained_now(run: Run, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return copies of the parameters trained in full, as they are here now."""
    return {name: local(parameters[name]).detach().clone() for name in run.slow.trained}


@dataclass(frozen=True)
class Held:
    """The parameters that `placed` writes: where modules hold them, their memory, and its versions for autograd."""

    places: list[Holder]
    memory: tuple[tuple[nn.Parameter, torch.Tensor], ...]
    versions: tuple[tuple[nn.Parameter, int], ...]

    @staticmethod
    def of(run: Run, parameters: Mapping[str, nn.Parameter]) -> Held:
        """Return those of a run. Of sharded weights there are none: FSDP itself exchanges them."""
        names = [*run.slow.states]
        if run.is_sharded:
            return Held([], (), ())
        dense = [parameters[name] for name in names if not is_quantized(parameters[name])]
        versions = tuple((parameter, parameter._version) for parameter in dense if not parameter.is_inference())
        return Held(holders_of(run.model, names), tuple((parameter, parameter.data) for parameter in dense), versions)

    def set_versions(self, placed: bool) -> None:
        """Give weights in place a version that nothing else has, so that no graph of others can be differentiated; the
        weights of before get their own versions, so that their graphs still can.
        """
        new = next(_VERSIONS)
        versions = tuple(new if placed else version for _, version in self.versions)
        parameters = tuple(parameter for parameter, _ in self.versions)
        torch._C._autograd._unsafe_set_version_counter(parameters, versions)

    def put_back(self) -> None:
        """Undo what was assigned, and casts; a place that is gone stays so."""
        for holder in self.places:
            if holder.is_there:
                holder.put(holder.value)
        for parameter, memory in self.memory:
            if parameter.dtype != memory.dtype or parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory


def _reserve(run: Run, parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
    """Return memory of each accelerator, to be freed when noisy weights are restored.

    Restoring them takes more than placing others did: a block of noise, and the exact weight if it is narrow. Without
    this reserve, a device that has become full inside `weights` would keep some of the other weights.
    """
    if run.slow.idle or not run.plan.spec.noise.is_on:
        return []
    sizes: dict[torch.device, int] = {}
    for parameter in run.weights_by_name().values():
        if not is_quantized(parameter) and (weight := local(parameter)).device.type != "cpu":
            exact = 0 if weight.dtype == arithmetic(weight.dtype) else 4 * weight.numel()
            drawn = 8 * min(weight.numel(), BLOCK)
            sizes[weight.device] = max(sizes.get(weight.device, 0), exact + drawn + 2 * SPARE)
    return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()]


def _put_back(
    run: Run,
    parameters: Mapping[str, nn.Parameter],
    live: Mapping[str, torch.Tensor],
    held: Held,
    reserve: list[torch.Tensor],
) -> None:
    """Write back what the parameters hold while the stage trains; where that raises, once more.

    Raises:
        StateError: a weight was written inside `weights`; all of them are back.
    """
    reserve.clear()
    written = {name: parameters[name] for name in run.slow.states}
    planned = Planned(run.plan, run.slow, written, tensors=run.statistics, live=live)

    def put_back() -> None:
        held.put_back()
        run.commit(planned)
        run.placed, run.placed_checksums, run.statistics = None, {}, []

    with torch.inference_mode(False), run.lock, commit() as undo:
        undo(put_back)
        changed = run.changed(run.placed_checksums)
        put_back()
    if changed is None:
        held.set_versions(placed=False)
    else:
        raise StateError(
            f"weights: {changed} was written inside the with block (a training step, load_state_dict, half, .data). "
            "The weights of before are back, and what was written is dropped. Train the cascade outside of the block; "
            "cast or change a copy (copy.deepcopy(model) inside the block), or the model after release",
            code="inside-weights",
        )


def cast_weights(run: Run, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], list[str]] | None:
    """Check a cast, before `fn` moves or casts every parameter; None if it leaves them as they are.

    Fingerprints are of the base as it was adapted: they are taken now if its numbers are about to change.

    Returns:
        A function to be called after the cast: the names of the weights that have another dtype, and of those trained
        in full that stand at the start of their stage. Both are rounded anew.

    Raises:
        StateError: after `release`; and where something moves, inside `weights` or inside a backward.
    """
    run.check_alive("to")
    parameters, trained = run.parameters_by_name(), run.trained_parameters()
    held = [*(parameter.data for parameter in parameters.values()), *run.model.buffers(), *run.branches.parameters()]
    if all(_stays(tensor.data, fn(tensor.data)) for tensor in held):
        return None
    run.check_ready("to")
    dtypes = {name: value.dtype for name, value in parameters.items()}
    if run.fingerprinted or any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in set(dtypes.values())):
        run.fingerprints()
    unmoved = [name for name, value in trained.items() if not run.slow.moved({name: value})]

    def rounded_anew() -> list[str]:
        now = run.weights_by_name()
        return [*(name for name, value in now.items() if value.dtype != dtypes[name]), *unmoved]

    return rounded_anew


def wide(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what moves and casts factors as `fn` does weights, but to fp32 where these are narrower."""

    def cast(factor: torch.Tensor) -> torch.Tensor:
        value = fn(factor)
        return value if value.dtype.itemsize >= 4 else factor.to(value.device, torch.float32)

    return cast


def tensors_writer(run: Run, cascade: nn.Module) -> Callable[[], None]:
    """Return what gives every module its own parameters and buffers back, with the memory that they have now."""
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in cascade.modules()]
    lists = [
        (store, list(store)) for module in cascade.modules() for store in vars(module).values() if type(store) is list
    ]
    data = [
        (value, value.data, value.grad, None if value.grad is None else value.grad.data, value.requires_grad)
        for value in cascade.parameters()
    ]

    def write() -> None:
        for module, parameters, buffers in held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for store, values in lists:
            store[:] = values
        for value, memory, gradient, its_memory, trained in data:
            value.grad = None
            value.data = memory
            value.requires_grad_(trained)
            if gradient is not None and its_memory is not None:
                gradient.data = its_memory
            value.grad = gradient
        run.note_weights()
        run.note_frozen()

    return write


def replace_quantized(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Move or cast weights that are tensor subclasses, as new parameters: torch swaps the old ones with theirs, which
    it refuses where a weak reference to one is held.
    """
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in () if isinstance(module, QuantizedLinear) else [*module._parameters.items()]:
            if parameter is not None and is_quantized(parameter):
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(fn(parameter.detach()), False)
                module._parameters[name] = new[id(parameter)]


def _stays(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a tensor was left as it is, or only copied to where it is: torch does so for the device `cpu:0`."""
    if after is before:
        return True
    if is_traceable_wrapper_subclass(before) and type(after) is type(before):  # a quantized weight
        names, how = before.__tensor_flatten__()
        other, its_how = after.__tensor_flatten__()
        alike = (names, how, before.dtype) == (other, its_how, after.dtype)
        return alike and all(_stays(getattr(before, name), getattr(after, name)) for name in names)
    if type(before) is not torch.Tensor or type(after) is not torch.Tensor:
        return False
    kind = (before.device, before.dtype, before.is_pinned())
    if kind != (after.device, after.dtype, after.is_pinned()):
        return False
    bits = [value.view(torch.uint8) if value.dtype.itemsize == 1 else value for value in (before, after)]
    return torch.equal(*bits)  # of fp8 torch compares no numbers


def folded_state(
    run: Run, call: str, quantized: Requantize, which: str | Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Return copies of the model's state dict with slow weights, its own or others; tied names share one tensor as in
    the model.
    """
    folded: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}
    for name, value, new in folded_each(run, call, quantized, which):
        if not isinstance(value, nn.Parameter):
            folded[name] = new()
            continue
        if id(value) not in done:
            done[id(value)] = new()
        folded[name] = done[id(value)]
    return folded


def folded_each(
    run: Run, call: str, quantized: Requantize = None, which: str | Mapping[str, float] = "slow"
) -> Iterator[tuple[str, Any, Callable[[], torch.Tensor]]]:
    """Yield each entry of the model's state dict: its name, what it holds now, and what makes its folded value."""
    weights, parameters = folded_weights(run, which, call), run.parameters_by_name()
    buffers = weights.buffers
    names = {name: parameters[name] for name in check_asked(call, weights.slow, quantized)}
    changed = {
        name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), False)
        for name, value in names.items()
    }
    with substituted(run.model, changed):  # a dense weight is saved by another name than a layer's packed numbers
        held = run.model.state_dict(keep_vars=True)
    first = {id(parameter): name for name, parameter in {**parameters, **changed}.items()}
    for key, value in held.items():
        name = first.get(id(value), "")
        now = buffers[key].to(value) if key in buffers else parameters[name] if name in changed else value
        yield key, now, partial(_folded, weights, name, now)


def _folded(weights: Weights, name: str, value: Any) -> Any:
    """Return a copy of an entry of the state dict, with the folded weights if it is the parameter of this name."""
    slow = weights.slow
    if name in slow.states and not (is_quantized(value) and slow.states[name].unmerged("slow") is None):
        return slow.value(name, weights.which, value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def release(run: Run, quantized: Requantize, which: str | Mapping[str, float], undo: Undo) -> None:
    """Write slow, averaged or other weights into the user's parameters, for good, and drop W0."""
    weights, parameters = folded_weights(run, which, "release"), run.parameters_by_name()
    dense = weights.dense(check_asked("release", weights.slow, quantized, modules=True), parameters)
    live = trained_now(run, parameters)
    holders, written = holders_of(run.model, dense), run.present(weights.slow.states)
    buffers = weights.moves(run)
    run.commit(Planned(run.plan, SlowWeights(), written, weights.write, dense, tensors=buffers, live=live), undo)
    requantize(holders, quantized, undo)


log = logging.getLogger("lorasc_fx")

Requantize = Literal["dequantize", "requantize"] | Callable[[nn.Module], object] | None
"""What a fold does to quantized weights that have trained: refuse (None), leave them dense, quantize them again by the
layer's own method, or call this on each of the modules that hold one, with the dense weight in it, to quantize it."""


def check_asked(call: str, slow: SlowWeights, how: Requantize, modules: bool = False) -> list[str]:
    """Return the quantized weights that a fold changes.

    Args:
        call: for messages.
        slow: what is folded.
        how: what the call was asked to do with them.
        modules: whether the fold is into modules, which can be quantized again, and not into tensors.

    Raises:
        StateError: there are some, and the call does not say what to do with them.
        SpecError: `how` is none of what it may be.
    """
    if not (how in (None, "dequantize") or (modules and (how == "requantize" or callable(how)))):
        more = ", 'requantize' or a callable that quantizes a module" if modules else ""
        raise SpecError(f"{call}: quantized is {how!r}; give None or 'dequantize'{more}")
    names = [
        name for name, state in slow.states.items() if is_quantized(state.base) and state.unmerged("slow") is not None
    ]
    if names and how is None:
        raise StateError(
            f"{call}: {named(names, 1)} is quantized, and its numbers cannot hold what was trained; nothing was "
            "changed. Give quantized='dequantize' for dense weights"
            + (
                ", 'requantize' to quantize them again by the method of their layer, or quantized=f, which quantizes a "
                "module again"
                if modules
                else "; release can quantize them again (quantized='requantize'), save and export.peft keep branches"
            ),
            code="quantized-not-supported",
        )
    return names


def requantize(held: Iterable[Holder], how: Requantize, undo: Undo) -> None:
    """Quantize again where asked to, and log what was done to each weight.

    Args:
        held: the places in which there are dense weights now, with the quantized ones that they held.
        how: of the call.
        undo: gets the steps that put the layers of libraries back.

    Raises:
        StateError: what shall quantize a module does not.
    """
    named = [holder for holder in held if holder.store is holder.module._parameters]
    exact = {id(holder.value): holder.module._parameters[holder.leaf] for holder in named}
    for holder in named:
        module, leaf, old, now_dense = holder.module, holder.leaf, holder.value, exact[id(holder.value)]
        assert old is not None
        assert now_dense is not None
        kind = type(module.layer if isinstance(module, QuantizedLinear) else module).__name__
        if how == "requantize":
            _by_its_own_method(module, kind, now_dense, undo)
        elif callable(how):
            how(module)
        else:
            log.info("%s of %s was dequantized: it is %s now", leaf, kind, now_dense.dtype)
            continue
        now = module._parameters[leaf]
        if now is None or not is_quantized(now):
            raise StateError(
                f"release: quantized={how!r} did not quantize the {leaf} of {kind}; "
                "nothing was changed. Give a callable that quantizes the module that it is given, in place",
                code="quantized-not-supported",
            )
        size = dense(old).float().norm().clamp_min(1e-30)
        trained = float((now_dense.float() - dense(old).float()).norm() / size)
        rounded = float((dense(now).float() - now_dense.float()).norm() / size)
        log.info(
            "%s of %s was quantized again as %s: training moved it by %.3g %% of its norm, rounding by %.3g %%",
            leaf,
            kind,
            type(module.layer if isinstance(module, QuantizedLinear) and module.holds_layer else now).__name__,
            100 * trained,
            100 * rounded,
        )


def _by_its_own_method(module: nn.Module, kind: str, weight: nn.Parameter, undo: Undo) -> None:
    """Quantize a dense weight as the layer did that it has taken the place of.

    Raises:
        StateError: there is no such layer, or its method needs more than the weight.
    """
    row = library_of(module.layer) if isinstance(module, QuantizedLinear) else None
    if row is None or row.requantize is None:
        raise StateError(
            f"release: quantized='requantize', and no method is known by which {kind} was quantized; "
            "nothing was changed. Give quantized=f, which quantizes a module in place, as torchao's "
            "lambda module: quantize_(module, config) does, or 'dequantize'",
            code="quantized-not-supported",
        )
    assert isinstance(module, QuantizedLinear)
    undo(partial(module.hold, module.layer))
    with torch.no_grad():
        module.hold(row.requantize(module.layer, weight.detach()))
