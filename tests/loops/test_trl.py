"""A cascade in TRL's SFTTrainer: beside peft in the same trainer, evaluated by its slow weights, saved and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lorasc_fx as lx
from tests.kit.state import branches_of
from tests.loops.kit import llama, losses

trl = pytest.importorskip("trl")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORDS = [f"w{number}" for number in range(37)]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: number + 3 for number, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def dataset(count: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(0, 37, (5 + number % 4,), generator=generator).tolist() for number in range(count)]
    return Dataset.from_list([{"text": " ".join(WORDS[each] for each in row)} for row in chosen])


def trainer_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    plain = {
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "num_train_epochs": 2, "use_cpu": True, "bf16": False,
        "report_to": [], "gradient_checkpointing": False, "max_length": 24, "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "epoch", "eval_strategy": "epoch", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(output_dir=str(folder), **{**plain, **more}), train_dataset=dataset(16),
        eval_dataset=dataset(4), processing_class=tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def adapted(spec: lx.CascadeSpec, checkpointing: bool = False) -> lx.Cascade:
    model = llama().float()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    return lx.adapt(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spec=spec)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_losses_are_those_of_peft(checkpointing: bool, packing: bool, tmp_path: Path) -> None:
    """One stage at pace 1, in the same trainer, whose fused head computes the loss of the peft model."""
    targets = tuple(f"*.{name}.weight" for name in LAYERS)
    cascade = adapted(lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0, targets=targets), checkpointing)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(LAYERS), lora_dropout=0.0)
    peft_model = get_peft_model(llama().float(), config)
    for name, branch in branches_of(cascade).items():
        layer = peft_model.base_model.model.get_submodule(name.removesuffix(".weight"))
        layer.lora_A["default"].weight.data.copy_(branch.lora_A.detach())
    callback = lx.integrations.transformers.CascadeCallback(cascade, epochs=9)
    ours = trainer_of(cascade, tmp_path / "ours", callback, packing=packing)
    theirs = trainer_of(peft_model, tmp_path / "theirs", packing=packing)
    for trainer in (ours, theirs):
        torch.manual_seed(2)
        trainer.train()
    assert losses(theirs)[-1] < losses(theirs)[0] - 0.02
    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-5)
    for name in ("entropy", "mean_token_accuracy", "grad_norm"):
        logged = [[entry[name] for entry in each.state.log_history if "loss" in entry] for each in (ours, theirs)]
        assert logged[0] == pytest.approx(logged[1], abs=2e-3), name


def test_stages_evaluation_and_the_saved_model(tmp_path: Path) -> None:
    cascade = adapted(lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
    trainer = trainer_of(cascade, tmp_path, lx.integrations.transformers.CascadeCallback(cascade))
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

    resumed = adapted(lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
    again = trainer_of(resumed, tmp_path, lx.integrations.transformers.CascadeCallback(resumed))
    (first,) = (path for path in tmp_path.iterdir() if path.name == "checkpoint-4")
    again.train(resume_from_checkpoint=str(first))
    assert losses(again) == losses(trainer)
    assert all(torch.equal(value, state[name]) for name, value in resumed.folded_state_dict().items())
