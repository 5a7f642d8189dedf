"""`save_pretrained` names the base, and `load` builds it: transformers, timm, new heads; the hub, by a stand-in."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    modeling_utils,
)

import lorasc_fx as lx
from tests.checkpoint.damage import forge
from tests.errors.models import adapted, mlp
from tests.errors.state import unchanged
from tests.integrations.kit import llama
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.models import randomize

# peft reads a name that transformers calls old.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 9, 7, 30], [3, 8, 21, 4]])
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def small() -> Any:
    return llama(num_hidden_layers=1)


Saved = Callable[[Path], tuple[lx.Cascade, tuple[Any, ...]]]


def in_a_second_stage(cascade: lx.Cascade) -> lx.Cascade:
    """One stage ended, and one that has trained; what is trained in full has moved."""
    for seed in (1, 2):
        randomize(cascade, seed)
        with torch.no_grad():
            for name, value in cascade.model.named_parameters():
                value.add_(0.01 * len(name) if value.requires_grad else 0)
        if seed == 1:
            cascade.transition(None)
    return cascade


def causal(path: Path) -> tuple[lx.Cascade, tuple[Any, ...]]:
    """In float64, which is not the default of transformers."""
    small().save_pretrained(path / "base")
    model = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float64)
    kwargs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return lx.adapt(model, kwargs=kwargs, spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1))), (IDS,)


def classifier(path: Path) -> tuple[lx.Cascade, tuple[Any, ...]]:
    """A base for another task, and so a head that no file has; it is trained in full."""
    bert().save_pretrained(path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        path / "base", num_labels=5, attn_implementation="eager", hidden_dropout_prob=0.3
    )
    spec = lx.CascadeSpec(rank=2, train=("classifier.*",))  # the pooler is new as well, and adapted
    return lx.adapt(model, kwargs={"input_ids": IDS}, spec=spec), (IDS,)


def bert(kind: str = "ForMaskedLM") -> Any:
    torch.manual_seed(3)
    return tiny.bert(kind)


def image(path: Path) -> tuple[lx.Cascade, tuple[Any, ...]]:
    """From a file of weights, with another number of classes."""
    torch.manual_seed(3)
    save_file(timm.create_model("test_resnet").state_dict(), path / "weights.safetensors")
    model = timm.create_model(
        "test_resnet",
        pretrained=True,
        num_classes=4,
        pretrained_cfg_overlay={"file": str(path / "weights.safetensors")},
    )
    return lx.adapt(model.eval(), (X,), spec=lx.CascadeSpec(rank=2)), (X,)


def folder_of_timm(path: Path) -> tuple[lx.Cascade, tuple[Any, ...]]:
    torch.manual_seed(3)
    made = timm.create_model("test_vit", num_classes=6)
    (path / "base").mkdir()
    save_file(made.state_dict(), path / "base" / "model.safetensors")
    config = {
        **{key: made.pretrained_cfg[key] for key in ("input_size", "mean", "std", "classifier")},
        "num_classes": 6,
    }
    about = {"architecture": "test_vit", "num_classes": 6, "pretrained_cfg": config}
    (path / "base" / "config.json").write_text(json.dumps(about))
    model = timm.create_model(f"local-dir:{path / 'base'}", pretrained=True)
    inputs = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(4))
    return lx.adapt(model.eval(), (inputs,), spec=lx.CascadeSpec(rank=2)), (inputs,)


@pytest.mark.parametrize("saved", [causal, classifier, image, folder_of_timm], ids=lambda each: each.__name__)
def test_a_folder_is_loaded_by_itself(saved: Saved, tmp_path: Path) -> None:
    cascade, args = saved(tmp_path)
    in_a_second_stage(cascade.eval())
    cascade.save_pretrained(tmp_path / "run")
    before = torch.random.get_rng_state()
    again = lx.load(tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(again.model) is type(cascade.model)
    assert (again.stage, again.training, again.plan) == (2, False, cascade.plan)

    def output(one: lx.Cascade) -> torch.Tensor:
        found = one(*args)
        return found if isinstance(found, torch.Tensor) else found.logits

    for which in ("base", "slow", "fast"):
        with cascade.weights(which), again.weights(which):
            states = [each.model.state_dict() for each in (cascade, again)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), which
    with torch.no_grad():
        assert torch.equal(output(again), output(cascade))
    again.transition(None)  # and goes on
    cascade.transition(None)
    with torch.no_grad():
        assert torch.equal(output(again), output(cascade))


def test_the_settings_of_the_model_come_along(tmp_path: Path) -> None:
    cascade, _ = classifier(tmp_path)
    cascade.save_pretrained(tmp_path / "run")
    config = lx.load(tmp_path / "run").model.config
    assert (config.num_labels, config._attn_implementation, config.hidden_dropout_prob) == (5, "eager", 0.3)


def test_a_base_that_was_moved(tmp_path: Path) -> None:
    cascade, _ = causal(tmp_path)
    cascade.save_pretrained(tmp_path / "run", base_model=str(tmp_path / "moved"))
    missing = tmp_path / "moved"
    with raises(lx.CheckpointError, "no-base", missing, "transformers", "HF_HUB_OFFLINE"):
        lx.load(tmp_path / "run")
    (tmp_path / "base").rename(missing)
    assert lx.load(tmp_path / "run").model.name_or_path == str(missing)


def test_another_base_of_this_name(tmp_path: Path) -> None:
    cascade, _ = causal(tmp_path)
    cascade.save_pretrained(tmp_path / "run")
    other = small()
    nn.init.zeros_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "base")
    with raises(lx.CheckpointError, "base-differs", "model.norm.weight"):
        lx.load(tmp_path / "run")


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted()[0],
        lambda: lx.adapt(small(), kwargs={"input_ids": IDS}),
        lambda: lx.adapt(timm.create_model("test_resnet", in_chans=1).eval(), (X[:, :1],)),
        lambda: lx.adapt(timm.create_model("test_resnet", drop_rate=0.3).eval(), (X,)),
    ],
    ids=["plain", "from a config", "other channels", "other dropout"],
)
def test_a_base_that_has_no_name(make: Callable[[], lx.Cascade], tmp_path: Path) -> None:
    cascade = make()
    for call in (
        lambda: cascade.save_pretrained(tmp_path / "run"),
        lambda: cascade.push_to_hub("me/run", api=object()),
    ):
        with unchanged(cascade), raises(lx.StateError, "no-base", "lorasc_fx.save"):
            call()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_names_no_base(tmp_path: Path) -> None:
    cascade, _ = adapted()
    lx.save(cascade, tmp_path)
    with raises(lx.CheckpointError, "no-base", tmp_path, "save_pretrained"):
        lx.load(tmp_path)
    assert lx.load(tmp_path, mlp(), (torch.zeros(2, 5),)).stage == 1


def test_the_model_may_be_given_all_the_same(tmp_path: Path) -> None:
    cascade, _ = causal(tmp_path)
    in_a_second_stage(cascade).save_pretrained(tmp_path / "run")
    model = small()
    again = lx.load(tmp_path / "run", model, kwargs={"input_ids": IDS})
    assert again.release() is model


def test_no_inputs_are_in_a_folder(tmp_path: Path) -> None:
    """They may be data that nobody else shall have, in a folder on the hub; the first call makes the graph."""
    cascade, _ = causal(tmp_path)
    version = cascade.save_pretrained(tmp_path / "run")
    manifest = json.loads((version / "manifest.json").read_text())
    held = load_file(version / "state.safetensors")
    assert not any(value.dtype == IDS.dtype and value.shape == IDS.shape for value in held.values())
    assert "example" not in manifest
    with raises(lx.StateError, "not-available"):
        lx.load(tmp_path / "run").folded_graph()


def test_a_resume_from_a_folder_that_names_its_base(tmp_path: Path) -> None:
    """The newest version is the one that is loaded: one without the state of the optimizer is not written over it."""
    cascade, _ = causal(tmp_path)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    saved = lx.save(cascade, tmp_path / "run", optimizer=optimizer, extra={"step": 3})
    with raises(lx.StateError, "state-not-saved", saved, "optimizer="):
        cascade.save_pretrained(tmp_path / "run")
    assert [path for path in (tmp_path / "run").iterdir() if path.is_dir()] == [saved]
    version = cascade.save_pretrained(tmp_path / "run", optimizer=optimizer, extra={"step": 4})
    assert [path for path in (tmp_path / "run").iterdir() if path.is_dir()] == [version]
    again = lx.load(tmp_path / "run")
    assert again.resume(torch.optim.AdamW(again.param_groups(lr=0.3))) == {"step": 4}
    cascade.save_pretrained(tmp_path / "other")
    assert cascade.save_pretrained(tmp_path / "other").name == "version-00000002"


def test_a_base_whose_files_have_other_names(tmp_path: Path) -> None:
    """One tensor for each expert there, and one of all here: none of them is new, and the folder holds none."""
    torch.manual_seed(3)
    config = MixtralConfig(**tiny.SIZES, num_key_value_heads=1, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    assert any("experts.3" in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    cascade = lx.adapt(model, kwargs={"input_ids": IDS}, spec=lx.CascadeSpec(("*.self_attn.*",), rank=2))
    version = in_a_second_stage(cascade.eval()).save_pretrained(tmp_path / "run")
    assert not [key for key in load_file(version / "state.safetensors") if key.startswith("base/")]
    with torch.no_grad():
        assert torch.equal(lx.load(tmp_path / "run")(IDS).logits, cascade(IDS).logits)


def test_a_base_whose_files_are_not_here(tmp_path: Path) -> None:
    """Whether it has a new head cannot be told; a model that was moved has files of its own."""
    cascade, _ = classifier(tmp_path)
    (tmp_path / "base").rename(tmp_path / "away")
    with unchanged(cascade), raises(lx.StateError, "no-base", tmp_path / "base", "lorasc_fx.save"):
        cascade.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what a folder may name


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version of a run on a llama."""
    path = tmp_path_factory.mktemp("named")
    return causal(path)[0].save_pretrained(path / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"library": "os"}, ("invalid-checkpoint", "os")),
        ({"name": 3}, ("invalid-checkpoint", "model")),
        ({"name": "a\nb"}, ("invalid-checkpoint", "model")),
        ({"dtype": "int8"}, ("invalid-checkpoint", "int8")),
        ({"more": 1}, ("invalid-checkpoint", "model")),
        ({"options": {}}, ("invalid-checkpoint", "model.options.class is missing")),
        ({"options": {"class": "pipeline", "config": {}, "attention": None}}, ("no-base", "pipeline")),
        ({"options": {"class": "os", "config": {}, "attention": None}}, ("no-base", "os")),
        ({"options": {"class": "LlamaForCausalLM", "config": {}, "attention": "me/kernel"}}, ("invalid-checkpoint",)),
        ({"options": {"class": "BertModel", "config": {}, "attention": None}}, ("no-base", "a larger model")),
        ({"library": "timm", "options": {"num_classes": -1, "file": None}}, ("invalid-checkpoint", "num_classes")),
        ({"library": "timm", "options": {"num_classes": 3, "file": "w.pth"}}, ("no-base", "w.pth")),
    ],
)
def test_a_forged_name(changes: dict[str, Any], expected: tuple[str, ...], named: Path, tmp_path: Path) -> None:
    version = shutil.copytree(named, tmp_path / "run" / named.name)
    forge(version, lambda manifest: manifest["model"].update(changes))
    with raises(lx.CheckpointError, *expected):
        lx.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"attn_implementation": "me/kernel"}, ("invalid-checkpoint", "attn_implementation")),
        ({"_attn_implementation": "me/kernel"}, ("invalid-checkpoint", "_attn_implementation")),
        ({"_attn_implementation_internal": "me/kernel"}, ("invalid-checkpoint", "internal")),
        ({"attn_implementation": {"": "sdpa", "text_config": "me/kernel"}}, ("invalid-checkpoint", "text_config")),
        ({"attn_implementation": ["me/kernel"]}, ("invalid-checkpoint", "attn_implementation")),
        ({"text_config": {"deep": [{"attn_implementation": "me/kernel"}]}}, ("invalid-checkpoint", "deep.0")),
        ({"experts_implementation": "me/kernel"}, ("invalid-checkpoint", "experts_implementation")),
        ({"auto_map": {"AutoModel": "code.Model"}}, ("invalid-checkpoint", "auto_map")),
        ({"vision_config": {"trust_remote_code": True}}, ("invalid-checkpoint", "trust_remote_code")),
        ({"use_pretrained_backbone": True}, ("invalid-checkpoint", "use_pretrained_backbone")),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ("invalid-checkpoint", "quantization_config")),
        ({"text_config": {"quantization_config": {}}}, ("invalid-checkpoint", "quantization_config")),
        ({"num_hidden_layers": 100_000, "layer_types": None}, ("no-base", "a larger model")),
        ({"num_hidden_layers": 10**12, "layer_types": None}, ("no-base", "num_hidden_layers")),
        ({"num_labels": 10**10}, ("no-base", "num_labels")),
        ({"intermediate_size": 10**9}, ("no-base", "a larger model")),
        ({"vocab_size": 10**15}, ("no-base", "vocab_size")),
        ({"hidden_size": 10**400}, ("no-base", "hidden_size")),
    ],
)
def test_a_forged_configuration(
    settings: dict[str, Any], expected: tuple[str, ...], named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel is asked for, and no layer built that the files of the base cannot fill."""
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("asks for code"))
    version = shutil.copytree(named, tmp_path / "run" / named.name)
    options = json.loads((version / "manifest.json").read_bytes())["model"]["options"]
    forge(
        version,
        lambda manifest: manifest["model"].update(
            options={**options, "attention": None, "config": {**options["config"], **settings}}
        ),
    )
    begun = time.process_time()
    with raises(lx.CheckpointError, *expected):
        lx.load(tmp_path / "run")
    assert time.process_time() - begun < 2.0


def test_a_forged_number_of_classes(tmp_path: Path) -> None:
    """timm builds its models with memory, which no head takes here."""
    cascade, _ = image(tmp_path)
    version = cascade.save_pretrained(tmp_path / "run")
    options = json.loads((version / "manifest.json").read_bytes())["model"]["options"]
    forge(version, lambda manifest: manifest["model"].update(options={**options, "num_classes": 10**6}))
    with raises(lx.CheckpointError, "no-base", "a larger model"):
        lx.load(tmp_path / "run")


def test_large_numbers_of_the_files_themselves(tmp_path: Path) -> None:
    """Long contexts, and settings of code that the class of the library does not need."""
    llama(num_hidden_layers=1, max_position_embeddings=10**7).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    cascade = lx.adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), kwargs={"input_ids": IDS})
    version = cascade.save_pretrained(tmp_path / "run")
    assert "auto_map" not in (version / "manifest.json").read_text()
    assert lx.load(tmp_path / "run").model.config.max_position_embeddings == 10**7


@pytest.mark.parametrize(("value", "local"), [(None, True), ("1", True), ("", True), ("0", False), ("off", False)])
def test_only_local_files_unless_the_environment_allows_more(
    value: str | None, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository on the hub: nothing is fetched here, as the download is a stand-in that gives files of ours."""
    model = timm.create_model("test_resnet.r160_in1k")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, str, bool]] = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def download(repository: str, name: str, *, local_files_only: bool) -> str:
        asked.append((repository, name, local_files_only))
        return str(tmp_path / name)

    cascade = lx.adapt(model.eval(), (X,), spec=lx.CascadeSpec(rank=2))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    cascade.save_pretrained(tmp_path / "run")
    asked.clear()
    if value is None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    lx.load(tmp_path / "run")
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors", local)]


# ---- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The calls of huggingface_hub's own class, by their signatures; what is uploaded is kept in `brought`."""
    api = mock.create_autospec(huggingface_hub.HfApi, instance=True)

    def upload(*, folder_path: str, **_: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, tmp_path / "brought")
        return SimpleNamespace(commit_url="https://huggingface.co/me/run/commit/abc")

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **how: api.made(**how) or api)
    api.made = mock.Mock(return_value=None)
    return api


def test_a_run_on_the_hub(hub: Any, tmp_path: Path) -> None:
    cascade, args = causal(tmp_path)
    in_a_second_stage(cascade.eval())
    with unchanged(cascade):
        url = cascade.push_to_hub("me/run", private=True, commit_message="two stages", api=hub)
    assert url == "https://huggingface.co/me/run/commit/abc"
    hub.create_repo.assert_called_once_with("me/run", private=True, exist_ok=True)
    assert hub.upload_folder.call_args.kwargs["commit_message"] == "two stages"
    (version,) = (tmp_path / "brought").iterdir()
    assert sorted(path.name for path in version.iterdir()) == ["manifest.json", "state.safetensors"]
    again = lx.load(tmp_path / "brought")
    with torch.no_grad():
        assert torch.equal(again(*args).logits, cascade(*args).logits)


def test_token_and_branch_are_given_as_to_peft(hub: Any, tmp_path: Path) -> None:
    cascade, _ = causal(tmp_path)
    cascade.push_to_hub("me/run", token="hf_of_somebody", revision="v1")
    hub.made.assert_called_once_with(token="hf_of_somebody")
    hub.create_branch.assert_called_once_with("me/run", branch="v1", exist_ok=True)
    assert hub.upload_folder.call_args.kwargs["revision"] == "v1"
    with raises(lx.SpecError, "conflicting-options", "token", "api"):
        cascade.push_to_hub("me/run", token="hf_of_somebody", api=hub)


# ---- peft's Auto classes


def test_peft_finds_base_and_task(tmp_path: Path) -> None:
    cascade, args = causal(tmp_path)
    in_a_second_stage(cascade.eval())
    lx.export.peft(cascade, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    with cascade.weights("slow"), torch.no_grad():
        expected = cascade.model(*args).logits
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"
    torch.testing.assert_close(theirs(*args).logits, cascade_slow_after(cascade, args), atol=1e-9, rtol=0)
    assert not torch.equal(expected, theirs(*args).logits)  # the running stage counts in the export


def cascade_slow_after(cascade: lx.Cascade, args: tuple[Any, ...]) -> torch.Tensor:
    """Logits of the slow weights once the running stage is folded, as an export has it."""
    with torch.no_grad():
        output = torch.func.functional_call(cascade.model, cascade.folded_state_dict(), args)
    logits: torch.Tensor = output.logits
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {"train": ("classifier.*",)},
        {},
        {"targets": ("*.query.*",)},
        {"adapter": "dora", "exclude": ("*embeddings*",)},
        {"noise": lx.Noise(0.3)},
    ],
    ids=["trained in full", "adapted", "neither", "magnitudes", "noise"],
)
def test_the_head_of_a_classifier_of_texts(options: dict[str, Any], tmp_path: Path) -> None:
    bert("ForSequenceClassification").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    cascade = lx.adapt(model.eval(), kwargs={"input_ids": IDS}, spec=lx.CascadeSpec(rank=2, **options))
    in_a_second_stage(cascade)
    written = lx.export.peft(cascade, tmp_path / "adapter", max_rank=None)
    assert written.saved == ("classifier",)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    expected = cascade_slow_after(cascade, (IDS,))
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-5, rtol=0)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    back = lx.from_peft(tmp_path / "adapter", base, kwargs={"input_ids": IDS})
    torch.testing.assert_close(cascade_slow_after(back, (IDS,)), expected, atol=1e-5, rtol=0)


def test_a_head_alone_is_an_adapter_of_no_task(tmp_path: Path) -> None:
    bert("ForSequenceClassification").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    cascade = lx.adapt(model, kwargs={"input_ids": IDS}, spec=lx.CascadeSpec(("classifier.*",), rank=2))
    in_a_second_stage(cascade)
    with raises(lx.SpecError, "conflicting-options", "classifier", "SEQ_CLS"):
        lx.export.peft(cascade, tmp_path / "other", task_type="SEQ_CLS")
    lx.export.peft(cascade, tmp_path / "adapter")
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, cascade_slow_after(cascade, (IDS,)), atol=1e-5, rtol=0)


def test_a_task_that_peft_has_not(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "base").eval()
    cascade = in_a_second_stage(lx.adapt(model, kwargs={"input_ids": IDS}, spec=lx.CascadeSpec(("*.query.*",), rank=2)))
    lx.export.peft(cascade, tmp_path / "adapter")
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, cascade_slow_after(cascade, (IDS,)), atol=1e-5, rtol=0)
