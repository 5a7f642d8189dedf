"""`CascadeSpec.grid`: the running model, the folded one and the grid have the same bits; and how much a fold keeps."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization as torchao
from torch import nn

import lorasc_fx as lx
from lorasc_fx import passes, quantized
from lorasc_fx.branch import Branch
from lorasc_fx.cascade import run_of
from lorasc_fx.errors import ExportError, LorascWarning
from lorasc_fx.quantized import QuantizedLinear, dense
from tests.kit import tiny
from tests.quantized.layers import LAYERS, WEIGHTS, Packed, is_missing, mxfp4

METHODS = ("lora", "dora", "delora", "hira", "lora-xs", "lokr", "miss", "oft", "shira", "vera")


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Round each row to 15 values."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-6) / 7
    return ((rows / scale).round() * scale).view(weight.shape)


lx.register_grid("four bits", four_bits)


class Net(nn.Module):
    """A linear, a convolution with channels last, and a weight that is stored as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.last = nn.Parameter(torch.randn(24, 8) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = torch.tanh(self.first(x)).view(-1, 4, 2, 2)
        out: torch.Tensor = self.conv(image).flatten(1) @ self.last
        return out


def train(cascade: lx.Cascade, x: torch.Tensor, stages: int = 2, end: bool = True) -> torch.Tensor:
    """Train, and return the output of the running model before the last transition."""
    optimizer = torch.optim.SGD(cascade.param_groups(lr=5.0), lr=5.0)
    for number in range(1, stages + 1):
        for _ in range(3):
            optimizer.zero_grad()
            cascade(x).float().square().mean().backward()
            nn.utils.clip_grad_norm_(cascade.parameters(), 0.1)
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            running: torch.Tensor = cascade(x)
        if end or number < stages:
            cascade.transition(optimizer)
    return running


GRIDS = ("bfloat16", "float8_e4m3fn", "four bits")
DTYPES = (torch.float32, torch.bfloat16)
ROWS = [(GRIDS[index % 3], adapter, DTYPES[index % 2]) for index, adapter in enumerate(METHODS)]


@pytest.mark.parametrize(("grid", "adapter", "dtype"), ROWS)
def test_the_running_and_the_folded_model_have_the_same_bits(grid: str, adapter: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    net, x = Net().to(dtype), torch.randn(5, 12, dtype=dtype)
    targets = ("first.weight", "conv.weight") if adapter in ("dora", "oft", "lokr") else ("*",)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(targets, adapter=adapter, rank=3, grid=grid, pace=1.0))
    with torch.no_grad():
        before = cascade(x)
    running = train(cascade, x)
    assert not torch.equal(running, before)
    with torch.no_grad():
        assert torch.equal(cascade(x), running)
        with cascade.weights("slow"):
            assert torch.equal(cascade(x), running)
        assert torch.equal(cascade.folded_graph()(x), running)
    for branch in cascade.branches.values():  # kernels are chosen by strides
        weight = net.get_parameter(branch.weight_name)
        assert branch.on_grid(weight).stride() == weight.stride()
    state = cascade.folded_state_dict()
    net = cascade.release()
    for weight in targets if targets != ("*",) else ("first.weight", "conv.weight", "last"):
        value = net.get_parameter(weight).detach()
        assert torch.equal(value, lx.spec.GRIDS[grid](value))
        assert torch.equal(value, state[weight])


@pytest.mark.parametrize(
    "options", [{"pace": 0.5}, {"restart": "fast", "pace": 0.5}, {"average": True, "pace": "mean"}]
)
def test_views_and_rewinds_are_on_the_grid(options: dict[str, Any]) -> None:
    net, x = Net(), torch.randn(5, 12)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=1, grid="four bits", **options))
    running = train(cascade, x, 3, end=False)
    views = ["slow", "fast", *(["averaged"] if "average" in options else [])]
    for view in views:
        with cascade.weights(view), torch.no_grad():
            value = net.first.weight.detach()
            assert torch.equal(value, four_bits(value))
            assert torch.equal(cascade(x), running) == (view == "fast")
    with cascade.weights(stage=1), torch.no_grad():
        ended = cascade(x)
    cascade.rewind(1, None)
    with cascade.weights("slow"), torch.no_grad():
        assert torch.equal(cascade(x), ended)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**tiny.SIZES, "num_key_value_heads": 1, "num_local_experts": 3}
    model: nn.Module = MixtralForCausalLM(MixtralConfig(**sizes))
    return model


@pytest.mark.parametrize("frontend", ["auto", "eager"])
@pytest.mark.parametrize("model", [tiny.gpt2, tiny.llama, mixtral])
def test_language_models(model: Any, frontend: str) -> None:
    """Weights that are stored as [in, out], shared inputs, and stacked matrices; released, they run by themselves."""
    net, ids = model().eval(), torch.arange(18).view(2, 9)
    exclude = ("*wte*", "*wpe*") if model is tiny.gpt2 else ("*embed*",)
    spec = lx.CascadeSpec(rank=3, grid="four bits", pace=1.0, exclude=exclude)
    cascade = lx.adapt(net, kwargs={"input_ids": ids, "labels": ids}, spec=spec, frontend=frontend)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    for _ in cascade.stages(2, optimizer):
        cascade(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            running = cascade(input_ids=ids, labels=ids).logits
    with torch.no_grad():
        assert torch.equal(cascade(input_ids=ids, labels=ids).logits, running)
        torch.testing.assert_close(cascade.release()(input_ids=ids, labels=ids).logits, running, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "hira", "dora"])
def test_gradients_pass_through_the_rounding(adapter: str) -> None:
    """As in plain torch, in fp64: `Q(W) + (delta - delta.detach())`."""
    net, x = nn.Linear(8, 6).double(), torch.randn(4, 8, dtype=torch.float64)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    options: dict[str, Any] = {} if adapter == "hira" else {"lora_alpha": 3.0}
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="four bits", adapter=adapter, **options))
    (branch,) = cascade.branches.values()
    values = {name: torch.randn_like(value).requires_grad_() for name, value in branch.named_parameters()}
    with torch.no_grad():
        for name, value in branch.named_parameters():
            value.copy_(values[name])
    (cascade(x) ** 3).sum().backward()
    a, b, *others = values.values()
    product = b @ a * (1.0 if adapter == "hira" else 1.5)
    adapted = weight * (1 + product) if adapter == "hira" else weight + product
    if adapter == "dora":
        adapted = adapted * (others[0] / adapted.detach().norm(dim=1)).unsqueeze(1)
    adapted = adapted + (four_bits(adapted) - adapted).detach()
    (F.linear(x, adapted, bias) ** 3).sum().backward()
    for name, value in branch.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(value.grad, values[name].grad, rtol=1e-9, atol=1e-9)


OWN = {**LAYERS, **WEIGHTS, "torchao mxfp4": mxfp4}


@pytest.mark.parametrize("case", OWN)
def test_a_fold_quantizes_to_exactly_what_was_trained(case: str) -> None:
    if case in LAYERS and (library := is_missing(case)):
        pytest.skip(f"{library} is not installed")
    dtype = torch.bfloat16 if case in ("torchao nvfp4", "torchao mxfp4") else torch.float32
    layers = [OWN[case](nn.Linear(size, 64).to(dtype)) for size in (64, 64)]
    net, x = nn.Sequential(layers[0], nn.Tanh(), layers[1]), torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        before = net(x)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=4, grid="own", pace=1.0))
    with torch.no_grad():
        start = cascade(x)
    if not case.endswith("mxfp4"):  # whose own product quantizes the input too
        assert float((start - before).norm()) < 0.01 * float(before.norm())
    running = train(cascade, x)
    with torch.no_grad():
        assert torch.equal(cascade(x), running)
    parameters = dict(cascade.model.named_parameters())
    trained = {
        name: branch.on_grid(parameters[branch.weight_name]).detach() for name, branch in cascade.branches.items()
    }
    net = cascade.release()
    for key, value in trained.items():
        layer: Any = net.get_submodule(key.partition("/")[0])
        stored = dense(layer.weight) if case.startswith("torchao") else QuantizedLinear(layer).weight.dequantize()
        assert torch.equal(stored.to(dtype), value)
    with torch.no_grad():
        if not case.endswith("mxfp4"):
            torch.testing.assert_close(net(x), running, rtol=0.02, atol=0.02)


def test_own_grid_refuses_what_cannot_be_quantized_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = nn.Sequential(Packed(nn.Linear(8, 8)), nn.Linear(8, 4)), torch.randn(3, 8)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="own"))
    assert [branch.grid for branch in cascade.branches.values()] == ["own", ""]
    cascade.release()

    monkeypatch.delitem(quantized.TENSORS, "torchao.quantization.Int8Tensor")
    net = nn.Sequential(WEIGHTS["torchao int8"](nn.Linear(8, 8)))
    with pytest.raises(lx.SpecError, match=r"0\.weight cannot be quantized again") as caught:
        lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="own"))
    assert caught.value.code == "quantized-not-supported"


@pytest.mark.parametrize("adapter", ["hira", "dora"])
def test_a_checkpoint_in_the_middle_of_a_stage(adapter: str, tmp_path: Path) -> None:
    """A loader makes branches before it knows the weights: this grid makes a matrix of zeros nan."""
    lx.register_grid("without zeros", without_zeros)
    net, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 6)
    original = copy.deepcopy(net)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="without zeros", adapter=adapter))
    running = train(cascade, x, 5, end=False)
    lx.save(cascade, tmp_path / "run")
    loaded = lx.load(tmp_path / "run", copy.deepcopy(original))
    assert torch.equal(loaded(x), running)
    with loaded.weights("slow"), cascade.weights("slow"):
        assert torch.equal(loaded(x), cascade(x))
    if adapter == "hira":
        with torch.no_grad():
            cascade.transition(None)
            assert torch.equal(lx.merge([tmp_path / "run"], copy.deepcopy(original), (x,))(x), cascade(x))


def without_zeros(weight: torch.Tensor) -> torch.Tensor:
    out, _ = weight.shape  # each expert is a matrix
    scale = weight.abs().amax(1).view(out, 1) / 7
    return (weight / scale).round() * scale


def test_stacked_experts_are_rounded_one_by_one() -> None:
    net, ids = mixtral().eval(), torch.arange(18).view(2, 9)
    lx.register_grid("without zeros", without_zeros)
    spec = lx.CascadeSpec(("*experts*",), rank=2, grid="without zeros")
    cascade = lx.adapt(net, kwargs={"input_ids": ids}, spec=spec)
    assert cascade.sites[0].kind == "stacked"


def test_layers_beside_quantized_ones_are_folded_onto_the_grid() -> None:
    net, x = nn.Sequential(Packed(nn.Linear(16, 16)), nn.Linear(16, 8)), torch.randn(4, 16)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="four bits"))
    train(cascade, x)
    weight = cascade.release("requantize").get_parameter("1.weight").detach()
    assert torch.equal(weight, four_bits(weight))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo makes autograd functions
@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_compilers_keep_the_rounding(backend: str) -> None:
    """Inductor skips a cast to bf16 and back, and dynamo takes a quantized weight for a plain tensor."""
    net, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(5, 64)
    if backend == "aot_eager":
        net[0] = WEIGHTS["torchao int4"](net[0])
    spec = lx.CascadeSpec(rank=2, grid="bfloat16" if backend == "inductor" else "own", pace=1.0)
    cascade = lx.adapt(net, (x,), spec=spec)
    running = train(cascade, x, 2, end=False)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(cascade, backend=backend, fullgraph=backend == "inductor")(x), running, rtol=1e-5, atol=1e-6
        )


def test_settings_for_inputs_survive_a_fold() -> None:
    net, x = nn.Sequential(nn.Linear(64, 64).bfloat16()), torch.randn(5, 64, dtype=torch.bfloat16)
    torchao.quantize_(net, torchao.Int8DynamicActivationInt8WeightConfig())
    settings = net[0].weight.act_quant_kwargs
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="own", pace=1.0))
    train(cascade, x)
    weight: Any = cascade.release()[0].weight
    assert settings is not None
    assert weight.act_quant_kwargs == settings


def test_the_model_of_a_cascade_is_not_on_the_grid_before_release() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="four bits"))
    with pytest.warns(LorascWarning, match="not rounded to their grid"):
        net.state_dict()
    with pytest.raises(lx.StateError, match=r"0\.weight trains on a grid.*float32"):
        cascade.to(torch.bfloat16)
    assert cascade.to(torch.device("cpu")) is cascade
    assert net[0].weight.dtype == torch.float32


def test_grids_that_cannot_be_used() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(lx.SpecError, match="bfloat16"):
        lx.CascadeSpec(grid="bfloat17")
    with pytest.raises(lx.SpecError, match="that of another grid"):
        lx.register_grid("bfloat16", four_bits)
    with pytest.raises(lx.SpecError, match=r"empty.*register_grid\(NAME"):
        lx.CascadeSpec(grid=partial(four_bits))
    with pytest.raises(lx.SpecError, match=r"returns \[2, 8\]"):
        lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid=lambda weight: weight.view(2, 8)))
    with torch.no_grad():
        net[0].weight[0, 0] = 1e6
    with pytest.raises(lx.SpecError, match=r"0\.weight inf or nan"):
        lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, grid="float16"))
    assert not hasattr(net, "branches")


def test_passes_banks_and_adapters_refuse_a_grid(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    spec = lx.CascadeSpec(rank=2, grid="four bits")
    inserted = passes.Pipeline([passes.MatchSites(spec), passes.InsertBranches()])(torch.fx.symbolic_trace(net))
    with pytest.raises(lx.PassError, match="rounds to a grid"):
        passes.InlineBranches()(inserted.graph_module)
    bank = lx.AdapterBank(copy.deepcopy(net), args=(x,), max_rank=2, targets=["0.weight"])
    cascade = lx.adapt(net, (x,), spec=spec)
    train(cascade, x, 1)
    with pytest.raises(lx.SpecError, match="trains on a grid"):
        bank.add("trained", cascade)
    with pytest.raises(ExportError, match="trains on a grid"):
        lx.export.peft(cascade, tmp_path / "adapter")


def test_fold_of_a_graph_that_owns_its_weights() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    graph = passes.Pipeline([passes.MatchSites(lx.CascadeSpec(rank=2, grid="four bits")), passes.InsertBranches()])(
        torch.fx.symbolic_trace(net)
    ).graph_module
    (branch,) = [module for module in graph.modules() if isinstance(module, Branch)]
    with torch.no_grad():
        branch.get_parameter("lora_B").normal_()
        running = graph(x)
        folded = passes.FoldBranches(view="fast")(graph).graph_module
        assert torch.equal(folded(x), running)


# ---- what a fold keeps


def rounded_linear(size: float, dtype: torch.dtype = torch.bfloat16) -> tuple[lx.Cascade, torch.Tensor]:
    """Return a cascade whose branch has changed the weight by a part of this size."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.randn(4, 64, dtype=dtype)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=4, pace=1.0))
    (branch,) = cascade.branches.values()
    with torch.no_grad():
        branch.get_parameter("lora_B").normal_()
        delta = branch.dense_delta(net[0].weight)
        branch.get_parameter("lora_B").mul_(size * net[0].weight.float().norm() / delta.norm())
    return cascade, x


@pytest.mark.parametrize(("size", "dtype"), [(0.01, torch.bfloat16), (1e-3, torch.float32)])
def test_the_share_is_a_projection(size: float, dtype: torch.dtype) -> None:
    cascade, _ = rounded_linear(size, dtype)
    weight = cascade.model.get_parameter("0.weight")
    base, change = weight.detach().double().clone(), cascade.branches["0/weight"].dense_delta(weight).detach().double()
    cascade.transition(None)
    stored = weight.detach().double() - base
    share = float((stored * change).sum() / change.square().sum())
    error = float((stored - change).norm() / change.norm())
    kept = cascade.kept()["0.weight"]
    assert kept.share == pytest.approx(share, abs=0.03)
    assert kept.error == pytest.approx(error, abs=0.03)
    assert 0.9 < kept.share < 1.1
    assert (error > 0.1) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("fold", ["transition", "release", "folded_state_dict"])
def test_a_fold_that_loses_most_of_the_change_warns_once(fold: str, caplog: pytest.LogCaptureFixture) -> None:
    cascade, _ = rounded_linear(1e-4)
    with pytest.warns(LorascWarning, match=r"the rounding of 0\.weight keeps .*CascadeSpec\.grid"):
        cascade.transition(None) if fold == "transition" else getattr(cascade, fold)()
    if fold == "transition":
        assert "the last fold kept at least" in str(cascade)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cascade.release()


def test_a_quantized_release_tells_what_it_keeps() -> None:
    net, x = nn.Sequential(Packed(nn.Linear(16, 16))), torch.randn(4, 16)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, pace=1.0))
    with torch.no_grad():
        cascade.branches["0/weight"].get_parameter("lora_B").fill_(1e-4)
    cascade.transition(None)
    with pytest.warns(LorascWarning, match=r"release: the rounding of 0\.weight keeps"):
        cascade.release("requantize")


def test_no_residual_of_weights_that_are_not_rounded(tmp_path: Path) -> None:
    cascade, _ = rounded_linear(0.01, torch.float32)
    with pytest.raises(lx.StateError, match="no residual"):
        lx.export.peft(cascade, tmp_path / "adapter", residual=2)


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_holds_the_largest_part_of_what_the_rounding_took(packed: bool, tmp_path: Path) -> None:
    """peft adds it to the released model. With the full rank, the sum is the exact weight."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)), torch.randn(4, 16)
    net = net if packed else net.bfloat16()
    if packed:
        net[0] = Packed(net[0])
    x = x.to(net[1].weight.dtype)
    cascade = lx.adapt(net, (x,), spec=lx.CascadeSpec(rank=2, pace=1.0))
    train(cascade, x, 2)
    folded, states = copy.deepcopy(cascade), run_of(cascade).slow.states
    weights = {site.weight: states[site.weight].exact("slow", torch.float64) for site in cascade.sites}
    errors = []
    for rank in (1, 4, 12):
        written = lx.export.peft(cascade, tmp_path / str(rank), residual=rank)
        errors.append({name: cut.relative for name, cut in written.cut.items()})
    assert all(0.0 <= errors[2][name] < 1e-6 < errors[1][name] < errors[0][name] for name in errors[0])
    assert errors[0].keys() == ({"0.weight"} if packed else {"0.weight", "1.weight"})
    released = folded.release("requantize" if packed else None)
    if packed:
        released[0] = QuantizedLinear(released[0])
        linear = nn.Linear(16, 12)
        linear.weight.data, linear.bias.data = released[0].weight.dequantize(), net[0].bias.detach().clone()
        released[0] = linear
    model = peft.PeftModel.from_pretrained(released.float(), tmp_path / "12").merge_and_unload()
    for name in errors[0]:
        torch.testing.assert_close(model.get_parameter(name).double(), weights[name], rtol=1e-5, atol=1e-6)


def test_a_function_that_was_defined_again_is_the_same_grid() -> None:
    """As by a cell of a notebook that runs twice. An edited one is another grid, because older runs know the name."""
    scope: dict[str, Any] = {"__name__": "notebook"}
    functions = []
    for scale in ("7", "7", "5"):
        exec(f"def coarse(weight):\n    return (weight * {scale}).round() / {scale}", scope)  # noqa: S102
        functions.append(scope["coarse"])
    spec = lx.CascadeSpec(grid=functions[0])
    assert spec == lx.CascadeSpec(grid=functions[1]) == lx.CascadeSpec.from_dict(spec.to_dict())
    with pytest.raises(lx.SpecError, match="register_grid"):
        lx.CascadeSpec(grid=functions[2])


@pytest.mark.parametrize("frontend", ["auto", "eager"])
def test_the_own_grid_of_a_model_without_quantized_weights(frontend: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lx.SpecError, match="none of the adapted weights is quantized"):
        lx.adapt(net, (torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2, grid="own"), frontend=frontend)
    lx.adapt(net, (torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2))  # the model is as before
