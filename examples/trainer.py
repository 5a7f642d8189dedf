"""Train a small Llama with transformers' Trainer: one stage per epoch, checkpoints, and a saved model.

Needs the extra `loops`: pip install 'lorasc-fx[loops]'. Takes about ten seconds on two cores. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorasc_fx as lx


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences that count in threes modulo 29, each from a random start."""
    start = torch.randint(29, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = 3 + (start + 3 * torch.arange(12)) % 29
    return [{"input_ids": row, "labels": row} for row in ids]


def main(folder: str, epochs: int = 4) -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train, test = sequences(512, seed=1), sequences(128, seed=2)

    spec = lx.CascadeSpec(
        targets=("*_proj.weight",), train=("lm_head.*", "*norm.weight"), rank=8, pace=0.7, noise=lx.Noise(0.05)
    )
    example = {name: torch.stack([row[name] for row in train[:2]]) for name in ("input_ids", "labels")}
    model = lx.adapt(model, kwargs=example, spec=spec)
    print(model)

    trainer = Trainer(
        model=model,  # the cascade from lx.adapt
        args=TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=1e-2,
            gradient_accumulation_steps=2, eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
            load_best_model_at_end=True, report_to=[], use_cpu=True, dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=test,
        callbacks=[lx.integrations.transformers.CascadeCallback(model, epochs=1)],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()  # resume_from_checkpoint=True resumes from the last checkpoint
    after: float = trainer.evaluate()["eval_loss"]
    print(f"loss of the slow weights: {before:.3f} before, {after:.3f} after {model.stage - 1} stages")

    trainer.save_model(f"{folder}/model")  # writes config.json and model.safetensors of a plain Llama
    trainer.accelerator.wait_for_everyone()  # under torchrun, only the first process has written
    model.release()
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    generated = loaded.generate(test[0]["input_ids"][None, :4], max_new_tokens=6, do_sample=False)
    print("the saved model goes on counting:", [token - 3 for token in generated[0].tolist()])
    return before, after


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else str(Path(temporary, "run")))
