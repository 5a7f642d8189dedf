"""A `peft.LoraConfig` as the spec, compared with peft's model: targets, ranks and trained parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import lorasc_fx as lx
from tests.integrations.kit import llama
from tests.kit.errors import raises
from tests.kit.state import branches_of

IDS = torch.tensor([[5, 9, 7, 30], [3, 8, 21, 4]])
PREFIX = "base_model.model."


class Traceable(LlamaForCausalLM):
    """Llama's modules with a forward that torch.fx traces quickly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            x = x + attention.o_proj(attention.q_proj(x) * attention.k_proj(x) + attention.v_proj(x))
            x = x + mlp.down_proj(torch.tanh(mlp.gate_proj(x)) * mlp.up_proj(x))
        return self.lm_head(self.model.norm(x))


CONFIGS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
    "path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.0\..*(k|v)_proj", "lora_dropout": 0.25},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 12},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "a layer of a pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"], "r": 2, "lora_alpha": 4,
        "rank_pattern": {"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 3}, "alpha_pattern": {"gate_proj": 9},
    },
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "dora": {"target_modules": ["v_proj"], "use_dora": True},
    "pissa": {"target_modules": ["v_proj"], "init_lora_weights": "pissa", "r": 4},
    "pissa, fast": {"target_modules": ["v_proj"], "init_lora_weights": "pissa_niter_4", "r": 4},
    "olora": {"target_modules": ["v_proj"], "init_lora_weights": "olora", "r": 4},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_as_in_peft_are_adapted(name: str) -> None:
    model = llama(attention_bias=True).float()
    theirs, spec = get_peft_model(copy.deepcopy(model), LoraConfig(**CONFIGS[name])), LoraConfig(**CONFIGS[name])
    if name == "patterns":
        cascade = lx.adapt(model, kwargs={"input_ids": IDS}, spec=spec)
    else:
        cascade = lx.adapt(Traceable(model.config), (torch.ones(2, 24),), spec=spec)
    layers = {
        path.removeprefix(PREFIX): module
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    branches = branches_of(cascade)
    assert set(branches) == {f"{path}.weight" for path in layers}
    for path, layer in layers.items():
        branch = branches[f"{path}.weight"]
        assert branch.rank == layer.r["default"], path
        assert branch.scale == pytest.approx(layer.scaling["default"], rel=1e-12), path
    config = LoraConfig(**CONFIGS[name])
    assert cascade.plan.spec.dropout == config.lora_dropout
    assert cascade.plan.spec.adapter == ("dora" if config.use_dora else "lora")
    start = config.init_lora_weights
    assert cascade.plan.spec.start == (start[:5] if isinstance(start, str) else "lora")
    trained = {
        each.removeprefix(PREFIX).replace("modules_to_save.default.", "").replace(".base_layer", "")
        for each, parameter in theirs.named_parameters()
        if parameter.requires_grad and "lora_" not in each
    }
    ours = {each.removeprefix("model.") for each, parameter in cascade.named_parameters() if parameter.requires_grad}
    assert {each for each in ours if not each.startswith("branches.")} == {
        each.replace(".base_layer", "") for each in trained
    }


def test_options_without_a_counterpart_are_one_error() -> None:
    odd: dict[str, Any] = {"use_qalora": True, "layer_replication": [(0, 2)]}
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian", **odd)
    model = llama()
    before = [parameter.requires_grad for parameter in model.parameters()]
    names = ("init_lora_weights='gaussian'", "use_qalora", "layer_replication", "repeats layers")
    with raises(lx.SpecError, "adapter-not-supported", *names):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=config)
    with raises(lx.SpecError, "adapter-not-supported", "target_modules=None"):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=LoraConfig())
    with raises(lx.UnknownTarget, "unknown-target", "q_porj"):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=LoraConfig(target_modules=["q_porj"]))
    assert [parameter.requires_grad for parameter in model.parameters()] == before
