"""The adapted model as an nn.Module. The user's model and the branches are its children.

Below the class: the flags and ties that `release` restores, and two warnings. They are for a call or a read of the
model instead of its cascade, and for a cascade that is dropped without `release`.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Literal, Self

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from lorasc_fx.cascade import transition
from lorasc_fx.cascade.graphs import Example, Graphs
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.training import Fresh, Optimizers, optimizers_of
from lorasc_fx.cascade.transition import Stage
from lorasc_fx.cascade.weights import VIEW_NAMES, Requantize, check_view, folded_state, move, placed, write_fold
from lorasc_fx.compile import Axis
from lorasc_fx.errors import SpecError, StateError, warn
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.quantized import unwrap_layers
from lorasc_fx.signature import bind
from lorasc_fx.state import Kept, ViewName, kept_by
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.undo import Undo, commit


class CascadeModule(nn.Module):
    """The adapted model, made by `lorasc_fx.adapt`. A call computes `y = W_t x + b + s B_t A_t x` at every site.

    W_t [out, in] is the frozen weight of stage t. A_t [r, in] and B_t [out, r] are the trained factors, with the scale
    s (LoRASC, 2407.01491; docs/algorithm.md, "One site").

    Child modules are `model`, the user's model, which remains the only owner of its weights, and `branches`, one per
    site. One graph is captured for each call signature. Graphs contain no weights and read these modules.
    """

    def __init__(self, run: Run, graphs: Graphs, flags: Flags, joined: Joined = ()) -> None:
        super().__init__()
        self.model, self._flags = run.model, flags
        self._modules["branches"] = run.branches
        self.training = run.model.training
        self._run, self._graphs, self._joined, self._usage = run, graphs, joined, UsageWatch()
        # Set last, so that it is finalized last: its finalizer checks whether anything else refers to the model.
        self._drop_warning = DropWarning(run, self._usage)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            StateError: the name is `model` or `branches`. Graphs and folds refer to the modules that `adapt` was given.
        """
        child = self.__dict__.get("_modules", {}).get(name) if name in ("model", "branches") else None
        if child is not None and value is not child:
            raise StateError(
                f"cascade.{name} cannot be replaced, because graphs and folds refer to the original module. To adapt "
                "another model, call release() and adapt(other_model, ...). To compile, call torch.compile(cascade)",
                code="weights-changed-outside",
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute that the cascade does not have, such as `config` or `device`, in the user's model.

        A method of the model computes without branches. Submodules are not available, because a call of one would
        silently compute without branches.

        Raises:
            AttributeError: neither the cascade nor the model has the attribute, or it is a submodule.
        """
        children = self.__dict__.get("_modules", {})
        if name in children:
            return children[name]
        if "model" not in children or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        model = children["model"]
        if not hasattr(model, name):
            raise AttributeError(f"neither the cascade nor its {type(model).__name__} has an attribute {name!r}")
        value = getattr(model, name)
        if isinstance(value, nn.Module):
            raise AttributeError(
                f"{name} is a submodule of the user's model, and calling it computes without branches. If that is what "
                f"you want, use cascade.model.{name}. With a transformers Trainer, pass "
                "callbacks=[lorasc_fx.integrations.transformers.CascadeCallback(cascade)]"
            )
        return value

    # ---- calls

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the user's model with the branches.

        A call captures another graph if there is none for its mode, dtypes, structure of arguments and sizes.
        Inside `weights(...)` no branch computes.

        Args:
            args, kwargs: arguments of the user's model.

        Returns:
            The output of the user's model, in its own types and shapes.

        Raises:
            StateError: after `release`.
            CaptureError: no front end can capture this kind of call.
            Exception: any exception that the model itself raises for these arguments.
        """
        run, graphs = self._run, self._graphs
        run.check_alive("forward")
        # Inside `weights(...)` call the model itself, unless its weights are sharded: only graphs gather shards.
        if run.placed is not None and graphs.split is None:
            return self.model(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo guards inputs itself, and cannot trace the hash of a call
            bound, named = bind(graphs.compiler.calls.signature, args, kwargs)
            compiled = graphs.variants.compiled(self.training, pytree.tree_leaves((bound, named)))
            if compiled is None:
                return graphs.variants.not_compiled(self, args, kwargs)
            return compiled.module(*bound, **named)
        call = graphs.compiler.calls.bind(args, kwargs)
        variant = graphs.variants.find(call) or graphs.capture(call)
        if DistributedDataParallel._active_ddp_module is not None or not torch.is_grad_enabled():
            run.check_call(self.training)
        return variant.compute(call)

    # ---- the plan and the graphs

    @property
    def plan(self) -> Plan:
        """The spec, the sites and the number of the running stage, as immutable data."""
        return self._run.plan

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted weights, in the order of the model's parameters."""
        return self._run.plan.sites

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The weight matrices that were not adapted, each with a reason."""
        return self._run.refusals

    @property
    def unreached(self) -> tuple[str, ...]:
        """The names of the weight matrices that no captured graph has used yet."""
        return self._run.unreached

    @property
    def stage(self) -> int:
        """Number of the running stage, from 1. After the last stage of a loop, the number of the next stage."""
        return self._run.plan.stage

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs of `adapt` as (args, kwargs). After a `load` without inputs, the inputs of the first call.

        Raises:
            StateError: the cascade was loaded without inputs and has not been called yet.
        """
        if self._graphs.example is None:
            raise StateError(
                "the cascade was loaded without example inputs. Call it once, or give args=(...) or kwargs={...}",
                code="not-available",
            )
        return self._graphs.example

    @property
    def frontend(self) -> str:
        """Name of the front end that captured the model, or "" until the first call after a `load` without inputs."""
        return self._graphs.frontend

    @property
    def refused_frontends(self) -> tuple[tuple[str, str], ...]:
        """The front ends that failed under `frontend="auto"`, as (name, reason)."""
        return self._graphs.refused_frontends

    @property
    def placements(self) -> dict[str, str]:
        """The placement of each branch in the first graph, {weight name: `beside`, `merged` or `weight`}.

        Empty before the first graph is captured.
        """
        return dict(oldest.placements) if (oldest := self._graphs.variants.oldest) is not None else {}

    @property
    def graph_module(self) -> fx.GraphModule:
        """The adapted graph of the first call. It reads the current weights of `model` and calls `branches`.

        Use it with passes and printers. Train the cascade itself, which has a separate graph for each kind of call.

        Raises:
            StateError: after `release`, before the first call, or if the model runs eagerly.
        """
        self._run.check_alive("graph_module")
        return self._graphs.unbroken_graph()

    def draw(self, sites: Sequence[str] = (), radius: int = 2) -> str:
        """Draw the adapted graph around some sites, with placements of branches, names, dtypes and shapes.

        A dashed box has neighbours outside of the drawing.

        Args:
            sites: kinds of weights, or globs on weight names, as in a spec. The default is the first three sites.
            radius: number of edges to follow from each branch, in both directions.

        Returns:
            Text for Graphviz. `dot -Tsvg` converts it to a picture, and `graphviz.Source(...)` shows it in a notebook.

        Raises:
            UnknownTarget: a pattern matches no site.
            StateError: after `release`, before the first call, or if the first graph has none of these branches.
        """
        self._run.check_alive("draw")
        return self._graphs.compiler.draw(self._graphs.first("draw"), self.plan, sites, radius)

    def __str__(self) -> str:
        """Return a readable summary: sites, refusals, parameters and front end."""
        return summary(self._run, self.frontend, self.refused_frontends, self.placements)

    # ---- stages

    def param_groups(self, lr: float, **options: object) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer.

        There is one group for each kind of branch parameter (`lora_A`, `lora_B`), and a group `train` for parameters
        trained in full. Empty groups are omitted, so with train_A=False there is no group `lora_A`.

        Args:
            lr: learning rate of all groups, except `lora_B`, whose rate is `lr * lr_ratio` (LoRA+, 2402.12354).
            options: more options for every group, such as `weight_decay`.

        Raises:
            StateError: after `release`.
        """
        return self._run.param_groups(lr, options)

    def stages(self, count: int, optimizer: Optimizers, scheduler: object = None) -> Iterator[Stage]:
        """Yield `count` stages. A transition runs after each stage.

        After the loop the parameters hold the slow weights, without noise. If the loop is left early, the current stage
        continues to run. Arguments are checked when this method is called, before the first stage.

        Args:
            count: number of stages, 1 or more.
            optimizer: the optimizer of all trained parameters, or a list of several that share these parameters, such
                as `torch.optim.Muon` for matrices and AdamW for the rest. A transition treats their state by
                `optimizer_state` of the spec.
            scheduler: a torch learning rate scheduler, or a list of several. Each is stepped once per transition.

        Raises:
            SpecError: `count` is not an integer of 1 or more. Or `optimizer` is no optimizer, has one optimizer twice,
                or ignores the learning rates of the spec.
            StateError: a trained parameter is in no optimizer or in two. Also in the other cases of `transition`.
        """
        if not is_integer(count, 1):
            raise SpecError(f"stages({count!r}): the number of stages must be an integer of 1 or more")
        optimizers = optimizers_of("stages", optimizer)
        self._run.begin_loop(optimizers)
        schedulers = scheduler if isinstance(scheduler, (list, tuple)) else () if scheduler is None else (scheduler,)
        return transition.loop(self._run, count, optimizers, schedulers)

    def transition(self, optimizer: Optimizers | None) -> None:
        """End the running stage and start the next one (docs/algorithm.md, "One site").

        The slow weights become `S_t = S_{t-1} + pace * (F_t - S_{t-1})`. The parameters get the weights of the next
        stage, with new noise. The options `restart_factors` and `optimizer_state` of the spec say which parameters of
        branches get new initial values, and what happens to their optimizer state.

        If anything raises, including Ctrl-C, nothing is changed. Methods that read or write weights take a lock, so
        they are safe to call from several threads. A call of the cascade takes no lock: if it runs in another thread
        during a transition, it may use weights of both stages.

        Parameter objects stay the same, so optimizers, compiled code and wrappers stay valid.

        Args:
            optimizer: the optimizer of all trained parameters, or a list of several. None without an optimizer.

        Raises:
            StateError: inside a backward, with gradients pending, inside `weights` or after `release`. Also if a
                trained parameter is in no optimizer or in two.
            NonFiniteBranch: a branch holds inf or nan, or its weight would overflow.
        """
        transition.next_stage(self._run, optimizers_of("transition", optimizer))

    def rewind(self, stage: int, optimizer: Optimizers | None) -> None:
        """Go back to the slow weights at the end of an earlier stage and start a new stage from them.

        All later stages are dropped, including the training of the running one. The new stage has a new number, so it
        draws new noise and new initial values. It starts from the slow weights even under restart="fast". The
        optimizer's state is reset. Buffers (running statistics) keep their values. If anything raises, nothing is
        changed.

        Args:
            stage: number of a stage that has ended. 0 is the base, W0.
            optimizer: as for `transition`.

        Raises:
            StateError: the stage has not ended or is no longer available. Also in the cases of `transition`.
        """
        transition.rewind(self._run, stage, optimizers_of("rewind", optimizer))

    # ---- weights

    @property
    def views(self) -> tuple[str, ...]:
        """The names that `weights` accepts: `slow`, `fast`, `base`, and `averaged` if it is kept."""
        return tuple(name for name in VIEW_NAMES if name != "averaged" or self._run.plan.spec.average)

    def weights(self, view: ViewName | str | None = None, *, stage: int | None = None) -> AbstractContextManager[Self]:
        """Return a context manager that replaces the weights inside the block, and then restores the old ones exactly.

        Inside the block no branch computes. The cascade and the model give the same outputs, and methods of the model
        such as `generate` can be used. The weights have no noise:

        - `slow`: W0 + S, the original weight plus the experts of the finished stages.
        - `fast`: W0 + F, which includes the running branches.
        - `base`: W0.
        - `averaged`: the mean of the slow weights over stages, if the spec has `average`.

        Args:
            view: one of these names.
            stage: instead of `view`, the number of a stage that has ended, for the slow weights at its end. 0 is the
                base.

        Raises:
            StateError: at the start of the block, if the name is unknown, the stage is not available, or there is no
                average. Also inside another `weights`, inside a backward, or after `release`. At the end of the block,
                if a weight was written inside. That write is lost.
        """
        return placed(self._run, view, stage, self)

    def folded_state_dict(
        self, quantized: Literal["dequantize"] | None = None, *, view: ViewName = "slow"
    ) -> dict[str, torch.Tensor]:
        """Return a copy of the model's state dict with the slow weights.

        The original model can load it with strict=True. If the running stage has trained, its slow update is included,
        as in `release`. The cascade is not changed.

        Args:
            quantized: `dequantize` returns dense tensors for quantized weights that have trained. With None, such a
                weight is an error.
            view: `slow` or `averaged`, as in `weights`.

        Returns:
            Tensors by name, in the shapes and dtypes of the model. Tied parameters share one tensor.

        Raises:
            StateError, SpecError, NonFiniteBranch: as for `release`.
        """
        with self._run.exclusive("folded_state_dict", keeps=True):
            return folded_state(self._run, "folded_state_dict", quantized, view)

    def folded_graph(
        self,
        args: Sequence[object] | None = None,
        kwargs: Mapping[str, object] | None = None,
        quantized: Literal["dequantize"] | None = None,
        *,
        view: ViewName = "slow",
    ) -> nn.Module:
        """Return a plain GraphModule without branches, whose constants are the slow weights.

        It has the nodes, names and shapes of the captured graph, and does not depend on the cascade. It raises
        RuntimeError for an input with a size of 0 or 1 for which the graph would not compute the same as the model.

        Args:
            args, kwargs: inputs to capture the graph for, by default the example inputs of `adapt`. The mode of the
                graph (train or eval) is the current mode of the cascade.
            quantized, view: as for `folded_state_dict`.

        Raises:
            StateError, SpecError, NonFiniteBranch: as for `release`.
            CaptureError: no front end can capture this kind of call.
        """
        return fold_graph(self, *example_or(self, args, kwargs), quantized, view)[0]

    def release(self, quantized: Requantize = None, *, view: ViewName = "slow") -> nn.Module:
        """End the cascade and return the user's model with the slow weights, and with its original flags and modes.

        If the running stage has trained, its slow update is included: with a pace below 1, the model gets only this
        share of the training. If anything raises, nothing is changed.

        Args:
            quantized: how to treat quantized weights that have trained. `dequantize` leaves them dense. `requantize`
                quantizes them again with the settings of their layer (bitsandbytes, torchao). This is the default with
                grid="own". A callable gets each module with its dense weight and quantizes it in place, for example
                torchao's `lambda module: quantize_(module, config)`. The share of the change that is kept is logged.
                With None (the default) a quantized weight that has trained is an error, except with grid="own".
            view: `slow` or `averaged`, as in `weights`.

        Raises:
            StateError: gradients are pending, inside `weights` or a backward, or after `release`. Also if quantized
                weights have trained, and `quantized` is None without grid="own".
            SpecError: `quantized` is invalid.
            NonFiniteBranch: a branch holds inf or nan, or its weight would overflow.
        """
        with self._run.exclusive("release", ends_stage=True, keeps=True), commit() as undo:
            # Register these undo steps before the first change, because they record the current state.
            undo(self._run.restorer())
            undo(partial(Flags.of(self.model).restore, self.model))
            undo(partial(self._usage.arm, self._run))
            write_fold(self._run, quantized, view, undo)
            self._flags.restore(self.model)
            restore_structure(self.model, self._joined, undo)
            self._graphs.drop(undo)
            self._usage.disarm()
            self._run.detach()
            return self.model

    def kept(self, view: Literal["slow", "averaged"] = "slow") -> dict[str, Kept]:
        """Return {weight name: how much of the change of the weight since W0 a fold keeps in its dtype}.

        The training of the running stage is not included. The values are computed from 16 rows of each weight. Left out
        are weights that have not changed, quantized weights, and weights that train on a grid.

        Args:
            view: `slow` or `averaged`, as in `weights`.
        """
        self._run.check_alive("kept")
        check_view("kept", view, self._run.plan.spec)
        shares = {name: kept_by(state, view) for name, state in self._run.slow.states.items()}
        return {name: kept for name, kept in shares.items() if kept is not None}

    # ---- moving

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the model and the branches. `to`, `cuda`, `half` and others call this.

        The slow state stays where it is. Graphs are dropped, because their constants do not move with the model. The
        next call captures new ones. Branches stay in fp32 or wider.
        """
        move(self._run, self._graphs, self, fn, recurse)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode of the cascade, its branches and the user's model.

        The module of an exported program has one fixed mode and keeps it.
        """
        self._run.check_alive("train")
        self.training = self.branches.train(mode).training
        if "train" not in vars(self.model):  # torch.export replaces `train` of its modules by a function that raises
            self.model.train(mode)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Support the `copy` module but not pickling, because graphs read the live model.

        Raises:
            StateError: the caller is not Python's `copy` module, or makes a deep copy of sharded weights.
        """
        if sys._getframe(1).f_globals.get("__name__") == "copy":
            if sys._getframe(1).f_code.co_name == "deepcopy" and self._run.is_sharded:
                raise StateError(
                    "deepcopy: the weights are sharded over processes, and FSDP would not manage the copy. Write a "
                    "checkpoint by lorasc_fx.save and load it onto another model by lorasc_fx.load",
                    code="sharded",
                )
            return super().__reduce_ex__(protocol)
        raise StateError(
            "a cascade cannot be pickled (by torch.save, a spawned process or otherwise), because its graphs read the "
            "live model. Write a checkpoint by lorasc_fx.save(cascade, folder) and read it by lorasc_fx.load, or "
            "pickle the model after cascade.release()",
            code="not-serializable",
        )


# ---- for other packages: functions, because attributes of a cascade would hide attributes of the user's model


def run_of(cascade: CascadeModule) -> Run:
    """Return the run of a cascade: its model and branches, plan, slow weights and lock."""
    return cascade._run


def graphs_of(cascade: CascadeModule) -> Graphs:
    """Return the captured graphs of a cascade."""
    return cascade._graphs


def flags_of(cascade: CascadeModule) -> Flags:
    """Return the flags that the user's model had before `adapt`."""
    return cascade._flags


def example_or(cascade: CascadeModule, args: Sequence[object] | None, kwargs: Mapping[str, object] | None) -> Example:
    """Return these inputs as (args, kwargs), or the example inputs of a cascade if both are None."""
    return cascade.example if args is None and kwargs is None else (tuple(args or ()), dict(kwargs or {}))


def fold_graph(
    cascade: CascadeModule,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    quantized: Literal["dequantize"] | None,
    view: str,
) -> tuple[nn.Module, dict[Axis, int]]:
    """Return the folded graph, and {axis: smallest accepted size} for axes that do not accept every size."""
    run, graphs = run_of(cascade), graphs_of(cascade)
    check_view("folded_graph", view, run.plan.spec)
    with run.exclusive("folded_graph", keeps=True):
        state = folded_state(run, "folded_graph", quantized, view)
    forget_new = graphs.variants.restorer()
    try:
        variant, call = graphs.variant_of(args, kwargs, "folded_graph", dynamic=True)
        return graphs.compiler.fold(variant, cascade.model, cascade.stage, state, call.args, call.kwargs)
    except BaseException:  # a call that raises adds no graph
        forget_new()
        raise


def watch_model(cascade: CascadeModule, undo: Undo) -> None:
    """Warn from now on if the user's model is called, or if its state dict is read."""
    undo(cascade._usage.disarm)
    cascade._usage.arm(cascade._run)


_SHOWN = 8
"""Maximum number of refusals, and of unreached weights, that the summary names."""


def summary(
    run: Run, frontend: str, refused_frontends: tuple[tuple[str, str], ...], placements: Mapping[str, str]
) -> str:
    """Return the summary of a cascade as lines of text."""
    plan, spec = run.plan, run.plan.spec
    total = sum(parameter.numel() for parameter in run.model.parameters())
    trainable = run.trained_entries
    pace = f"{run.slow.pace(plan):g}"
    kinds, counted = Counter(site.kind for site in plan.sites), Counter(placements.values())
    lines = [
        f"Cascade of {type(run.model).__name__}, "
        + (f"captured by {frontend}" if frontend else "captured at its first call"),
        f"  stage {plan.stage}, pace {pace}, noise {spec.noise.strength:g}, restart {spec.restart}",
        f"  {len(plan.sites)} sites: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"  {trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %)",
    ]
    if counted:
        lines.append("  placements: " + ", ".join(f"{count} {where}" for where, count in counted.most_common()))
    if run.kept:
        name, kept = min(run.kept.items(), key=lambda item: item[1].share)
        share = f"{kept.share:.3f} of the change ({name}, of {len(run.kept)} weights)"
        lines.append(f"  the last fold kept at least {share}")
    lines += [f"  before: {name} refused: {reason}" for name, reason in refused_frontends]
    requested = Counter(refusal.reason.value for refusal in run.refusals if refusal.reason.requested)
    if requested:
        lines.append("  left as asked: " + ", ".join(f"{count} {reason}" for reason, count in requested.items()))
    refusals = [refusal for refusal in run.refusals if not refusal.reason.requested]
    if refusals:
        lines.append(f"  {len(refusals)} refusals:")
        lines += [f"    {refusal}" for refusal in refusals[:_SHOWN]]
        if len(refusals) > _SHOWN:
            lines.append(f"    and {len(refusals) - _SHOWN} more, see cascade.refusals")
    if run.unreached:
        shown = ", ".join(run.unreached[:_SHOWN])
        lines.append(f"  {len(run.unreached)} unreached (in no graph yet): {shown}")
    return "\n".join(lines)


# ---- the model beside its cascade


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


class UsageWatch(Fresh):
    """Warns if the user's model is called, or its state dict is read, while cascade and model compute differently.

    It is a state dict pre-hook and the `_compiled_call_impl` of the model. Copies and pickles leave out the latter.
    """

    def __init__(self) -> None:
        self._run: Callable[[], Run | None] = lambda: None
        self._remove: Callable[[], None] = lambda: None

    def arm(self, run: Run) -> None:
        """Warn about calls and reads of the model of this run, until `disarm`."""
        self.disarm()
        self._run, model, call = weakref.ref(run), weakref.ref(run.model), self._checked_call(run.model)
        handle = run.model.register_state_dict_pre_hook(self)
        if run.model._compiled_call_impl is None:
            run.model._compiled_call_impl = call

        def remove() -> None:
            handle.remove()
            if (watched := model()) is not None and vars(watched).get("_compiled_call_impl") is call:
                del watched._compiled_call_impl

        self._remove = remove

    def disarm(self) -> None:
        """Stop watching."""
        self._remove()
        self._run = self._remove = lambda: None

    def _checked_call(self, module: nn.Module) -> Callable[..., Any]:
        """Return a function that runs a check and then calls the model, for use as its `_compiled_call_impl`."""
        reference = weakref.ref(module)

        def call(*args: object, **kwargs: object) -> Any:
            called = reference()
            if not torch.compiler.is_dynamo_compiling():  # dynamo cannot trace frames
                called = sys._getframe(1).f_locals.get("self", called)  # a shallow copy has this function too
            assert called is not None
            if not torch.compiler.is_compiling():
                self._check("model-called-inside-stage", "the model of a cascade was called")
            return called._call_impl(*args, **kwargs)

        return call

    def __call__(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Check a call of the model's `state_dict`."""
        self._note_kept()
        self._check("model-saved-inside-stage", "the state dict of the model of a cascade was read")

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        """Record that the model is copied or pickled, and its hooks, of which this is one, with it."""
        self._note_kept()
        return super().__reduce__()

    def _note_kept(self) -> None:
        """Inside `weights`, record that the caller keeps a copy of the training of the stage."""
        if (run := self._run()) is not None and run.placed not in (None, "base"):
            run.note_kept()

    def _check(self, code: str, event: str) -> None:
        """Warn once if the model's outputs differ from the cascade's, unless this package is the caller."""
        run, callers = self._run(), tuple(_callers())
        if run is None or any(frame.f_code.co_filename.startswith(_PACKAGE) for frame in callers):
            return
        if torch.is_grad_enabled() and any(
            frame.f_code.co_name == "training_step" and frame.f_globals["__name__"] == "transformers.trainer"
            for frame in callers
        ):
            raise StateError(
                f"a Trainer trains the {type(run.model).__name__} that was given to adapt, whose weights are frozen. "
                "Give it the cascade: Trainer(model=cascade, "
                "callbacks=[lorasc_fx.integrations.transformers.CascadeCallback(cascade)], ...)",
                code="trainer-not-supported",
            )
        if code not in run.warned and run.differs_from_model():
            run.warned.once(
                code,
                f"{event} inside stage {run.plan.stage}. It has the weights from the start of the stage"
                f"{', with noise' if run.plan.spec.noise.strength > 0 else ''}"
                f"{', not rounded to their grid' if run.plan.spec.grid else ''}, without the training of the stage. "
                "Call the cascade instead. To call, save or copy the model, do it inside "
                '`with cascade.weights("slow"):` (or "fast"), or after cascade.release()',
            )


def _callers() -> Iterator[FrameType]:
    """Yield the frames outside of `UsageWatch`, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_qualname.startswith(f"{UsageWatch.__name__}."):
            yield frame
        frame = frame.f_back


Joined = tuple[tuple[nn.Module, str, nn.Parameter], ...]
"""Parameters that `adapt` has tied, as (module, attribute name in the module, original parameter)."""


@dataclass(frozen=True)
class Flags:
    """Flags of a model that `release` restores: requires_grad by parameter name, and training by module name."""

    requires_grad: Mapping[str, bool]
    training: Mapping[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Flags:
        """Read the flags of a model."""
        return cls(
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
        )

    def restore(self, model: nn.Module) -> None:
        """Restore the flags. Parameters and modules that were added later keep their flags."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)


def restore_structure(model: nn.Module, joined: Joined, undo: Undo) -> None:
    """Replace tied parameters by the original ones, with the tied values, and unwrap layers of libraries."""
    for module, leaf, value in joined:
        shared = module._parameters[leaf]
        if shared is not None:
            undo(partial(setattr, value, "data", value.data))
            undo(partial(setattr, module, leaf, shared))
            value.data = shared.data
            setattr(module, leaf, value)
    unwrap_layers(model, undo)


class DropWarning:
    """Warns if a cascade is garbage collected without `release` while its model is alive, and says what is lost.

    Only the cascade and its shallow copies refer to this object, so its finalizer runs when they are gone. A finalizer
    may run in any thread, in a trace or in a backward, so it does no tensor operations.
    """

    def __init__(self, run: Run, usage: UsageWatch) -> None:
        self.run, self.usage = run, usage
        _MODELS[id(self)] = weakref.ref(run.model, lambda _: None)

    def __reduce__(self) -> tuple[type[DropWarning], tuple[Run, UsageWatch]]:
        """Create a new object for the copied run, so that a deep copy of a cascade is watched too."""
        return (type(self), (self.run, self.usage))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Remove the hooks of the run. Warn, unless nothing is lost or the model is garbage too."""
        model = _MODELS.pop(id(self), None)
        if is_finalizing() or model is None:  # the interpreter is shutting down, or the construction failed
            return
        loss = self.run.loss_if_dropped()
        self.run.detach()
        self.usage.disarm()
        del self.run
        if loss is None:
            return
        gc.collect()  # graph modules refer to the model, and are reference cycles
        if (alive := model()) is not None:
            warn(
                f"a cascade was garbage collected without release(): {loss.format(model=type(alive).__name__)}. Keep "
                "the cascade (model = lorasc_fx.adapt(model, ...)), fold it by release(), or save it by lorasc_fx.save",
                "training-not-kept",
            )


_MODELS: dict[int, weakref.ref[nn.Module]] = {}
"""Weak references to the models, by the id of the `DropWarning`. As attributes of the object they would be garbage
themselves, and the collector clears such references before finalizers run. Their callback makes the collector clear a
reference to a model that is garbage."""
