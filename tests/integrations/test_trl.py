"""A cascade in TRL's trainers: beside peft in the same trainer, evaluated by its slow weights, saved and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lorasc_fx as lx
from tests.integrations.kit import WORDS, llama, losses, tokenizer
from tests.kit.errors import raises
from tests.kit.models import take_start
from tests.kit.state import branches_of, variant_count

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dataset(count: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(0, 37, (5 + number % 4,), generator=generator).tolist() for number in range(count)]
    return Dataset.from_list([{"text": " ".join(WORDS[word] for word in row)} for row in chosen])


def sentence(generator: torch.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in torch.randint(0, 37, (count,), generator=generator).tolist())


def preferences(count: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows = range(count)
    return Dataset.from_list(
        [
            {
                "prompt": sentence(generator, 3),
                "chosen": f" {sentence(generator, 3 + row % 2)}",
                "rejected": f" {sentence(generator, 2 + row % 3)}",
            }
            for row in rows
        ]
    )


PLAIN = {
    "per_device_train_batch_size": 4, "learning_rate": 0.01, "num_train_epochs": 2, "use_cpu": True, "bf16": False,
    "report_to": [], "gradient_checkpointing": False, "logging_steps": 1, "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}  # fmt: skip


def trainer_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    plain = {**PLAIN, "max_length": 24, "save_strategy": "epoch", "eval_strategy": "epoch"}
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(output_dir=str(folder), **{**plain, **more}), train_dataset=dataset(16),
        eval_dataset=dataset(4), processing_class=tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def dpo_of(model: Any, folder: Path, *callbacks: Any, ref_model: Any = None, **more: Any) -> Any:
    plain = {**PLAIN, "max_length": 24, "save_strategy": "no"}
    return trl.DPOTrainer(
        model=model, ref_model=ref_model, args=trl.DPOConfig(output_dir=str(folder), **{**plain, **more}),
        train_dataset=preferences(8), eval_dataset=preferences(4), processing_class=tokenizer(),
        callbacks=list(callbacks),
    )  # fmt: skip


def grpo_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    """Rewards are for words of the first half of the vocabulary."""
    plain = {**PLAIN, "num_generations": 4, "max_completion_length": 6, "save_strategy": "no"}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()) & set(WORDS[:18]))) for text in completions]

    return trl.GRPOTrainer(
        model=model, args=trl.GRPOConfig(output_dir=str(folder), **{**plain, **more}), reward_funcs=reward,
        train_dataset=preferences(4).select_columns("prompt"), eval_dataset=preferences(4).select_columns("prompt"),
        processing_class=tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def logged(trainer: Any, *names: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names]


def adapted(spec: lx.CascadeSpec, model: Any = None, checkpointing: bool = False) -> lx.Cascade:
    model = llama().float() if model is None else model
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    return lx.adapt(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spec=spec)


TARGETS = tuple(f"*.{name}.weight" for name in LAYERS)
LORA = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0, targets=TARGETS)
NOISY = lx.CascadeSpec(rank=2, lora_alpha=6.0, targets=TARGETS, noise=lx.Noise(0.3))


def of_peft(cascade: lx.Cascade, model: Any = None) -> Any:
    """A model of peft in fp32 or in the dtype of the base, that starts with the cascade's lora_A."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(LAYERS), lora_dropout=0.0)
    theirs = get_peft_model(llama().float() if model is None else model, config, autocast_adapter_dtype=False)
    take_start(cascade, theirs.base_model.model)
    return theirs


def callback_of(cascade: lx.Cascade, **how: Any) -> Any:
    return lx.integrations.transformers.CascadeCallback(cascade, **how)


BY_TRAINER = {
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize(("checkpointing", "packing"), [("before adapt", False), ("reentrant", True)])
def test_the_losses_are_those_of_peft(checkpointing: str, packing: bool, tmp_path: Path) -> None:
    """One stage at pace 1, in the same trainer, whose fused head computes the loss of the peft model."""
    cascade = adapted(LORA, checkpointing=checkpointing == "before adapt")
    more = {"packing": packing, **BY_TRAINER.get(checkpointing, {})}
    ours = trainer_of(cascade, tmp_path / "ours", callback_of(cascade, epochs=9), **more)
    theirs = trainer_of(of_peft(cascade), tmp_path / "theirs", **more)
    for trainer in (ours, theirs):
        torch.manual_seed(2)
        trainer.train()
    assert cascade.model.is_gradient_checkpointing
    assert losses(theirs)[-1] < losses(theirs)[0] - 0.02
    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-5)
    for name in ("entropy", "mean_token_accuracy", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=2e-3), name


def test_a_configuration_of_peft_belongs_to_adapt(tmp_path: Path) -> None:
    """With `peft_config`, TRL would train a PeftModel around the cascade."""
    cascade, config = adapted(LORA), LoraConfig(r=2, target_modules=list(LAYERS))
    usual = {"train_dataset": dataset(4), "processing_class": tokenizer(), "callbacks": [callback_of(cascade)]}
    with raises(lx.StateError, "trainer-not-supported", "PeftModel"):
        trl.SFTTrainer(cascade, trl.SFTConfig(output_dir=str(tmp_path), **PLAIN), **usual, peft_config=config)


def test_stages_evaluation_and_the_saved_model(tmp_path: Path) -> None:
    cascade = adapted(lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
    trainer = trainer_of(cascade, tmp_path, callback_of(cascade))
    trainer.train()
    assert cascade.stage == 3
    trainer.save_model(str(tmp_path / "final"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    state = cascade.folded_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(4)])
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    alone = trainer.state.log_history[-1]
    both = trainer_of(cascade, tmp_path / "both", callback_of(cascade, evaluate=("slow", "fast")))
    with torch.no_grad():
        for branch in branches_of(cascade).values():
            branch.lora_B.normal_()
    both.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):  # which TRL sums by itself
        assert both.state.log_history[-1][name] == pytest.approx(alone[name], abs=1e-6), name
    assert both.state.log_history[-1]["eval_fast_loss"] > loss + 0.1

    resumed = adapted(lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
    again = trainer_of(resumed, tmp_path, callback_of(resumed))
    (checkpoint,) = (path for path in tmp_path.iterdir() if path.name == "checkpoint-4")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(trainer)
    assert all(torch.equal(value, state[name]) for name, value in resumed.folded_state_dict().items())


# ---- preferences: DPO, with every kind of reference model


@pytest.mark.parametrize(
    ("reference", "checkpointing"), [("own", "not reentrant"), ("left out", "none"), ("computed before", "none")]
)
def test_dpo_is_that_of_peft(reference: str, checkpointing: str, tmp_path: Path) -> None:
    """peft compares with its base by `disable_adapter`; so does a cascade, without a second model."""
    llama().float().save_pretrained(tmp_path / "base")  # which TRL reads where no reference is given

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    cascade = adapted(LORA, base())
    callback, more = callback_of(cascade, epochs=9, evaluate="fast"), BY_TRAINER.get(checkpointing, {})
    more = {**more, "precompute_ref_log_probs": reference == "computed before"}
    ref_model = callback.reference if reference == "own" else None
    theirs = dpo_of(of_peft(cascade, base()), tmp_path / "theirs", **more)
    ours = dpo_of(cascade, tmp_path / "ours", callback, ref_model=ref_model, **more)
    for trainer in (ours, theirs):
        torch.manual_seed(2)
        trainer.train()
    names = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")
    assert max(logged(theirs, "rewards/margins")) > 0.01
    assert logged(ours, *names) == pytest.approx(logged(theirs, *names), abs=2e-5)
    for name in ("eval_loss", "eval_rewards/margins"):
        assert ours.evaluate()[name] == pytest.approx(theirs.evaluate()[name], abs=2e-5)
    expected = None if reference == "computed before" else callback.reference
    assert ours.ref_model is expected
    assert variant_count(cascade) <= 2  # also where checkpointing goes off and on at each step


def test_the_reference_of_dpo_is_the_base(tmp_path: Path) -> None:
    """In all stages, compared with a plain model as reference."""

    logs = {}
    for reference in ("own", "plain"):
        cascade, plain = adapted(NOISY), llama().float()
        callback = callback_of(cascade)
        ref_model = callback.reference if reference == "own" else plain
        trainer = dpo_of(cascade, tmp_path / reference, callback, ref_model=ref_model)
        trainer.train()
        assert cascade.stage == 3
        logs[reference] = [*logged(trainer, "loss", "rewards/margins"), trainer.evaluate()["eval_loss"]]
    assert logs["own"] == pytest.approx(logs["plain"], abs=1e-5)


# ---- GRPO


def test_grpo_is_that_of_peft(tmp_path: Path) -> None:
    """In fp64, so that both sample the same completions; the KL term is to the base."""
    llama().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)

    cascade, more = adapted(LORA, base()), {**BY_TRAINER["not reentrant"], "beta": 0.5}
    theirs = grpo_of(of_peft(cascade, base()), tmp_path / "theirs", **more)
    ours = grpo_of(cascade, tmp_path / "ours", callback_of(cascade, epochs=9, evaluate="fast"), **more)
    for trainer in (ours, theirs):
        torch.manual_seed(2)
        trainer.train()
    names = ("loss", "reward", "grad_norm", "entropy", "kl")
    assert len(set(logged(theirs, "grad_norm"))) > 4
    assert logged(ours, *names) == pytest.approx(logged(theirs, *names), abs=1e-6)
    evaluated = []
    for trainer in (ours, theirs):
        torch.manual_seed(3)
        evaluated.append(trainer.evaluate()["eval_reward"])
    assert evaluated[0] == evaluated[1]
    assert variant_count(cascade) <= 2
