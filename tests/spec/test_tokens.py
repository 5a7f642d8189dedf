"""Trainable tokens: rows of an embedding, and of a head that is tied to it, compared with peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.models import trainable_parameters

ROWS, CLOSE = (2, 5, 7), {"rtol": 0, "atol": 1e-10}


class Plain(nn.Module):
    """An embedding with a padding row, and an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(11, 6, padding_idx=1), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.middle(self.embed(ids))))
        return output


SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12}
MODELS: dict[str, tuple[Any, list[str], Any]] = {
    "plain": (Plain, ["middle"], {"embed": [*ROWS], "head": [1]}),
    "untied": (lambda: tiny.llama(**SIZES, tie_word_embeddings=False), ["q_proj", "up_proj"], [*ROWS]),
    "tied": (lambda: tiny.llama(**SIZES, tie_word_embeddings=True), ["q_proj", "up_proj"], [*ROWS]),
}


def made(name: str) -> tuple[nn.Module, Any]:
    make, targets, rows = MODELS[name]
    torch.manual_seed(3)
    config = {"r": 2, "lora_alpha": 4, "target_modules": targets, "trainable_token_indices": rows}
    return make().double().eval(), peft.LoraConfig(**config)


def ids(number: int) -> Tensor:
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(number))


def loss_of(model: Any, number: int) -> Tensor:
    output = model(ids(number))
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1), ids(number).flatten())


def train(model: Any, optimizer: Any, steps: int = 20) -> list[float]:
    losses = []
    for number in range(steps):
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(name: str, **fields: Any) -> tuple[lx.Cascade, Any]:
    """Return a cascade from a peft configuration, and the peft model with the same A."""
    model, config = made(name)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    cascade = lx.adapt(model, (ids(0),), spec=config, **fields)
    lora = [site for site in cascade.sites if not site.options.tokens]
    for site in lora:
        layer = theirs.base_model.model.get_submodule(site.weight.removesuffix(".weight"))
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(cascade.branches[site.key].lora_A)
    return cascade, theirs


def merged(theirs: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in theirs.merge_and_unload().named_parameters()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_merged_weights_are_those_of_peft(name: str, tmp_path: Path) -> None:
    cascade, theirs = adapted(name)
    before = {key: value.detach().clone() for key, value in cascade.model.named_parameters()}
    expected = train(theirs, torch.optim.AdamW(trainable_parameters(theirs), lr=0.02, weight_decay=0.0))
    ours = torch.optim.AdamW(cascade.param_groups(lr=0.02), weight_decay=0.0)
    assert train(cascade, ours) == pytest.approx(expected, abs=1e-10, rel=0)
    assert expected[-1] < expected[0] - 0.02
    wanted = merged(copy.deepcopy(theirs))
    with cascade.weights("fast"):
        fast = {key: value.detach().clone() for key, value in cascade.model.named_parameters()}
    for key, value in fast.items():
        torch.testing.assert_close(value, wanted[key], **CLOSE)
    key = "embed.weight" if name == "plain" else "model.embed_tokens.weight"
    changed = (fast[key] != before[key]).any(1)
    assert changed.nonzero().flatten().tolist() == [*ROWS]

    # peft's file as the first expert, and as a spec.
    theirs.save_pretrained(tmp_path / "theirs")
    again = lx.from_peft(tmp_path / "theirs", made(name)[0], (ids(0),))
    assert {site.weight: site.options.tokens for site in again.sites} == {
        site.weight: site.options.tokens for site in cascade.sites
    }
    for key, value in again.folded_state_dict().items():
        if key in wanted:
            torch.testing.assert_close(value, wanted[key], **CLOSE)

    # Our file in peft.
    lx.export.peft(cascade, tmp_path / "ours", view="fast")
    loaded = peft.PeftModel.from_pretrained(made(name)[0], tmp_path / "ours")
    for key, value in merged(loaded).items():
        torch.testing.assert_close(value, fast[key], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"restart": "fast", "average": True}, {"noise": lx.Noise(0.1)}], ids=str)
def test_stages_and_a_resume(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """`S_t = S_{t-1} + pace (F_t - S_{t-1})` of the rows, resumed rows keep their bits, and a resume has the same."""
    model, _ = made(name)
    weight = "embed.weight" if name == "plain" else "model.embed_tokens.weight"
    rules = (lx.Rule("*embed*", tokens=ROWS), lx.Rule("head.weight", tokens=(1,)))[: 2 if name == "plain" else 1]
    spec = lx.CascadeSpec(rank=2, pace=0.4, rules=rules, targets=("linear", "embedding"), dropout=0.1, **more)
    cascade = lx.adapt(copy.deepcopy(model), (ids(0),), spec=spec)
    assert not any(site.dropout for site in cascade.sites if site.options.tokens)
    base = dict(model.named_parameters())[weight].detach()
    slow = start = base.clone()
    optimizer: Any = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for stage in range(3):
        branch = next(cascade.branches[site.key] for site in cascade.sites if site.options.tokens)
        train(cascade, optimizer, 3)
        fast = start.index_add(0, torch.tensor(ROWS), branch.token_deltas.detach())
        slow = slow + 0.4 * (fast - slow)
        cascade.transition(optimizer)
        start = fast if spec.restart == "fast" else slow
        with cascade.weights("slow"):
            weights = dict(cascade.model.named_parameters())[weight].detach().clone()
        torch.testing.assert_close(weights, slow, rtol=0, atol=1e-13)
        assert (weights != base).any(1).nonzero().flatten().tolist() == [*ROWS]
        if stage == 1:
            train(cascade, optimizer, 2)
            lx.save(cascade, tmp_path, optimizer=optimizer)
            again = lx.load(tmp_path, copy.deepcopy(model), (ids(0),))
            resumed = torch.optim.AdamW(again.param_groups(lr=0.05))
            again.resume(resumed)
            assert train(cascade, optimizer, 2) == train(again, resumed, 2)
            cascade, optimizer = again, resumed


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a row beyond the weight": (
        {"rules": (lx.Rule("0.weight", tokens=(1, 4)),)},
        ("method-not-supported", "tokens", "0.weight", "4 rows", "0 to 3"),
    ),
    "no rows": ({"adapter": "tokens"}, ("method-not-supported", "0.weight", "Rule(pattern, tokens=(...))")),
    "a rank of MiSS above the inputs": (
        {"adapter": "miss", "rank": 5, "targets": ("1.weight",)},
        ("method-not-supported", "miss", "1.weight", "3 inputs", "rank 5"),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_site_where_the_method_has_no_meaning(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *expected):
        lx.adapt(linear_net(), (torch.tensor([0, 1]),), spec=lx.CascadeSpec(**fields))


@pytest.mark.parametrize("fields", [{"tokens": (1, 1)}, {"tokens": (-1,)}, {"tokens": (1,), "rank": 2}], ids=str)
def test_a_rule_refuses_rows(fields: dict[str, Any]) -> None:
    with raises(lx.SpecError, "conflicting-options" if "rank" in fields else "invalid-value", "tokens"):
        lx.Rule("*", **fields)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize("targets", [None, ["embed_tokens"], ["lm_head"]], ids=str)
def test_rows_alone(targets: list[str] | None) -> None:
    """A peft configuration of rows without LoRA."""
    model = made("untied")[0]
    config = peft.TrainableTokensConfig(token_indices=[*ROWS], target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.copy(config))
    cascade = lx.adapt(model, (ids(0),), spec=config)
    expected = train(theirs, torch.optim.AdamW(trainable_parameters(theirs), lr=0.02, weight_decay=0.0))
    ours = torch.optim.AdamW(cascade.param_groups(lr=0.02), weight_decay=0.0)
    assert train(cascade, ours) == pytest.approx(expected, abs=1e-10, rel=0)
    refused = peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"], init_weights=False)
    with raises(lx.SpecError, "adapter-not-supported", "init_weights=False"):
        lx.adapt(made("untied")[0], (ids(0),), spec=refused)
    with raises(lx.UnknownTarget, "unknown-target", "no_such"):
        lx.adapt(
            made("untied")[0], (ids(0),), spec=peft.TrainableTokensConfig(token_indices=[1], target_modules=["no_such"])
        )


def test_rows_of_one_name_of_a_weight_that_peft_does_not_tie(tmp_path: Path) -> None:
    """peft changes only the embedding, but a cascade changes both weights, so this is an error."""
    model = Plain()
    model.middle, model.head = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
    model.head.weight = model.embed.weight
    config = peft.LoraConfig(r=2, target_modules=["middle"], trainable_token_indices={"embed": [2]})
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with raises(lx.CheckpointError, "tied-weights-differ", "embed.weight", "head.weight"):
        lx.from_peft(tmp_path, model, (ids(0),))


def test_only_rows_are_no_adapter_of_lora(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(targets=("0.weight",), rules=(lx.Rule("*", tokens=(1,)),))
    cascade = lx.adapt(linear_net(), (torch.tensor([0, 1]),), spec=spec)
    with torch.no_grad():
        next(cascade.branches.parameters()).add_(1)
    with raises(lx.errors.ExportError, "not-exportable", "only rows"):
        lx.export.peft(cascade, tmp_path / "x", view="fast")


class Broken(nn.Module):
    """A model with a graph break before an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x if x.sum().item() > 0 else x * 0)
        return output


@pytest.mark.parametrize("placement", ["auto", "beside", "merged", "weight"])
@pytest.mark.parametrize("make", [Plain, Broken])
def test_each_placement_computes_the_rows(make: Any, placement: Any) -> None:
    torch.manual_seed(1)
    rules = (lx.Rule("*embed.weight", tokens=ROWS), lx.Rule("*head.weight", tokens=(1,)))
    spec = lx.CascadeSpec(rank=2, rules=rules, placement=placement)
    cascade = lx.adapt(make().double(), (ids(0),), spec=spec)
    with torch.no_grad():
        for parameter in cascade.branches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    output = cascade(ids(0))
    with cascade.weights("fast"):
        torch.testing.assert_close(output, cascade.model(ids(0)), rtol=0, atol=1e-13)
    output.square().mean().backward()
    assert all(bool(parameter.grad.any()) for parameter in cascade.branches.parameters())  # type: ignore[union-attr]
