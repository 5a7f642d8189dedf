"""Trainers that sample from the model being trained: what samples is what trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.generation import ContinuousBatchingConfig

import lorasc_fx as lx
from tests.integrations.kit import WORDS, llama, tokenizer
from tests.integrations.test_trl import LORA, NOISY, PLAIN, adapted, callback_of, grpo_of, logged, of_peft, preferences
from tests.kit.errors import raises

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental import online_dpo  # it warns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STAGED = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=0.5, targets=NOISY.targets, noise=lx.Noise(0.3))


def online_dpo_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    plain = {**PLAIN, "max_new_tokens": 6, "max_length": 24, "save_strategy": "no", "missing_eos_penalty": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(each.split()) & set(WORDS[:18]))) for each in completions]

    return online_dpo.OnlineDPOTrainer(
        model=model, args=online_dpo.OnlineDPOConfig(output_dir=str(folder), **{**plain, **more}), reward_funcs=reward,
        train_dataset=preferences(8).select_columns("prompt"), processing_class=tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("batched", [False, True])
def test_transformers_samples_from_the_fast_weights(batched: bool, tmp_path: Path) -> None:
    cascade = adapted(STAGED, llama().float())
    name, calls = "generate_batch" if batched else "generate", []
    original = getattr(cascade.model, name)

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(cascade._run.placed)
        return original(*args, **kwargs)

    setattr(cascade.model, name, generate)
    trainer = grpo_of(cascade, tmp_path, callback_of(cascade, steps=3), use_transformers_continuous_batching=batched)
    trainer.continuous_batching_config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    trainer.train()
    assert len(calls) >= 4
    assert set(calls) == {"fast"}


def test_online_dpo_is_that_of_peft(tmp_path: Path) -> None:
    cascade = adapted(LORA, llama())
    theirs = online_dpo_of(of_peft(cascade, llama()), tmp_path / "theirs")
    ours = online_dpo_of(cascade, tmp_path / "ours", callback_of(cascade, epochs=9))
    for trainer in (theirs, ours):
        torch.manual_seed(2)
        trainer.train()
    names = ("loss", "grad_norm", "rewards/margins")
    assert logged(ours, *names) == pytest.approx(logged(theirs, *names), abs=1e-6)


def test_trainers_that_would_sample_from_other_weights_are_refused(tmp_path: Path) -> None:
    cascade = adapted(STAGED)
    for name, value in (("use_vllm", True), ("vllm_server_base_url", "http://localhost:8000")):  # as for AsyncGRPO
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        setattr(arguments, name, value)
        with raises(lx.SpecError, "trainer-not-supported", "use_vllm=False"):
            Trainer(model=cascade, args=arguments, callbacks=[callback_of(cascade)])
