"""Models of transformers in the Trainer: what it reads off them, saves of them, and what they do afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import lorasc_fx as lx
from tests.integrations.kit import arguments, llama, losses, texts, tokenizer, values_of, with_weights
from tests.kit.models import lora_of

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
SPEC = lx.CascadeSpec(
    targets=tuple(f"*.{name}.weight" for name in TARGETS), rank=2, lora_alpha=6.0, pace=1.0, placement="beside"
)


def adapted(spec: lx.CascadeSpec = SPEC) -> lx.Cascade:
    rows = texts(2)
    kwargs = {name: torch.stack([each[name] for each in rows]) for name in rows[0]}
    kwargs["num_items_in_batch"] = torch.tensor(11)
    return lx.adapt(llama().train(), kwargs=kwargs, spec=spec)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize(
    ("more", "close"),
    [
        ({"gradient_accumulation_steps": 2}, 1e-6),  # normed by the tokens of both batches, shifted by one
        ({"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}, 1e-6),  # labels shifted by the Trainer
        ({"bf16": True}, 2e-2),
        ({"activation_checkpointing": True}, 1e-6),
    ],
    ids=["tokens", "smoothed", "bf16", "recomputed"],
)
def test_the_losses_are_those_of_peft_in_the_same_trainer(tmp_path: Path, more: dict[str, Any], close: float) -> None:
    data = texts(12)
    cascade = adapted()
    theirs = Trainer(
        model=lora_of(cascade, llama(), TARGETS),
        args=arguments(tmp_path, **more),
        train_dataset=data,
        eval_dataset=data,
    )
    theirs.train()
    callback = lx.integrations.transformers.CascadeCallback(cascade, steps=1000, evaluate="fast")
    ours = Trainer(
        model=cascade, args=arguments(tmp_path, **more), train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    ours.train()
    assert len(losses(ours)) > 2
    assert losses(ours) == pytest.approx(losses(theirs), abs=close, rel=0)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=close)
    assert ours.state.total_flos > 0


@pytest.mark.slow
def test_what_is_saved_is_the_librarys_own(tmp_path: Path) -> None:
    """The folder loads by `AutoModel`, where nothing of ours is, with the outputs of W0 + S by the formula."""
    cascade = adapted(lx.CascadeSpec(targets=SPEC.targets, rank=2, pace=0.5, noise=lx.Noise(0.1)))
    callback = lx.integrations.transformers.CascadeCallback(cascade, steps=2)
    more = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path / "run", **more), train_dataset=texts(), callbacks=[callback],
        processing_class=tokenizer(), optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    assert cascade.stage == 4  # the last one was cut short, and folded
    trainer.save_model(str(tmp_path / "saved"))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64).eval()
    plain = with_weights(llama(), values_of(cascade))
    ids = torch.stack([each["input_ids"] for each in texts(3)])
    with torch.no_grad():
        assert (plain(ids).logits - with_weights(llama(), {})(ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, atol=1e-10, rtol=0)
        with cascade.weights("slow"):
            assert torch.equal(cascade.eval()(ids).logits, loaded(ids).logits)
    assert not (tmp_path / "run" / "checkpoint-3" / "config.json").exists()  # no model: nobody takes it for one
