"""Export: `lx.export.peft` writes adapters that `peft.PeftModel.from_pretrained` loads with equal outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from tests.kit.errors import raises, warns
from tests.kit.models import Tied, randomize
from tests.kit.seams import SEAMS
from tests.kit.state import weight_states
from tests.peft.adapters import cascade_of, close, folded, loaded
from tests.peft.models import BUILD, INPUTS, gap, made, seeded

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft's, of a model that has both
]


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def assert_loads(cascade: lx.Cascade, name: str, folder: Path, merges: bool = True) -> None:
    """Assert that peft's model, with its adapter and merged, computes the same as the slow weights."""
    args = INPUTS[name]()
    with torch.no_grad():
        right, base = seeded(folded(cascade, name), args), seeded(made(BUILD[name]), args)
        theirs = loaded(name, folder)
        close(seeded(theirs, args), right)
        assert gap(right, base) > 1e-2
        if merges:
            close(seeded(theirs.merge_and_unload(), args), right)


@pytest.mark.parametrize(("given", "written"), [(None, "SEQ_CLS"), ("TOKEN_CLS", "TOKEN_CLS")])
def test_the_task_is_the_models_unless_it_is_given(given: str | None, written: str, tmp_path: Path) -> None:
    cascade = cascade_of("bert", exclude=("classifier",))
    lx.export.peft(cascade, tmp_path / "adapter", task_type=given)
    assert config_in(tmp_path / "adapter")["task_type"] == written


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("suffixes", {}),
        ("words", {"targets": ("emb", "up"), "train": ("head", "norm")}),
        ("convs", {}),
        pytest.param("llama", {"train": ("model.norm", "lm_head")}, marks=slow),
        pytest.param("gpt2", {}, marks=slow),
        ("bert", {"exclude": ("classifier",)}),  # whose head peft's class for the task would take from the adapter
    ],
)
def test_all_stages_become_one_adapter(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    cascade = cascade_of(name, **spec)
    written = lx.export.peft(cascade, tmp_path / "adapter")
    expected = {site.weight: min(4, *site.matrix_shape) for site in cascade.sites}  # two experts of rank 2
    assert written.ranks == expected
    assert_loads(cascade, name, tmp_path / "adapter")
    config = config_in(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 4
    assert config["fan_in_fan_out"] is (name == "gpt2")


def test_the_cascade_is_unchanged(tmp_path: Path) -> None:
    cascade = cascade_of("words", targets=("emb", "up"), train=("head",), noise=lx.Noise(0.2))
    before = {name: value.clone() for name, value in cascade.state_dict().items()}
    drawn = torch.get_rng_state()
    lx.export.peft(cascade, tmp_path)
    assert torch.equal(drawn, torch.get_rng_state())
    after = cascade.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in cascade.model.modules())
    cascade.transition(None)  # and goes on


def test_fast_weights(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", pace=0.25)
    lx.export.peft(cascade, tmp_path / "fast", view="fast")
    with torch.no_grad(), cascade.weights("fast"):
        right = seeded(cascade.model, INPUTS["suffixes"]())
    close(seeded(loaded("suffixes", tmp_path / "fast"), INPUTS["suffixes"]()), right)
    lx.export.peft(cascade, tmp_path / "slow")
    assert gap(seeded(loaded("suffixes", tmp_path / "slow"), INPUTS["suffixes"]()), right) > 1e-2


@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_a_running_stage_counts_as_in_release(restart: str, tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=3, restart=restart)
    lx.export.peft(cascade, tmp_path)
    args = INPUTS["suffixes"]()
    theirs = seeded(loaded("suffixes", tmp_path), args)
    close(theirs, seeded(cascade.release(), args))


def test_ranks_by_exact_patterns(tmp_path: Path) -> None:
    rules = (lx.Rule("1.lin", rank=3), lx.Rule("lin.weight", rank=5))
    cascade = cascade_of("suffixes", stages=1, rules=rules, exclude=("deep",))
    lx.export.peft(cascade, tmp_path)
    assert_loads(cascade, "suffixes", tmp_path)
    config = config_in(tmp_path)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^1\.lin": 3, "^lin": 5}
    theirs = loaded("suffixes", tmp_path)
    ranks = {
        name: module.r["default"] for name, module in theirs.base_model.model.named_modules() if hasattr(module, "r")
    }
    assert ranks == {"1.lin": 3, "1.other": 2, "11.lin": 2, "11.other": 2, "lin": 5}


def test_one_rank_for_loaders_that_ignore_patterns(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", rules=(lx.Rule("lin", rank=5),))
    lx.export.peft(cascade, tmp_path, uniform_rank=True)
    assert_loads(cascade, "suffixes", tmp_path)
    config = config_in(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {8}


def test_a_smaller_rank_and_its_exact_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lorasc_fx")
    cascade = cascade_of("convs", stages=3)
    written = lx.export.peft(cascade, tmp_path, max_rank=3)
    assert max(written.ranks.values()) == 3
    before, right = made(BUILD["convs"]).state_dict(), cascade.folded_state_dict()
    merged = loaded("convs", tmp_path).merge_and_unload().state_dict()
    assert "stem.weight" in written.cut
    for name, cut in written.cut.items():
        delta, kept = (each[name] - before[name] for each in (right, merged))
        values = torch.linalg.svdvals(delta.flatten(1))
        assert cut.error == pytest.approx(float((delta - kept).norm()), rel=1e-9)
        assert cut.error == pytest.approx(float(values[3:].norm()), rel=1e-9)  # Eckart and Young: no pair is nearer
        assert cut.norm == pytest.approx(float(delta.norm()), rel=1e-9)
        assert (
            f"{name}: rank {cut.before} to 3, error {cut.error:.3g} of {cut.norm:.3g} ({cut.relative:.2%})"
            in caplog.text
        )
    assert any(cut.relative > 0.05 for cut in written.cut.values())


def test_a_dense_delta_is_factored_at_its_rank(tmp_path: Path) -> None:
    """After the collapse there are no experts, so their dense sum is factored again."""
    cascade = cascade_of("suffixes", stages=4, running=False)
    assert all(state.is_dense for state in weight_states(cascade).values())
    written = lx.export.peft(cascade, tmp_path)
    assert written.ranks["deep.lin.weight"] == 4
    assert written.ranks["1.lin.weight"] == 6
    assert_loads(cascade, "suffixes", tmp_path)


def test_biases_of_adapted_modules(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", train=("1.lin.bias", "lin.bias"))
    lx.export.peft(cascade, tmp_path)
    assert config_in(tmp_path)["bias"] == "lora_only"
    assert_loads(cascade, "suffixes", tmp_path)


def test_only_parameters_trained_in_full(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(targets=("up",), train=("head.2.bias",), pace=1.0)
    cascade = lx.adapt(made(BUILD["words"]), INPUTS["words"](), spec=spec)
    with torch.no_grad():
        cascade.model.head[2].bias.add_(1.0)
    assert lx.export.peft(cascade, tmp_path).saved == ("head.2",)
    assert_loads(cascade, "words", tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_weight_has_two_pairs(tmp_path: Path) -> None:
    model = made(Tied)
    ids = (torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(2)),)
    cascade = lx.adapt(copy.deepcopy(model), ids, spec=lx.CascadeSpec(rank=2, pace=1.0))
    randomize(cascade)
    with warns("tied-weight-exported-twice", "table.weight"):
        lx.export.peft(cascade, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    with torch.no_grad():
        adapted = seeded(theirs, ids)
        close(adapted, seeded(cascade.release(), ids))


def test_factors_of_a_dtype(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=1)
    lx.export.peft(cascade, tmp_path / "half", dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    lx.export.peft(cascade, tmp_path / "own")
    own = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert {value.dtype for value in own.values()} == {torch.float64}
    for name, value in own.items():
        assert torch.equal(half[name], value.bfloat16())
    single = lx.adapt(made(BUILD["suffixes"]).float(), (INPUTS["suffixes"]()[0].float(),), spec=lx.CascadeSpec(rank=2))
    randomize(single)
    lx.export.peft(single, tmp_path / "single")
    found = load_file(tmp_path / "single" / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    cascade = cascade_of("suffixes", stages=1)
    lx.export.peft(cascade, folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    first = (folder / "adapter_model.safetensors").read_bytes()
    cascade.transition(None)
    randomize(cascade, seed=77)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*SEAMS["write an adapter"], full)
        with raises(lx.export.ExportError, "write-failed", "adapter"):
            lx.export.peft(cascade, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == first
    lx.export.peft(cascade, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_loads(cascade, "suffixes", folder)
