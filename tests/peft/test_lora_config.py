"""A `peft.LoraConfig` as the spec, compared with peft's model: targets, ranks and trained parameters."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import lorasc_fx as lx
from tests.integrations.kit import llama
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.models import trainable_parameters
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
    "regex": {"target_modules": r".*layers\.0\..*(k|v)_proj", "lora_dropout": 0.25},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 12},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
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
    ours = {path.removeprefix("model.") for path, parameter in cascade.named_parameters() if parameter.requires_grad}
    assert {path for path in ours if not path.startswith("branches.")} == trained_in_full(theirs)


def trained_in_full(theirs: nn.Module) -> set[str]:
    """Return the names of the parameters that peft's model trains in full."""
    return {
        name.removeprefix(PREFIX).replace("modules_to_save.default.", "").replace(".base_layer", "")
        for name, parameter in theirs.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and "lora_" not in name
    }


def test_options_without_a_counterpart_are_one_error() -> None:
    odd: dict[str, Any] = {"use_qalora": True, "layer_replication": [(0, 2)]}
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian", **odd)
    model = llama()
    before = [parameter.requires_grad for parameter in model.parameters()]
    names = ("init_lora_weights='gaussian'", "use_qalora", "layer_replication")
    with raises(lx.SpecError, "adapter-not-supported", *names):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=config)
    with raises(lx.SpecError, "adapter-not-supported", "target_modules=None"):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=LoraConfig())
    with raises(lx.UnknownTarget, "unknown-target", "q_porj"):
        lx.adapt(model, kwargs={"input_ids": IDS}, spec=LoraConfig(target_modules=["q_porj"]))
    with raises(lx.UnknownTarget, "unknown-target", "modules_to_save", "lm_haed", "lm_head"):
        lx.adapt(
            model,
            kwargs={"input_ids": IDS},
            spec=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "lm_haed"]),
        )
    assert [parameter.requires_grad for parameter in model.parameters()] == before


LABELED = LlamaConfig(**tiny.SIZES, pad_token_id=0, num_labels=3)
CLASSIFIERS = {
    "score": (lambda: LlamaForSequenceClassification(LABELED), "q_proj"),
    "classifier": (tiny.bert, "query"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head", CLASSIFIERS)
def test_the_head_of_a_classifier_is_trained(head: str) -> None:
    build, target = CLASSIFIERS[head]
    model, config = build(), LoraConfig(r=4, task_type="SEQ_CLS", target_modules=[target])
    expected = trained_in_full(get_peft_model(copy.deepcopy(model), copy.deepcopy(config)))
    batch = {"input_ids": torch.randint(1, 40, (3, 6)), "labels": torch.tensor([0, 1, 2])}
    cascade = lx.adapt(model, kwargs=batch, spec=config)
    assert set(cascade.plan.spec.train) == expected
    assert all(name.startswith(f"{head}.") for name in expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("tied", "modules", "ensure"),
    [
        (False, ["lm_head", "embed_tokens"], False),
        (True, ["lm_head"], False),
        (True, ["lm_head", "embed_tokens"], True),
    ],
    ids=str,
)
def test_saved_modules_of_tied_embeddings(tied: bool, modules: list[str], ensure: bool, tmp_path: Path) -> None:
    """peft trains a copy of each saved module, so a tied weight becomes separate ones, unless peft ties the copies."""

    def build() -> LlamaForCausalLM:
        return llama(tie_word_embeddings=tied, num_hidden_layers=1)

    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=ensure, task_type="CAUSAL_LM"
    )
    theirs, batch = get_peft_model(build().train(), copy.deepcopy(config)), {"input_ids": IDS, "labels": IDS}
    expected = {"model.embed_tokens.weight"} if ensure else trained_in_full(theirs)
    cascade = lx.adapt(build(), kwargs=batch, spec=config)
    assert set(cascade.plan.spec.train) == expected
    assert (cascade.model.lm_head.weight is cascade.model.model.embed_tokens.weight) == ensure
    optimizer = torch.optim.SGD(trainable_parameters(theirs), lr=0.1)
    for _ in range(3):
        theirs(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    read = lx.from_peft(tmp_path, build(), kwargs=batch)
    assert set(read.plan.spec.train) == expected
    with torch.no_grad(), read.weights("slow"):
        torch.testing.assert_close(read(**batch).logits, theirs.eval()(**batch).logits, rtol=0, atol=1e-10)
    if tied and not ensure:
        with raises(lx.CheckpointError, "tied-weights-differ", "model.embed_tokens.weight and lm_head.weight"):
            lx.from_peft(tmp_path, build(), kwargs=batch, spec=replace(read.plan.spec, untie=()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_parameters_are_targets(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**tiny.SIZES, **sizes))

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    theirs = get_peft_model(build(), copy.deepcopy(config)).eval()
    theirs.save_pretrained(tmp_path)
    config.init_lora_weights = True
    names = [f"model.layers.0.{name}" for name in parameters]
    assert [site.weight for site in lx.adapt(build(), kwargs={"input_ids": IDS}, spec=config).sites] == names
    read = lx.from_peft(tmp_path, build(), kwargs={"input_ids": IDS}).eval()
    assert [site.weight for site in read.sites] == names
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
