"""Trainers that sample from the model being trained: what samples is what trains.

vLLM itself is not installed. `Engine` stands for it: it holds its own copy of the base, takes the tensors that the
installed TRL sends, and compares them with the fast weights whenever it samples.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments
from transformers.generation import ContinuousBatchingConfig
from trl.generation import vllm_generation

import lorasc_fx as lx
from tests.integrations.kit import WORDS, llama, tokenizer
from tests.integrations.test_trl import LORA, NOISY, PLAIN, adapted, callback_of, grpo_of, logged, of_peft, preferences
from tests.kit.errors import raises

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental import online_dpo  # it warns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STAGED = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=0.5, targets=NOISY.targets, noise=lx.Noise(0.3))


class Engine:
    """A stand-in for a vLLM engine or server. `cascade` is the cascade that is trained, set by the test."""

    cascade: Any = None
    samples = 0

    def __init__(self, model: Any = None, **_: Any) -> None:
        base = model if isinstance(model, str) else Engine.cascade.name_or_path
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load_weights))
        worker = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in weights:
            parameters[name].data.copy_(value)

    def sample(self, prompts: list[Any], count: int, length: int) -> tuple[list[Any], list[Any]]:
        """Return the prompts as ids, and `count` completions of each. Fails if the weights are not the trained ones."""
        cascade = Engine.cascade
        if cascade._run.placed is None:
            with cascade.weights("fast"):
                self.compare(cascade.model)
        else:
            self.compare(cascade.model)
        Engine.samples += 1
        ids = [tokenizer()(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
        found = []
        for row in ids:
            inputs = torch.tensor([row] * count)
            config = GenerationConfig(max_new_tokens=length, do_sample=True, eos_token_id=1, pad_token_id=0)
            outputs = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
            found += [each[len(row) :].tolist() for each in outputs]
        return ids, found

    def compare(self, trained: Any) -> None:
        for (name, value), current in zip(self.model.named_parameters(), trained.parameters(), strict=True):
            assert torch.equal(value, current), name

    def generate(self, prompts: Any, sampling_params: Any = None, **more: Any) -> Any:
        """Both the method of an engine in this process and the one of a client of a server."""
        if sampling_params is None:
            ids, found = self.sample(prompts, more["n"], more["max_tokens"])
            return {"prompt_ids": ids, "completion_ids": found, "logprobs": [[[-1.0]] * len(row) for row in found]}
        prompts = [each["prompt_token_ids"] if isinstance(each, dict) else each for each in prompts]
        ids, found = self.sample(prompts, sampling_params.n, sampling_params.max_tokens)
        token = types.SimpleNamespace(rank=1, logprob=-1.0)
        outputs = [types.SimpleNamespace(token_ids=row, logprobs=[{each: token} for each in row]) for row in found]
        count = sampling_params.n
        return [
            types.SimpleNamespace(prompt_token_ids=row, outputs=outputs[index * count : (index + 1) * count])
            for index, row in enumerate(ids)
        ]

    def update_named_params(self, metadata: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        received = list(weights)
        facts = [(name, str(value.dtype).removeprefix("torch."), [*value.shape]) for name, value in received]
        assert facts == metadata
        self.load_weights(received)

    def update_named_param(self, name: str, value: torch.Tensor) -> None:
        self.load_weights([(name, value)])

    def weight_update(self) -> AbstractContextManager[None]:
        return nullcontext()

    def get_server_info(self) -> Any:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self) -> None: ...

    def init_communicator(self, device: Any) -> None: ...


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let TRL find the stand-in where it looks for vLLM."""
    for module in (vllm_generation, online_dpo.online_dpo_trainer):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
        for name, value in (("LLM", Engine), ("VLLMClient", Engine), ("SamplingParams", types.SimpleNamespace)):
            monkeypatch.setattr(module, name, value, raising=False)
    found = types.ModuleType("torch")  # this trainer asks torch for an accelerator
    vars(found).update(vars(torch), accelerator=types.SimpleNamespace(current_accelerator=lambda: torch.device("cpu")))
    monkeypatch.setattr(online_dpo.online_dpo_trainer, "torch", found)
    monkeypatch.setattr(Engine, "samples", 0)
    with mock.patch.dict(os.environ):  # TRL sets RANK and WORLD_SIZE
        yield


def online_dpo_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    plain = {**PLAIN, "max_new_tokens": 6, "max_length": 24, "save_strategy": "no", "missing_eos_penalty": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(each.split()) & set(WORDS[:18]))) for each in completions]

    return online_dpo.OnlineDPOTrainer(
        model=model, args=online_dpo.OnlineDPOConfig(output_dir=str(folder), **{**plain, **more}), reward_funcs=reward,
        train_dataset=preferences(8).select_columns("prompt"), processing_class=tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


TRAINERS = {"grpo": grpo_of, "online dpo": online_dpo_of}


def cascade_of(spec: lx.CascadeSpec, folder: Path) -> Any:
    """A cascade whose model was read from a folder, as vLLM reads its base."""
    llama().float().save_pretrained(folder / "base")
    Engine.cascade = adapted(spec, AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32))
    return Engine.cascade


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_vllm_samples_from_the_fast_weights(kind: str, mode: str, vllm: None, tmp_path: Path) -> None:
    """At each sample, in two stages with noise. The engine fails otherwise."""
    cascade = cascade_of(STAGED, tmp_path)
    trainer = TRAINERS[kind](
        cascade, tmp_path, callback_of(cascade, steps=3), use_vllm=True, vllm_mode=mode, learning_rate=0.1
    )
    trainer.train()
    assert cascade.stage > 2
    assert Engine.samples >= trainer.state.global_step >= 4


def test_an_evaluation_between_two_steps_leaves_vllm_with_the_trained_weights(vllm: None, tmp_path: Path) -> None:
    """TRL sends weights once per step. An evaluation has other weights than the training of the same step."""
    cascade = cascade_of(STAGED, tmp_path)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    callback = callback_of(cascade, steps=3, evaluate=("slow", "fast"))
    trainer = grpo_of(cascade, tmp_path, callback, use_vllm=True, vllm_mode="colocate", learning_rate=0.1, **evaluated)
    trainer.train()
    assert Engine.samples >= 3 * trainer.state.global_step


@pytest.mark.parametrize("batched", [False, True])
def test_transformers_samples_from_the_fast_weights(batched: bool, tmp_path: Path) -> None:
    cascade = cascade_of(STAGED, tmp_path)
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
    """When the trainer is made, if it sends weights in another way."""
    cascade = adapted(STAGED)
    for name, value in (("use_vllm", True), ("vllm_server_base_url", "http://localhost:8000")):  # as for AsyncGRPO
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        setattr(arguments, name, value)
        with raises(lx.SpecError, "trainer-not-supported", "use_vllm=False", "GRPOTrainer"):
            Trainer(model=cascade, args=arguments, callbacks=[callback_of(cascade)])


def test_an_untied_head_is_refused(vllm: None, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).float()
    spec = lx.CascadeSpec(rank=2, targets=NOISY.targets, untie=("lm_head.weight",))
    cascade = Engine.cascade = adapted(spec, model)
    with raises(lx.StateError, "trainer-not-supported", "lm_head.weight", "use_vllm=False"):
        grpo_of(cascade, tmp_path, callback_of(cascade), use_vllm=True, vllm_mode="colocate")
