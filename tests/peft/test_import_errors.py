"""Import errors: unsupported, damaged or foreign adapters raise one clear error, before the model is changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.peft.adapters import trained_by_peft
from tests.peft.models import BUILD, INPUTS, made

P = "base_model.model."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained_by_peft("words", folder, target_modules=["up"], modules_to_save=["norm"])
    return folder


def changed(source: Path, folder: Path, config: dict[str, Any], edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    data = json.loads((source / "adapter_config.json").read_text(encoding="utf-8")) | config
    tensors = load_file(source / "adapter_model.safetensors")
    edit(tensors)
    (folder / "adapter_config.json").write_text(json.dumps(data), encoding="utf-8")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, expected: tuple[str, ...]) -> None:
    model = made(BUILD["words"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with raises(lx.CheckpointError, *expected) as caught:
        lx.from_peft(folder, model, INPUTS["words"]())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


# fmt: off
CONFIGURATIONS = [
    ({"peft_type": "LOHA"}, ("adapter-not-supported", "adapter_config.json", "LOHA")),
    ({"use_dora": 1}, ("invalid-adapter", "use_dora", "1")),
    ({"use_dora": True}, ("invalid-adapter", "up", "lora_A.weight", "DoRA's magnitudes")),
    ({"lora_bias": True}, ("adapter-not-supported", "lora_bias", "True")),
    ({"init_lora_weights": "pissa_niter_4"}, ("adapter-not-supported", "init_lora_weights", "pissa_niter_4")),
    ({"use_doora": True}, ("adapter-not-supported", "use_doora", "True", "use_dora")),
    ({"r": 0}, ("invalid-adapter", "r", "0")),
    ({"r": None}, ("invalid-adapter", "r", "None")),
    ({"r": 4}, ("adapter-does-not-fit", "up.lora_A.weight", "up.weight", "[3, 6]", "[4, 6]")),
    ({"r": True}, ("invalid-adapter", "r", "True")),
    ({"rank_pattern": {"up": 10**9}}, ("adapter-does-not-fit", "up.weight", "1000000000")),
    ({"rank_pattern": {"up": 10**12}}, ("invalid-adapter", "rank_pattern.up is 1000000000000")),
    ({"lora_alpha": -1}, ("invalid-adapter", "lora_alpha", "-1")),
    ({"lora_alpha": 10**40}, ("invalid-adapter", "lora_alpha")),
    ({"lora_dropout": 1.5}, ("invalid-adapter", "lora_dropout", "1.5")),
    ({"bias": "some"}, ("invalid-adapter", "bias", "some", "lora_only")),
    ({"rank_pattern": {"(": 3}}, ("invalid-adapter", "rank_pattern")),
    ({"alpha_pattern": {"(a+)+b": 3}}, ("invalid-adapter", "alpha_pattern", "a+)+b")),
    ({"alpha_pattern": [1]}, ("invalid-adapter", "alpha_pattern", "[1]")),
    ({"modules_to_save": "norm"}, ("invalid-adapter", "modules_to_save", "norm")),
    ({"modules_to_save": ["norm", "haed"]}, ("adapter-does-not-fit", "modules_to_save", "haed", "head")),
    ({"modules_to_save": ["norm", "head"]}, ("invalid-adapter", "head.0.weight")),
]
# fmt: on


@pytest.mark.parametrize(("config", "expected"), CONFIGURATIONS)
def test_configurations(config: dict[str, Any], expected: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    refused(changed(source, tmp_path, config, lambda tensors: None), expected)


def move(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({P + new: tensors.pop(P + old)})


A, B = "up.lora_A.weight", "up.lora_B.weight"


# fmt: off
TENSORS = [
    (move(A, "upp.lora_A.weight"), ("adapter-does-not-fit", "upp.lora_A.weight", "up")),
    (move(A, "head.1.lora_A.weight"), ("adapter-does-not-fit", "head.1", "BatchNorm1d")),
    (move(A, "up.lora_embedding_A"), ("invalid-adapter", "up.lora_embedding_A")),
    (lambda tensors: tensors.pop(P + B), ("invalid-adapter", "up", "base_model.model.up.lora_A.weight")),
    (lambda tensors: [tensors.pop(P + A), tensors.pop(P + B)], ("invalid-adapter",)),
    (lambda tensors: tensors.update({P + B: tensors[P + B].t()}),
        ("adapter-does-not-fit", "up.lora_B.weight", "up.weight", "[3, 8]", "[8, 3]")),
    (lambda tensors: tensors.update({P + "up.lora_magnitude_vector": torch.ones(8)}),
        ("adapter-does-not-fit", "up.lora_magnitude_vector", "DoRA")),
    (lambda tensors: tensors.update({"up.weight": torch.ones(8)}),
        ("invalid-adapter", "up.weight", "base_model.model")),
    (lambda tensors: tensors.update({P + "norm.weigth": torch.ones(8)}), ("adapter-does-not-fit", "norm.weigth")),
    (lambda tensors: tensors.update({P + "norm.weight": torch.ones(9)}),
        ("adapter-does-not-fit", "norm.weight", "[9]", "[8]")),
    (lambda tensors: tensors.update({P + "emb.weight": torch.ones(11, 6)}),
        ("base-differs", "base_model.model.emb.weight")),
    (lambda tensors: tensors[P + A].fill_(float("nan")), ("non-finite", "up")),
    (lambda tensors: tensors.update({P + A: tensors[P + A].long()}), ("invalid-adapter", "torch.int64")),
]
# fmt: on


@pytest.mark.parametrize(("edit", "expected"), TENSORS)
def test_tensors(
    edit: Callable[[dict[str, torch.Tensor]], Any], expected: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    refused(changed(source, tmp_path, {}, edit), expected)


M = P + "up.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda tensors: tensors[M][None], ("adapter-does-not-fit", "up.weight", "[1, 8]", "[8]")),
        (lambda tensors: tensors[M] * float("nan"), ("non-finite", "magnitudes", "up")),
        (lambda tensors: tensors[M].long(), ("invalid-adapter", "up", "int64")),
    ],
)
def test_magnitudes(edit: Callable[[dict[str, torch.Tensor]], Any], expected: tuple[str, ...], tmp_path: Path) -> None:
    trained_by_peft("words", tmp_path, target_modules=["up"], use_dora=True)
    refused(changed(tmp_path, tmp_path, {}, lambda tensors: tensors.update({M: edit(tensors)})), expected)


def test_a_parameter_that_is_wrapped_once_and_named_twice(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path, {"target_parameters": ["up.weight"]}, move(A, "up.base_layer.lora_A.weight"))
    refused(folder, ("invalid-adapter", "up.base_layer.lora_A.weight"))


def test_files(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", ("unreadable-file", "adapter_config.json"))
    folder = changed(source, tmp_path, {}, lambda tensors: None)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refused(folder, ("unreadable-file", "adapter_model.safetensors"))
    weights.rename(folder / "adapter_model.bin")
    refused(folder, ("unreadable-file", "adapter_model.safetensors", "adapter_model.bin"))
    (folder / "adapter_model.bin").unlink()
    refused(folder, ("unreadable-file", "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text("[1]", encoding="utf-8")
    refused(folder, ("invalid-adapter", "adapter_config.json"))
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    refused(folder, ("invalid-adapter", "adapter_config.json"))
    (folder / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")
    refused(folder, ("invalid-adapter", "adapter_config.json"))
    with (folder / "adapter_config.json").open("wb") as handle:
        handle.truncate((1 << 24) + 1)
    refused(folder, ("invalid-checkpoint", "adapter_config.json", "16"))


def test_a_grouped_convolution(tmp_path: Path) -> None:
    """peft's change mixes the groups, so no weight of the module can store it."""
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "adapter-does-not-fit", "0", "Conv2d"):
        lx.from_peft(tmp_path, nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)), (torch.zeros(1, 4, 3, 3),))


def test_a_complete_attention(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["self_attn"])).save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "adapter-not-supported", "self_attn"):
        lx.from_peft(tmp_path, build(), (torch.zeros(1, 3, 4),))


@pytest.mark.parametrize("injected", [False, True])
def test_a_model_with_layers_of_peft(injected: bool) -> None:
    """peft's lora_A and lora_B are not adapted, even in a model that is not a PeftModel (`load_adapter`)."""
    base, config, args = made(BUILD["words"]), peft.LoraConfig(r=2, target_modules=["up"]), INPUTS["words"]()
    wrapped: Any = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    model, name = (base, "up") if injected else (wrapped, f"{P}up")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with raises(lx.StateError, "already-adapted", f"{name} is a layer of peft", "lorasc_fx.from_peft"):
        lx.adapt(model, args)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    wrapped.unload()
    assert lx.adapt(base, args).sites
