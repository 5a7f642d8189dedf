"""A callback for transformers' Trainer. The cascade itself is the Trainer's model.

The Trainer calls its callbacks after a step, an epoch and an evaluation, but not before it evaluates or saves. So the
callback also wraps `evaluation_loop`, `save_model` and a few more methods of the Trainer instance.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from lorasc_fx.cascade import run_of, transition
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.facade import Cascade
from lorasc_fx.quantized import QuantizedLinear, library_of
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.environment import require

require("loops", "transformers", "accelerate")

from transformers import Trainer, TrainerCallback  # noqa: E402 - after the message on how to install it
from transformers.trainer_utils import has_length  # noqa: E402
from transformers.utils.generic import find_labels  # noqa: E402

__all__ = ["CascadeCallback"]

Evaluated = Literal["slow", "fast"]

_TIME = "_model_preparation_time"
"""Suffix of an entry in `output.metrics` that is a duration and not a metric of the weights."""

_MODEL_CHANGES = (
    *("neftune_noise_alpha", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval"),
    *("cast_lm_head_to_fp32", "sync_ref_model"),
)
"""Training arguments that change the model's code, dtype or weights. Captured graphs would not see the change."""


class CascadeCallback(TrainerCallback):  # type: ignore[misc]
    """Ends the stages of a cascade in a Trainer: after the optimizer step, before the next forward.

    Pass the Trainer the cascade and this callback: `Trainer(model=cascade, callbacks=[CascadeCallback(cascade)], ...)`.
    `trainer.save_model(folder)` writes the user's model with the slow weights, in the layout of the model's library.
    Each `checkpoint-N` holds the state of the cascade, without W0. To resume, adapt the same weights with the same spec
    and call `trainer.train(resume_from_checkpoint=...)`. If a stage is still running when the training ends, it is
    folded, except after `load_best_model_at_end` by slow weights: then the model has the best slow weights.

    Training logs (also for W&B and TensorBoard) have the stage of the step as `stage`. For weights in half precision,
    rounding loses a part of each weight's change in a fold. `kept` is the smallest share that the last fold has kept.
    Evaluations also report each metric with the name of the evaluated weights: `eval_slow_loss` and `eval_fast_loss`.

    Args:
        cascade: the Trainer's model.
        stages: number of stages. The steps of the training are divided evenly among them.
        epochs: epochs per stage. The default is 1, as in the paper, unless `stages` or `steps` is given.
        steps: optimizer steps per stage.
        evaluate: the weights for evaluations and predictions: `slow`, `fast`, or both, such as `("slow", "fast")`. Both
            are evaluated in separate passes, and the first pass gives the predictions and `eval_loss`. The default is
            `slow`, or `fast` in a training of one stage, in which the slow weights do not change before the end.

    Raises:
        SpecError: several of `stages`, `epochs` and `steps` are given, one of them is below 1, or a cascade does not
            support a training argument.
        StateError: the Trainer has another model, or the callback was added after the Trainer was constructed.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        stages: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        evaluate: Evaluated | Sequence[Evaluated] | None = None,
    ) -> None:
        rules = {"stages": stages, "epochs": epochs, "steps": steps}
        chosen = [name for name, value in rules.items() if value is not None]
        if len(chosen) > 1:
            raise SpecError(
                f"CascadeCallback: {' and '.join(chosen)} cannot be combined, because each decides when a stage ends. "
                "Give only one",
                code="conflicting-options",
            )
        for name in chosen:
            if not is_integer(rules[name], 1):
                raise SpecError(f"CascadeCallback: {name} is {rules[name]!r}. Give a whole number of 1 or more")
        self._requested = () if evaluate is None else (evaluate,) if isinstance(evaluate, str) else tuple(evaluate)
        self._evaluated = self._requested if evaluate is not None else ("slow",)
        if not self._evaluated or not {*self._evaluated} <= {*get_args(Evaluated)}:
            raise SpecError(f"CascadeCallback: evaluate is {evaluate!r}. Give slow, fast, or a tuple of both")
        run_of(cascade).check_alive("CascadeCallback")
        self.cascade = cascade
        self.epochs, self.steps, self.stages = epochs if chosen else 1, steps, stages
        self._last_steps: set[int] = set()
        self._view: str | None = None
        self._placed: contextlib.AbstractContextManager[object] | None = None
        self._trainer: Any = None
        self._stage = cascade.stage
        self.reference: torch.nn.Module = _Reference(self)
        """The reference model of a preference training: the base model, without a copy of W0. Pass it as
        `DPOTrainer(model=cascade, ref_model=callback.reference, ...)`, unless you compare with another model."""
        self._user_reference = False  # whether the user has given another reference model
        vars(cascade)["_get_name"] = cascade.model._get_name  # the Trainer shifts labels for some model names
        vars(cascade)["_hf_peft_config_loaded"] = True  # without it, a Trainer refuses to train a quantized model

    # ---- events of the Trainer

    def on_init_end(self, args: Any, state: object, control: object, **kwargs: object) -> None:
        """Check the Trainer's arguments, and wrap its methods."""
        self._check_model(kwargs["model"])
        self._trainer, arguments = _calling_trainer()
        self._check_arguments(args)
        trainer = self._trainer
        if args.label_names is None:
            # The Trainer has looked for labels in the class Cascade, but they depend on the class of the user's model.
            trainer.label_names = find_labels(type(self.cascade.model))
        reference = arguments.get("ref_model")
        self._user_reference = reference is not None and reference is not self.reference
        self._save_state_dicts(trainer)
        for name in ("evaluation_loop", "log", "train", "save_model", "compute_ref_log_probs"):
            if hasattr(trainer, name):
                setattr(trainer, name, functools.partial(getattr(self, f"_{name}"), getattr(trainer, name)))

    def on_train_begin(self, args: object, state: Any, control: object, **kwargs: Any) -> None:
        """Check the rule that ends stages, and start the training loop of the cascade."""
        self._check_model(kwargs["model"])
        if self._trainer is None:
            raise StateError(
                "CascadeCallback: the callback was added after the Trainer was constructed. Pass it to the "
                "constructor: Trainer(..., callbacks=[callback])",
                code="trainer-not-supported",
            )
        if self.epochs is not None and not has_length(kwargs["train_dataloader"]):
            raise SpecError(
                f"CascadeCallback: epochs is {self.epochs}, but the dataset has no length. Give steps=... to count "
                "optimizer steps instead",
                code="invalid-data",
            )
        if self.stages is not None:
            if not self.stages <= state.max_steps:
                raise SpecError(
                    f"stages is {self.stages}, but the training has {state.max_steps} optimizer steps. Give fewer"
                )
            self._last_steps = {round(stage * state.max_steps / self.stages) for stage in range(1, self.stages + 1)}
        # The shares of the training that one stage takes. With one stage, the slow weights are the base until it ends.
        shares = (self.steps or 0) / state.max_steps, (self.epochs or 0) / state.num_train_epochs, self.stages == 1
        self._evaluated = self._requested or ("fast" if max(shares) >= 1 else "slow",)
        run = run_of(self.cascade)
        run.begin_loop([kwargs["optimizer"]], "CascadeCallback")
        transition.end_idle(run)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the stage of this step for the logs."""
        self._stage = self.cascade.stage

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: Any) -> None:
        """End the stage after its last step. An evaluation or a checkpoint of this step follows later."""
        epoch_ends = state.epoch is not None and state.epoch == int(state.epoch)
        if (
            state.global_step in self._last_steps
            or (self.steps is not None and state.global_step % self.steps == 0)
            or (self.epochs is not None and epoch_ends and int(state.epoch) % self.epochs == 0)
        ):
            self.cascade.transition(kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fold the stage that is still running, or restart it if the best model was chosen by its slow weights."""
        run, optimizers = run_of(self.cascade), [kwargs["optimizer"]]
        if not transition.has_begun(run):
            return
        metric = f"_{args.metric_for_best_model}"
        best = next((view for view in get_args(Evaluated) if f"_{view}_" in metric), self._evaluated[0])
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and best == "slow":
            with run.lock:
                transition.restart(run, optimizers)  # the branches of the stage were not evaluated
        else:
            transition.next_stage(run, optimizers, idle=True)

    # ---- wrappers of the Trainer's methods

    def _replace_references(self) -> None:
        """Replace the user's model by the cascade in objects that a subclass of Trainer has created from it.

        TRL's trainers patch forward and may copy the base as a reference model. In sentence-transformers, the losses
        hold the model.
        """
        trainer = self._trainer
        losses = getattr(trainer, "loss", None)
        for loss in losses.values() if isinstance(losses, dict) else [losses]:
            if isinstance(loss, torch.nn.Module):
                self._replace_model_in(loss)
        _replace_fused_head(self.cascade)
        _remove_hook_on_disable(self.cascade)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None and not self._user_reference:
            vars(self.reference).pop("forward", None)  # TRL may have patched it
            trainer.ref_model = self.reference

    def _replace_model_in(self, module: torch.nn.Module) -> None:
        """Replace the user's model by the cascade in this module and its submodules."""
        for name, child in list(module.named_children()):
            if child is self.cascade.model:
                setattr(module, name, self.cascade)
            elif child is not self.cascade:
                self._replace_model_in(child)

    def _compute_ref_log_probs(self, original: Any, model: Any, inputs: Any) -> Any:
        """Compute the log-probabilities of the reference. Without a reference model, TRL passes the trained model."""
        self._replace_references()
        with self._placing("base") if model is self.cascade else contextlib.nullcontext():
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
        """Evaluate once for each of the requested weights, and return the output of the first pass.

        The metrics of every pass are added to this output, under names such as `eval_fast_loss`.
        """
        self._replace_references()
        result: Any = None
        for view in self._evaluated:
            sums = copy.deepcopy(vars(self._trainer).get("_metrics"))
            with self._placing(view):
                output = original(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            if result is None:
                result = output
            elif sums is not None:
                # TRL's trainers collect the metrics of all batches here. Remove the metrics of the second pass, or the
                # batches would count twice.
                self._trainer._metrics = sums
            prefix = f"{metric_key_prefix}_"
            metrics = {f"{prefix}{view}_{name.removeprefix(prefix)}": output.metrics[name] for name in output.metrics}
            result.metrics.update({name: metrics[name] for name in metrics if not name.endswith(_TIME)})
        return result

    def _log(self, original: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the entries `stage` and `kept` to training logs, and log."""
        if "loss" in logs:
            logs["stage"] = self._stage
            if kept := run_of(self.cascade).kept:
                logs["kept"] = round(min(share for share, _ in kept.values()), 4)
        original(logs, *args, **kwargs)

    def _save_model(self, original: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the user's model with the slow weights. For a checkpoint, write the state dict of the cascade."""
        if _internal_call:  # the Trainer saves a checkpoint
            original(output_dir, _internal_call=True)
            return
        with self._placing("slow"), _skipping_dense(self.cascade.model):
            self._trainer.model = self.cascade.model
            try:
                original(output_dir)
            finally:
                self._trainer.model = self.cascade

    def _save_state_dicts(self, trainer: Any) -> None:
        """Make a sentence-transformers trainer save the cascade's state dict in checkpoints, as a plain Trainer does.

        By default, it would save a model by `save_pretrained`. Loading the best checkpoint would then only log an
        error.
        """
        if type(trainer)._save.__module__ != "sentence_transformers.base.trainer":
            return
        original = trainer._save

        def save(*args: object) -> None:
            """Write a checkpoint's state dict, or the user's model."""
            (functools.partial(Trainer._save, trainer) if trainer.model is self.cascade else original)(*args)

        trainer._save = save
        trainer._load_from_checkpoint = functools.partial(Trainer._load_from_checkpoint, trainer)
        trainer._load_best_model = functools.partial(Trainer._load_best_model, trainer)

    @contextlib.contextmanager
    def _placing(self, view: str) -> Iterator[None]:
        """Place weights in the model inside the block, and restore the previous ones afterwards."""
        previous = self._view
        if previous is None and view != "base" and run_of(self.cascade).placed is not None:
            yield  # keep the user's own `weights(...)`
            return
        self._place(view)
        try:
            yield
        finally:
            self._place(previous)

    def _place(self, view: str | None) -> None:
        """Replace the weights that this callback has placed in the model. With None, the trained weights return."""
        previous, self._placed, self._view = self._placed, None, None
        if previous is not None:
            previous.__exit__(None, None, None)
        if view is not None:
            placed = self.cascade.weights(view)
            placed.__enter__()
            self._placed, self._view = placed, view

    def _check_model(self, model: object) -> None:
        if model is not self.cascade:
            raise StateError(
                f"CascadeCallback: the Trainer's model is a {type(model).__name__}, not the callback's cascade. "
                "Pass the same cascade to both, without model_init",
                code="trainer-not-supported",
            )

    def _check_arguments(self, args: Any) -> None:
        if args.n_gpu > 1:
            raise SpecError(
                f"CascadeCallback: the Trainer would copy the cascade to {args.n_gpu} devices at each step "
                "(DataParallel), and copies have no graphs. Start one process per device with torchrun, or set "
                "CUDA_VISIBLE_DEVICES to one device",
                code="wrapper-not-supported",
            )
        is_sharded = run_of(self.cascade).is_sharded or getattr(self._trainer, "is_fsdp_enabled", False)
        if args.fsdp or args.deepspeed or is_sharded:
            raise SpecError(
                "CascadeCallback: a Trainer cannot train a sharded cascade, because transitions write whole weights. "
                "Remove fsdp and deepspeed: with torchrun, the Trainer uses DistributedDataParallel. To train shards, "
                "call lorasc_fx.parallel.fsdp.shard in your own training loop, with or without accelerate",
                code="trainer-not-supported",
            )
        for name in _MODEL_CHANGES:
            if getattr(args, name, None):
                raise SpecError(
                    f"CascadeCallback: {name} is {getattr(args, name)!r}, which is not supported: it changes the "
                    "model, but not the captured graphs. Remove it from the training arguments",
                    code="trainer-not-supported",
                )
        if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):
            raise SpecError(
                f"CascadeCallback: {type(self._trainer).__name__} would send weights without the branches to vLLM, and "
                "sample from them. Set use_vllm=False, so that transformers generates",
                code="trainer-not-supported",
            )


@contextlib.contextmanager
def _skipping_dense(model: Any) -> Iterator[None]:
    """List the dense modules as `llm_int8_skip_modules` in the quantization config of a bitsandbytes model.

    Trained weights are dense in a saved model, but transformers would load all modules as quantized.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(config, "quant_method", None) != "bitsandbytes":
        yield
        return
    previous = config.llm_int8_skip_modules
    config.llm_int8_skip_modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and library_of(module) is None
        and not (isinstance(module, QuantizedLinear) and module.holds_layer)
    ]
    try:
        yield
    finally:
        config.llm_int8_skip_modules = previous


def _replace_fused_head(cascade: Cascade) -> None:
    """Replace the forward that TRL has patched into the cascade, by one that uses the logits of the cascade.

    With `fused_lm_head=True`, TRL's forward calls the backbone and the head separately, which skips the branches.
    """
    fused: Any = getattr(vars(cascade).get("forward"), "__func__", None)
    if getattr(fused, "__globals__", {}).get("__name__") != "trl.trainer.utils":
        return
    output = fused.__globals__["FusedCausalLMOutput"]
    temperature = inspect.getclosurevars(fused).nonlocals["temperature"]

    def forward(
        *args: object,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: object = None,
        **kwargs: object,
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
        # The formulas of TRL's fused kernel. Positions with the label -100 are zero in every output.
        mask, label = shift_labels != -100, shift_labels.clamp(min=0)
        all_log_probs = logits.log_softmax(-1)  # [batch, tokens, vocabulary]
        log_probs = all_log_probs.gather(-1, label[..., None])[..., 0].masked_fill(~mask, 0)
        with torch.no_grad():
            metrics = {
                "entropy": -(all_log_probs.exp() * all_log_probs).sum(-1),
                "log_sum_sq_probs": (2 * all_log_probs).logsumexp(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": all_log_probs.argmax(-1) == label,
            }
            metrics = {name: value.masked_fill(~mask, 0) for name, value in metrics.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return output(loss=-log_probs.sum() / count, log_probs=log_probs, label_mask=mask, **metrics)

    vars(cascade)["forward"] = forward


def _remove_hook_on_disable(cascade: Cascade) -> None:
    """Make `gradient_checkpointing_disable` remove the hook on the input embedding.

    transformers adds a hook at each `enable` and never removes it. TRL's trainers disable and enable at each step, and
    each new hook would make the cascade capture a new graph.
    """
    model: Any = cascade.model
    if not hasattr(model, "disable_input_require_grads"):
        return

    def gradient_checkpointing_disable() -> None:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()

    vars(cascade)["gradient_checkpointing_disable"] = gradient_checkpointing_disable


class _Reference(torch.nn.Module):
    """A model that calls the cascade with the base weights W0."""

    def __init__(self, callback: CascadeCallback) -> None:
        super().__init__()
        self._callback = callback

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self._callback.cascade.config

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Call the cascade while the weights of the base are placed in the model."""
        with self._callback._placing("base"):
            return self._callback.cascade(*args, **kwargs)


def _calling_trainer() -> tuple[Any, dict[str, Any]]:
    """Return the Trainer that has called the callback, or None, and {name: value} of the variables in its constructors.

    A callback does not get the Trainer as an argument, so the Trainer is found on the call stack. The variables include
    the arguments of `__init__`, also of subclasses.
    """
    frame, trainer, arguments = inspect.currentframe(), None, dict[str, Any]()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and (trainer is None or caller is trainer):
            trainer = caller
            arguments |= frame.f_locals if frame.f_code.co_name == "__init__" else {}
        frame = frame.f_back
    return trainer, arguments
