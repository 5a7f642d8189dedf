"""A callback for transformers' Trainer, whose model is the cascade itself.

The Trainer calls its callbacks after a step, an epoch and an evaluation, but not before it evaluates or saves. So the
callback wraps `evaluation_loop`, `save_model` and a few more methods of its own Trainer instance.

With `fsdp` the weights are sharded by `parallel.fsdp` when the Trainer is made. The Trainer is told that its model was
sharded at load time, so it adds no wrapper. Its checkpoints are written and read by `lorasc_fx.save` instead of torch's
state dicts.
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
from transformers import Trainer, TrainerCallback  # noqa: E402 - after the message on how to install it
from transformers.trainer_utils import has_length  # noqa: E402
from transformers.utils.generic import find_labels  # noqa: E402

__all__ = ["CascadeCallback"]

Scheduled = Literal["training", "stage"]

_PLATEAU = "lorasc_fx.plateau"
"""Key of the plateau in the Trainer's state."""

_TIME = "_model_preparation_time"
"""Suffix of an entry among the metrics that is not a metric."""

_REFERENCE = "reference"
"""Name of the reference weights of a preference training."""

_SHAPES: dict[str, tuple[float, Literal["cosine", "linear"]]] = {
    "linear": (0.0, "linear"),
    "cosine": (0.0, "cosine"),
    "constant": (1.0, "cosine"),
    "constant_with_warmup": (1.0, "cosine"),
}
"""Floor and decay of a StageSchedule by the Trainer's `lr_scheduler_type`."""

_CHANGE_MODEL = (
    *("neftune_noise_alpha", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval"),
    *("cast_lm_head_to_fp32", "sync_ref_model"),
)
"""Arguments with which a Trainer changes the code, the dtype or the weights of a model. Captured graphs miss that."""

_FOLDER = "cascade"
"""Folder in a `checkpoint-N` that `lorasc_fx.save` writes if the weights are sharded."""

_FOLLOWED: dict[str, tuple[Any, str]] = {
    "fsdp_version": (2, "FSDP1 flattens parameters, but a transition has to write them"),
    "reshard_after_forward": (True, "the weights of a block are always freed after its part of the forward"),
    "activation_checkpointing": (False, "it wraps modules that the graphs never call"),
    "cpu_ram_efficient_loading": (
        False,
        "each process needs W0. If the model does not fit on one process, build it on the meta device, call "
        "lorasc_fx.parallel.fsdp.shard and lorasc_fx.materialize, and leave fsdp out",
    ),
    "cpu_offload": (False, "a transition computes on the device, so shards stay there"),
    "ignored_modules": (None, "all parameters are sharded"),
}
"""Options of accelerate's FSDP plugin: the only value that sharding a cascade supports, and the reason."""

_UNSHARDED = {
    "activation_checkpointing": "give gradient_checkpointing=False, which TRL's trainers have on by default: shards "
    "need a whole graph. Smaller batches and gradient_accumulation_steps save memory too",
    "fp16": "use bf16",
    "torch_compile": "leave it out, because segments of a graph run between gathers",
    "parallelism_config": "leave it out, and shard the cascade by your own mesh before",
}
"""Arguments that a Trainer of sharded weights does not support, and what to do instead."""


class CascadeCallback(StageEnds, TrainerCallback):  # type: ignore[misc]
    """Runs the transitions of a cascade in a Trainer, after the optimizer's step and before the next forward.

    Give the Trainer the cascade and this callback: `Trainer(model=cascade, callbacks=[CascadeCallback(cascade)], ...)`.
    Evaluations and predictions see the slow weights. `trainer.save_model(folder)` writes the user's model with the slow
    weights, in the layout of its library. Each `checkpoint-N` holds what a resume needs, without W0. To resume, adapt
    the same weights with the same spec and call `trainer.train(resume_from_checkpoint=...)`. A stage that is running at
    the end of the training is folded, except after `load_best_model_at_end`: then the weights are the best ones.

    With the argument `fsdp=True` (FSDP2) the cascade is sharded by `parallel.fsdp.shard` when the Trainer is made. A
    cascade that was sharded before needs no argument. Each `checkpoint-N` then holds a folder of `lorasc_fx.save`, and
    can be resumed on any number of processes, sharded or not.

    Training logs (also for W&B and TensorBoard) have `stage`, that of the step, and `transition`, the number of stages
    that have ended since the last log. Evaluations also report each metric by the evaluated weights, such as
    `eval_slow_loss` and `eval_fast_loss`.

    Args:
        cascade: the Trainer's model.
        epochs: epochs per stage. The default is 1, as in the paper, unless `steps` or `plateau` is given.
        steps: optimizer steps per stage.
        plateau: end a stage when `eval_fast_loss` stops improving: a `schedules.Plateau`, or its patience. The slow
            weights do not change within a stage.
        evaluate: the weights for evaluations and predictions: `slow`, `fast`, or `trained` (the cascade as it is now,
            including noise). With several, such as `("slow", "fast")`, each gets its own pass, and the first one gives
            the predictions and `eval_loss`.
        schedule: whether the Trainer's `lr_scheduler_type` and `warmup_steps` cover the whole `training`, or each
            `stage` by an `lx.StageSchedule` (types linear, cosine, constant, constant_with_warmup).

    Raises:
        SpecError: two ways to end stages, a count below 1, or arguments of the Trainer that a cascade does not support.
        StateError: the Trainer has another model, or got the callback after it was made.
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
        vars(cascade)["_get_name"] = cascade.model._get_name  # a Trainer decides by it whether to shift labels
        cascade._run.warned.accept("unfolded-save")  # save_model writes the folded model
        vars(cascade)["_hf_peft_config_loaded"] = True  # a Trainer trains no quantized model without adapters

    @property
    def reference(self) -> torch.nn.Module:
        """The reference model of a preference training: the cascade before it, without a copy of the weights.

        `DPOTrainer(model=cascade, ref_model=callback.reference, ...)`. It computes with the added run `reference`. If
        there is none when the training begins, the callback calls `cascade.add("reference", cascade)`, which keeps the
        base of a new cascade, or what a loaded run has learnt.
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
            trainer.label_names = find_labels(type(self.cascade.model))  # it also depends on the name of the class
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
            # `_save` also writes the state of optimizer and scheduler.
            replaced |= {"_save": self._save, "_save_optimizer_and_scheduler": lambda original, output_dir: None}
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
        """Check that the training can run as configured."""
        self._check_model(about["model"])
        if self._trainer is None:
            raise StateError(
                "CascadeCallback: the Trainer was made without this callback. Give it as Trainer(callbacks=[...])",
                code="trainer-not-supported",
            )
        if self.epochs is not None and not has_length(about["train_dataloader"]):
            raise SpecError(
                f"CascadeCallback: epochs is {self.epochs}, but the data have no length. Give steps=...",
                code="invalid-data",
            )
        if self.plateau is not None and args.eval_strategy == "no":
            raise SpecError(
                "CascadeCallback: plateau needs evaluations, but eval_strategy is 'no'. Give another one",
                code="conflicting-options",
            )
        run, optimizer = self.cascade._run, about["optimizer"]
        run.begin_loop(optimizer, "CascadeCallback")
        transition.end_idle(run)
        self._restore_plateau(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """End a stage on a plateau. By now the weights that were evaluated have been saved."""
        if self._over:
            self.cascade.transition(about["optimizer"])
            self._over = False
            self._store_plateau(state)
        self._stage = self.cascade.stage

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """End a stage after its steps or epochs, before an evaluation or a checkpoint of the same step."""
        whole = state.epoch is not None and state.epoch == int(state.epoch)
        if (self.steps is not None and state.global_step % self.steps == 0) or (
            self.epochs is not None and whole and int(state.epoch) % self.epochs == 0
        ):
            self.cascade.transition(about["optimizer"])

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **about: Any) -> None:
        """Report the loss to the plateau."""
        if self.plateau is None or not self._trainer.is_in_train:
            return
        name = "eval_fast_loss"
        if name not in metrics:
            raise SpecError(
                f"CascadeCallback: plateau needs {name}, but the evaluation gives {', '.join(sorted(metrics))}. "
                "Give the Trainer one eval_dataset, with labels",
                code="trainer-not-supported",
            )
        self._over = self.plateau.over(metrics[name]) or self._over
        self._store_plateau(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Fold a stage that was cut short, or drop it if the best model was loaded: it was not evaluated."""
        run, optimizer = self.cascade._run, about["optimizer"]
        if not transition.has_begun(run):
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            metric = f"_{args.metric_for_best_model}"
            best = next((which for which in get_args(Evaluated) if f"_{which}_" in metric), self._passes[0])
            if best == "slow":
                with run.lock:
                    transition.restart(run, optimizer)
        else:
            self._end_last(optimizer)

    # ---- sharded weights

    @property
    def _sharded(self) -> bool:
        return self.cascade._run.is_sharded

    def _shard(self, trainer: Any) -> None:
        """Shard the cascade if the Trainer has the argument `fsdp`, and keep the Trainer from wrapping sharded weights.

        Except on a CPU, the Trainer's accelerator has an FSDP plugin then.
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
                    f"CascadeCallback: {name} is {getattr(args, name)!r}, but the weights are sharded: {advice}",
                    code="trainer-not-supported",
                )
        if run.is_sharded and run.slow.group.size != args.world_size:
            raise StateError(
                f"CascadeCallback: the Trainer has {args.world_size} processes, each with its own data, but the "
                f"cascade is sharded over {run.slow.group.size}. Shard it over all of them",
                code="invalid-value",
            )
        if trainer.optimizer is not None and not self._sharded:
            raise SpecError(
                "CascadeCallback: fsdp replaces the parameters that the optimizer of optimizers=(...) holds. Call "
                "lorasc_fx.parallel.fsdp.shard(cascade) first, then build the optimizer, and leave fsdp out",
                code="conflicting-options",
            )

    def _save(self, original: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the shards of a checkpoint, or the user's model, whose weights the first process gathers one by one.

        All processes call this.
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
        """Load the cascade from a `checkpoint-N`, which any number of processes may have written."""
        if self._take(checkpoint):
            return
        if self._sharded:
            raise CheckpointError(
                f"{checkpoint}: it was written by a Trainer without sharded weights. Resume it without fsdp",
                code="no-checkpoint",
            )
        original(checkpoint, model)

    def _load_best_model(self, original: Any) -> None:
        """Load the cascade from the best `checkpoint-N`."""
        if not self._take(self._trainer.state.best_model_checkpoint):
            original()

    def _take(self, checkpoint: str) -> bool:
        """Load what `_save` has written into a checkpoint. Returns whether there is something."""
        if not Path(checkpoint, _FOLDER).is_dir():
            return False
        ranks = ProcessGroup.of()
        with ranks.agreed("resume_from_checkpoint"):
            found = reader.read(Path(checkpoint, _FOLDER))
        self.cascade._go_on(found, "resume_from_checkpoint", sharded=True)
        return True

    def _load_optimizer_and_scheduler(self, original: Any, checkpoint: str | None) -> None:
        """Load the state of optimizer and scheduler from a checkpoint."""
        if checkpoint is None or not Path(checkpoint, _FOLDER).is_dir():
            original(checkpoint)
            return
        self.cascade.resume(_inner(self._trainer.optimizer), self._trainer.lr_scheduler)

    # ---- inside

    def _store_plateau(self, state: Any) -> None:
        """Store the plateau in the Trainer's state, which is part of its checkpoints."""
        if self.plateau is not None:
            state.stateful_callbacks[_PLATEAU] = {"over": self._over, "plateau": self.plateau.state_dict()}

    def _restore_plateau(self, state: Any) -> None:
        """Restore the plateau from the Trainer's state."""
        if self.plateau is not None and (saved := state.stateful_callbacks.get(_PLATEAU)) is not None:
            self.plateau.load_state_dict(saved["plateau"])
            self._over = saved["over"]

    def _replace_references(self) -> None:
        """Replace what a trainer has set up with the user's model by the cascade.

        In TRL these are a forward and a second copy of the base, in sentence-transformers the model in the losses.
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
        """Keep the reference weights. For sharded weights it is the base, W0.

        Raises:
            StateError: sharded weights have been trained before.
        """
        run = self.cascade._run
        if not self._sharded:
            if _REFERENCE not in self.cascade.views:
                self.cascade.add(_REFERENCE, self.cascade)
        elif self._compared != "base":
            if run.plan.stage > 1 or transition.has_begun(run):
                raise StateError(
                    "CascadeCallback: the reference of this training is what the cascade has learnt before, which "
                    "cannot be kept beside sharded weights. Give the trainer a ref_model, or release the cascade and "
                    "adapt its model again: then its base is the reference",
                    code="sharded",
                )
            self._compared = "base"

    def _replace_model_in(self, module: torch.nn.Module) -> None:
        """Replace the user's model by the cascade in this module and its submodules."""
        for name, child in list(module.named_children()):
            if child is self.cascade.model:
                setattr(module, name, self.cascade)
            elif child is not self.cascade:
                self._replace_model_in(child)

    def _compute_ref_log_probs(self, original: Any, model: Any, inputs: Any) -> Any:
        """Compute the reference log-probabilities with the reference weights, if there is no reference model."""
        self._replace_references()
        with self._placing(self._compared) if model is self.cascade else contextlib.nullcontext():
            return original(model, inputs)

    def _train(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Replace references to the user's model, then train."""
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
        """Evaluate once for each of the requested weights."""
        self._replace_references()
        passes: dict[str, bool | None] = dict.fromkeys(self._passes, prediction_loss_only)
        if self.plateau is not None and self._trainer.is_in_train:
            passes.setdefault("fast", True)  # the plateau needs only its loss
        first: Any = None
        for which, loss_only in passes.items():
            sums = copy.deepcopy(vars(self._trainer).get("_metrics"))
            with self._placing(which):
                output = original(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
            if first is None:
                first = output
            elif sums is not None:
                self._trainer._metrics = sums  # TRL's trainers add up metrics there: keep those of the first pass
            prefix = f"{metric_key_prefix}_"
            metrics = {f"{prefix}{which}_{name.removeprefix(prefix)}": output.metrics[name] for name in output.metrics}
            first.metrics.update({name: metrics[name] for name in metrics if not name.endswith(_TIME)})
        return first

    def _log(self, original: Any, logs: dict[str, Any], *about: Any, **more: Any) -> None:
        """Log, and add the stage to training logs."""
        if "loss" in logs:
            history = self._trainer.state.log_history
            before = next((entry["stage"] for entry in reversed(history) if "stage" in entry), self._stage)
            logs |= {"stage": self._stage, "transition": self._stage - before}
        original(logs, *about, **more)

    def _get_train_dataloader(self, original: Any) -> Any:
        """Return the Trainer's batches, and keep them: the scheduler needs their number."""
        self._batches = original()
        return self._batches

    def _create_scheduler(
        self, original: Any, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create a schedule per stage, with the Trainer's warm-up and decay."""
        trainer = self._trainer
        if trainer.lr_scheduler is None:
            optimizer, args = _inner(optimizer or trainer.optimizer), trainer.args
            steps, warmup = self.steps, 0  # there are no steps if a plateau ends the stage
            if self.epochs is not None:
                updates = math.ceil(len(self._batches) / int(args.gradient_accumulation_steps))
                steps = self.epochs * max(1, updates)
            if args.lr_scheduler_type != "constant":
                warmup = args.get_warmup_steps(steps or 0)
            floor, decay = _SHAPES[args.lr_scheduler_type]
            trainer.lr_scheduler = StageSchedule(
                optimizer, self.cascade, steps, warmup=warmup, floor=floor, decay=decay
            )
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _save_model(self, original: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the user's model with the slow weights, or for a checkpoint the state dict of the cascade."""
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
        """Make a sentence-transformers trainer write state dicts of the cascade into checkpoints, as a Trainer does.

        It would write a model by `save_pretrained`, and would only log an error when it loads the best one.
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
                f"CascadeCallback: the Trainer's model is {type(model).__name__}, not the cascade of the callback. "
                "Give both the same cascade, and no model_init",
                code="trainer-not-supported",
            )

    def _check_arguments(self, args: Any) -> None:
        if args.n_gpu > 1:
            raise SpecError(
                f"CascadeCallback: the Trainer would copy the cascade to {args.n_gpu} devices at each step "
                "(DataParallel), and copies have no graphs. Start one process per device by torchrun, or make only one "
                "device visible",
                code="wrapper-not-supported",
            )
        if args.deepspeed:
            raise SpecError(
                f"CascadeCallback: deepspeed is {args.deepspeed!r}. It shards parameters, and transitions could not "
                "write them. Leave it out: started by torchrun, the Trainer uses DistributedDataParallel, and with "
                "fsdp=True it shards the cascade",
                code="trainer-not-supported",
            )
        if args.fsdp and args.fsdp_plugin_args is None:
            raise SpecError(
                f"CascadeCallback: fsdp_config is {args.fsdp_config!r}, which is for XLA. Leave out xla",
                code="trainer-not-supported",
            )
        if args.fsdp:
            _check_plugin(FullyShardedDataParallelPlugin(**args.fsdp_plugin_args))
        if self.schedule == "stage":
            self._check_schedule(args)
        for name in _CHANGE_MODEL:
            if getattr(args, name, None):
                raise SpecError(
                    f"CascadeCallback: {name} is {getattr(args, name)!r}. It changes the model, but not the captured "
                    "graphs. Leave it out",
                    code="trainer-not-supported",
                )

    def _check_schedule(self, args: Any) -> None:
        if args.lr_scheduler_type not in _SHAPES or args.lr_scheduler_kwargs:
            scheduler = f"{args.lr_scheduler_type.value} {args.lr_scheduler_kwargs or ''}".strip()
            raise SpecError(
                f"CascadeCallback: schedule is 'stage', but lr_scheduler_type is {scheduler}. Give one of "
                f"{', '.join(_SHAPES)}, or optimizers=(optimizer, lx.StageSchedule(...))",
                code="conflicting-options",
            )
        if self.plateau is not None and (_SHAPES[args.lr_scheduler_type][0] < 1 or 0 < args.warmup_steps < 1):
            raise SpecError(
                "CascadeCallback: schedule is 'stage', but with a plateau the length of a stage is not known. Give "
                "lr_scheduler_type 'constant' or 'constant_with_warmup', and warmup_steps as a number of steps",
                code="conflicting-options",
            )


@contextlib.contextmanager
def _naming_dense(model: Any) -> Iterator[None]:
    """Name the dense modules in the configuration of a model that bitsandbytes has quantized.

    Trained weights are dense in a saved model, but transformers would load all modules as quantized.
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
    """Replace TRL's forward with a fused head by one that uses the logits of the cascade.

    With `fused_lm_head=True` TRL's forward calls the backbone and the head separately, without branches.
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
    """Remove the hook of gradient checkpointing when it is turned off. transformers only adds one each time.

    TRL's trainers turn it off and on at each step, and other hooks would make the cascade capture a new graph.
    """
    model: Any = cascade.model
    if not hasattr(model, "disable_input_require_grads"):
        return

    def gradient_checkpointing_disable() -> None:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()

    vars(cascade)["gradient_checkpointing_disable"] = gradient_checkpointing_disable


class _Reference(torch.nn.Module):
    """The cascade with its reference weights."""

    def __init__(self, callback: CascadeCallback) -> None:
        super().__init__()
        self.config = callback.cascade.config
        self._callback = callback

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the cascade with the reference weights in place."""
        with self._callback._placing(self._callback._compared):
            return self._callback.cascade(*args, **kwargs)


def _check_plugin(plugin: Any) -> None:
    """Refuse options of accelerate's FSDP plugin that sharding a cascade does not support.

    `auto_wrap_policy` has no effect, because blocks come from the graph, and neither has `state_dict_type`.
    """
    for name, (followed, why) in _FOLLOWED.items():
        value = getattr(plugin, name)
        value = isinstance(value, CPUOffloadPolicy) if isinstance(value, OffloadPolicy) else value
        if value != followed:
            raise SpecError(
                f"CascadeCallback: {name} of fsdp_config is {value!r}, but {why}. Give {followed!r}",
                code="trainer-not-supported",
            )


def _drop_plugin(trainer: Any) -> None:
    """Create the Trainer's accelerator again without its FSDP plugin, which would shard the model a second time."""
    args = trainer.args
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # the first accelerator has set it, and it asks for a plugin
    vars(args).pop("_setup_devices", None)  # so that the next line resets accelerate's state
    assert args.device is not None
    options, args.fsdp_plugin_args = args.fsdp_plugin_args, None
    try:
        trainer.create_accelerator_and_postprocess()
    finally:
        args.fsdp_plugin_args = options  # for another Trainer


def _inner(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _gathered(model: torch.nn.Module, holds: bool) -> dict[str, torch.Tensor]:
    """Return the model's state dict with full tensors in host memory; {} unless this process `holds` it.

    Every rank must call this at the same point. Tied names share one tensor.
    """
    tensors: dict[int, torch.Tensor] = {}
    named = model.state_dict(keep_vars=True)
    for value in named.values():
        if id(value) not in tensors:
            whole = full_tensor(value).detach()
            tensors[id(value)] = whole.cpu() if holds else torch.empty(0)
    return {name: tensors[id(value)] for name, value in named.items()} if holds else {}


def _calling_trainer() -> tuple[Any, dict[str, Any]]:
    """Return the Trainer that has called the callback, and the arguments of its constructor.

    A callback does not get the Trainer as an argument, so it is found on the call stack.
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
        "CascadeCallback: on_init_end was not called by a Trainer, and the callback works only in one",
        code="trainer-not-supported",
    )
