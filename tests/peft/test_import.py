"""Import: an adapter of peft becomes the first expert of a cascade, or raises one error before the model is changed."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.compare import assert_same
from tests.kit.errors import raises
from tests.kit.models import Tied, optimizer_of, train
from tests.kit.state import weight_state
from tests.peft.models import (
    BUILD,
    INPUTS,
    cascade_of,
    close,
    folded,
    gap,
    loaded,
    made,
    merged,
    seeded,
    trained_by_peft,
)

slow = pytest.mark.slow
LINEARS = ["q_proj", "v_proj", "down_proj"]

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("suffixes", {"target_modules": ["lin", "other"]}),
    "rslora": ("suffixes", {"target_modules": ["lin"], "use_rslora": True}),
    "patterns": (
        "suffixes",
        {
            "target_modules": ["lin", "other"],
            "rank_pattern": {r"^1\.lin": 2, "deep.lin": 4, "other": 1},
            "alpha_pattern": {r"^11\.lin": 7, r".*\.other": 9},
        },
    ),
    "patterns, rslora": (
        "suffixes",
        {"target_modules": ["lin"], "use_rslora": True, "rank_pattern": {"1.lin": 2}, "alpha_pattern": {"^lin": 2.5}},
    ),
    "biases": ("suffixes", {"target_modules": ["lin"], "bias": "lora_only"}),
    "all biases": ("words", {"target_modules": ["up"], "bias": "all"}),
    "embedding, head": ("words", {"target_modules": ["emb", "up"], "modules_to_save": ["head", "norm"]}),
    "convs": ("convs", {"target_modules": ["stem", "same", "down", "short", "line", "box", "head"]}),
    "dora, rslora": (
        "convs",
        {
            "target_modules": ["stem", "same", "down", "short", "line", "box", "head"],
            "use_dora": True,
            "use_rslora": True,
        },
    ),
    "parameters": (
        "mixture",
        {
            "target_modules": ["into"],
            "target_parameters": ["gate.rows", "plain.up", "plain.down", "transposed.up", "transposed.down"],
        },
    ),
    "llama": ("llama", {"target_modules": LINEARS, "lora_dropout": 0.1}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"}),
}
CASES = [pytest.param(key, marks=slow) if key in ("llama", "gpt2", "bert") else key for key in ADAPTERS]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]


@pytest.mark.parametrize("case", CASES)
def test_an_imported_adapter_is_exported_unchanged(case: str, tmp_path: Path) -> None:
    name, config = ADAPTERS[case]
    theirs = trained_by_peft(name, tmp_path / "in", **config)
    args = INPUTS[name]()
    model = made(BUILD[name])
    base = seeded(model, args)
    cascade = lx.from_peft(tmp_path / "in", model, args)

    right = merged(theirs).state_dict()
    with torch.no_grad(), cascade.weights("slow"):
        ours = {key: value.clone() for key, value in cascade.model.state_dict().items()}
        close(seeded(cascade.model, args), seeded(theirs, args))
        assert gap(seeded(cascade.model, args), base) > 1e-2
    torch.testing.assert_close(ours, dict(right), rtol=0, atol=1e-10)
    with torch.no_grad():
        close(seeded(cascade.eval(), args), seeded(theirs, args))  # the stage starts there

    lx.export.peft(cascade, tmp_path / "out")
    with torch.no_grad():
        close(seeded(loaded(name, tmp_path / "out"), args), seeded(theirs, args))
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("in", "out"))
    assert all(after[key].shape == value.shape for key, value in before.items() if "lora_" in key)
    again = lx.from_peft(tmp_path / "out", made(BUILD[name]), args)
    torch.testing.assert_close(again.folded_state_dict(), ours, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["suffixes", "words", "convs", "mixture"])
def test_an_exported_cascade_is_imported_unchanged(name: str, tmp_path: Path) -> None:
    train_in_full = ("head",) if name == "words" else ()
    left_out = ("head",) if name == "convs" else ()  # it would collapse
    cascade = cascade_of(name, train=train_in_full, exclude=left_out, rank=1)
    lx.export.peft(cascade, tmp_path / "one")
    again = lx.from_peft(tmp_path / "one", made(BUILD[name]), INPUTS[name]())
    assert {site.weight: site.rank for site in again.sites} == {site.weight: 2 for site in cascade.sites}
    with torch.no_grad():
        close(seeded(folded(again, name), INPUTS[name]()), seeded(folded(cascade, name), INPUTS[name]()))
    lx.export.peft(again, tmp_path / "two")
    one, two = (tmp_path / folder / "adapter_model.safetensors" for folder in ("one", "two"))
    assert_same(load_file(one), load_file(two))


def test_the_spec_of_an_adapter(tmp_path: Path) -> None:
    trained_by_peft("suffixes", tmp_path, **ADAPTERS["patterns"][1], lora_dropout=0.25)
    model = made(BUILD["suffixes"])
    spec = lx.export.peft_spec(tmp_path, model)
    assert (spec.rank, spec.lora_alpha, spec.dropout, spec.use_rslora) == (3, 5.0, 0.25, False)
    cascade = lx.from_peft(tmp_path, model, INPUTS["suffixes"](), spec=replace(spec, pace=0.25))
    assert cascade.plan.spec.pace == 0.25
    assert {site.weight: (site.rank, site.options.lora_alpha) for site in cascade.sites} == {
        "1.lin.weight": (2, 5.0),
        "1.other.weight": (1, 9.0),
        "11.lin.weight": (3, 7.0),
        "11.other.weight": (1, 9.0),
        "lin.weight": (3, 5.0),
        "deep.lin.weight": (4, 5.0),
    }


def test_training_continues(tmp_path: Path) -> None:
    """The first expert keeps its coefficient, and the next stages add theirs."""
    trained_by_peft("words", tmp_path / "in", r=1, target_modules=["up"], modules_to_save=["head"])
    model, args = made(BUILD["words"]), INPUTS["words"]()
    cascade = lx.from_peft(tmp_path / "in", model, args)
    before = cascade.folded_state_dict()
    optimizer = optimizer_of(cascade)
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [args[0]] * 3)
    state = weight_state(cascade, "up.weight")
    assert (state.experts[0].stage, state.slow[0]) == (0, 1.0)
    assert len(state.experts) == 3
    lx.export.peft(cascade, tmp_path / "out")
    with torch.no_grad():
        close(seeded(loaded("words", tmp_path / "out"), args), seeded(folded(cascade, "words"), args))
    assert gap(cascade.folded_state_dict()["up.weight"], before["up.weight"]) > 1e-3


@pytest.mark.parametrize("case", ["plain", "dora, rslora"])
def test_an_imported_expert_survives_a_checkpoint(case: str, tmp_path: Path) -> None:
    name, config = ADAPTERS[case]
    trained_by_peft(name, tmp_path / "in", **config)
    args = INPUTS[name]()
    cascade = lx.from_peft(tmp_path / "in", made(BUILD[name]), args)
    assert (cascade.plan.spec.adapter == "dora") == cascade.plan.spec.use_rslora == (case != "plain")
    optimizer = optimizer_of(cascade, "sgd")
    train(cascade, optimizer, [args[0]])
    cascade.transition(optimizer)
    lx.save(cascade, tmp_path / "run")
    again = lx.load(tmp_path / "run", made(BUILD[name]), args)
    assert_same(again.folded_state_dict(), cascade.folded_state_dict())


def test_magnitudes_need_a_spec_that_has_them(tmp_path: Path) -> None:
    trained_by_peft("words", tmp_path, target_modules=["up"], use_dora=True)
    with raises(lx.CheckpointError, "conflicting-options", "up.weight", "dora"):
        lx.from_peft(tmp_path, made(BUILD["words"]), INPUTS["words"](), spec=lx.CascadeSpec())


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_head_that_was_adapted_alone(tmp_path: Path) -> None:
    """peft trains a head separately from its embedding. This needs the untied model, and the error says so."""
    model = made(Tied)
    ids = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(2))
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["head"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "tied-weights-differ", "head.weight"):
        lx.from_peft(tmp_path, model, (ids,))
    untied = copy.deepcopy(model)
    spec = replace(lx.export.peft_spec(tmp_path, model), untie=("head.weight",))
    cascade = lx.from_peft(tmp_path, model, (ids,), spec=spec)
    with torch.no_grad(), cascade.weights("slow"):
        close(cascade.model(ids), theirs.eval()(ids))
    # A bank has no spec, so the model itself must be untied.
    with raises(lx.CheckpointError, "tied-weights-differ", "head.weight = torch.nn.Parameter(head.weight.detach()"):
        lx.AdapterBank(untied, {"theirs": tmp_path}, (ids,))
    untied.head.weight = torch.nn.Parameter(untied.head.weight.detach().clone())
    with torch.no_grad():
        close(lx.AdapterBank(untied, {"theirs": tmp_path}, (ids,))(ids, adapter="theirs"), theirs(ids))


def test_import_with_a_user_spec(tmp_path: Path) -> None:
    trained_by_peft("words", tmp_path, target_modules=["up"], modules_to_save=["head"])
    model, args = made(BUILD["words"]), INPUTS["words"]()
    spec = lx.CascadeSpec(rank=5, train=("head", "norm"), noise=lx.Noise(0.1))
    cascade = lx.from_peft(tmp_path, model, args, spec=spec)
    assert {site.rank for site in cascade.sites} == {5}
    with torch.no_grad(), cascade.weights("slow"):
        close(cascade.model(*args), loaded("words", tmp_path)(*args))
    model, targets = made(BUILD["words"]), ("emb",)
    codes = "conflicting-options", "up.weight", "not-targeted", "head.0.weight", "spec.train"
    with unchanged(model), raises(lx.CheckpointError, *codes):
        lx.from_peft(tmp_path, model, args, spec=lx.CascadeSpec(targets=targets))
    lx.adapt(model, args)  # nobody holds it
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


P = "base_model.model."
Edit = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained_by_peft("words", folder, target_modules=["up"], modules_to_save=["norm"])
    return folder


def changed(source: Path, folder: Path, config: dict[str, Any], edit: Edit) -> Path:
    data = json.loads((source / "adapter_config.json").read_text(encoding="utf-8")) | config
    tensors = load_file(source / "adapter_model.safetensors")
    edit(tensors)
    (folder / "adapter_config.json").write_text(json.dumps(data), encoding="utf-8")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, expected: tuple[str, ...]) -> None:
    model = made(BUILD["words"])
    with unchanged(model), raises(lx.CheckpointError, *expected) as caught:
        lx.from_peft(folder, model, INPUTS["words"]())
    assert "\n" not in str(caught.value)


def config(**fields: Any) -> tuple[dict[str, Any], Edit]:
    return fields, lambda tensors: None


def tensors_of(new: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]]) -> tuple[dict[str, Any], Edit]:
    """Replace tensors by the results of functions of all tensors."""
    return {}, lambda tensors: tensors.update({P + name: make(tensors) for name, make in new.items()})


def move(old: str, new: str) -> tuple[dict[str, Any], Edit]:
    return {}, lambda tensors: tensors.update({P + new: tensors.pop(P + old)})


A, B, M = "up.lora_A.weight", "up.lora_B.weight", "up.lora_magnitude_vector"
DORA, TOKENS = "an adapter with magnitudes", "an adapter with rows"
MORE: dict[str, dict[str, Any]] = {DORA: {"use_dora": True}, TOKENS: {"trainable_token_indices": {"emb": [1, 2, 5]}}}
ROWS = "emb.token_adapter.trainable_tokens_delta"

# fmt: off
DAMAGED: list[tuple[tuple[dict[str, Any], Edit], tuple[str, ...]]] = [
    (config(peft_type="LOHA"), ("adapter-not-supported", "adapter_config.json", "LOHA")),
    (config(lora_bias=True), ("adapter-not-supported", "lora_bias", "True")),
    (config(init_lora_weights="pissa_niter_4"), ("adapter-not-supported", "init_lora_weights", "pissa_niter_4")),
    (config(use_doora=True), ("adapter-not-supported", "use_doora", "True", "use_dora")),
    (config(use_dora=True), ("invalid-adapter", M)),
    (config(r=None), ("invalid-adapter", "r", "None")),
    (config(r=4), ("adapter-does-not-fit", "up.lora_A", "[3, 6]", "[4, 6]")),
    (config(rank_pattern={"up": 10**9}), ("adapter-does-not-fit", "up.lora_A", "1000000000")),
    (config(rank_pattern={"up": 10**12}), ("invalid-adapter", "its rank is 1000000000000")),
    (config(bias="some"), ("adapter-does-not-fit", "bias", "some")),
    (config(target_modules="(up"), ("adapter-does-not-fit", "unterminated subpattern")),
    (config(modules_to_save=["norm", "haed"]), ("adapter-does-not-fit", "modules_to_save", "haed", "head")),
    (config(modules_to_save=["norm", "head"]), ("adapter-does-not-fit", "KeyError", "head.0.weight")),
    (config(target_parameters=["up.weight"]), ("adapter-does-not-fit", "'up' of type Linear")),
    (move(A, "upp.lora_A.weight"), ("adapter-does-not-fit", "upp.lora_A.weight", "up")),
    (move(A, "head.1.lora_A.weight"), ("adapter-does-not-fit", "head.1.lora_A.weight")),
    (({}, lambda tensors: tensors.pop(P + B)), ("invalid-adapter", "base_model.model.up.lora_B.weight")),
    (({}, lambda tensors: [tensors.pop(P + A), tensors.pop(P + B)]), ("invalid-adapter",)),
    (({}, lambda tensors: tensors.update({"up.weight": torch.ones(8)})), ("adapter-does-not-fit", "'up.weight'")),
    (tensors_of({B: lambda old: old[P + B].t()}), ("adapter-does-not-fit", "up.lora_B", "[3, 8]", "[8, 3]")),
    (tensors_of({M: lambda _: torch.ones(8)}), ("adapter-does-not-fit", M)),
    (tensors_of({"norm.weight": lambda _: torch.ones(9)}), ("adapter-does-not-fit", "norm.", "[9]", "[8]")),
    (tensors_of({"emb.weight": lambda _: torch.ones(11, 6)}), ("base-differs", "'emb.weight'")),
    (tensors_of({A: lambda old: old[P + A] * float("nan")}), ("non-finite", "up")),
    (tensors_of({A: lambda old: old[P + A].long()}), ("adapter-does-not-fit", "up.lora_A", "floating point")),
    (tensors_of({M: lambda old: old[P + M][None]}), ("adapter-does-not-fit", M, "[1, 8]", "[8]", DORA)),
    (tensors_of({M: lambda old: old[P + M] * float("nan")}), ("non-finite", M, DORA)),
    (({}, lambda tensors: tensors.pop(P + ROWS)), ("adapter-does-not-fit", "emb.token_adapter", TOKENS)),
    (tensors_of({ROWS: lambda old: old[P + ROWS][:2]}), ("adapter-does-not-fit", "[2, 6]", TOKENS)),
    (tensors_of({ROWS: lambda old: old[P + ROWS] * torch.nan}), ("non-finite", "token_adapter", TOKENS)),
    (config(trainable_token_indices={"emb": [1, 2, 11]}), ("adapter-does-not-fit", "11", TOKENS)),
    (config(trainable_token_indices={"norm": [1]}), ("adapter-does-not-fit", "LayerNorm", TOKENS)),
]
# fmt: on


@pytest.mark.parametrize(("edit", "expected"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_adapter(
    edit: tuple[dict[str, Any], Edit], expected: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    if expected[-1] in MORE:
        source = tmp_path
        trained_by_peft("words", source, target_modules=["up"], **MORE[expected[-1]])
        expected = expected[:-1]
    refused(changed(source, tmp_path, *edit), expected)


def test_files(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", ("unreadable-file", "adapter_config.json"))
    folder = changed(source, tmp_path, {}, lambda tensors: None)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(folder, ("unreadable-file", "adapter_model.safetensors"))
    weights.unlink()
    refused(folder, ("unreadable-file", "adapter_model.safetensors"))
    for text in ("[1]", "{", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        refused(folder, ("invalid-adapter", "adapter_config.json"))


def test_no_module_that_the_file_names_is_imported(source: Path, tmp_path: Path) -> None:
    """peft would import `megatron_core`."""
    config = {"target_modules": "u.", "megatron_core": "this_module_is_absent", "megatron_config": {"a": 1}}
    folder = changed(source, tmp_path, config, lambda tensors: None)
    cascade = lx.from_peft(folder, made(BUILD["words"]), INPUTS["words"]())
    assert [site.weight for site in cascade.sites] == ["up.weight"]


def test_without_peft(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = made(BUILD["words"]), peft.LoraConfig(target_modules=["up"])
    monkeypatch.setitem(sys.modules, "peft", None)
    calls: list[Callable[[], object]] = [
        lambda: lx.from_peft(source, model, INPUTS["words"]()),
        lambda: lx.export.peft_spec(source, model),
        lambda: lx.adapt(model, INPUTS["words"](), spec=config),
    ]
    for call in calls:
        with raises(lx.errors.MissingExtra, "missing-extra", "pip install 'lorasc-fx[peft]'"):
            call()


def test_load_names_the_function_for_an_adapter(source: Path) -> None:
    with raises(lx.CheckpointError, "no-checkpoint", "adapter of peft", "lorasc_fx.from_peft"):
        lx.load(source, made(BUILD["words"]))


def test_a_grouped_convolution(tmp_path: Path) -> None:
    """peft's change mixes the groups, so no weight of the module can store it."""
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "adapter-not-supported", "0.weight", "Conv2d with groups"):
        lx.from_peft(tmp_path, nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)), (torch.zeros(1, 4, 3, 3),))


def test_a_complete_attention(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["self_attn"])).save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "adapter-not-supported", "self_attn"):
        lx.from_peft(tmp_path, build(), (torch.zeros(1, 3, 4),))


@pytest.mark.parametrize("injected", [False, True])
def test_a_model_with_layers_of_peft(injected: bool) -> None:
    """peft's lora_A and lora_B are not adapted, even without a PeftModel around them (`load_adapter`)."""
    base, config, args = made(BUILD["words"]), peft.LoraConfig(r=2, target_modules=["up"]), INPUTS["words"]()
    wrapped: Any = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    model, name = (base, "up") if injected else (wrapped, f"{P}up")
    with unchanged(model), raises(lx.StateError, "already-adapted", f"{name} is a layer of peft", "fx.from_peft"):
        lx.adapt(model, args)
    wrapped.unload()
    assert lx.adapt(base, args).sites
