"""The adapted model as an nn.Module, with the user's model and the branches as its children."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any, Literal, Self, overload

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Decided
from lorasc_fx.cascade import experts, folding, transition
from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.dropped import DropGuard, Flags, Joined
from lorasc_fx.cascade.folding import Requantize
from lorasc_fx.cascade.graphs import Example, Graphs
from lorasc_fx.cascade.placed import placed
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.summary import summary
from lorasc_fx.cascade.usage import UsageWatch
from lorasc_fx.compile import Axis, Compiler, Picture
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.state import ViewName
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.undo import AllOrNothing, commit


@dataclass
class Stage:
    """A stage of a loop: its `number` in the cascade (part of the key of its noise), and its `index` of `count`.

    Under pace="loss" the loop sets `loss` before the stage ends.
    """

    number: int
    index: int
    count: int
    loss: Any = None


class CascadeModule(nn.Module):
    """The adapted model. `lorasc_fx.adapt` makes it; calling it computes `y = W_t x + b + s B_t A_t x` at every site.

    Children: `model`, the user's own, which stays the only owner of its weights; `branches`, one per site. Graphs are
    made per call signature and hold no weights.
    """

    def __init__(
        self,
        run: Run,
        compiler: Compiler,
        decided: Decided,
        example: Example | None,
        flags: Flags,
        joined: Joined = (),
    ) -> None:
        super().__init__()
        self.model, self.branches = run.model, run.branches
        self.training = run.model.training
        self._run, self._usage = run, UsageWatch()
        self._graphs = Graphs(run, compiler, decided, example)
        # Last: when the guard checks whether the model is alive, the cascade's other references to it must be gone.
        self._guard = DropGuard(run, self._usage, flags, joined)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            StateError: another model or other branches. Graphs and folds use those of `adapt`.
        """
        held = self.__dict__.get("_modules", {}).get(name) if name in ("model", "branches") else None
        if held is not None and value is not held:
            raise StateError(
                f"cascade.{name} cannot be replaced: graphs and folds use the one of adapt. Call release and adapt the "
                "other model. To compile, compile the cascade",
                code="weights-changed-outside",
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's model, such as `config` or `device`.

        Methods run unchanged, with a warning if they compute with an adapted weight inside a stage. Submodules are not
        available, because a call of one computes without branches.

        Raises:
            AttributeError: neither the cascade nor the model has it, or it is a submodule.
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
                f"{name} is a module of the user's model and computes without branches. Use cascade.model.{name}. "
                "A Trainer needs lorasc_fx.integrations.transformers.CascadeCallback(cascade) among its callbacks"
            )
        of_model = isinstance(value, MethodType) and value.__self__ is model
        return self._usage.method(value) if of_model else value

    # ---- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the user's model computes for these arguments, with the branches. Types are the model's own.

        Raises:
            StateError: after `release`.
            CaptureError: no front end can capture a new kind of call.
            Exception: what the model itself raises for these arguments.
        """
        run, graphs = self._run, self._graphs
        run.check_alive("forward")
        # Inside `weights(...)` the model itself computes, except if only a graph can gather its shards.
        if run.placed is not None and graphs.split is None:
            return self.model(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo guards inputs itself and cannot hash a signature
            bound, named = graphs.compiler.bind(args, kwargs)
            compiled = graphs.variants.compiled(self.training, pytree.tree_leaves((bound, named)))
            if compiled is None:
                return graphs.variants.not_compiled(self, args, kwargs)
            return compiled.module(*bound, **named)
        call = graphs.compiler.calls.bind(args, kwargs)
        if call.key is None:  # torch.fx traces the cascade
            variant, count = graphs.variants.symbolic(self.training)
            variant.conditions.assert_sizes(call.leaves)
            return variant.module.forward(*call.args[:count], **call.kwargs)  # type: ignore[attr-defined]
        if not torch.is_grad_enabled() and run.is_noisy and self._called_by("evaluate"):
            with self.weights("fast"):
                return self.forward(*args, **kwargs)
        self._usage.check_call(run, self)
        return (graphs.variants.find(call) or graphs.capture(call)).run(call)

    def _called_by(self, event: str) -> bool:
        """Whether another library causes this event, so that a call acts differently. May refuse it.

        This class knows no other library: `lorasc_fx.Cascade` has the table (`facade`).
        """
        return False

    # ---- what was decided

    @property
    def plan(self) -> Plan:
        """The spec, the sites and the stage."""
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
        """Number of the running stage, from 1. After the last fold it is that of the next stage."""
        return self._run.plan.stage

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs of `adapt`, positional and by name. After a `load` without inputs, of the first call.

        Raises:
            StateError: there was no call yet.
        """
        if self._graphs.example is None:
            raise StateError(
                "the cascade was loaded without example inputs. Call it once, or give args or kwargs",
                code="not-available",
            )
        return self._graphs.example

    def _inputs(self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> Example:
        """Return these inputs, or the example inputs if there are none."""
        return self.example if args is None and kwargs is None else (tuple(args or ()), dict(kwargs or {}))

    @property
    def frontend(self) -> str:
        """Name of the front end that captured the model. Empty after a `load` without inputs, until the first call."""
        return self._graphs.frontend

    @property
    def refused_frontends(self) -> tuple[tuple[str, str], ...]:
        """Names of the front ends that `auto` tried before, and why they failed."""
        return self._graphs.refused_frontends

    @property
    def placements(self) -> dict[str, str]:
        """Where the branch of each weight computes in the first graph: `beside`, `merged` or `weight`."""
        return dict(first.placements) if (first := self._graphs.variants.oldest) is not None else {}

    @property
    def graph_module(self) -> fx.GraphModule:
        """The adapted graph of the first call: it reads the live weights of `model` and calls `branches`.

        Other kinds of calls have graphs of their own. Give it to passes and printers, and train the cascade itself.

        Raises:
            StateError: after `release`, there was no call yet, or the model has graph breaks.
        """
        self._run.check_alive("graph_module", on_meta=True)
        return self._graphs.whole_graph()

    @overload
    def draw(self, file: str | PathLike[str], sites: Sequence[str] = (), radius: int = 2) -> Path: ...

    @overload
    def draw(self, file: None = None, sites: Sequence[str] = (), radius: int = 2) -> Picture: ...

    def draw(
        self, file: str | PathLike[str] | None = None, sites: Sequence[str] = (), radius: int = 2
    ) -> Path | Picture:
        """Draw the rewritten graph around some sites: placements of branches, names, dtypes and shapes.

        Args:
            file: path of the .svg, .png or .pdf to write. Without one, the picture is returned: a notebook shows it.
            sites: kinds or globs on weight names, as in a spec. The default is the first three sites.
            radius: number of arrows to follow from each branch, in both directions.

        Returns:
            The path, or without a file the picture.

        Raises:
            UnknownTarget: a pattern matches no site.
            SpecError: another ending, its folder does not exist, or radius is not a count.
            StateError: after `release`, or no graph has one of these branches.
            MissingExtra: the extra `report` is not installed.
        """
        self._run.check_alive("draw", on_meta=True)
        return self._graphs.draw(file, sites, radius)

    def __str__(self) -> str:
        """Return a readable summary: sites, refusals, parameters and front end."""
        return summary(self._run, self.frontend, self.refused_frontends, self.placements)

    # ---- stages

    def param_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Return groups for a torch optimizer: one for each name of a branch parameter, and `train` for parameters
        trained in full.

        Each rule of the spec's train_rules with a learning rate has its own group, `train:PATTERN`. With train_A=False
        there is no group of A.

        Args:
            lr: learning rate. That of B is `lr * lr_ratio` (LoRA+, 2402.12354).
            options: further options of the optimizer's groups.
        """
        return self._run.param_groups(lr, options)

    def stages(self, count: int, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Iterator[Stage]:
        """Yield `count` stages, with a transition between them and a fold after the last one.

        Arguments are checked at the call. A loop that is left early leaves its stage running.

        Args:
            count: number of stages.
            optimizer: holds the branches. Its state for them is treated as the spec says.
            scheduler: a torch learning rate scheduler that is stepped once per transition.

        Raises:
            StateError: the optimizer does not hold the branches. SpecError: an invalid count.
        """
        if not is_integer(count, 1):
            raise SpecError(f"stages({count!r}): give the number of stages, an integer of 1 or more")
        self._run.begin_loop(optimizer)
        return self._stages(count, optimizer, scheduler)

    def _stages(self, count: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[Stage]:
        transition.end_idle(self._run)
        then = scheduler.step if scheduler is not None else None
        for index in range(1, count + 1):
            stage = Stage(self._run.plan.stage, index, count)
            yield stage
            transition.next_stage(self._run, optimizer, idle=index == count, then=then, loss=stage.loss)

    def transition(self, optimizer: torch.optim.Optimizer | None, loss: Any = None) -> None:
        """End the running stage and start the next: slow update, fold, fresh branches, new noise, optimizer state.

        If anything raises, Ctrl-C included, nothing is changed. Threads that call this, or another method that reads or
        writes weights, wait for each other. Calls of the cascade do not wait, so a call in another thread may see
        weights of both stages.

        Parameter objects stay the same, so optimizers, compiled code and wrappers stay valid. If the spec's `ranks`
        change shapes, compiled code is compiled again and the optimizer's state is reset.

        Args:
            optimizer: holds the branches; None if there is none.
            loss: of the stage, a number above 0 or a tensor with one, by which pace="loss" weights it. Other paces
                ignore it. If the weights are sharded, the loss of the first rank counts.

        Raises:
            StateError: inside a backward, with gradients pending, inside `weights`, an optimizer without the branches,
                or training has made a buffer inf or nan.
            NonFiniteBranch: a branch holds inf or nan.
            SpecError: the pace is "loss", and the loss is missing, or is not a finite number above 0.
        """
        transition.next_stage(self._run, optimizer, loss=loss)

    def rewind(self, stage: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Start a stage from the slow weights of an earlier one, and drop what came after it. All or nothing.

        The new stage has a new number, so its noise and initial values are new. It starts from the slow weights for
        either `restart`. The state of the optimizer is reset. Buffers (running statistics) stay. Outside `stages` it
        runs until `transition`.

        Args:
            stage: number of a stage that has ended; 0 is the base.
            optimizer: holds the branches; None if there is none.

        Raises:
            StateError: as `weights(stage=...)`, or as `transition`; nothing was changed.
        """
        transition.rewind(self._run, stage, optimizer)

    # ---- weights

    @property
    def views(self) -> tuple[str, ...]:
        """The names for `weights`: slow, fast and base weights, averaged ones if they are kept, and added runs."""
        names = [name for name in experts.VIEW_NAMES if name != "averaged" or self._run.plan.spec.keeps_average]
        return (*names, *self._run.added)

    def weights(
        self, view: ViewName | str | Mapping[str, float] | None = None, *, stage: int | None = None
    ) -> AbstractContextManager[Self]:
        """Put other weights in place for a `with`: slow, fast, base, averaged, of an earlier stage, or of another run.

        Inside, no branch computes, so the cascade and the model compute the same, and methods of the model (`generate`)
        work. `slow` is W0 + S as of the last transition, `fast` is W0 + F including the running branches, `base` is W0,
        and `averaged` is the mean of slow weights that the spec's `average` asks for. None of them holds noise. At the
        end the weights from before are restored exactly.

        Args:
            view: `slow`, `fast`, `base`, `averaged` or the name of an added run. Or numbers by such names,
                `{"legal": 0.7, "slow": 0.3}`, for the sum `W0 + sum_i w_i S_i`. A run comes with its buffers (running
                statistics), a sum with those that are equal in all its runs.
            stage: instead of `view`, the number of a stage that has ended, for the slow weights at its end. 0 is the
                base.

        Raises:
            StateError: an unknown name, a stage that has not ended or is not kept, averaged weights that are not kept,
                an added run if the weights are sharded, inside another `weights`, inside a backward, or after
                `release`. At the end of the `with`: a weight was written inside, and that write is dropped.
            SpecError: a sum without names or with invalid numbers, beyond the dtype of a weight, or with DoRA.
        """
        return placed(self._run, view, stage, self)

    def folded_state_dict(
        self, quantized: Literal["dequantize"] | None = None, *, view: str | Mapping[str, float] = "slow"
    ) -> dict[str, torch.Tensor]:
        """Return a copy of the model's state dict with the slow weights. It loads with strict=True.

        A running stage that has trained is folded, as in `release`.

        Args:
            quantized: `dequantize` for dense tensors in place of quantized weights that have trained, which are refused
                otherwise.
            view: `slow`, their average over stages (`averaged`), an added run, or a sum, as in `weights`.
        """
        with self._run.exclusive("folded_state_dict"):
            return folding.folded_state(self._run, "folded_state_dict", quantized, view)

    def folded_graph(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        quantized: Literal["dequantize"] | None = None,
        *,
        view: str | Mapping[str, float] = "slow",
    ) -> nn.Module:
        """Return a plain GraphModule with the captured nodes, names and shapes, and slow weights as its own constants.

        It raises RuntimeError for a size of 0 or 1 at which it would compute something else than the model.

        Args:
            args, kwargs: inputs that choose the graph, by default those of `adapt`. The current mode counts too.
            quantized, view: as for `folded_state_dict`.
        """
        return self._folded(*self._inputs(args, kwargs), quantized, view)[0]

    def _folded(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], quantized: Literal["dequantize"] | None, view: Any
    ) -> tuple[nn.Module, dict[Axis, int]]:
        """Return the folded graph, and the smallest size of each axis that does not accept all sizes."""
        self._run.check_ready("folded_graph")
        if isinstance(view, str):  # before a graph is captured, which a call that fails must not add
            experts.check_view("folded_graph", view, self._run.plan.spec, (*experts.FOLDED, *self._run.added))
        variant, call = self._graphs.variant_of(args, kwargs, "folded_graph", dynamic=True)
        with self._run.exclusive("folded_graph"):
            state = folding.folded_state(self._run, "folded_graph", quantized, view)
        return self._graphs.fold(variant, call, state)

    def release(self, quantized: Requantize = None, *, view: str | Mapping[str, float] = "slow") -> nn.Module:
        """End the cascade and return the user's model, with the slow weights and its original flags.

        A running stage that has trained is folded first, so nothing is lost.

        Args:
            quantized: what to do with quantized weights that have trained. `dequantize` leaves them dense. `requantize`
                quantizes them again by the method of their layer (bitsandbytes, HQQ, quanto). A callable gets each
                module with its dense weight and quantizes it in place, such as torchao's
                `lambda module: quantize_(module, config)`. The rounding error is logged.
            view: `slow`, their average over stages (`averaged`), an added run, or a sum, as in `weights`.

        Raises:
            StateError: gradients are pending, after `release`, training has made a buffer inf or nan, or quantized
                weights have trained and `quantized` is None.
            NonFiniteBranch: a branch holds inf or nan; nothing was changed.
        """
        with self._run.exclusive("release", ends_stage=True), commit() as undo:
            # Undo steps first: each restores what the steps below change.
            undo(self._run.restorer())
            undo(partial(Flags.of(self.model).restore, self.model))
            undo(partial(self._usage.arm, self._run, self))
            undo(self._guard.arm)
            folding.release(self._run, quantized, view, undo)
            self._guard.flags.restore(self.model)
            self._guard.restore_structure(self.model, undo)
            self._graphs.drop(undo)
            self._usage.disarm()
            self._guard.disarm()
            self._run.detach()
            return self.model

    # ---- moving

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast. Graphs are dropped, because their constants do not move. Branches and slow state stay."""
        graphs = self._graphs
        with self._run.lock, AllOrNothing() as undo:
            if (rounded_anew := folding.cast_weights(self._run, fn)) is None:
                return self
            undo(partial(setattr, graphs, "example", graphs.example))
            undo(folding.tensors_writer(self._run, self))
            if recurse:
                folding.replace_quantized(self.model, fn)
                self.model._apply(fn)
                self.branches._apply(folding.wide(fn))
            graphs.drop(undo)
            graphs.example = pytree.tree_map_only(torch.Tensor, fn, graphs.example)
            self._run.commit(Planned(self._run.plan, self._run.slow, self._run.present(rounded_anew())), undo)
            self._run.note_weights()
            self._run.note_frozen()
            return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of model and cascade. The graph of an exported program has only one mode and keeps it."""
        self._run.check_alive("train", on_meta=True)
        self.training = self.branches.train(mode).training
        if "train" not in vars(self.model):
            self.model.train(mode)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Allow `copy` but not pickling, because graphs read the model that they were made from.

        Raises:
            StateError: the caller is not Python's `copy`, it copies for an average of parameters, or it makes a deep
                copy of sharded weights.
        """
        if sys._getframe(1).f_globals.get("__name__") == "copy":
            self._called_by("copy")
            if sys._getframe(1).f_code.co_name == "deepcopy":
                self._run.check_copy()
            return super().__reduce_ex__(protocol)
        raise StateError(
            "a cascade cannot be pickled, by torch.save, a spawned process or otherwise. Write a checkpoint by "
            "lorasc_fx.save and read it by lorasc_fx.load, or pickle the model after cascade.release()",
            code="not-serializable",
        )
