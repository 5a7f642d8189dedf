"""In: what is no plain LoRA, damaged, or of another model is one clear error, before the model is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasc_fx as lx
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


def refused(folder: Path, sentence: str) -> None:
    model = made(BUILD["words"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(lx.CheckpointError) as caught:
        lx.from_peft(folder, model, INPUTS["words"]())
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(sentence, message), message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "LOHA"}, r"adapter_config\.json: peft_type is 'LOHA'; only LORA is a change by factors$"),
        ({"use_dora": True}, "use_dora is True: DoRA scales whole rows of the weight, which is no low-rank change$"),
        ({"lora_bias": True}, "lora_bias is True: the factors have a bias, which is no part of a weight$"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]: single rows of an embedding"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base weights",
        ),
        ({"use_doora": True}, "'use_doora' is True, a key that this version does not know; nearest: 'use_dora'"),
        ({"r": 0}, "r is 0; a rank is an integer of 1 or more$"),
        (
            {"r": 4},
            r"up\.lora_A\.weight' is \[3, 6\]; for up\.weight \[8, 6\] at rank 4 of the configuration it is \[4, 6\]$",
        ),
        ({"r": True}, "r is True; a rank is"),
        ({"rank_pattern": {"up": 10**12}}, r"up\.weight is \[8, 6\], and rank 1000000000000 is more than it can use$"),
        ({"lora_alpha": -1}, "lora_alpha is -1; it scales the factors: a number above 0$"),
        ({"lora_alpha": 10**40}, "it scales the factors: a number above 0$"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1\.5, not a share in \[0, 1\)$"),
        ({"bias": "some"}, "bias is 'some', not one of none, all, lora_only$"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 3}}, r"alpha_pattern: '\(a\+\)\+b' repeats too much to be searched for safely$"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not a table$"),
        ({"modules_to_save": "norm"}, "modules_to_save is 'norm', not a list of names$"),
        ({"modules_to_save": ["norm", "haed"]}, "modules_to_save: the model has no module haed; nearest: 'head'"),
        ({"modules_to_save": ["norm", "head"]}, r"has no head\.0\.weight, which modules_to_save says was trained$"),
    ],
)
def test_configurations(config: dict[str, Any], sentence: str, source: Path, tmp_path: Path) -> None:
    refused(changed(source, tmp_path, config, lambda tensors: None), sentence)


def move(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({P + new: tensors.pop(P + old)})


A, B = "up.lora_A.weight", "up.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (move(A, "upp.lora_A.weight"), "upp.lora_A.weight': the model has no module upp; nearest: 'up'$"),
        (move(A, "head.1.lora_A.weight"), r"head\.1 is a BatchNorm1d; nothing of it can hold this adapter$"),
        (move(A, "up.lora_embedding_A"), "is not how peft keeps a pair of up$"),
        (lambda tensors: tensors.pop(P + B), "up has one factor, 'base_model.model.up.lora_A.weight', not two$"),
        (lambda tensors: [tensors.pop(P + A), tensors.pop(P + B)], "holds no factors$"),
        (
            lambda tensors: tensors.update({P + B: tensors[P + B].t()}),
            r"up\.lora_B\.weight' is \[3, 8\]; for up\.weight \[8, 6\] at rank 3 of the configuration it is \[8, 3\]$",
        ),
        (
            lambda tensors: tensors.update({P + "up.lora_magnitude_vector": torch.ones(8)}),
            "up.lora_magnitude_vector' is DoRA's magnitudes",
        ),
        (
            lambda tensors: tensors.update({"up.weight": torch.ones(8)}),
            "'up.weight' does not start with 'base_model.model.'",
        ),
        (
            lambda tensors: tensors.update({P + "norm.weigth": torch.ones(8)}),
            "is nothing of the model, nor factors; nearest: 'n",
        ),
        (
            lambda tensors: tensors.update({P + "norm.weight": torch.ones(9)}),
            r"norm\.weight' is \[9\], and norm\.weight of the model is \[8\]$",
        ),
        (
            lambda tensors: tensors.update({P + "emb.weight": torch.ones(11, 6)}),
            "'base_model.model.emb.weight' is not what the model holds; the adapter is of another base$",
        ),
        (lambda tensors: tensors[P + A].fill_(float("nan")), "the factors of up hold inf or nan$"),
        (
            lambda tensors: tensors.update({P + A: tensors[P + A].long()}),
            "the factors of up are torch.int64, not floating numbers$",
        ),
    ],
)
def test_tensors(edit: Callable[[dict[str, torch.Tensor]], Any], sentence: str, source: Path, tmp_path: Path) -> None:
    refused(changed(source, tmp_path, {}, edit), sentence)


def test_a_parameter_that_is_wrapped_once_and_named_twice(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path, {"target_parameters": ["up.weight"]}, move(A, "up.base_layer.lora_A.weight"))
    refused(folder, r"up\.base_layer\.lora_A\.weight': peft does not wrap up so often$")


def test_files(source: Path, tmp_path: Path) -> None:
    refused(
        tmp_path / "absent", r"adapter_config\.json: cannot be read: No such file or directory; give the folder of a"
    )
    folder = changed(source, tmp_path, {}, lambda tensors: None)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refused(folder, r"adapter_model\.safetensors: cannot be read: ")
    weights.rename(folder / "adapter_model.bin")
    refused(
        folder,
        r"adapter_model\.safetensors: is not there; adapter_model\.bin is a pickle, which can run code: save it anew ",
    )
    (folder / "adapter_model.bin").unlink()
    refused(folder, r"is not there; give the folder of an adapter that peft has saved$")
    (folder / "adapter_config.json").write_text("[1]", encoding="utf-8")
    refused(folder, r"adapter_config\.json: is a list, not a table$")
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    refused(folder, r"adapter_config\.json: is no JSON: ")
    (folder / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")
    refused(folder, r"adapter_config\.json: is no JSON: ")
    with (folder / "adapter_config.json").open("wb") as handle:
        handle.truncate((1 << 24) + 1)
    refused(folder, r"adapter_config\.json: is larger than 16 MiB")


def test_a_grouped_convolution(tmp_path: Path) -> None:
    """peft's change of it mixes the groups, so that no weight of the module holds it."""
    import warnings

    import peft
    from torch import nn

    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(
        lx.CheckpointError, match=r"0 is a Conv2d, whose change mixes the groups; nothing of it can hold"
    ):
        lx.from_peft(tmp_path, nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)), (torch.zeros(1, 4, 3, 3),))


def test_a_whole_attention(tmp_path: Path) -> None:
    import peft
    from torch import nn

    def build() -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["self_attn"])).save_pretrained(tmp_path)
    with pytest.raises(
        lx.CheckpointError, match=r"self_attn is an adapter of a whole nn.MultiheadAttention, of which peft"
    ):
        lx.from_peft(tmp_path, build(), (torch.zeros(1, 3, 4),))
