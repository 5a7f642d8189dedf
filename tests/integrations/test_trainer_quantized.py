"""Models that transformers quantizes as it loads them, in its Trainer: losses of peft, and what is saved of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer

import lorasc_fx as lx
from tests.integrations.kit import arguments, llama, losses, texts
from tests.kit.models import lora_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the libraries, about themselves

METHODS: dict[str, Any] = {
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
LAYERS = ["q_proj", "v_proj"]
IDS = torch.stack([row["input_ids"] for row in texts(2)])


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_peft_and_what_is_saved_loads(method: str, tmp_path: Path) -> None:
    if method != "torchao" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is missing")
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    llama(**wide).float().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=METHODS[method](), dtype=torch.float32
        )

    spec = lx.CascadeSpec(
        targets=tuple(f"*.{name}.weight" for name in LAYERS), rank=2, lora_alpha=6.0, pace=1.0, placement="beside"
    )
    cascade = lx.adapt(base(), kwargs={"input_ids": IDS, "labels": IDS, "attention_mask": IDS > 0}, spec=spec)
    assert len(cascade.sites) == 2
    theirs = lora_of(cascade, base(), LAYERS)
    callback = lx.integrations.transformers.CascadeCallback(cascade, steps=1000)
    trainers = [
        Trainer(model=each, args=arguments(tmp_path / "run"), train_dataset=texts(), callbacks=callbacks)
        for each, callbacks in ((cascade, [callback]), (theirs, []))
    ]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), abs=1e-5)
    assert losses(trainers[0])[-1] < losses(trainers[0])[0]

    trainers[0].save_model(str(tmp_path / "final"))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    with torch.no_grad():
        with cascade.weights("base"):
            start = cascade.eval()(input_ids=IDS).logits
        with cascade.weights("slow"):
            slow = cascade(input_ids=IDS).logits
        assert (slow - start).abs().max() > 0.05
        torch.testing.assert_close(final(IDS).logits, slow, rtol=0, atol=0.005)  # of nf4 on a CPU in eval mode: bf16
