"""Each adapter method against peft's layer of the same parameters: losses of 20 steps, and the merged weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from tests.kit.models import branches, train, trainable_parameters

peft = pytest.importorskip("peft")

IN, HIDDEN, OUT = 12, 18, 5


def net() -> nn.Module:
    """Two linear layers with different sizes."""
    return nn.Sequential(OrderedDict(up=nn.Linear(IN, HIDDEN), act=nn.Tanh(), down=nn.Linear(HIDDEN, OUT)))


def images() -> nn.Module:
    """A convolution with stride and padding, and a 1x1 convolution."""
    up, down = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 2, 1)
    return nn.Sequential(OrderedDict(up=up, act=nn.Tanh(), down=down, flat=nn.Flatten()))


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The peft counterpart of a method: its configuration, and parameters of its layer that end on `.weight`."""

    config: Callable[..., Any]
    more: Mapping[str, Any]
    modules: tuple[str, ...] = ()
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LORA = ("lora_A", "lora_B", "lora_magnitude_vector")
OFT = ("oft_R",)
ORACLES = {
    "lora": Oracle(peft.LoraConfig, {"lora_alpha": 8}, LORA),
    "dora": Oracle(peft.LoraConfig, {"lora_alpha": 8, "use_dora": True}, LORA),
    "vera": Oracle(peft.VeraConfig, {"d_initial": 0.1}),
    "hira": Oracle(peft.HiraConfig, {}),
    "shira": Oracle(peft.ShiraConfig, {}),
    "miss": Oracle(peft.MissConfig, {}),
    "oft": Oracle(peft.OFTConfig, {}, OFT),
    "oft, exact": Oracle(peft.OFTConfig, {"use_cayley_neumann": False}, OFT, {"adapter_options": {"neumann_terms": 0}}),
    "lokr": Oracle(peft.LoKrConfig, {"alpha": 8}),
    "delora": Oracle(peft.DeloraConfig, {"delora_lambda": 15}),
}


def config_of(name: str) -> Any:
    oracle: Any = ORACLES[name]
    size = {"r": 3}
    if oracle.config is peft.OFTConfig:
        size = {"r": 0, "oft_block_size": 3}
    return oracle.config(target_modules=["up"] if name == "vera" else ["up", "down"], **size, **oracle.more)


def pair(name: str, model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Return a cascade and a peft model with the same weights and adapter values."""
    oracle = ORACLES[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(name)).double()
    exclude = ("down.*",) if name == "vera" else ()  # peft slices one large pair for all layers
    fields: dict[str, Any] = {"adapter": name.partition(",")[0], "rank": 3, "exclude": exclude, **oracle.spec}
    spec = lx.CascadeSpec(pace=1.0, **fields)
    ours = lx.adapt(copy.deepcopy(model), (x,), spec=spec)
    branch: Any
    for key, branch in ours.branches.items():
        layer: Any = theirs.base_model.model.get_submodule(key.split("/")[0])
        with torch.no_grad():
            for mine, value in branch.trainable().items():
                theirs_name = "shira_weight" if mine == "shira_values" else mine
                target = layer.get_parameter(f"{theirs_name}.default{'.weight' * (mine in oracle.modules)}")
                target.copy_(value.view_as(target))
        if name == "vera":
            out, columns = branch.weight_shape
            theirs.base_model.vera_A["default"][:, :columns] = branch.vera_A.like(branch.vera_lambda_d)
            theirs.base_model.vera_B["default"][:out] = branch.vera_B.like(branch.vera_lambda_b)
        if name == "shira":
            columns = branch.weight_shape[1]
            places = branch.positions[: len(branch.shira_values)]
            layer.shira_indices["default"] = torch.stack([places // columns, places % columns]).int()
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "linear") for name in ORACLES), *((name, "conv") for name in ("lora", "dora", "lokr", "hira"))],
)
def test_it_trains_as_peft_does(name: str, kind: str) -> None:
    """For convolutions, only the methods for which peft uses the same formula."""
    torch.manual_seed(3)
    model = (net() if kind == "linear" else images()).double()
    x = torch.randn(16, IN).double() if kind == "linear" else torch.randn(16, 4, 5, 5).double()
    ours, theirs = pair(name, model, x)
    assert torch.equal(ours(x), model(x))
    mine = train(ours, torch.optim.SGD(ours.param_groups(lr=0.2)), [x] * 20)
    wanted = train(theirs, torch.optim.SGD(trainable_parameters(theirs), lr=0.2), [x] * 20)
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)
    assert mine[-1] < mine[0]
    merged, released = theirs.merge_and_unload(), ours.release()
    torch.testing.assert_close(released.state_dict(), merged.state_dict(), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ORACLES)
def test_a_configuration_of_peft_is_a_spec(name: str) -> None:
    """The branches have the parameters of peft's layers, and the same options."""
    model, x = net().double(), torch.randn(2, IN).double()
    ours, _ = pair(name, model, x)
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=config_of(name))
    assert cascade.plan.spec.adapter_options == ours.plan.spec.adapter_options or not ours.plan.spec.adapter_options
    for key, branch in ours.branches.items():
        adapted: Any = cascade.branches[key]
        assert type(adapted) is type(branch)
        assert adapted.scale == branch.scale
        shapes = {name: value.shape for name, value in branch.named_parameters()}
        assert {name: value.shape for name, value in adapted.named_parameters()} == shapes


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "coft=True": (peft.OFTConfig, {"oft_block_size": 3, "coft": True}),
    "init_weights='bat'": (peft.MissConfig, {"init_weights": "bat"}),
    "decompose_both=True": (peft.LoKrConfig, {"decompose_both": True}),
    "hira_dropout=0.1": (peft.HiraConfig, {"hira_dropout": 0.1}),
    "spec is a LoHaConfig": (peft.LoHaConfig, {}),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_an_option_without_a_counterpart_is_named(problem: str) -> None:
    config, options = REFUSED[problem]
    with pytest.raises(lx.SpecError, match=problem):
        lx.adapt(net(), (torch.randn(2, IN),), spec=config(target_modules=["up"], **options))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_oracle(name: str) -> None:
    assert name in ORACLES or name == "lora-xs"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dora"])
def test_every_method_is_exported_as_an_adapter_of_peft(name: str, tmp_path: Path) -> None:
    """Every method is exported as LoRA factors of the rank of its delta, and peft computes the same outputs."""
    torch.manual_seed(3)
    model, x = net().double(), torch.randn(4, IN).double()
    cascade = lx.adapt(copy.deepcopy(model), (x,), spec=lx.CascadeSpec(adapter=name, rank=3, pace=1.0))
    optimizer = torch.optim.Adam(cascade.param_groups(lr=0.05))
    train(cascade, optimizer, [x] * 3)
    cascade.transition(optimizer)
    lx.export.peft(cascade, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), cascade.release()(x), rtol=1e-6, atol=1e-6)


def test_fresh_factors_are_loras() -> None:
    """A is U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming uniform with a = sqrt(5). B is 0. Each stage has another A."""
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3)).double()
    cascade = lx.adapt(model, (torch.randn(2, 50).double(),), spec=lx.CascadeSpec(rank=30))
    drawn = []
    for _ in range(2):
        for name, fan in (("0.weight", 50), ("1.weight", 40)):
            branch = branches(cascade)[name]
            bound = fan**-0.5
            assert branch.lora_A.abs().max() <= bound
            assert branch.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
            assert abs(branch.lora_A.mean().item()) < 4 * bound / 3**0.5 / branch.lora_A.numel() ** 0.5
            assert not branch.lora_B.any()
            drawn.append(branch.lora_A.detach().clone()[:, :40])
        cascade.transition(None)
    for pair in itertools.combinations(drawn, 2):
        assert torch.corrcoef(torch.stack(pair).flatten(1))[0, 1].abs() < 0.15
