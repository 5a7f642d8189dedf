"""A cascade has its model's attributes and peft's names, works in pipelines, and its methods have the right weights."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

import lorasc_fx as lx
from tests.integrations.kit import llama, tokenizer, values_of, with_weights
from tests.kit.errors import raises
from tests.kit.models import lora_of, randomize
from tests.kit.state import branches_of

IDS = torch.tensor([[5, 9, 7, 30], [3, 8, 21, 4]])


def made() -> lx.Cascade:
    """Return a cascade in its second stage, with a trained branch, and noise that changes the generated tokens."""
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(3.0), targets=("linear",))
    cascade = lx.adapt(llama(), kwargs={"input_ids": IDS}, spec=spec)
    for seed in (1, 2):
        randomize(cascade, seed)
        if seed == 1:
            cascade.transition(None)
    return cascade


def test_attributes_that_trainers_read_are_the_models() -> None:
    cascade = made()
    model = cascade.model
    for name in ("config", "generation_config", "device", "dtype", "main_input_name", "_keys_to_ignore_on_save"):
        assert getattr(cascade, name) == getattr(model, name), name
    assert cascade.can_generate() is True
    assert cascade.num_parameters() == model.num_parameters()
    assert cascade.get_input_embeddings() is model.get_input_embeddings()
    cascade.add_model_tags(["cascade"])
    assert model.model_tags == ["cascade"]
    assert cascade.stage == 2  # its own names come first
    assert copy.deepcopy(cascade).config.vocab_size == 40
    with pytest.raises(AttributeError, match="neither the cascade nor its LlamaForCausalLM has an attribute 'confg'"):
        _ = cascade.confg
    assert not hasattr(cascade, "hf_device_map")
    assert not hasattr(cascade, "__len__")


def test_a_submodule_is_the_models() -> None:
    """A submodule has no branches. The `module` of a wrapper is not an attribute of the model."""
    cascade = made()
    for name in ("base_model", "lm_head"):
        with pytest.raises(AttributeError, match=rf"(?i)use cascade\.model\.{name}"):
            getattr(cascade, name)
    inner = lx.adapt(nn.ModuleDict({"module": nn.Linear(5, 3)})["module"], (torch.ones(2, 5),))
    assert not hasattr(inner, "module")


@pytest.mark.parametrize("name", ["add_adapter", "load_adapter", "set_adapter", "disable_adapters"])
def test_layers_of_peft_cannot_be_put_into_the_model(name: str) -> None:
    """peft's layers would take over weights that the graphs read. transformers offers these methods on the model."""
    cascade = made()
    assert hasattr(cascade.model, name)
    assert not hasattr(cascade, name)
    with pytest.raises(AttributeError, match=rf"^{name} .*AdapterBank"):
        getattr(cascade, name)


def test_generate_uses_the_fast_or_the_placed_weights() -> None:
    cascade = made()
    slow, fast = values_of(cascade), values_of(cascade, "fast")
    noisy = {name: value.detach().clone() for name, value in cascade.model.named_parameters()}
    expected = {
        view: with_weights(cascade.model, values).generate(IDS, max_new_tokens=6, do_sample=False)
        for view, values in {"slow": slow, "fast": fast, "noisy": {}}.items()
    }
    assert len({str(ids) for ids in expected.values()}) == 3
    assert torch.equal(cascade.generate(IDS, max_new_tokens=6, do_sample=False), expected["fast"])
    with cascade.weights("slow"):
        assert torch.equal(cascade.generate(IDS, max_new_tokens=6, do_sample=False), expected["slow"])
    assert all(torch.equal(value, noisy[name]) for name, value in cascade.model.named_parameters())


@pytest.mark.parametrize("method", ["generate_batch", "encode", "encode_query", "encode_document", "predict", "rank"])
def test_computing_methods_use_the_fast_weights(method: str) -> None:
    """The methods of transformers for continuous batches, and of sentence-transformers."""

    class Encoder(nn.Linear):
        pass

    setattr(Encoder, method, Encoder.__call__)
    x = torch.randn(4, 5, dtype=torch.float64)
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(1.0), targets=("linear",))
    cascade = lx.adapt(Encoder(5, 3).double(), (x,), spec=spec)
    randomize(cascade, 1)
    for view in (None, "slow"):
        with cascade.weights(view) if view else contextlib.nullcontext():
            output = getattr(cascade, method)(x)
        torch.testing.assert_close(output, x @ values_of(cascade, view or "fast")["weight"].T + cascade.model.bias)


def test_save_pretrained_of_the_model_writes_the_weights_in_place(tmp_path: Path) -> None:
    """Inside a stage the cascade has no `save_pretrained`: it would lose the training of the running stage."""
    cascade = made()
    slow = values_of(cascade)
    with pytest.raises(AttributeError, match=r"^save_pretrained .*lorasc_fx\.save .*cascade\.model\.save_pretrained"):
        cascade.save_pretrained(tmp_path)
    assert not hasattr(cascade, "push_to_hub")
    for view in ("slow", "base"):
        with cascade.weights(view):
            cascade.save_pretrained(tmp_path / view)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slow", dtype=torch.float64)
    for name, value in slow.items():
        torch.testing.assert_close(loaded.get_parameter(name).detach(), value, atol=1e-12, rtol=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    for name, value in llama().named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)


LAYERS = ("q_proj", "down_proj")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_methods_do_what_pefts_do(capsys: pytest.CaptureFixture[str]) -> None:
    spec = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0, targets=tuple(f"*.{name}.weight" for name in LAYERS))
    cascade = lx.adapt(llama(), kwargs={"input_ids": IDS}, spec=spec)
    theirs = lora_of(cascade, llama(), LAYERS).double()
    randomize(cascade, 1)
    for name, branch in branches_of(cascade).items():
        layer = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
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
    model, merged = (m.merge_and_unload(progressbar=False, safe_merge=True) for m in (cascade, theirs))
    assert model is cascade.model
    torch.testing.assert_close(dict(model.state_dict()), dict(merged.state_dict()), atol=1e-12, rtol=0)
    with raises(lx.StateError, "released", "release"):
        cascade.merge_and_unload()


TEXTS = ["w1 w2 w3 w4", "w9 w30", "w7 w7 w21 w5 w4 w2"]


def test_a_pipeline_computes_with_the_placed_weights() -> None:
    """Alone, in a batch and lazily."""
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}

    def pipe_of(model: Any) -> Any:
        return pipeline("text-generation", model=model, tokenizer=tokenizer())

    cascade = made()
    pipe, outputs = pipe_of(cascade), []
    for view in ("slow", "fast"):
        plain = pipe_of(with_weights(cascade.model, values_of(cascade, view)))
        expected = [plain(text, **options) for text in TEXTS]
        with cascade.weights(view):
            assert [pipe(text, **options) for text in TEXTS] == expected
            assert list(pipe((text for text in TEXTS), **options)) == expected
            assert pipe(TEXTS[:1] * 2, batch_size=2, **options) == [pipe(TEXTS[0], **options)] * 2
        outputs.append(expected)
    assert outputs[0] != outputs[1]
