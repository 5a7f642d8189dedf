"""Export: `lx.export.peft` writes adapters that peft loads with equal outputs, or names every weight that it cannot."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from lorasc_fx.export import ExportError
from tests.errors.state import unchanged
from tests.kit.errors import raises, warns
from tests.kit.models import Tied, randomize
from tests.kit.seams import SEAMS
from tests.kit.state import weight_states
from tests.peft.models import (
    BUILD,
    INPUTS,
    Gate,
    Suffixes,
    cascade_of,
    close,
    folded,
    gap,
    loaded,
    made,
    normal,
    seeded,
    tokens,
)

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft's, of a model that has both
]


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config


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


def test_the_task_is_the_models_unless_it_is_given(tmp_path: Path) -> None:
    cascade = cascade_of("bert", exclude=("classifier",))
    for task, written in ((None, "SEQ_CLS"), ("TOKEN_CLS", "TOKEN_CLS")):
        lx.export.peft(cascade, tmp_path / written, task_type=task)
        assert config_in(tmp_path / written)["task_type"] == written


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("suffixes", {}),
        ("words", {"targets": ("emb", "up"), "train": ("head", "norm")}),
        ("suffixes", {"train": ("1.lin.bias", "lin.bias")}),
        ("convs", {}),
        pytest.param("llama", {"train": ("model.norm", "lm_head")}, marks=slow),
        pytest.param("gpt2", {}, marks=slow),
        ("words", {"adapter": "dora", "targets": ("up",)}),
        ("suffixes", {"start": "pissa"}),
        ("suffixes", {"restart": "fast"}),
        ("bert", {"exclude": ("classifier",)}),  # whose head peft's class for the task would take from the adapter
    ],
)
def test_all_stages_become_one_adapter(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    cascade = cascade_of(name, **spec)
    written = lx.export.peft(cascade, tmp_path / "adapter")
    expected = {site.weight: min(4, *site.matrix_shape) for site in cascade.sites}  # two experts of rank 2
    assert written.ranks == expected
    low = "4" if min(expected.values()) == 4 else f"{min(expected.values())} to 4"
    assert str(written).partition(";")[0] == f"{tmp_path}/adapter: {len(expected)} weights adapted, ranks {low}"
    assert_loads(cascade, name, tmp_path / "adapter")
    config = config_in(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 4
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert config["bias"] == ("lora_only" if "lin.bias" in spec.get("train", ()) else "none")


def test_the_cascade_is_unchanged(tmp_path: Path) -> None:
    cascade = cascade_of("words", targets=("emb", "up"), train=("head",), noise=lx.Noise(0.2))
    with unchanged(cascade):
        lx.export.peft(cascade, tmp_path)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in cascade.model.modules())
    cascade.transition(None)  # and goes on


def test_ranks_by_exact_patterns(tmp_path: Path) -> None:
    rules = (lx.Rule("1.lin", rank=3), lx.Rule("lin.weight", rank=5))
    cascade = cascade_of("suffixes", stages=1, rules=rules, exclude=("deep",))
    written = lx.export.peft(cascade, tmp_path)
    assert_loads(cascade, "suffixes", tmp_path)
    config = config_in(tmp_path)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^1\.lin": 3, "^lin": 5}
    ranks = {name.removesuffix(".weight"): rank for name, rank in written.ranks.items()}
    assert ranks == {"1.lin": 3, "1.other": 2, "11.lin": 2, "11.other": 2, "lin": 5}


def test_one_rank_for_loaders_that_ignore_patterns(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", rules=(lx.Rule("lin", rank=5),))
    lx.export.peft(cascade, tmp_path, uniform_rank=True)
    assert_loads(cascade, "suffixes", tmp_path)
    config = config_in(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {5}


def test_a_smaller_rank_and_its_exact_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lorasc_fx")
    cascade = cascade_of("convs", stages=3)
    written = lx.export.peft(cascade, tmp_path, max_rank=3)
    assert max(written.ranks.values()) == 3
    before, right = made(BUILD["convs"]).state_dict(), cascade.folded_state_dict()
    merged = loaded("convs", tmp_path).merge_and_unload().state_dict()
    assert "stem.weight" in written.cut
    for name, cut in written.cut.items():
        delta, kept = right[name] - before[name], merged[name] - before[name]
        values = torch.linalg.svdvals(delta.flatten(1))
        assert cut.error == pytest.approx(float((delta - kept).norm()), rel=1e-9)
        assert cut.error == pytest.approx(float(values[3:].norm()), rel=1e-9)  # Eckart and Young: no pair is nearer
        assert cut.norm == pytest.approx(float(delta.norm()), rel=1e-9)
        assert f"{name}: rank {cut.before} to 3, error {cut.error:.3g}" in caplog.text
    assert any(cut.relative > 0.05 for cut in written.cut.values())


def test_a_dense_delta_is_factored_at_its_rank(tmp_path: Path) -> None:
    """After the collapse there are no experts, so their dense sum is factored again."""
    cascade = cascade_of("suffixes", stages=4, running=False)
    assert all(state.is_dense for state in weight_states(cascade).values())
    written = lx.export.peft(cascade, tmp_path)
    assert written.ranks["deep.lin.weight"] == 4
    assert written.ranks["1.lin.weight"] == 6
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
    lx.export.peft(cascade, tmp_path / "double")
    double = load_file(tmp_path / "double" / "adapter_model.safetensors")
    assert {value.dtype for value in double.values()} == {torch.float64}
    for name, value in double.items():
        assert torch.equal(half[name], value.bfloat16())


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    cascade = cascade_of("suffixes", stages=1)
    lx.export.peft(cascade, folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    before = (folder / "adapter_model.safetensors").read_bytes()
    cascade.transition(None)
    randomize(cascade, seed=77)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*SEAMS["write an adapter"], full)
        with raises(lx.export.ExportError, "write-failed", "adapter"):
            lx.export.peft(cascade, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    lx.export.peft(cascade, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_loads(cascade, "suffixes", folder)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.lin = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(self.att(x, x, x)[0])
        return out


class Outer(nn.Module):
    """A module with a parameter and a linear layer. peft wraps the module because of the parameter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.rows, self.inner = nn.Parameter(torch.randn(6, 6) / 3), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(F.linear(x, self.rows))
        return out


class Positions(nn.Embedding):
    """An embedding that shifts its indices, like OPT's positions."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.cumsum(1))


class Scaled(nn.Embedding):
    """An embedding that scales its output, like Gemma's."""

    embed_scale = 2.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Looks(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.lin = table, nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(self.table(ids))
        return out


def images() -> tuple[torch.Tensor]:
    return (normal(3, 4, 6),)


def words() -> tuple[torch.Tensor]:
    return (tokens(3, 4, high=5),)


def normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


def wide() -> Conv1D:
    layer = Conv1D(7, 6)
    nn.init.normal_(layer.weight)
    return layer


Build = Callable[[], nn.Module]
# fmt: off
CASES: dict[str, tuple[Build, Callable[[], Any], dict[str, Any], list[str]]] = {
    "packed projection": (Attention, images, {"exclude": ("att.out_proj",)}, ["att.in_proj_weight"]),
    "a linear below a parameter": (lambda: nn.Sequential(Outer(nn.Linear(6, 6)), nn.Linear(6, 3)), images,
        {"train": ("1.bias",)}, ["0.rows"]),
    "Conv1D, linear": (lambda: nn.Sequential(wide(), nn.Linear(7, 3)), images, {}, []),
    "Conv1D beside a parameter": (lambda: nn.Sequential(wide(), nn.Linear(7, 6), Gate()), images, {},
        ["0.weight", "2.rows"]),
    "weight norm": (normed, images, {}, ["0.weight_v"]),
    "a subclass of Embedding": (lambda: Looks(Positions(30, 6)), words, {}, ["table.weight"]),
    "a scaled embedding": (lambda: Looks(Scaled(11, 6)), words, {}, []),
    "a bag": (lambda: Looks(nn.EmbeddingBag(11, 6)), words, {}, ["table.weight"]),
    "an encoder that is never fused": (lambda: nn.TransformerEncoderLayer(6, 3, 8, 0.0, batch_first=True), images,
        {"targets": ("linear*",)}, []),
}
# fmt: on


def built(build: Build) -> nn.Module:
    torch.manual_seed(1)
    return build().double().eval()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=slow) if case in ("packed projection", "an encoder that is never fused") else case
        for case in CASES
    ],
)
def test_adapted_modules_and_parameters(case: str, tmp_path: Path) -> None:
    build, inputs, spec, parameters = CASES[case]
    args = inputs()
    cascade = lx.adapt(built(build), args, spec=lx.CascadeSpec(rank=2, pace=1.0, **spec))
    randomize(cascade)
    lx.export.peft(cascade, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert sorted(config.target_parameters or []) == parameters
    theirs = peft.PeftModel.from_pretrained(built(build), tmp_path).eval()
    with torch.no_grad():
        adapted = seeded(theirs, args)
        base = seeded(built(build), args)
        right = seeded(cascade.release(), args)
    assert gap(adapted, right) < 1e-10
    assert gap(right, base) > 1e-2


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")  # peft's, that it cannot merge
def test_a_quantized_base(tmp_path: Path) -> None:
    """A quantized weight cannot store a delta, so the run is exported as an adapter and imported again."""

    def base() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    cascade = lx.adapt(base(), (x,), spec=lx.CascadeSpec(rank=2, pace=1.0))
    for stage in range(2):
        randomize(cascade, seed=stage)
        cascade.transition(None)
    lx.export.peft(cascade, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    again = lx.from_peft(tmp_path, base(), (x,))
    with torch.no_grad():
        assert gap(theirs(x), cascade(x)) < 1e-5
        assert gap(again(x), theirs(x)) < 1e-5
        assert gap(theirs(x), base()(x)) > 0.1


class Net(nn.Module):
    """A linear layer and another module."""

    def __init__(
        self, module: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any] = lambda module, x: module(x)
    ) -> None:
        super().__init__()
        self.lin, self.other, self.call = nn.Linear(6, 6), module, call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.other, torch.tanh(self.lin(x)))


class Shared(nn.Module):
    """A model with one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return out


class TopParameter(nn.Module):
    """A model with a parameter in the top module."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.lin = nn.Parameter(torch.randn(6, 6) / 3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.lin(x), self.rows)


def attend(attention: nn.Module, x: torch.Tensor) -> Any:
    return attention(x, x, x)[0]


def image(conv: nn.Module, x: torch.Tensor) -> Any:
    return conv(x.unflatten(2, (2, 3)))


READ = "reads it without calling the module that holds it, so that an adapter of peft has no effect"
FUSED = "in eval mode, torch's fused TransformerEncoderLayer does not call the modules that peft adapts"
PARAMETER = "it is a parameter of a {}, where peft's target_parameters have no effect"

# fmt: off
UNEXPRESSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, str]]] = {
    "grouped": (lambda: Net(nn.Conv2d(4, 6, 2, groups=2), image), {},
        {"other.weight": "peft's adapter of a grouped convolution mixes the groups"}),
    "transposed": (lambda: Net(nn.ConvTranspose2d(4, 3, 2), image), {},
        {"other.weight": "peft adapts no ConvTranspose2d: .*"}),
    "dilated": (lambda: Net(nn.Conv2d(4, 3, 2, dilation=2, padding="same"), image), {},
        {"other.weight": "peft's adapter of this Conv2d does not compute the same as the merged weight .*"}),
    "attention": (lambda: Net(nn.MultiheadAttention(6, 2), attend), {},
        {"other.out_proj.weight": f"MultiheadAttention {READ}"}),
    "encoder": (lambda: Net(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)), {},
        {"other.linear1.weight": FUSED, "other.linear2.weight": FUSED, "other.self_attn.in_proj_weight": FUSED,
        "other.self_attn.out_proj.weight": f"MultiheadAttention {READ}"}),
    "read by another": (lambda: Net(nn.Linear(6, 4), lambda module, x: x @ module.weight.T), {},
        {"other.weight": f"Net {READ}"}),
    "recurrent": (lambda: Net(nn.GRU(6, 4, batch_first=True), lambda module, x: module(x)[0]), {},
        {"other.weight_hh_l0": PARAMETER.format("GRU"), "other.weight_ih_l0": PARAMETER.format("GRU")}),
    "shared module": (Shared, {},
        {"one.weight": "its module has the paths one and two, and peft adapts only one of them"}),
    "top module": (TopParameter, {}, {"rows": "it is a parameter of the top module, which peft cannot wrap"}),
    "top module, in full": (TopParameter, {"targets": ("lin",), "train": ("rows",)}, {"rows": ".*"}),
    "nested parameters": (lambda: nn.Sequential(Outer(Outer(nn.Linear(6, 6)))), {},
        dict.fromkeys(("0.inner.inner.weight", "0.inner.rows", "0.rows"), "peft refuses.*has no attribute `inner`")),
    "kept noise": (Suffixes, {"noise": lx.Noise(0.1, keep=True), "targets": ("lin",)},
        {"lin.weight": ".*noise.keep.*"}),
    "the path of a saved module is a suffix": (Suffixes, {"exclude": ("1.lin.weight",), "train": ("1.lin.bias",)},
        dict.fromkeys(("1.lin.bias", "1.other.weight", "11.lin.weight", "11.other.weight", "deep.lin.weight",
            "lin.weight"), "peft refuses this adapter: modules_to_save .*")),
}
# fmt: on


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=slow) if case == "encoder" else case for case in UNEXPRESSED]
)
def test_changes_that_no_adapter_expresses(case: str, tmp_path: Path) -> None:
    build, spec, reasons = UNEXPRESSED[case]
    cascade = lx.adapt(made(build), (normal(2, 4, 6),), spec=lx.CascadeSpec(rank=2, **spec))
    modules = dict(cascade.model.named_modules())
    randomize(cascade)
    with raises(ExportError, "not-exportable") as caught:
        lx.export.peft(cascade, tmp_path / "adapter")
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == len(reasons), lines
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert re.fullmatch(rf"  {re.escape(name)}: {reason}", line), line
    assert not list(tmp_path.iterdir())
    assert dict(cascade.model.named_modules()) == modules
    cascade.transition(None)


@pytest.mark.slow
def test_an_adapted_head_of_a_classifier(tmp_path: Path) -> None:
    """peft's class for the task would save the head completely, so the adapter has no task."""
    cascade = cascade_of("bert")
    lx.export.peft(cascade, tmp_path / "adapter")
    assert config_in(tmp_path / "adapter")["task_type"] is None
    assert_loads(cascade, "bert", tmp_path / "adapter")
    with raises(ExportError, "not-exportable", "classifier.weight", "if it saves classifier"):
        lx.export.peft(cascade, tmp_path / "other", task_type="SEQ_CLS")


def test_the_name_of_the_base(tmp_path: Path) -> None:
    """As timm loads it, as transformers has loaded it, or as it was given."""
    model: Any = timm.layers.Mlp(6)
    cascade = lx.adapt(model, (torch.randn(2, 6),), spec=lx.CascadeSpec(rank=2))
    randomize(cascade)
    hub = {"hf_hub_id": "timm/net", "file": "net.pt", "architecture": "net", "tag": None}
    for config, name_or_path, inner, given, expected in (
        (hub | {"source": "local-dir"}, "other", "inner", None, "local-dir:net.pt"),
        (hub | {"source": "hf-hub"}, "other", "inner", None, "hf-hub:timm/net"),
        (hub | {"tag": "in1k"}, "other", "inner", None, "net.in1k"),
        (hub, "other", "inner", None, "net"),
        (None, "other", "inner", None, "other"),
        (None, None, "inner", None, "inner"),
        (None, "", "", None, None),
        (None, 3, "inner", None, None),
        (hub, "other", "inner", "given", "given"),
    ):
        model.pretrained_cfg, model.name_or_path = config, name_or_path
        model.config = SimpleNamespace(_name_or_path=inner)
        lx.export.peft(cascade, tmp_path, base_model=given)
        assert config_in(tmp_path)["base_model_name_or_path"] == expected


def test_invalid_calls(tmp_path: Path) -> None:
    untrained = lx.adapt(made(Suffixes), (normal(3, 4, 6),), spec=lx.CascadeSpec(rank=2))
    with raises(lx.StateError, "not-available"):
        lx.export.peft(untrained, tmp_path)
    cascade = cascade_of("suffixes", stages=1)
    with raises(lx.StateError, "unknown-name", "slow", "fast", "averaged"):
        lx.export.peft(cascade, tmp_path, view="base")
    with raises(lx.SpecError, "invalid-value", "max_rank", "0"):
        lx.export.peft(cascade, tmp_path, max_rank=0)
    options: Any
    for options in ({"residual": 0}, {"residual": 1, "view": "fast"}, {"residual": 2.0}):
        with raises(lx.SpecError, "invalid-value", f"residual is {options['residual']}"):
            lx.export.peft(cascade, tmp_path, **options)
    with raises(lx.SpecError, "invalid-value", "dtype", "torch.int8"):
        lx.export.peft(cascade, tmp_path, dtype=torch.int8)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with raises(ExportError, "path-in-the-way", "file"):
        lx.export.peft(cascade, tmp_path / "file")
    with raises(ExportError, "path-in-the-way", "adapter_config.json"):
        lx.export.peft(cascade, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
