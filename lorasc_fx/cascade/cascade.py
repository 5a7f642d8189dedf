"""The cascade: the adapted model as an nn.Module, with the user's model and the branches as its children."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Decided
from lorasc_fx.cascade import experts, folding, transition
from lorasc_fx.cascade.dropped import DropGuard, Flags, Joined
from lorasc_fx.cascade.folding import Requantize
from lorasc_fx.cascade.run import Planned, Run
from lorasc_fx.cascade.usage import UsageWatch, check_not_averaged, check_plugin
from lorasc_fx.checkpoint import reader, training_state, writer
from lorasc_fx.checkpoint.base_model import BaseModel
from lorasc_fx.checkpoint.state_dict import KEY, from_state_dict, take_over, to_state_dict
from lorasc_fx.compile import NOT_COMPILED, Axis, Call, Compiler, Made, Variant, Variants
from lorasc_fx.errors import CaptureError, CheckpointError, PassError, SpecError, StateError, named, path_of
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.shards import ONE_PROCESS, ProcessGroup
from lorasc_fx.state import Which
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.undo import (
    PROCESS,
    AllOrNothing,
    Block,
    Commit,
    Undo,
    grad_mode,
    isolated,
    no_grad,
    no_inference_mode,
)

log = logging.getLogger("lorasc_fx")

_METHOD_WEIGHTS: Mapping[str, Which] = dict.fromkeys(
    ("generate", "encode", "encode_query", "encode_document", "predict", "rank"), "fast"
)
"""Weights that methods of the user's model run with."""

_ADAPTER_METHODS = ("transformers.integrations.peft", "diffusers.loaders.peft")
"""Modules whose methods, of each of their models, put layers of peft into it and switch them."""

_SHOWN = 8
"""Refusals and unreached weights that `print(cascade)` names."""


@dataclass(frozen=True)
class Stage:
    """A stage of a loop: its `number` in the cascade (the address of its noise), and its place, `index` of `count`."""

    number: int
    index: int
    count: int


class Cascade(nn.Module):
    """The adapted model. `lorasc_fx.adapt` makes it; calling it computes `y = W_t x + b + s B_t A_t x` at every site.

    Children: `model`, the user's own, which stays the only owner of its weights; `branches`, one per site. Graphs are
    made per call signature and hold no weights.
    """

    def __init__(
        self,
        run: Run,
        compiler: Compiler,
        decided: Decided,
        example: tuple[Any, Any] | None,
        flags: Flags,
        joined: Joined = (),
    ) -> None:
        super().__init__()
        self.model, self.branches = run.model, run.branches
        self.training = run.model.training
        self._run, self._usage = run, UsageWatch()
        self._compiler, self._example = compiler, example
        self._preprocessing: Any = None
        self._variants = Variants()
        self._split: Callable[[Variant], Variant] | None = None  # what shards make of each graph
        self._gathered: Callable[[], AbstractContextManager[None]] = nullcontext  # in which the model's modules run
        self._eager = False  # whether calls inside `weights` run the model itself on shards, too
        self._frontend = ""
        self._refused_frontends: tuple[tuple[str, str], ...] = ()
        if isinstance(decided, Made) and example is not None:
            self._add(compiler.calls.bind(*example), decided)
        self._loaded: reader.Checkpoint | None = None
        self._to_load: tuple[Any, int, Sequence[str]] = None, 0, ()  # a state, the keys missing before it, and errors
        register: Any = self.register_load_state_dict_post_hook  # torch has no annotations for it
        register(Cascade._load_state)
        # Last, so that the cascade's other references to the model are gone before the guard looks whether it lives.
        self._guard = DropGuard(run, self._usage, flags, joined)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the model and the branches stay those of `adapt`, of which graphs and folds are.

        Raises:
            StateError: another model, or other branches.
        """
        held = self.__dict__.get("_modules", {}).get(name) if name in ("model", "branches") else None
        if held is not None and value is not held:
            raise StateError(
                f"cascade.{name} cannot be exchanged: the cascade computes with, and folds into, the one of adapt. "
                "Call release and adapt the other model; to compile, compile the cascade",
                code="child-replaced",
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model: `config`, `device` and what else trainers read of a model.

        Submodules are left out: called by themselves they compute without branches. `generate`, `encode` and `predict`
        have the fast weights in place while they run, unless `weights` has put others there. Of weights that
        `fsdp.shard` has cut every rank must call them, and a block is gathered while it runs. Other methods run as they
        are, and a warning is given where they compute with an adapted weight inside a stage.

        Raises:
            AttributeError: neither the cascade nor the model has it, it is a submodule, or a method for layers of peft.
            StateError: accelerate's FSDP plugin asks, to cut the model.
        """
        children = self.__dict__.get("_modules", {})
        if name in children:
            return children[name]
        if "model" not in children or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "_no_split_modules":
            check_plugin()
        model = children["model"]
        if not hasattr(model, name):
            raise AttributeError(f"neither the cascade nor its {type(model).__name__} has an attribute {name!r}")
        value = getattr(model, name)
        if isinstance(value, nn.Module):
            raise AttributeError(
                f"{name} is a module of the user's model, and computes without branches; take cascade.model.{name}. "
                "A Trainer needs lorasc_fx.integrations.transformers.CascadeCallback(cascade) among its callbacks"
            )
        if getattr(value, "__module__", None) in _ADAPTER_METHODS:
            raise AttributeError(
                f"{name} is for layers of peft inside a {type(model).__name__}, which the graphs of a cascade do not "
                "call. cascade.add(name, folder) reads another run, `with cascade.weights(name):` puts it in place, "
                "and lorasc_fx.from_peft makes a cascade of an adapter"
            )
        if name not in _METHOD_WEIGHTS or not callable(value):
            of_model = isinstance(value, MethodType) and value.__self__ is model
            return self._usage.method(value) if of_model else value

        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run.is_sharded and "synced_gpus" in inspect.signature(value).parameters:
                kwargs["synced_gpus"] = True  # ranks that are done compute on until all are
            placed = run.released or run.inside_weights
            with nullcontext() if placed else self.weights(_METHOD_WEIGHTS[name]), self._gathered():
                return value(*args, **kwargs)

        return call

    # ---- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the user's model computes for these arguments, with the branches; the model's own types.

        Raises:
            StateError: after `release`.
            CaptureError: a new signature that no front end takes.
            Exception: what the model itself raises for these arguments.
        """
        run = self._run
        run.check_alive("forward")
        if run.inside_weights and (self._eager or not run.is_sharded):
            return self.model(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo guards inputs itself, and cannot hash a signature
            bound, named = self._compiler.bind(args, kwargs)
            compiled = self._variants.compiled(self.training, pytree.tree_leaves((bound, named)))
            return compiled.module(*bound, **named) if compiled is not None else NOT_COMPILED[0](self, args, kwargs)
        call = self._compiler.calls.bind(args, kwargs)
        if call.key is None:
            variant, count = self._variants.symbolic(self.training)
            return variant.module.forward(*call.args[:count], **call.kwargs)  # type: ignore[attr-defined]
        if self._usage.in_pipeline(run, self):
            with self.weights(_METHOD_WEIGHTS["generate"]):
                return self.forward(*args, **kwargs)
        self._usage.check_mode(run, self.training)
        run.check_replicas(type(self))
        return (self._variants.find(call) or self._capture(call)).run(call)

    def _variant_of(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "variant"
    ) -> tuple[Variant, Call]:
        """Return the variant for a call, captured if there is none yet, and the call. `name` is the method's, for
        messages.
        """
        self._run.check_alive(name)
        self._run.replicas.see(len(self.branches), self._run.trainable)
        call = self._compiler.calls.bind(tuple(args), kwargs)
        return self._variants.find(call) or self._capture(call), call

    def _split_by(
        self, split: Callable[[Variant], Variant], gathered: Callable[[], AbstractContextManager[None]], undo: Undo
    ) -> None:
        """Put the graph that `split` makes of it in the place of each graph, also of those that are still to come.

        The modules of the model run inside `gathered`.
        """
        undo(self._variants.restorer())
        undo(partial(vars(self).update, _split=self._split, _gathered=self._gathered))
        self._variants.exchange(split)
        self._split, self._gathered = split, gathered

    def _capture(self, call: Call) -> Variant:
        grad = torch.is_grad_enabled()  # which leaving the inference mode would set
        with AllOrNothing(PROCESS), no_inference_mode(), grad_mode(grad):  # tracers work on the whole process
            while (variant := self._variants.find(call) or self._make_variant(call)) is None:
                pass
            return variant

    def _make_variant(self, call: Call) -> Variant | None:
        """Capture, then take over what came of it; None where another thread has started another stage meanwhile."""
        plan, wide, begun = self._run.plan, self._variants.known(call), time.monotonic()
        given = (plan, self._run.by_key, self._run.refusals)
        try:
            made = self._compiler.make(self.model, *given, call.args, call.kwargs, wide)
            disagreements = self._compiler.faults(made.variant) if not self._frontend else []
        except (PassError, SpecError) as fault:
            if self._frontend:
                raise
            raise self._does_not_fit([str(fault)]) from fault
        except CaptureError as fault:
            own = fault.__cause__ if fault.code == "model-refuses-inputs" else None
            if own is None or type(own).__module__.startswith(("torch.fx.", "torch._subclasses.")):  # of fake tensors
                raise
            raise own from None  # a call raises what the model raises
        if disagreements:
            raise self._does_not_fit(disagreements)
        if self._split is not None:
            late = [branch.weight_name for name, branch in made.branches.items() if name not in self.branches]
            if late:
                raise StateError(
                    f"forward: this call adapts {named(late)}, which no graph had used when the weights were sharded, "
                    "and whose branches are on no rank: call the cascade once so before shard, or exclude the weight",
                    code="variant-after-sharding",
                )
            made = replace(made, variant=self._split(made.variant))
        number, sizes, seconds = len(self._variants) + 1, ", other sizes" if wide else "", time.monotonic() - begun
        log.info("variant %d by %s%s, in %.2f s", number, made.variant.frontend, sizes, seconds)
        with Commit(self._run.lock) as undo:
            if self._run.plan is not plan:
                return None
            undo(self._variants.restorer())
            self._run.grow(made, undo)
            self._add(call, made)
            return made.variant

    def _does_not_fit(self, disagreements: list[str]) -> CheckpointError:
        """Return the error of a first graph that does not follow the plan that was loaded."""
        where = f"{self._loaded.path}: " if self._loaded is not None else ""
        sentences = "\n  ".join(dict.fromkeys(disagreements))
        return CheckpointError(f"{where}its plan does not fit this call's graph:\n  {sentences}", code="plan-mismatch")

    def _add(self, call: Call, made: Made) -> None:
        """Keep a variant; the first one that the cascade has had says which front end took the model."""
        self._variants.add(call, made.variant, self.training)
        if made.variant.attach is not None:
            made.variant.attach(self._run)
        if not self._frontend:
            self._frontend, self._refused_frontends = made.variant.frontend, made.refused_frontends
        if self._example is None:  # loaded without inputs
            self._example = pytree.tree_map_only(torch.Tensor, _without_graph, (call.args, call.kwargs))

    # ---- what was decided

    @property
    def plan(self) -> Plan:
        """What was decided."""
        return self._run.plan

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted weights, in the model's order."""
        return self._run.plan.sites

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The weight matrices that are not adapted, each with its reason."""
        return self._run.refusals

    @property
    def unreached(self) -> tuple[str, ...]:
        """The weight matrices that no captured graph has used yet."""
        return self._run.unreached

    @property
    def stage(self) -> int:
        """Number of the running stage, 1 is the first; after the last fold, of the one that would start next."""
        return self._run.plan.stage

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs of `adapt`, positional, and by name; after a `load` without inputs those of the first
        call.

        Raises:
            StateError: that call is still to come.
        """
        if self._example is None:
            raise StateError(
                "there are no example inputs: the cascade was loaded without; call it once, or give args or kwargs",
                code="no-graph",
            )
        return self._example

    def _inputs(
        self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs that a call gives; without any the example inputs."""
        return self.example if args is None and kwargs is None else (tuple(args or ()), dict(kwargs or {}))

    @property
    def frontend(self) -> str:
        """Name of the front end that took the model; empty before the first call after a `load` without inputs."""
        return self._frontend

    @property
    def refused_frontends(self) -> tuple[tuple[str, str], ...]:
        """Names and reasons of the front ends that `auto` tried before."""
        return self._refused_frontends

    @property
    def preprocessing(self) -> Any:
        """That of a run of the command line that was loaded; else that attribute of the user's model, or None."""
        if self._preprocessing is None and hasattr(self.model, "preprocessing"):
            return self.__getattr__("preprocessing")
        return self._preprocessing

    @property
    def placements(self) -> dict[str, str]:
        """Where the branch of each weight computes in the first graph: `beside`, `merged` or `weight`."""
        return dict(first.placements) if (first := self._variants.oldest) is not None else {}

    def draw(self, file: str | PathLike[str], sites: Sequence[str] = (), radius: int = 2) -> Path:
        """Draw the rewritten graph around some sites: branches marked by placement, names, dtypes and shapes.

        Args:
            file: the .svg to write.
            sites: kinds or globs on weight names, as in a spec; the first three sites if not given.
            radius: arrows to follow from each branch, in both directions.

        Returns:
            The file.

        Raises:
            UnknownTarget: a pattern means no site.
            SpecError: the file is no .svg, its folder is not there, or radius is no count.
            StateError: after `release`, or no graph has one of these branches.
            MissingExtra: the extra `report` is not installed.
        """
        self._run.check_alive("draw", on_meta=True)
        first = self._variants.oldest
        if first is None:
            raise StateError(
                "draw: there is no graph yet, or none since the cascade was moved or copied; call it once",
                code="no-graph",
            )
        return self._compiler.draw(first, self._run.plan, file, sites, radius)

    def __str__(self) -> str:
        """Return sites, refusals, parameters and front end, for people."""
        plan, spec = self.plan, self.plan.spec
        pace = spec.pace_at(plan.stage)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trainable = self._run.trained_entries
        kinds = Counter(site.kind for site in self.sites)
        lines = [
            f"Cascade of {type(self.model).__name__}, "
            + (f"captured by {self.frontend}" if self.frontend else "captured at its first call"),
            f"  stage {plan.stage}, pace {pace:g}, noise {spec.noise.strength:g}, restart {spec.restart}",
            f"  {len(self.sites)} sites: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            f"  {trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %)",
        ]
        lines += self._placement_lines()
        lines += [f"  before: {name} refused: {reason}" for name, reason in self.refused_frontends]
        asked = Counter(refusal.reason.value for refusal in self.refusals if refusal.reason.asked)
        if asked:
            lines.append("  left as asked: " + ", ".join(f"{count} {reason}" for reason, count in asked.items()))
        ours = [refusal for refusal in self.refusals if not refusal.reason.asked]
        if ours:
            lines.append(f"  {len(ours)} refusals:")
            lines += [f"    {refusal}" for refusal in ours[:_SHOWN]]
            if len(ours) > _SHOWN:
                lines.append(f"    and {len(ours) - _SHOWN} more, see cascade.refusals")
        if self.unreached:
            shown = ", ".join(self.unreached[:_SHOWN])
            lines.append(f"  {len(self.unreached)} unreached (in no graph yet): {shown}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return parameters, a bar for each weight, sites and refusals, for a notebook."""
        return self._compiler.html(str(self), self.model, self.plan, self._variants.oldest, self.refusals)

    def _placement_lines(self) -> list[str]:
        """Return the line on where branches compute."""
        counted = Counter(self.placements.values())
        if not counted:
            return []
        return ["  placements: " + ", ".join(f"{count} {where}" for where, count in counted.most_common())]

    # ---- stages

    def param_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Return groups for a torch optimizer: `lora_A`, `lora_B`, and `train` (what the spec trains in full).

        Each rule of the spec's train_rules with a learning rate has a group of its own, `train:PATTERN`; without
        train_A there is no `lora_A`.

        Args:
            lr: learning rate of every group without its own; of `lora_B` it is `lr * lr_ratio` (LoRA+, 2402.12354).
            options: anything else that the optimizer's groups take.
        """
        return self._run.param_groups(lr, options)

    def stages(self, count: int, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Iterator[Stage]:
        """Yield `count` stages; between them fold, renew the branches and redraw the noise, and fold after the last.

        The arguments are checked at the call. A loop that is left early leaves its stage running.

        Args:
            count: number of stages.
            optimizer: holds the branches; its state for them is treated as the spec says.
            scheduler: a torch learning rate scheduler whose unit is the stage: stepped once at each transition.

        Raises:
            StateError: the optimizer does not hold the branches. SpecError: count is no count.
        """
        if not is_integer(count, 1):
            raise SpecError(f"stages({count!r}): give the number of stages, an integer of 1 or more")
        self._run.begin_loop(optimizer)
        return self._stages(count, optimizer, scheduler)

    def _stages(self, count: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[Stage]:
        transition.end_idle(self._run)
        then = scheduler.step if scheduler is not None else None
        for index in range(1, count + 1):
            yield Stage(self._run.plan.stage, index, count)
            transition.next_stage(self._run, optimizer, idle=index == count, then=then)

    def transition(self, optimizer: torch.optim.Optimizer | None) -> None:
        """End the running stage and start the next: slow update, fold, fresh branches, new noise, optimizer state.

        All or nothing, also where a signal's handler raises (Ctrl-C). Of several threads that call this, or another
        method that reads or writes weights, one waits for the other. Calls of the cascade do not wait: one that runs in
        another thread meanwhile may see weights of both stages.

        Parameter objects stay the same, so that optimizers, compiled code and wrappers stay valid;
        where the spec's `ranks` change their shape, compiled code is compiled again, and the optimizer's state starts
        anew.

        Args:
            optimizer: holds the branches; None if there is none to be treated.

        Raises:
            StateError: inside a backward, with gradients pending, inside `weights`, an optimizer without the branches,
            or training has made a buffer inf or nan. NonFiniteBranch: a branch holds inf or nan.
        """
        transition.next_stage(self._run, optimizer)

    def rewind(self, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Go back to the slow weights of an earlier stage, and start a stage from them; what came after is dropped.

        All or nothing. The new stage has a number that no stage had, so that its noise and its lora_A are new. Under
        either restart it starts from the slow weights. The optimizer's state of all that trains is reset; buffers of
        the model (running statistics) stay as they are. Without `stages` it runs until `transition`.

        Args:
            stage: number of a stage that has ended; 0 is the base.
            optimizer: holds the branches; None if there is none to be treated.

        Raises:
            StateError: as `weights(stage=...)`, or as `transition`; nothing was changed.
        """
        transition.rewind(self._run, stage, optimizer)

    def resume(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Any]:
        """After `lorasc_fx.load`: give optimizer, scheduler and random generators their saved state; return `extra`.

        Where a process group of torch.distributed is initialized, every rank must call this: under
        DistributedDataParallel after the wrapper was made, on shards after `shard`. The number of
        ranks need not be that of the run which saved. On the same number each rank gets its own random generators
        back, on another number a stream that is a function of the first rank's, of the rank and of the number.

        Args:
            optimizer, scheduler: built as those that were saved.
            group: of the ranks that go on, if not all of them do.

        Raises:
            StateError: the cascade was not loaded from a checkpoint, or the optimizer does not hold the branches; ranks
                have loaded different versions, or another rank has failed or is gone.
            CheckpointError: the checkpoint holds no such state, or that of another optimizer.
        """
        ranks = self._run.slow.group or ProcessGroup.of(group)
        with ranks.agreed("resume"):
            self._run.check_ready("resume", sharded=True)
            if (loaded := self._loaded) is None:
                raise StateError(
                    "resume: this cascade was not loaded; make it by lorasc_fx.load(folder, model)",
                    code="not-loaded",
                )
        names = ranks.gather_text(loaded.path.name, "resume")
        if len(set(names)) > 1:
            raise StateError(
                f"resume: the ranks have loaded different versions: {', '.join(names)}, by rank; load from a folder "
                "that all of them see, and let nobody write into it meanwhile",
                code="versions-differ",
            )
        with ranks.agreed("resume"), self._run.exclusive("resume", sharded=True):
            return training_state.resume(self._run, loaded, optimizer, scheduler, ranks)

    # ---- weights

    def add(self, name: str, run: Cascade | str | PathLike[str]) -> None:
        """Give another run on this base a name, under which `weights` and `release` know its weights.

        Several runs so share one model in memory; weights are computed from W0 at each switch. The other run counts as
        its `release` would leave it. It stays what it is: this cascade trains and saves its own run only, and after a
        load the others are added again. Another run of the same name is replaced.

        Args:
            name: of your choice, but for those that `weights` knows already.
            run: a checkpoint folder (its newest version), or a living cascade on a copy of the base. It has changed no
                weight that is not a site, or trained in full, here as well.

        Raises:
            SpecError: a name that is none, or the other run has changed other weights.
            CheckpointError: a folder without a whole checkpoint, or a run on another base; names what differs.
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
            NonFiniteBranch: a running branch of the other run holds inf or nan.
        """
        self._run.check_ready("add")
        if not isinstance(name, str) or not name or name in (*experts.WHICH, "stage"):
            raise SpecError(f"add: the name is {name!r}; give one that is not among {', '.join(experts.WHICH)}")
        given = experts.GivenRun.of(run._run if isinstance(run, Cascade) else run, repr(name), "add")
        with self._run.exclusive("add"):
            experts.add(self._run, name, given)

    @property
    def views(self) -> tuple[str, ...]:
        """The names that `weights` knows: slow, fast and base weights, averaged ones if they are kept, added runs."""
        names = [name for name in experts.WHICH if name != "averaged" or self._run.plan.spec.keeps_average]
        return (*names, *self._run.added)

    def weights(
        self, which: Which | str | Mapping[str, float] | None = None, *, stage: int | None = None
    ) -> AbstractContextManager[Cascade]:
        """Put slow, fast, base, averaged, an earlier stage's or another run's weights in place, for a `with`, exactly.

        Inside, the branches rest, cascade and model compute the same, and the model's own methods (`generate`) work.
        `slow` is W0 + S as of the last transition, `fast` is W0 + F with the running branches in it, `base` is W0, and
        `averaged` the mean of the slow weights that the spec's `average` asks for; none holds noise.

        Args:
            which: `slow`, `fast`, `base` or `averaged`; the name of a run that was added; or numbers by such names and
                `slow`, `{"legal": 0.7, "slow": 0.3}`, for the weighted sum `W0 + sum_i w_i S_i`. A run comes with its
                buffers (running statistics), a sum with those on which its runs agree.
            stage: in its place the number of a stage that has ended: the slow weights at its end; 0 is the base.

        Raises:
            StateError: another name, a stage that has not ended or whose experts are gone into a dense delta, averaged
                weights where none are kept, inside another `weights`, inside a backward, or after `release`; a run that
                was added, of sharded weights. At the end of the `with`: a weight was written inside; that write is
                dropped, and the weights are back.
            SpecError: a sum without names, with what is no number, beyond the dtype of a weight, or with rows scaled by
                DoRA.
        """
        return folding.placed(self._run, which, stage, self)

    def recalibrate(self, batches: Iterable[Any], call: Callable[[Cascade, Any], Any] | None = None) -> None:
        """Estimate the running statistics of batch norms anew, for the weights that are in place.

        As torch.optim.swa_utils.update_bn (SWA, 1803.05407, section 3.2): the statistics are reset, and are then the
        mean over the batches, without gradients, in train mode. The model itself runs, not a captured graph, in which
        the momentum of a batch norm is a constant. Inside `weights(...)` those weights count, and the statistics of
        before are put back at its end; elsewhere the fast weights count, and the new statistics stay. Of weights that
        `fsdp.shard` has cut every rank must call this with as many batches, and has the statistics of its own.

        Args:
            batches: of inputs; a mapping is given by name, of a tuple or list the first entry.
            call: runs the cascade on a batch, where another reading is wanted.

        Raises:
            StateError: the model has no such batch norm, there is no batch, inside a backward, or after `release`.
                Whatever raises, the statistics are as they were.
        """
        self._run.check_alive("recalibrate")
        norms = [
            module
            for module in self.model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        if not norms:
            raise StateError(
                "recalibrate: the model has no batch norm with running statistics, so there is nothing to do",
                code="no-batch-norm",
            )
        if not self._run.inside_weights:
            with self.weights("fast"):
                self._estimate_statistics(norms, batches, call or _call_on_first)
            return
        self._run.keep_buffers([buffer for norm in norms for buffer in norm.buffers(recurse=False)])
        self._estimate_statistics(norms, batches, call or _call_on_first)

    def _estimate_statistics(
        self, norms: list[_BatchNorm], batches: Iterable[Any], call: Callable[[Cascade, Any], Any]
    ) -> None:
        before = [(buffer, buffer.detach().clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

        def put_back() -> None:
            for buffer, value in before:
                buffer.copy_(value)

        count = 0
        with no_grad(), self._gathered(), _averaging(self, norms), AllOrNothing() as undo:
            undo(put_back)
            for norm in norms:
                norm.reset_running_stats()
            for batch in batches:
                call(self, batch)
                count += 1
            if not count:
                raise StateError(
                    "recalibrate: there is no batch to estimate statistics from; give one or more", code="no-batches"
                )

    def folded_state_dict(
        self, quantized: Literal["dequantize"] | None = None, *, which: str | Mapping[str, float] = "slow"
    ) -> dict[str, torch.Tensor]:
        """Return the model's state dict with the slow weights in it, as copies; loads with strict=True.

        A stage that has trained is counted as `release` would: it is folded.

        Args:
            quantized: `dequantize` to get dense tensors for quantized weights that have trained; else they are refused.
            which: `slow`, or their average over stages (`averaged`), a run that was added, or a sum, as of `weights`.
        """
        with self._run.exclusive("folded_state_dict"):
            return folding.folded_state(self._run, "folded_state_dict", quantized, which)

    def folded_graph(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        quantized: Literal["dequantize"] | None = None,
        *,
        which: str | Mapping[str, float] = "slow",
    ) -> nn.Module:
        """Return a plain GraphModule: names, nodes and shapes as captured, slow weights as its own constants.

        Args:
            args, kwargs: inputs whose graph is wanted; without, those of `adapt`. The model's present mode counts.
            quantized, which: as for `folded_state_dict`.

        The graph raises RuntimeError for a size of 0 or 1 at which it would compute something else than the model.
        """
        return self._folded(*self._inputs(args, kwargs), quantized, which)[0]

    def _folded(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], quantized: Literal["dequantize"] | None, which: Any
    ) -> tuple[nn.Module, dict[Axis, int]]:
        """Return the folded graph, and the smallest size of each axis that does not take all sizes."""
        self._run.check_ready("folded_graph")
        variant, call = self._variant_of(args, kwargs, "folded_graph")
        with self._run.exclusive("folded_graph"):
            state = folding.folded_state(self._run, "folded_graph", quantized, which)
        return self._compiler.fold(variant, self.model, self.stage, state, call.args, call.kwargs)

    def release(self, quantized: Requantize = None, *, which: str | Mapping[str, float] = "slow") -> nn.Module:
        """Return the user's own model with the slow weights in it, and its flags as they were; the cascade ends.

        A running stage that has trained is folded first, so that nothing is lost.

        Args:
            quantized: what to do with quantized weights that have trained: `dequantize` leaves them dense;
                `requantize` quantizes them again by the method of their layer (bitsandbytes, HQQ, quanto); a callable
                is given each module with its dense weight and quantizes it again, as torchao's
                `lambda module: quantize_(module, config)` does. What was done is logged, with the error.
            which: `slow`, or their average over stages (`averaged`), a run that was added, or a sum, as of `weights`.

        Raises:
            StateError: gradients are pending, it was released before, training has made a buffer inf or nan, or
                quantized weights have trained and `quantized` does not say what to do.
            NonFiniteBranch: a branch holds inf or nan; nothing was changed.
        """
        with self._run.exclusive("release", ends_stage=True), Commit() as undo:
            undo(self._run.restorer())
            undo(partial(setattr, self, "_variants", self._variants))
            undo(partial(Flags.of(self.model).restore, self.model))
            undo(partial(self._usage.arm, self._run, self))
            undo(self._guard.arm)
            folding.release(self._run, quantized, which, undo)
            self._guard.flags.restore(self.model)
            self._guard.give_back(self.model, undo)
            self._drop_graphs()
            self._usage.disarm()
            self._guard.disarm()
            self._run.let_go()
            return self.model

    def _drop_graphs(self) -> None:
        """Detach and drop all graphs; the next call makes new ones."""
        self._variants.detach()
        self._variants = Variants()

    # ---- the names that peft has for these

    def print_trainable_parameters(self) -> None:
        """Print the number of parameters that train, of all those of model and branches; `print(cascade)` says more."""
        self._run.check_alive("print_trainable_parameters", on_meta=True)
        trainable = self._run.trained_entries
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True) -> nn.Module:
        """Fold, and return the user's model: `release`, which shows no bar and always checks for inf and nan."""
        return self.release()

    def disable_adapter(self) -> AbstractContextManager[Cascade]:
        """Put the base's weights in place for the time of a `with`: `weights("base")`."""
        return self.weights("base")

    # ---- the names under which timm asks a model how to group its parameters

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the layer of a parameter of the cascade, by its name: of a branch that of its weight.

        timm's `create_optimizer_v2(cascade, layer_decay=...)` asks for it; its schedulers scale the learning rates.

        Args:
            coarse: as of the model's own `group_matcher`. A model without one is grouped as timm groups such a model.

        Raises:
            StateError: after `release`. MissingExtra: timm is not installed.
        """
        self._run.check_alive("group_matcher", on_meta=True)
        model: Any = self.model
        if hasattr(model, "group_matcher"):
            matcher = model.group_matcher(coarse)
            layers = module_of("vision", "timm.models").group_parameters(model, matcher, reverse=True)
        else:
            layers = module_of("vision", "timm.optim").auto_group_layers(model)
        by_name = {f"model.{name}": layer for name, layer in layers.items()}
        by_name |= {name: layers[weight] for name, weight in self._weight_names().items() if weight in layers}
        last = max(layers.values(), default=0)
        return lambda name: by_name.get(name, last)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the model wants without weight decay, in the cascade, with the
        factors of such weights. timm's `create_optimizer_v2` asks for it.

        Raises:
            StateError: after `release`.
        """
        self._run.check_alive("no_weight_decay", on_meta=True)
        patterns: Iterable[str] = getattr(self.model, "no_weight_decay", set)()
        names = {f"model.{name}": name for name, _ in self.model.named_parameters()} | self._weight_names()
        return {name for name, weight in names.items() if any(fnmatch(weight, pattern) for pattern in patterns)}

    def _weight_names(self) -> dict[str, str]:
        """The names of the branches' parameters in the cascade, each with that of its weight."""
        return {
            f"branches.{key}.{name}": branch.weight_name
            for key, branch in self._run.by_key.items()
            for name, _ in branch.named_parameters()
        }

    # ---- folders that name their base

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        base_model: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write what the run has learnt, and the name of its base: `lorasc_fx.load(folder)` needs nothing more.

        As peft's adapters, the folder holds no data and no base, but for W0 of what is trained in full, and of what the
        files of the base have not (a new head). For the model with its slow weights, in its library's layout:
        `with cascade.weights("slow"): cascade.model.save_pretrained(folder)`, or `release` before.

        Args:
            folder: as of `lorasc_fx.save`.
            base_model: name or folder of the base, by default what a model of transformers (`name_or_path`) or timm
                (`pretrained_cfg`) says of itself.
            optimizer, scheduler, extra: as of `lorasc_fx.save`, for a folder from which a training is to go on.

        Returns:
            The folder of the version.

        Raises:
            StateError: the base cannot be named, or its files are not here; the newest version in the folder holds the
                state of a training, and no optimizer is given; after `release`, inside `weights` or inside a backward,
                or the weights are sharded.
            CheckpointError: the folder cannot be written. What was there stays.
            NonFiniteBranch: a branch holds inf or nan.
        """
        root = path_of(folder)
        without = optimizer is None and scheduler is None and not extra
        if without and (version := writer.newest_of_training(root)) is not None:
            raise StateError(
                f"save_pretrained: {version} holds the state of a training, with which a resume goes on, and a new "
                "version without it would come first. Give optimizer= (scheduler=, extra=) here as well, or another "
                "folder",
                code="state-not-saved",
            )
        return self._write_named(root, "save_pretrained", base_model, optimizer, scheduler, extra)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        commit_message: str = "lorasc-fx run",
        token: str | bool | None = None,
        revision: str | None = None,
        api: Any = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the hub, which is made if it is not there.

        `huggingface_hub.snapshot_download(repo_id, local_dir=folder)` brings it back for `lorasc_fx.load(folder)`.

        Args:
            repo_id: `user/name`.
            base_model: as of `save_pretrained`.
            private, commit_message, token: as of huggingface_hub.
            revision: a branch, which is made if it is not there.
            api: a `huggingface_hub.HfApi` with an endpoint and token of its own.

        Returns:
            The address of the commit.

        Raises:
            MissingExtra: huggingface_hub is not installed.
            StateError, NonFiniteBranch: as of `save_pretrained`. What the hub refuses is huggingface_hub's to raise.
            SpecError: both a token and an api.
        """
        self._run.check_alive("push_to_hub")
        if api is not None and token is not None:
            raise SpecError(
                "push_to_hub: both token and api are given, and an api has a token of its own; give one of them",
                code="conflicting-options",
            )
        api = module_of("text", "huggingface_hub").HfApi(token=token) if api is None else api
        with TemporaryDirectory() as folder:
            self._write_named(Path(folder), "push_to_hub", base_model)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(done.commit_url)

    def _write_named(
        self,
        root: Path,
        call: str,
        base_model: str | None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a version that names its base."""
        self._run.check_ready(call)
        base = BaseModel.of(self._run, call, base_model)
        named, beside = {"model": base.to_dict()}, base.tensors_beside(self._run, call)
        return writer.write_version(self._run, root, optimizer, scheduler, extra or {}, 1, ONE_PROCESS, named, beside)

    # ---- moving

    def _apply(self, fn: Any, recurse: bool = True) -> Cascade:
        """Move or cast; graphs are dropped (constants in them do not move), branches and slow state stay."""
        with AllOrNothing(self._run.lock) as undo:
            if (rounded_anew := folding.cast_weights(self._run, fn)) is None:
                return self
            undo(partial(self.__dict__.update, _variants=self._variants, _example=self._example))
            undo(folding.tensors_writer(self._run, self))
            if recurse:
                folding.replace_quantized(self.model, fn)
                self.model._apply(fn)
                self.branches._apply(folding.wide(fn))
            self._drop_graphs()
            self._example = pytree.tree_map_only(torch.Tensor, fn, self._example)
            self._run.commit(Planned(self._run.plan, self._run.slow, self._run.present(rounded_anew())), undo)
            self._run.note_weights()
            self._run.note_frozen()
            return self

    def train(self, mode: bool = True) -> Cascade:
        """Set the mode of model and cascade; an exported program's graph has one mode and keeps it."""
        self._run.check_alive("train", on_meta=True)
        self.training = self.branches.train(mode).training
        if "train" not in vars(self.model):
            self.model.train(mode)
        return self

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return copies of all that a resume needs, without noise, which is drawn again from its key, and without W0,
        except W0 of what is trained in full.

        These are branches, experts, coefficients, the stage, what is trained in full, buffers, gradients that wait for
        a step, and random generators (which `resume` takes). The optimizer has a state dict of its own, and
        `folded_state_dict` has the weights of the user's model. Wrappers and containers call this for theirs.

        Args:
            destination, prefix: table to add to, and what to put before each name, as torch calls it.
            keep_vars: has no effect.

        Raises:
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
            NonFiniteBranch: a branch holds inf or nan.
        """
        self._usage.check_saved(self._run)
        state: Any = OrderedDict() if destination is None else destination
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        with self._run.exclusive("state_dict"):
            state.update({prefix + name: tensor for name, tensor in to_state_dict(self._run).items()})
        for after in self._state_dict_hooks.values():
            after(self, state, prefix, {})
        return state

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Go on from what `state_dict` returned, all of it: `load_state_dict` calls this, here and in containers.

        The model must be the same base, adapted by the same spec. Parameters stay the same objects, also with `assign`.
        A state without an entry of the cascade is one without a key: an error unless `strict` is False.

        Raises:
            CheckpointError: damage, another base, another spec, other sites. The cascade is as it was.
            StateError: after `release`, inside `weights` or inside a backward, or the weights are sharded.
        """
        for before in self._load_state_dict_pre_hooks.values():
            before(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        table = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        whole = bool(table) or not prefix
        if not whole:
            missing_keys.append(prefix + KEY)
        checkpoint = from_state_dict(table, "load_state_dict") if whole else None
        self._to_load = checkpoint, len(missing_keys), error_msgs

    def _load_state(self, keys: Any) -> None:
        """Take over what `_load_from_state_dict` has read, when torch has been at model and branches, which have no
        entries of their own and miss none; not where torch will raise for what it met on the way.
        """
        (checkpoint, missing, errors), self._to_load = self._to_load, (None, 0, ())
        del keys.missing_keys[missing:]
        if checkpoint is None or errors:
            return
        self._go_on(checkpoint, "load_state_dict")

    def _go_on(self, checkpoint: reader.Checkpoint, call: str, *, sharded: bool = False) -> None:
        """Take over a checkpoint of the same base and spec in a cascade that lives; `resume` has the rest of it.

        Where the weights are sharded, every rank must call this at the same point.

        Args:
            checkpoint: as read.
            call: for messages.
            sharded: whether the call works on shards.
        """
        run = self._run
        with run.exclusive(call, sharded=sharded), Commit() as undo:
            placed = {site.weight: site.placement for site in run.plan.sites}
            take_over(run, checkpoint, undo)
            if placed != {site.weight: site.placement for site in run.plan.sites}:  # chosen on another machine
                undo(partial(setattr, self, "_variants", self._variants))
                self._drop_graphs()
            self._loaded = checkpoint
            run.note_kept()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Allow `copy`, and refuse pickling: graphs read the model that they were made of.

        Raises:
            StateError: the caller is not Python's `copy`, it copies for an average of parameters, or it makes a deep
                copy of weights that lie in shards.
        """
        if sys._getframe(1).f_globals.get("__name__") == "copy":
            check_not_averaged()
            if self._run.is_sharded and sys._getframe(1).f_code.co_name == "deepcopy":
                raise StateError(
                    "deepcopy: the weights lie in shards on several processes, which a copy would not follow: write "
                    "a checkpoint by lorasc_fx.save, and lorasc_fx.load it onto another model",
                    code="sharded",
                )
            return super().__reduce_ex__(protocol)
        raise StateError(
            "a cascade cannot be pickled, by torch.save, a spawned process or otherwise: write a checkpoint by "
            "lorasc_fx.save and read it by lorasc_fx.load, or pickle the model after cascade.release()",
            code="pickled",
        )

    def _take_over(self, checkpoint: reader.Checkpoint, undo: Undo | None = None) -> None:
        """Take over a checkpoint that was read, by itself or as a part of a larger block."""
        reader.restore(self._run, checkpoint, undo)
        self._loaded = checkpoint
        self._run.note_kept()


@isolated
def _averaging(undo: Block[Any], cascade: Cascade, norms: list[_BatchNorm]) -> None:
    """Let the norms take the mean over all batches, in train mode."""
    undo(partial(setattr, cascade, "_eager", cascade._eager))
    cascade._eager = True
    for module in cascade.modules():
        undo(partial(setattr, module, "training", module.training))
    for norm in norms:
        undo(partial(setattr, norm, "momentum", norm.momentum))
        norm.momentum = None
    cascade.train()


def _without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """Return an input, without the autograd graph that it is a part of."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()


def _call_on_first(cascade: Cascade, batch: Any) -> Any:
    """Run the cascade on a batch as torch's update_bn does: of a tuple or list on its first entry."""
    if isinstance(batch, Mapping):
        return cascade(**batch)
    return cascade(batch[0] if isinstance(batch, (list, tuple)) else batch)


def cascade_class(model: nn.Module, signature: inspect.Signature) -> type[Cascade]:
    """Return Cascade with a forward that shows the model's signature, which trainers and tracers read."""
    # Code of its own: torch.compile counts the graphs of each code object, and stops compiling at a few.
    forward = FunctionType(Cascade.forward.__code__.replace(), Cascade.forward.__globals__, "forward")
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.replace(parameters=[first, *signature.parameters.values()])
    vars(forward)["__signature__"] = shown
    vars(forward)["__wrapped__"] = inspect.unwrap(type(model).forward)  # whose names of arguments torch.fx reads
    forward.__doc__ = Cascade.forward.__doc__
    return type("Cascade", (Cascade,), {"forward": forward, "__module__": __name__, "__doc__": Cascade.__doc__})


def save(
    cascade: nn.Module,
    folder: str | PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> Path:
    """Write what a resume needs as a new version in `folder`, and drop versions older than the last `keep`.

    A process that is killed at any moment leaves versions that are whole: the new one counts from the moment at which
    it is on disk, and the old one goes after that. Gradients that wait for a step, and the states of the random
    generators of torch, python, numpy and CUDA, are written too; `Cascade.resume` gives them back.

    Of a DistributedDataParallel and of sharded weights every rank must call this at the same point, between two steps:
    each rank writes the shards that it holds, the first rank all else, and an error of one rank is raised on all.

    Args:
        cascade: whose branches, experts, coefficients, trained parameters and buffers are written; or the
            DistributedDataParallel around it.
        optimizer, scheduler: whose state is written.
        folder: that every rank sees.
        extra: anything of yours that JSON holds, and tensors in it: the number of steps done (the position in the
            stage, and in the data of `shuffled_batches`), the state of a loader or a GradScaler, an average of weights.
        keep: number of versions that stay.

    Returns:
        The folder of the new version.

    Raises:
        CheckpointError: the folder cannot be written, another save writes into it, or extra or scheduler hold what
            neither JSON nor safetensors can. What was there stays.
        SpecError: keep is less than 1.
        StateError: after `release`, inside `weights`, or inside a backward; training has made a buffer inf or nan; on
            several ranks where gradients wait for a step, or another rank has failed or is gone.
        NonFiniteBranch: a branch holds inf or nan.
    """
    wrapper = cascade if isinstance(cascade, DistributedDataParallel) else None
    model = wrapper.module if wrapper is not None else cascade
    if not isinstance(model, Cascade):
        raise StateError(
            f"save: this is {type(model).__name__}; give a cascade, or DistributedDataParallel(cascade)",
            code="wrong-wrapper",
        )
    run = model._run
    group = ProcessGroup.of(wrapper.process_group) if wrapper is not None else run.slow.group or ONE_PROCESS
    return writer.write_version(run, path_of(folder), optimizer, scheduler, dict(extra or {}), keep, group)
