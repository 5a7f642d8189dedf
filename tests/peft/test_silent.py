"""What peft passes over in silence: weights that are read and not called, tied weights, parameters, targets."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

import lorasc_fx as lx
from tests.peft.kit import (
    EXACT,
    Case,
    assert_ours_is_right,
    eager,
    formula_of,
    gap,
    normal,
    ours_of,
    peft_gaps,
    peft_of,
    seeded,
    without_gradient,
)


def inputs() -> tuple[torch.Tensor]:
    return (normal(3, 4, 6),)


class Reads(nn.Module):
    """The projection's weight is read, and the projection never called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.drop, self.head = nn.Linear(6, 7), nn.Dropout(0.2), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(F.linear(x, self.proj.weight, self.proj.bias))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by", ["modules", "parameters"])
def test_a_weight_that_is_read(by: str, training: bool) -> None:
    case = Case(Reads, inputs, ("proj", "head"), ("proj.weight", "head.weight"))
    model, args = case.model().train(training), case.inputs()
    if by == "modules":
        theirs = peft_of(model, case.targets)
    else:
        theirs = peft_of(model, ["head"], target_parameters=["proj.weight"])
    weights = formula_of(theirs, model)
    assert set(weights) == set(case.weights)
    head_only = eager(model, {"head.weight": weights["head.weight"]}, args)
    assert gap(seeded(theirs, args), head_only) < EXACT  # a silent no-op
    assert without_gradient(theirs, args) == {"proj"}
    right = eager(model, weights, args)
    assert gap(seeded(theirs.merge_and_unload(), args), right) < EXACT
    assert gap(head_only, right) > 0.1  # and yet it is merged


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_a_weight_that_is_read_is_a_site(frontend: str) -> None:
    assert_ours_is_right(Case(Reads, inputs, ("proj", "head"), ("proj.weight", "head.weight")), frontend)


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.drop(torch.tanh(self.up(self.emb(ids))))))


def tied(*targets: str) -> Case:
    ids = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(2))
    return Case(Tied, lambda: (ids,), targets, ("emb.weight", "up.weight"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [("head", "up"), ("emb", "up"), ("emb", "head", "up")])
def test_a_tied_head(targets: tuple[str, ...], training: bool) -> None:
    """peft trains a head beside the embedding, or the reverse, and merges it into both."""
    case = tied(*targets)
    model, args = case.model().train(training), case.inputs()
    theirs = peft_of(model, targets)
    apart = {name: value.detach() for name, value in model.state_dict().items()} | formula_of(theirs, model)
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.head.weight.detach().clone())
    adapter = seeded(theirs, args)
    assert gap(adapter, eager(untied, apart, args)) < EXACT  # two weights while it trains
    merged = theirs.merge_and_unload()
    assert merged.head.weight is merged.emb.weight  # one after the merge, with every delta in it
    deltas = [apart[f"{name}.weight"] - model.emb.weight.detach() for name in ("emb", "head")]
    assert gap(merged.emb.weight.detach(), model.emb.weight.detach() + sum(deltas)) < EXACT
    assert gap(seeded(merged, args), adapter) > 0.1


@pytest.mark.parametrize("targets", [("head", "up"), ("emb", "up"), ("emb", "head", "up")])
def test_a_tied_head_is_one_site(targets: tuple[str, ...]) -> None:
    case = tied(*targets)
    assert_ours_is_right(case)
    cascade = ours_of(case.model(), case.inputs(), targets)
    assert cascade.sites[0].aliases == ("head.weight",)
    released = cascade.release()
    assert released.head.weight is released.emb.weight


def test_ensure_weight_tying_on_a_plain_module() -> None:
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        theirs = peft_of(tied().model(), ["emb", "head"], ensure_weight_tying=True)
    factors = dict(theirs.named_parameters(remove_duplicate=False))
    assert len({id(value) for name, value in factors.items() if "lora_" in name}) == 4  # two pairs: not tied


def llama() -> nn.Module:
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, tie_word_embeddings=True, use_cache=False, **size, **heads)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # peft's, at the merge
def test_ensure_weight_tying_merges_twice() -> None:
    """On a transformers model the option ties the factors: right while it trains, and the merge adds them twice."""
    ids = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(2))
    case = Case(llama, lambda: (ids,), ("lm_head", "model.layers.0.mlp.up_proj"), ())
    model = case.model().eval()
    theirs = peft_of(model, case.targets, ensure_weight_tying=True)
    weights = formula_of(theirs, model)
    base, table = model.lm_head.weight.detach(), weights.pop("model.embed_tokens.weight")
    assert gap(table, weights["lm_head.weight"]) < EXACT
    assert gap(seeded(theirs, (ids,)), eager(model, weights, (ids,))) < 10 * EXACT
    merged = theirs.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert gap(merged.lm_head.weight.detach(), 2 * table - base) < EXACT
    assert gap(seeded(merged, (ids,)), eager(model, weights, (ids,))) > 0.1
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    assert_ours_is_right(Case(llama, lambda: (ids,), case.targets, names))


class Body(nn.Module):
    """Two parameters that no module holds, one stored [in, out] and one [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.up = nn.Parameter(torch.randn(6, 7) * 0.3), nn.Parameter(torch.randn(5, 7) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.tanh(x @ self.w), 0.2, self.training) @ self.up.t()


class Fused(nn.Module):
    """Experts stacked in one parameter, gate and up in one: [3, 2 * 7, 6], [3, 6, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(3, 14, 6) * 0.4), nn.Parameter(torch.randn(3, 6, 7) * 0.4)

    def forward(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for index in range(3):
            gate, up = F.linear(x, self.gate_up[index]).chunk(2, -1)
            total = total + shares[..., index : index + 1] * F.linear(F.silu(gate) * up, self.down[index])
        return total


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.body, self.head = nn.Linear(6, 3), Fused(), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x, self.router(x).softmax(-1)))


class Outside(Experts):
    """The same, where the parent computes with the parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("bti,eoi->beto", x, self.body.gate_up).chunk(2, -1)
        outputs = torch.einsum("beto,eio->beti", F.silu(gate) * up, self.body.down)
        return self.head(torch.einsum("beti,bte->bti", outputs, self.router(x).softmax(-1)))


PARAMETERS = {
    "bare": (lambda: nn.Sequential(Body(), nn.Linear(5, 4)), ("0.w", "0.up"), "1"),
    "fused-experts": (Experts, ("body.gate_up", "body.down"), "head"),
    "experts-of-the-parent": (Outside, ("body.gate_up", "body.down"), "head"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    """As targets of peft they are an error if alone, and nothing if one other target is found."""
    build, held, head = PARAMETERS[name]
    case = Case(build, inputs, (*held, head), (*held, f"{head}.weight"))
    for training in (True, False):
        model, args = case.model().train(training), case.inputs()
        with pytest.raises(NoMatchingPeftModuleError, match=r"Target modules \{.*\} not found in the base model"):
            peft_of(model, held)
        for targets in (case.targets, "all-linear"):
            assert not set(held) & set(formula_of(peft_of(model, targets), model))
        assert torch.equal(seeded(peft_of(model, case.targets), args), seeded(peft_of(model, [head]), args))
        # target_parameters is right, as long as the module that holds the parameters computes with them
        named = Case(build, inputs, (head,), ())
        if name == "experts-of-the-parent":
            theirs = peft_of(model, [head], target_parameters=list(held))
            with pytest.raises(AttributeError, match="'ParamWrapper' object has no attribute 'gate_up'"):
                theirs(*args)
        else:
            assert max(peft_gaps(named, training, target_parameters=list(held))) < EXACT
    assert_ours_is_right(case)


def test_parameters_of_the_top_module() -> None:
    case = Case(Body, inputs, ("w", "up"), ("w", "up"))
    with pytest.raises(ValueError, match=r"Targeting an nn\.Parameter on the top-level module is not supported"):
        peft_of(case.model(), [], target_parameters=["w", "up"])
    assert_ours_is_right(case)


def test_a_target_that_matches_nothing() -> None:
    """peft names no other name, and is silent where one other target is found; ours is an error with the nearest."""
    case = Case(Reads, inputs, (), ())
    model, args = case.model(), case.inputs()
    with pytest.raises(NoMatchingPeftModuleError) as theirs:
        peft_of(model, ["haed"])
    assert str(theirs.value) == (
        "Target modules {'haed'} not found in the base model. Please check the target modules and try again."
    )
    assert set(formula_of(peft_of(model, ["proj", "haed"]), model)) == {"proj.weight"}
    for targets, wrong, near in (
        (["haed"], "haed", "'head'"),
        (["proj", "haed"], "haed", "'head'"),
        (["prj.weight"], "prj.weight", "'proj.weight', 'head.weight'"),
    ):
        with pytest.raises(lx.UnknownTarget) as ours:
            ours_of(model, args, targets)
        assert str(ours.value) == f"targets: {wrong!r} matches no weight; nearest: {near}"
