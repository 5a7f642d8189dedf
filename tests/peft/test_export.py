"""Export: `lx.export.peft` writes adapters that peft loads with equal outputs, or names every weight that it cannot."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from lorasc_fx.export import ExportError
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
    found = Conv1D(7, 6)
    nn.init.normal_(found.weight)
    return found


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
    "an embedding of its own": (lambda: Looks(Positions(30, 6)), words, {}, ["table.weight"]),
    "a scaled embedding": (lambda: Looks(Scaled(11, 6)), words, {}, []),
    "a bag": (lambda: Looks(nn.EmbeddingBag(11, 6)), words, {}, ["table.weight"]),
    "an encoder that is never fused": (lambda: nn.TransformerEncoderLayer(6, 3, 8, 0.0, batch_first=True), images,
        {"targets": ("linear*",)}, []),
}
# fmt: on


SLOW = pytest.mark.slow


def built(build: Build) -> nn.Module:
    torch.manual_seed(1)
    return build().double().eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # peft's, of a model that has both
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, marks=SLOW) if each in ("packed projection", "an encoder that is never fused") else each
        for each in CASES
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


ODD: dict[str, tuple[Build, str, str]] = {
    "nested parameters": (
        lambda: nn.Sequential(Outer(Outer(nn.Linear(6, 6)))),
        "0.inner.rows",
        "peft refuses this adapter: ParamWrapper has no attribute `inner`",
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        "0.parametrizations.weight.original1",
        "it is a parameter of a ParametrizationList, where peft's target_parameters have no effect",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_adapters_that_peft_could_not_load(case: str, tmp_path: Path) -> None:
    build, name, reason = ODD[case]
    cascade = lx.adapt(built(build), images(), spec=lx.CascadeSpec(rank=2))
    modules = dict(cascade.model.named_modules())
    randomize(cascade)
    with raises(lx.export.ExportError, "not-exportable", name, reason):
        lx.export.peft(cascade, tmp_path)
    assert dict(cascade.model.named_modules()) == modules


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
        self, other: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any] = lambda other, x: other(x)
    ) -> None:
        super().__init__()
        self.lin, self.other, self.call = nn.Linear(6, 6), other, call

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


class Own(nn.Module):
    """A model with a parameter in the top module."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.lin = nn.Parameter(torch.randn(6, 6) / 3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.lin(x), self.rows)


def encoder(batch_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=batch_first)


def attend(other: nn.Module, x: torch.Tensor) -> Any:
    return other(x, x, x)[0]


def image(other: nn.Module, x: torch.Tensor) -> Any:
    return other(x.unflatten(2, (2, 3)))


READ = "reads it without calling the module that holds it, so that an adapter of peft has no effect"
FUSED = "in eval mode, torch's fused TransformerEncoderLayer does not call the modules that peft adapts"
OTHER = (
    r"peft's adapter of this {} does not compute the same as the merged weight "
    r"\(relative error of the change: [\d.e-]+\)"
)

# fmt: off
UNEXPRESSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "grouped": (lambda: Net(nn.Conv2d(4, 6, 2, groups=2), image),
        {"other.weight": "peft's adapter of a grouped convolution mixes the groups"}),
    "transposed": (lambda: Net(nn.ConvTranspose2d(4, 3, 2), image),
        {"other.weight": "peft adapts no ConvTranspose2d: .*"}),
    "dilated": (lambda: Net(nn.Conv2d(4, 3, 2, dilation=2, padding="same"), image),
        {"other.weight": OTHER.format("Conv2d")}),
    "padding mode": (lambda: Net(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), image),
        {"other.weight": OTHER.format("Conv2d")}),
    "attention": (lambda: Net(nn.MultiheadAttention(6, 2), attend),
        {"other.out_proj.weight": f"MultiheadAttention {READ}"}),
    "encoder": (lambda: Net(encoder()), {"other.linear1.weight": FUSED, "other.linear2.weight": FUSED,
        "other.self_attn.in_proj_weight": FUSED, "other.self_attn.out_proj.weight": f"MultiheadAttention {READ}"}),
    "read by another": (lambda: Net(nn.Linear(6, 4), lambda other, x: F.linear(x, other.weight, other.bias)),
        {"other.weight": f"Net {READ}"}),
    "read by another, transposed": (lambda: Net(nn.Linear(6, 4), lambda other, x: x @ other.weight.T),
        {"other.weight": f"Net {READ}"}),
    "called and read": (lambda: Net(nn.Linear(6, 6), lambda other, x: F.linear(other(x), other.weight)),
        {"other.weight": f"Net {READ}"}),
    "recurrent": (lambda: Net(nn.GRU(6, 4, batch_first=True), lambda other, x: other(x)[0]),
        {"other.weight_hh_l0": "it is a parameter of a GRU, where peft's target_parameters have no effect",
        "other.weight_ih_l0": "it is a parameter of a GRU, where peft's target_parameters have no effect"}),
    "shared module": (Shared, {"one.weight": "its module has the paths one and two, and peft adapts only one of them"}),
    "top module": (Own, {"rows": "it is a parameter of the top module, which peft cannot wrap"}),
}
# fmt: on


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=pytest.mark.slow) if each == "encoder" else each for each in UNEXPRESSED]
)
def test_changes_that_no_adapter_expresses(case: str, tmp_path: Path) -> None:
    build, reasons = UNEXPRESSED[case]
    args = (normal(2, 4, 6),)
    cascade = lx.adapt(made(build), args, spec=lx.CascadeSpec(rank=2))
    randomize(cascade)
    with pytest.raises(ExportError) as caught:
        lx.export.peft(cascade, tmp_path / "adapter")
    summary, *lines = str(caught.value).splitlines()
    assert summary.startswith("export.peft: an adapter of peft cannot express the change of these weights; nothing was")
    assert len(lines) == len(reasons), lines
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert re.fullmatch(rf"  {re.escape(name)}: {reason}", line), line
    assert not list(tmp_path.iterdir())
    cascade.transition(None)


def test_kept_noise(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", noise=lx.Noise(0.1, keep=True), targets=("lin",))
    with raises(ExportError, "not-exportable", "lin.weight", "noise.keep"):
        lx.export.peft(cascade, tmp_path)


def test_a_parameter_trained_in_full_in_the_top_module(tmp_path: Path) -> None:
    cascade = lx.adapt(made(Own), (normal(2, 4, 6),), spec=lx.CascadeSpec(targets=("lin",), train=("rows",)))
    randomize(cascade)
    with raises(ExportError, "not-exportable", "\n  rows: "):
        lx.export.peft(cascade, tmp_path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(x) * self.scale
        return out


def test_a_module_that_contains_an_adapted_one(tmp_path: Path) -> None:
    """peft would save it completely, and it has no factors then."""
    spec = lx.CascadeSpec(train=("other.scale",), pace=1.0)
    cascade = lx.adapt(made(lambda: Net(Block())), (normal(2, 4, 6),), spec=spec)
    randomize(cascade)
    with raises(ExportError, "not-exportable", "other.lin.weight", "peft does not adapt", "if it saves other"):
        lx.export.peft(cascade, tmp_path)


@pytest.mark.slow
def test_an_adapted_head_of_a_classifier(tmp_path: Path) -> None:
    """peft's class for the task would save the head completely, so the adapter has no task."""
    cascade = cascade_of("bert")
    lx.export.peft(cascade, tmp_path / "adapter")
    assert config_in(tmp_path / "adapter")["task_type"] is None
    assert_loads(cascade, "bert", tmp_path / "adapter")
    with raises(ExportError, "not-exportable", "classifier.weight", "if it saves classifier"):
        lx.export.peft(cascade, tmp_path / "other", task_type="SEQ_CLS")


def test_a_module_whose_path_is_a_suffix_of_an_adapted_one(tmp_path: Path) -> None:
    """peft saves every module with this suffix: 1.lin also matches 11.lin."""
    cascade = lx.adapt(
        made(Suffixes), (normal(3, 4, 6),), spec=lx.CascadeSpec(exclude=("1.lin.weight",), train=("1.lin.bias",))
    )
    randomize(cascade)
    with raises(ExportError, "not-exportable", "1.lin.bias", "1.lin", "11.lin"):
        lx.export.peft(cascade, tmp_path)


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"view": "base"}, lx.StateError, ("unknown-name", "slow", "fast", "averaged")),
        ({"max_rank": 0}, lx.SpecError, ("invalid-value", "max_rank", "0")),
        ({"dtype": torch.int8}, lx.SpecError, ("invalid-value", "dtype", "torch.int8")),
    ],
)
def test_invalid_arguments(
    given: dict[str, Any], kind: type[lx.LorascError], sentence: tuple[str, ...], tmp_path: Path
) -> None:
    cascade = cascade_of("suffixes", stages=1)
    with raises(kind, *sentence):
        lx.export.peft(cascade, tmp_path, **given)


def test_a_cascade_that_has_not_trained(tmp_path: Path) -> None:
    cascade = lx.adapt(made(Suffixes), (normal(3, 4, 6),), spec=lx.CascadeSpec(rank=2))
    with raises(lx.StateError, "not-available"):
        lx.export.peft(cascade, tmp_path)


def test_folders_with_other_files(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=1)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with raises(ExportError, "path-in-the-way", "file"):
        lx.export.peft(cascade, tmp_path / "file")
    with raises(ExportError, "path-in-the-way", "adapter_config.json"):
        lx.export.peft(cascade, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
