"""Methods of a cascade with peft's names, compared with peft's methods."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorasc_fx as lx
from tests.integrations.kit import llama
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.kit.state import branches_of

IDS = torch.tensor([[5, 9, 7, 30], [3, 8, 21, 4]])
LAYERS = ("q_proj", "down_proj")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_methods_do_what_pefts_do(capsys: pytest.CaptureFixture[str]) -> None:
    spec = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0, targets=tuple(f"*.{name}.weight" for name in LAYERS))
    cascade = lx.adapt(llama(), kwargs={"input_ids": IDS}, spec=spec)
    theirs = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=6, target_modules=list(LAYERS)))
    theirs.base_model.model.to(torch.float64)
    randomize(cascade, 1)
    for name, branch in branches_of(cascade).items():
        layer = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        layer.lora_A["default"].weight.data.copy_(branch.lora_A.detach())
        layer.lora_B["default"].weight.data.copy_(branch.lora_B.detach())

    printed = []
    for model in (cascade, theirs):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]

    base = llama()(input_ids=IDS).logits
    with cascade.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(cascade(input_ids=IDS).logits, base)
        assert torch.equal(theirs(input_ids=IDS).logits, base)
    torch.testing.assert_close(cascade(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-12, rtol=0)
    model, merged = (each.merge_and_unload(progressbar=False, safe_merge=True) for each in (cascade, theirs))
    assert model is cascade.model
    torch.testing.assert_close(dict(model.state_dict()), dict(merged.state_dict()), atol=1e-12, rtol=0)
    with raises(lx.StateError, "released", "release"):
        cascade.merge_and_unload()


def test_the_version_and_the_command_of_the_package() -> None:
    assert lx.__version__ == importlib.metadata.version("lorasc-fx")
    command = [sys.executable, "-m", "lorasc_fx", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == lx.__version__
