"""A cascade in transformers' Trainer, which is given the cascade itself as its model.

The Trainer calls its callbacks when a step, an epoch and an evaluation end, but not before it evaluates or saves: so
the callback wraps `evaluation_loop`, `save_model` and some more methods of its own Trainer, and of no other.

With `fsdp` the weights are sharded when the Trainer is made, by `parallel.fsdp`, and the Trainer is told that its
model was sharded at load time: it then adds no wrapper. What it would write by torch's state dicts is written, and read
back, by `lorasc_fx.save`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from lorasc_fx.cascade import transition
from lorasc_fx.checkpoint import reader
from lorasc_fx.checkpoint.cascade import save
from lorasc_fx.errors import CheckpointError, SpecError, StateError
from lorasc_fx.facade import Cascade
from lorasc_fx.integrations.stages import Evaluated, StageEnds
from lorasc_fx.parallel import fsdp
from lorasc_fx.quantized import QuantizedLinear, library_of
from lorasc_fx.schedules import Plateau, StageSchedule
from lorasc_fx.shards import ProcessGroup, full_tensor
from lorasc_fx.util.extras import require

require("loops", "transformers", "accelerate")

from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402 - after the sentence on how to install it
from transformers.trainer_utils import has_length  # noqa: E402
from transformers.utils.generic import find_labels  # noqa: E402

__all__ = ["CascadeCallback"]

Scheduled = Literal["training", "stage"]

_PLATEAU = "lorasc_fx.plateau"
"""Entry of the Trainer's state."""

_TIME = "_model_preparation_time"
"""The end of a name among the metrics of a pass that is none of them."""

_REFERENCE = "reference"
"""Name of the weights with which a preference training compares."""

_SHAPES: dict[str, tuple[float, Literal["cosine", "linear"]]] = {
    "linear": (0.0, "linear"),
    "cosine": (0.0, "cosine"),
    "constant": (1.0, "cosine"),
    "constant_with_warmup": (1.0, "cosine"),
}
"""Floor and decay of a StageSchedule by the Trainer's `lr_scheduler_type`."""

_BEHIND = (
    *("neftune_noise_alpha", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval"),
    *("cast_lm_head_to_fp32", "sync_ref_model"),
)
"""Arguments by which a Trainer changes a model behind the captured graphs: its Python, its dtype, or its weights."""


_FOLDER = "cascade"
"""Folder of a `checkpoint-N` that `lorasc_fx.save` writes where the weights are sharded."""

_FOLLOWED: dict[str, tuple[Any, str]] = {
    "fsdp_version": (2, "FSDP1 flattens parameters, and a transition has to write them"),
    "reshard_after_forward": (True, "a block's weights are freed after its part of the forward"),
    "activation_checkpointing": (False, "it wraps modules that the graphs never call"),
    "cpu_ram_efficient_loading": (
        False,
        "each process needs W0; for models that none holds whole build it on the meta device, call "
        "lorasc_fx.parallel.fsdp.shard and lorasc_fx.materialize, and leave fsdp out",
    ),
    "cpu_offload": (False, "shards stay on the device, where a transition computes"),
    "ignored_modules": (None, "all parameters are sharded"),
}
"""Options of accelerate's FSDP plugin that matter: the value that sharding a cascade follows, and why no other."""

_UNSHARDED = {
    "activation_checkpointing": "give gradient_checkpointing=False, which TRL's trainers have on by default: shards "
    "need a whole graph. Smaller batches and gradient_accumulation_steps save memory too",
    "fp16": "use bf16",
    "torch_compile": "leave it out: segments of a graph run between gathers",
    "parallelism_config": "leave it out: shard by a mesh of yours before",
}
"""Arguments that a Trainer of sharded weights cannot follow, with what to do."""


class CascadeCallback(StageEnds, TrainerCallback):  # type: ignore[misc]
    """Makes the transitions of a cascade that a Trainer trains, after the optimizer's step and before the next forward.

    Give the Trainer the cascade and this callback: `Trainer(model=cascade, callbacks=[CascadeCallback(cascade)], ...)`.
    Evaluations and predictions see the slow weights. `trainer.save_model(folder)` writes the user's own model with the
    slow weights, in its own library's layout. The `checkpoint-N` of a Trainer hold what a resume needs, without W0;
    `trainer.train(resume_from_checkpoint=...)` takes them, in a process that has adapted the same weights by the same
    spec. A stage that the end of the training cuts short is folded, but after `load_best_model_at_end`: the weights
    are then those that were found best.

    With `fsdp=True` among its arguments (FSDP2) the Trainer trains shards, as made by `parallel.fsdp.shard` when
    the Trainer is made; a cascade that was sharded before needs no argument. Their `checkpoint-N` hold a folder of
    `lorasc_fx.save`, and go on on any number of processes, sharded or not.

    Logs of the training, and so W&B and TensorBoard, have `stage`, that of the step, and `transition`, the number of
    stages that have ended since the log before. Evaluations have each metric by the weights that it is of as well:
    `eval_slow_loss`, `eval_fast_loss`.

    Args:
        cascade: the Trainer's model.
        epochs: a stage ends with every so many epochs; 1 if nothing else is given, as in the paper.
        steps: a stage ends with every so many optimizer steps.
        plateau: a stage ends when evaluations find no lower `eval_fast_loss`: a `schedules.Plateau`, or its patience.
            The slow weights do not change within a stage.
        evaluate: what evaluations and predictions see: the `slow` weights, the `fast` ones, or the cascade as it is
            `trained` at this moment, noise included. Of several, as in `("slow", "fast")`, each is a pass of its own,
            and the first one has the predictions and `eval_loss`.
        schedule: what the Trainer's `lr_scheduler_type` and `warmup_steps` are over: the whole `training`, or each
            `stage`, by an `lx.StageSchedule` (types linear, cosine, constant, constant_with_warmup).

    Raises:
        SpecError: two ways of ending stages, a count below 1, or arguments of the Trainer that a cascade cannot follow.
        StateError: another model than the Trainer's, or a callback that the Trainer was given after it was made.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        plateau: Plateau | int | None = None,
        evaluate: Evaluated | Sequence[Evaluated] = "slow",
        schedule: Scheduled = "training",
    ) -> None:
        super().__init__(cascade, epochs=epochs, steps=steps, plateau=plateau, evaluate=evaluate)
        if schedule not in get_args(Scheduled):
            raise SpecError(f"CascadeCallback: schedule is {schedule!r}; give one of {', '.join(get_args(Scheduled))}")
        self.schedule = schedule
        self._trainer: Any = None
        self._over = False
        self._stage = cascade.stage
        self._batches: Any = None
        self._reference: _Reference | None = None
        self._compared = _REFERENCE
        self._other_reference = False
        vars(cascade)["_get_name"] = cascade.model._get_name  # by which a Trainer knows whether it shifts labels
        cascade._run.warned.accept("unfolded-save")  # save_model writes the folded model
        vars(cascade)["_hf_peft_config_loaded"] = True  # a Trainer trains no quantized model without adapters

    @property
    def reference(self) -> torch.nn.Module:
        """The reference model of a preference training, without weights of its own: the cascade before the training.

        `DPOTrainer(model=cascade, ref_model=callback.reference, ...)`. It computes with the weights that the cascade
        has under the name `reference`. If there are none when the training begins, they are `cascade.add("reference",
        cascade)`: the base of a new cascade, what a run that was loaded has learnt.
        """
        if self._reference is None:
            self._reference = _Reference(self)
        return self._reference

    # ---- events of the Trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Check the Trainer's arguments, and wrap its methods."""
        self._check_model(about["model"])
        self._check_arguments(args)
        self._trainer, arguments = _calling_trainer()
        trainer = self._trainer
        self._shard(trainer)
        if args.label_names is None:
            trainer.label_names = find_labels(type(self.cascade.model))  # it looks at the name of the class as well
        reference = arguments.get("ref_model")
        self._other_reference = reference is not None and reference is not self._reference
        replaced: dict[str, Callable[..., Any]] = {
            "evaluation_loop": self._evaluation_loop,
            "log": self._log,
            "train": self._train,
            "save_model": self._save_model,
            "_load_from_checkpoint": self._load_from_checkpoint,
            "_load_best_model": self._load_best_model,
            "_load_optimizer_and_scheduler": self._load_optimizer_and_scheduler,
        }
        if self._sharded:
            replaced |= {"_save": self._save, "_save_optimizer_and_scheduler": _saved_with_the_model}
        if hasattr(trainer, "compute_ref_log_probs"):
            replaced["compute_ref_log_probs"] = self._compute_ref_log_probs
        if self.schedule == "stage":
            replaced |= {
                "get_train_dataloader": self._get_train_dataloader,
                "create_scheduler": self._create_scheduler,
            }
        self._keep_state_dicts(trainer)
        for name, method in replaced.items():
            setattr(trainer, name, functools.partial(method, getattr(trainer, name)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Check that the training can go as it was asked for."""
        self._check_model(about["model"])
        if self._trainer is None:
            raise StateError(
                "CascadeCallback: the Trainer was made without it, and has read off the cascade what it needs; "
                "give it as Trainer(callbacks=[...])",
                code="trainer-not-supported",
            )
        if self.epochs is not None and not has_length(about["train_dataloader"]):
            raise SpecError(
                f"CascadeCallback: epochs is {self.epochs}, and the data have no length; give steps=...",
                code="invalid-data",
            )
        if self.plateau is not None and args.eval_strategy == "no":
            raise SpecError(
                "CascadeCallback: plateau looks at evaluations, and eval_strategy is 'no'; give another",
                code="conflicting-options",
            )
        run, optimizer = self.cascade._run, about["optimizer"]
        run.begin_loop(optimizer, "CascadeCallback")
        transition.end_idle(run)
        self._restore_plateau(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """End a stage on a plateau: after the evaluation that found it was saved as it was measured."""
        if self._over:
            self.cascade.transition(about["optimizer"])
            self._over = False
            self._store_plateau(state)
        self._stage = self.cascade.stage

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """End a stage by its count of steps or epochs: before an evaluation or a checkpoint of the same step."""
        whole = state.epoch is not None and state.epoch == int(state.epoch)
        if (self.steps is not None and state.global_step % self.steps == 0) or (
            self.epochs is not None and whole and int(state.epoch) % self.epochs == 0
        ):
            self.cascade.transition(about["optimizer"])

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **about: Any) -> None:
        """Look at the loss."""
        if self.plateau is None or not self._trainer.is_in_train:
            return
        name = "eval_fast_loss"
        if name not in metrics:
            raise SpecError(
                f"CascadeCallback: plateau looks at {name}, and the evaluation gives {', '.join(sorted(metrics))}; "
                "give the Trainer one eval_dataset, with labels",
                code="trainer-not-supported",
            )
        self._over = self.plateau.over(metrics[name]) or self._over
        self._store_plateau(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Fold a stage that was cut short; after the best model was loaded, drop it, as it was not measured."""
        run, optimizer = self.cascade._run, about["optimizer"]
        if not transition.has_begun(run):
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            if self._best_of(args) == "slow":
                with run.lock:
                    transition.restart(run, optimizer)
        else:
            self._end_last(optimizer)

    # ---- sharded weights

    @property
    def _sharded(self) -> bool:
        return self.cascade._run.is_sharded

    def _shard(self, trainer: Any) -> None:
        """Shard the cascade if the Trainer was given `fsdp`, and let the Trainer add no wrapper to sharded weights.

        On a CPU accelerate takes no FSDP plugin; elsewhere the Trainer's accelerator has one.
        """
        args, cascade = trainer.args, self.cascade
        if trainer.is_fsdp_enabled:
            _check_plugin(trainer.accelerator.state.fsdp_plugin)
        if not (args.fsdp or trainer.is_fsdp_enabled or self._sharded):
            return
        self._check_sharding(trainer)
        if trainer.is_fsdp_enabled:
            _drop_plugin(trainer)
        if not self._sharded:
            if cascade._run.holds_numbers:
                cascade.to(args.device)
            if not cascade._graphs.variants.all:  # the graphs of another device are gone
                cascade._graphs.variant_of(*cascade.example)
            fsdp.shard(cascade)
        trainer.is_distributed_loading_by_transformers = True

    def _check_sharding(self, trainer: Any) -> None:
        args, run = trainer.args, self.cascade._run
        for name, advice in _UNSHARDED.items():
            if getattr(args, name, None):
                raise SpecError(
                    f"CascadeCallback: {name} is {getattr(args, name)!r}, and the weights are sharded; {advice}",
                    code="trainer-not-supported",
                )
        if run.is_sharded and run.slow.group.size != args.world_size:
            raise StateError(
                f"CascadeCallback: the cascade is sharded over other ranks than the {args.world_size} processes of "
                "the Trainer, which gives each of them data of its own: shard it over all of them",
                code="invalid-value",
            )
        if trainer.optimizer is not None and not self._sharded:
            raise SpecError(
                "CascadeCallback: fsdp exchanges the parameters that the optimizer of optimizers=(...) holds. Call "
                "lorasc_fx.parallel.fsdp.shard(cascade) first, build the optimizer then, and leave fsdp out",
                code="conflicting-options",
            )

    def _save(self, original: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint's shards, or on the first process the user's model, whose weights it gathers one by one.

        All processes come here.
        """
        trainer = self._trainer
        folder = output_dir or trainer.args.output_dir
        if trainer.model is self.cascade:
            state: dict[str, Any] = {}
            if not trainer.args.save_only_model:
                state = {"optimizer": _inner(trainer.optimizer), "scheduler": trainer.lr_scheduler}
            save(self.cascade, Path(folder, _FOLDER), **state)
            if trainer.args.should_save and trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            return
        whole = _gathered(self.cascade.model, trainer.args.should_save)
        if trainer.args.should_save:
            original(folder, whole)

    def _load_from_checkpoint(self, original: Any, checkpoint: str, model: Any = None) -> None:
        """Load the cascade from a `checkpoint-N`, whichever number of processes has written it."""
        if self._take(checkpoint):
            return
        if self._sharded:
            raise CheckpointError(
                f"{checkpoint}: was written by a Trainer whose weights were not sharded: resume it without fsdp",
                code="no-checkpoint",
            )
        original(checkpoint, model)

    def _load_best_model(self, original: Any) -> None:
        """Load the cascade from the best `checkpoint-N`."""
        if not self._take(self._trainer.state.best_model_checkpoint):
            original()

    def _take(self, checkpoint: str) -> bool:
        """Take over what `_save` has written into a checkpoint; return whether it has."""
        if not Path(checkpoint, _FOLDER).is_dir():
            return False
        ranks = ProcessGroup.of()
        with ranks.agreed("resume_from_checkpoint"):
            found = reader.read(Path(checkpoint, _FOLDER))
        self.cascade._go_on(found, "resume_from_checkpoint", sharded=True)
        return True

    def _load_optimizer_and_scheduler(self, original: Any, checkpoint: str | None) -> None:
        """Give optimizer and scheduler the state that a checkpoint has for them."""
        if checkpoint is None or not Path(checkpoint, _FOLDER).is_dir():
            original(checkpoint)
            return
        self.cascade.resume(_inner(self._trainer.optimizer), self._trainer.lr_scheduler)

    # ---- inside

    def _best_of(self, args: Any) -> str:
        """Return the weights by which the best model was found."""
        metric = f"_{args.metric_for_best_model}"
        return next((which for which in get_args(Evaluated) if f"_{which}_" in metric), self._passes[0])

    def _store_plateau(self, state: Any) -> None:
        """Store the plateau in the Trainer's state, which its checkpoints hold."""
        if self.plateau is not None:
            state.stateful_callbacks[_PLATEAU] = {"over": self._over, "plateau": self.plateau.state_dict()}

    def _restore_plateau(self, state: Any) -> None:
        """Restore the plateau from the Trainer's state."""
        if self.plateau is not None and (saved := state.stateful_callbacks.get(_PLATEAU)) is not None:
            self.plateau.load_state_dict(saved["plateau"])
            self._over = saved["over"]

    def _replace_references(self) -> None:
        """Replace what trainers have set up since: TRL's forward and its second copy of the base, and the model in the
        losses of sentence-transformers.
        """
        trainer = self._trainer
        losses = getattr(trainer, "loss", None)
        for loss in losses.values() if isinstance(losses, dict) else [losses]:
            if isinstance(loss, torch.nn.Module):
                self._replace_model_in(loss)
        _replace_fused_head(self.cascade)
        _replace_switch(self.cascade)
        reference = getattr(trainer, "ref_model", None)
        if self._other_reference or (reference is None and not hasattr(trainer, "compute_ref_log_probs")):
            return
        self._keep_reference()
        if reference is not None:
            vars(self.reference).pop("forward", None)
            trainer.ref_model = self.reference

    def _keep_reference(self) -> None:
        """Keep the weights with which the training compares; of shards the base, which is W0.

        Raises:
            StateError: sharded weights that have learnt something before.
        """
        run = self.cascade._run
        if not self._sharded:
            if _REFERENCE not in self.cascade.views:
                self.cascade.add(_REFERENCE, self.cascade)
        elif self._compared != "base":
            if run.plan.stage > 1 or transition.has_begun(run):
                raise StateError(
                    "CascadeCallback: the weights are sharded, and what the cascade has learnt before this training, "
                    "with which it is to be compared, cannot be kept beside them. Give the trainer a ref_model, or "
                    "release the cascade first, and adapt its model anew: its base is the reference then",
                    code="sharded",
                )
            self._compared = "base"

    def _replace_model_in(self, module: torch.nn.Module) -> None:
        """Replace the user's model by the cascade, in this module and those in it."""
        for name, child in list(module.named_children()):
            if child is self.cascade.model:
                setattr(module, name, self.cascade)
            elif child is not self.cascade:
                self._replace_model_in(child)

    def _compute_ref_log_probs(self, original: Any, model: Any, inputs: Any) -> Any:
        """Compute what the policy is compared with, before the training and where no reference model is held."""
        self._replace_references()
        with self._placing(self._compared) if model is self.cascade else contextlib.nullcontext():
            return original(model, inputs)

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does."""
        self._replace_references()
        return original(*args, **kwargs)

    def _evaluation_loop(
        self,
        original: Any,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as the Trainer does, with the weights that are asked for in place."""
        self._replace_references()
        passes: dict[str, bool | None] = dict.fromkeys(self._passes, prediction_loss_only)
        if self.plateau is not None and self._trainer.is_in_train:
            passes.setdefault("fast", True)  # of which the plateau needs the loss alone
        first: Any = None
        for which, loss_only in passes.items():
            sums = copy.deepcopy(vars(self._trainer).get("_metrics"))
            with self._placing(which):
                output = original(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
            if first is None:
                first = output
            elif sums is not None:
                self._trainer._metrics = sums  # where TRL's trainers sum what they measure: of the first pass
            prefix = f"{metric_key_prefix}_"
            metrics = {f"{prefix}{which}_{name.removeprefix(prefix)}": output.metrics[name] for name in output.metrics}
            first.metrics.update({name: metrics[name] for name in metrics if not name.endswith(_TIME)})
        return first

    def _log(self, original: Any, logs: dict[str, Any], *about: Any, **more: Any) -> None:
        """Log as the Trainer does, of a step of the training with its stage."""
        if "loss" in logs:
            history = self._trainer.state.log_history
            before = next((entry["stage"] for entry in reversed(history) if "stage" in entry), self._stage)
            logs |= {"stage": self._stage, "transition": self._stage - before}
        original(logs, *about, **more)

    def _get_train_dataloader(self, original: Any) -> Any:
        """Return the Trainer's batches, whose number is asked for when the scheduler is made."""
        self._batches = original()
        return self._batches

    def _create_scheduler(
        self, original: Any, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make a schedule of each stage, with the Trainer's warm-up and decay."""
        trainer = self._trainer
        if trainer.lr_scheduler is None:
            optimizer = optimizer or trainer.optimizer
            steps, warmup = self._stage_steps(trainer.args), 0
            if trainer.args.lr_scheduler_type != "constant":
                warmup = trainer.args.get_warmup_steps(steps or 0)
            floor, decay = _SHAPES[trainer.args.lr_scheduler_type]
            trainer.lr_scheduler = StageSchedule(
                _inner(optimizer),
                self.cascade,
                steps,
                warmup=warmup,
                floor=floor,
                decay=decay,
            )
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _stage_steps(self, args: Any) -> int | None:
        """Return the optimizer steps of a stage; None where a plateau ends it."""
        if self.plateau is not None or self.steps is not None:
            return self.steps
        assert self.epochs is not None
        updates = math.ceil(len(self._batches) / int(args.gradient_accumulation_steps))
        return self.epochs * max(1, updates)

    def _save_model(self, original: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the user's model with the slow weights; a checkpoint gets the cascade's state dict."""
        if _internal_call:
            original(output_dir, _internal_call=True)
            return
        with self._placing("slow"), _naming_dense(self.cascade.model):
            self._trainer.model = self.cascade.model
            try:
                original(output_dir)
            finally:
                self._trainer.model = self.cascade

    def _keep_state_dicts(self, trainer: Any) -> None:
        """Let checkpoints of a sentence-transformers trainer hold the state dict of the cascade, as those of others do.

        Its own are models by `save_pretrained`, and an error in reading the best one back is a line in the log.
        """
        if type(trainer)._save.__module__ != "sentence_transformers.base.trainer":
            return
        original = trainer._save

        def save(output_dir: str | None = None, state_dict: Any = None) -> None:
            """Write a checkpoint's state dict, or the user's model."""
            write = functools.partial(Trainer._save, trainer) if trainer.model is self.cascade else original
            write(output_dir, state_dict)

        trainer._save = save
        trainer._load_from_checkpoint = functools.partial(Trainer._load_from_checkpoint, trainer)
        trainer._load_best_model = functools.partial(Trainer._load_best_model, trainer)

    def _check_model(self, model: Any) -> None:
        if model is not self.cascade:
            raise StateError(
                f"CascadeCallback: the Trainer's model is {type(model).__name__}, and not the cascade that the "
                "callback was given; give both the same (and no model_init)",
                code="trainer-not-supported",
            )

    def _check_arguments(self, args: Any) -> None:
        if args.n_gpu > 1:
            raise SpecError(
                f"CascadeCallback: the Trainer would copy the cascade to {args.n_gpu} devices at each step "
                "(DataParallel), and no copy has graphs; start one process a device by torchrun, or show one device "
                "only",
                code="wrapper-not-supported",
            )
        if args.deepspeed:
            raise SpecError(
                f"CascadeCallback: deepspeed is {args.deepspeed!r}; it would cut the cascade's parameters behind "
                "its transitions. Leave it out: started by torchrun, the Trainer uses DistributedDataParallel, and "
                "with fsdp=True it shards the cascade",
                code="trainer-not-supported",
            )
        if args.fsdp and args.fsdp_plugin_args is None:
            raise SpecError(
                f"CascadeCallback: fsdp_config is {args.fsdp_config!r}, which is of XLA; leave out xla",
                code="trainer-not-supported",
            )
        if args.fsdp:
            _check_plugin(FullyShardedDataParallelPlugin(**args.fsdp_plugin_args))
        if self.schedule == "stage":
            self._check_schedule(args)
        for name in _BEHIND:
            if getattr(args, name, None):
                raise SpecError(
                    f"CascadeCallback: {name} is {getattr(args, name)!r}; it changes the model behind the graphs that "
                    "were captured of it. Leave it out",
                    code="trainer-not-supported",
                )

    def _check_schedule(self, args: Any) -> None:
        if args.lr_scheduler_type not in _SHAPES or args.lr_scheduler_kwargs:
            scheduler = f"{args.lr_scheduler_type.value} {args.lr_scheduler_kwargs or ''}".strip()
            raise SpecError(
                f"CascadeCallback: schedule is 'stage', and lr_scheduler_type is {scheduler}; give one of "
                f"{', '.join(_SHAPES)}, or optimizers=(optimizer, lx.StageSchedule(...))",
                code="conflicting-options",
            )
        if self.plateau is not None and (_SHAPES[args.lr_scheduler_type][0] < 1 or 0 < args.warmup_steps < 1):
            raise SpecError(
                "CascadeCallback: schedule is 'stage', and a plateau says how long a stage is; give lr_scheduler_type "
                "'constant' or 'constant_with_warmup', and warmup_steps as a number of steps",
                code="conflicting-options",
            )


@contextlib.contextmanager
def _naming_dense(model: Any) -> Iterator[None]:
    """Let the configuration of a model that bitsandbytes has quantized name the modules whose weights are dense now.

    What has trained is dense in a saved model, and transformers would take all modules for quantized ones.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(config, "quant_method", None) != "bitsandbytes":
        yield
        return
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    before, config.llm_int8_skip_modules = (
        config.llm_int8_skip_modules,
        [
            name
            for name, module in linear
            if library_of(module) is None and not (isinstance(module, QuantizedLinear) and module.holds_layer)
        ],
    )
    try:
        yield
    finally:
        config.llm_int8_skip_modules = before


def _replace_fused_head(cascade: Cascade) -> None:
    """Let the cascade's own logits answer what TRL's trainers ask of the forward that they put before the model's.

    With `fused_lm_head=True` theirs calls the backbone and the head by themselves, where no branches are.
    """
    fused: Any = getattr(vars(cascade).get("forward"), "__func__", None)
    if getattr(fused, "__globals__", {}).get("__name__") != "trl.trainer.utils":
        return
    output = fused.__globals__["FusedCausalLMOutput"]
    temperature = inspect.getclosurevars(fused).nonlocals["temperature"]

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        plain = type(cascade).forward
        if not fused_lm_head:
            options = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return plain(
                cascade, *args, **kwargs, **{name: value for name, value in options.items() if value is not None}
            )
        logits = plain(cascade, *args, **kwargs).logits.float() / temperature
        if shift_labels is None:
            assert labels is not None
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        mask, label = shift_labels != -100, shift_labels.clamp(min=0)
        every = logits.log_softmax(-1)
        log_probs = every.gather(-1, label[..., None])[..., 0].masked_fill(~mask, 0)
        with torch.no_grad():
            measured = {
                "entropy": -(every.exp() * every).sum(-1),
                "log_sum_sq_probs": (2 * every).logsumexp(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": every.argmax(-1) == label,
            }
            measured = {name: value.masked_fill(~mask, 0) for name, value in measured.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return output(loss=-log_probs.sum() / count, log_probs=log_probs, label_mask=mask, **measured)

    vars(cascade)["forward"] = forward


def _replace_switch(cascade: Cascade) -> None:
    """Let the hooks of gradient checkpointing go with it: transformers adds one more each time that it is turned on.

    TRL's trainers turn it off and on at each step, and a graph is captured anew for other hooks.
    """
    model: Any = cascade.model
    if not hasattr(model, "disable_input_require_grads"):
        return

    def gradient_checkpointing_disable() -> None:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()

    vars(cascade)["gradient_checkpointing_disable"] = gradient_checkpointing_disable


class _Reference(torch.nn.Module):
    """The cascade with the weights that it has under the name `reference`."""

    def __init__(self, callback: CascadeCallback) -> None:
        super().__init__()
        self.config = callback.cascade.config
        self._callback = callback

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the cascade computes with these weights."""
        with self._callback._placing(self._callback._compared):
            return self._callback.cascade(*args, **kwargs)


def _check_plugin(plugin: Any) -> None:
    """Refuse options of accelerate's FSDP plugin that sharding a cascade does not follow.

    Blocks come from the graph, whatever `auto_wrap_policy` says, and no state dict of torch's is read
    (`state_dict_type`).
    """
    for name, (followed, why) in _FOLLOWED.items():
        value = getattr(plugin, name)
        value = isinstance(value, CPUOffloadPolicy) if isinstance(value, OffloadPolicy) else value
        if value != followed:
            raise SpecError(
                f"CascadeCallback: {name} of fsdp_config is {value!r}: {why}. Give {followed!r}",
                code="trainer-not-supported",
            )


def _drop_plugin(trainer: Any) -> None:
    """Make the Trainer's accelerator anew without its FSDP plugin, by which it would cut the model again."""
    args = trainer.args
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the first one, and asks for a plugin
    vars(args).pop("_setup_devices", None)  # accelerate's state is reset where the device is asked for
    assert args.device is not None
    options, args.fsdp_plugin_args = args.fsdp_plugin_args, None
    try:
        trainer.create_accelerator_and_postprocess()
    finally:
        args.fsdp_plugin_args = options  # for another Trainer


def _inner(optimizer: Any) -> Any:
    """Return the optimizer that steps, which accelerate's is around."""
    return getattr(optimizer, "optimizer", optimizer)


def _saved_with_the_model(original: Any, output_dir: str) -> None:
    """Write no second state of optimizer and scheduler."""


def _gathered(model: torch.nn.Module, holds: bool) -> dict[str, torch.Tensor]:
    """Return a model's state dict, each tensor gathered, in host memory; {} on processes that hold nothing of it.

    Every rank must call this at the same point. Ties stay ties.
    """
    tensors: dict[int, torch.Tensor] = {}
    named = model.state_dict(keep_vars=True)
    for value in named.values():
        if id(value) not in tensors:
            whole = full_tensor(value).detach()
            tensors[id(value)] = whole.cpu() if holds else torch.empty(0)
    return {name: tensors[id(value)] for name, value in named.items()} if holds else {}


def _calling_trainer() -> tuple[Any, dict[str, Any]]:
    """Return the Trainer that calls the event that calls this, and the arguments that it was made with.

    No event is given the Trainer, and one Trainer is meant.
    """
    frame, trainer, arguments = inspect.currentframe(), None, dict[str, Any]()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and (trainer is None or caller is trainer):
            trainer = caller
            arguments |= frame.f_locals if frame.f_code.co_name == "__init__" else {}
        frame = frame.f_back
    if trainer is not None:
        return trainer, arguments
    raise StateError(
        "CascadeCallback: nobody that called on_init_end is a Trainer; it works in one only",
        code="trainer-not-supported",
    )
