"""The rows of docs/peft.md: what peft computes of a case, by the formula, and that ours computes the formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

import lorasc_fx as lx
from tests.peft.kit import (
    EXACT,
    RANK,
    Case,
    assert_ours_is_right,
    eager,
    formula_of,
    gap,
    normal,
    ours_of,
    peft_of,
    seeded,
    without_gradient,
)

RIGHT, WRONG = "within rounding of W + s B A", "more than 0.1 away from it"
Outcome = str | tuple[type[Exception], str]
"""RIGHT, WRONG, or the error that is raised."""


@dataclass(frozen=True)
class Row:
    """A case and what peft makes of it.

    Args:
        adapter, merge: outcomes of a call of the adapter, and of `merge_and_unload`. An error of the adapter may come
            when it is made, or when it is called; there is no merge then.
        modes: training modes in which peft is looked at; ours is in both.
        dead: adapted modules of which no factor gets a gradient.
        missed: weights of the case that peft does not adapt.
        theirs: arguments for peft in place of the case's targets.
        frontends: for ours.
    """

    case: Case
    adapter: Outcome = RIGHT
    merge: Outcome = RIGHT
    modes: tuple[bool, ...] = (True, False)
    dead: frozenset[str] = frozenset()
    missed: frozenset[str] = frozenset()
    theirs: Mapping[str, Any] = field(default_factory=dict)
    frontends: tuple[str, ...] = ("auto",)


def rows_of(*shape: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (normal(*shape),)


# ---- convolutions

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KERNEL = {1: (3,), 2: (3, 5), 3: (3, 1, 3)}
SPACE = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}


def convs(dims: int, kind: Any = None, kernel: Any = None, **options: Any) -> Case:
    """Two such convolutions, [8, 4] and [4, 8] in channels, with a batch norm and a dropout between."""
    conv, kernel = kind or CONV[dims], kernel or KERNEL[dims]

    def build() -> nn.Module:
        middle = (NORM[dims](8), nn.Tanh(), nn.Dropout(0.2))
        return nn.Sequential(conv(4, 8, kernel, **options), *middle, conv(8, 4, kernel, **options))

    return Case(build, rows_of(3, 4, *SPACE[dims]), ("0", "4"), ("0.weight", "4.weight"))


SILENT: dict[str, dict[str, Any]] = {
    "dilation": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}
SIZES = r"The size of tensor a \(\d+\) must match the size of tensor b \(\d+\)"
CONVS = {
    **{f"conv{dims}d": Row(convs(dims, padding="same")) for dims in CONV},
    # An op of its own for the padding, and the module's. tests/kit/operators has the other dimensions of ours.
    **{
        f"conv{dims}d, {name}": Row(convs(dims, **SILENT[name]), WRONG, frontends=("export", "symbolic"))
        for dims, name in ((1, "circular"), *((2, name) for name in SILENT), (3, "replicate"))
    },
    "conv2d, dilation, size changes": Row(convs(2, kernel=3, dilation=2, padding=2), (RuntimeError, SIZES)),
    **{
        f"transposed conv{dims}d, groups {groups}": Row(
            convs(dims, TRANSPOSED[dims], groups=groups, stride=2, padding=1),
            (ValueError, rf"Target module ConvTranspose{dims}d\(.*\) is not supported"),
        )
        for dims, groups in ((1, 2), (2, 1), (3, 2))
    },
    # peft takes this kernel for a 1x1 one.
    "conv3d, kernel (1, 1, 3)": Row(
        convs(3, kernel=(1, 1, 3)), merge=(RuntimeError, "must match the size of tensor b"), modes=(False,)
    ),
}


@pytest.mark.parametrize(
    ("groups", "dims", "frontend"),
    [(2, 1, "export"), (2, 2, "symbolic"), (4, 2, "export"), (4, 3, "symbolic")],
)
def test_grouped_convolutions(groups: int, dims: int, frontend: str) -> None:
    """peft's delta is a dense convolution, which a grouped weight cannot hold: no merge, and channels leak."""
    case = convs(dims, groups=groups, padding=1)
    model, (x,) = case.model().eval(), case.inputs()
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        theirs = peft_of(model[0:1], ["0"])
    other = x.clone()
    other[:, 4 // groups :] += 1  # nothing that the first group reads
    own = slice(0, 8 // groups)
    assert gap(model[0](x)[:, own], model[0](other)[:, own]) == 0
    assert gap(theirs(x)[:, own], theirs(other)[:, own]) > 0.1
    with pytest.raises(NotImplementedError, match="Merging is not supported for _ConvNd layers with groups > 1!"):
        theirs.merge_and_unload()
    rank = "support is limited to conv layers where the rank is divisible by groups"
    with pytest.warns(UserWarning, match="groups > 1"), pytest.raises(ValueError, match=rank):
        peft_of(model, case.targets, r=RANK - 1)
    assert_ours_is_right(case, frontend)


# ---- attention


class Attends(nn.Module):
    """Self-attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True), nn.Linear(6, 5)
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            nn.init.normal_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Crosses(nn.Module):
    """Keys and values of other widths than the queries: three projections in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, kdim=5, vdim=7, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, keys, values, need_weights=False)[0])


def attends(*targets: str) -> Case:
    meant = {"attn.in_proj_weight": ("attn", "attn.in_proj_weight"), "attn.out_proj.weight": ("attn", "attn.out_proj")}
    meant["head.weight"] = ("head",)
    weights = tuple(name for name, by in meant.items() if set(by) & set(targets))
    return Case(Attends, rows_of(3, 4, 6), targets, weights)


def encoder(*targets: str, count: int = 2) -> Case:
    """TransformerEncoderLayers, with these modules of each."""
    weights = {"linear1": ["linear1.weight"], "linear2": ["linear2.weight"]}
    weights["self_attn"] = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    names = [f"{layer}.{name}" for layer in range(count) for target in targets for name in weights[target]]

    def build() -> nn.Module:
        return nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True) for _ in range(count)))

    modules = tuple(f"{layer}.{target}" for layer in range(count) for target in targets)
    return Case(build, rows_of(3, 4, 6), modules, tuple(names))


KEYS_AND_VALUES = Case(
    Crosses,
    lambda: (normal(3, 4, 6), normal(3, 2, 5), normal(3, 2, 7, seed=5)),
    ("attn", "head"),
    ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight", "head.weight"),
)
LINEARS = encoder("linear1", "linear2", count=1)
ATTENTION = {
    # In eval mode the layer hands its weights to one fused op, as the frozen weights allow: peft is not asked. Export
    # takes no such path; dynamo would, and so would a model with graph breaks.
    "encoder layer, eval mode": Row(
        LINEARS,
        WRONG,
        modes=(False,),
        dead=frozenset(LINEARS.targets),
        frontends=("auto", "dynamo", "graph-breaks"),
    ),
    "encoder layer, train mode": Row(encoder("linear1", "linear2"), modes=(True,)),
    "encoder layers with attention": Row(
        encoder("self_attn", "linear1", "linear2"),
        WRONG,
        WRONG,
        modes=(False,),
        dead=frozenset(
            f"{layer}.{name}"
            for layer in range(2)
            for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
        ),
    ),
    "in_proj_weight": Row(attends("attn.in_proj_weight", "head"), missed=frozenset({"attn.in_proj_weight"})),
    "in_proj_weight by all-linear": Row(
        attends("attn.in_proj_weight", "attn.out_proj", "head"),
        WRONG,
        dead=frozenset({"attn.out_proj"}),
        missed=frozenset({"attn.in_proj_weight"}),
        theirs={"targets": "all-linear"},
    ),
    "in_proj_weight as a parameter": Row(
        attends("attn.in_proj_weight", "head"),
        theirs={"targets": ["head"], "target_parameters": ["attn.in_proj_weight"]},
    ),
    # nn.MultiheadAttention reads out_proj.weight and never calls out_proj; the merge adds what never trained.
    "out_proj": Row(attends("attn.out_proj", "head"), WRONG, dead=frozenset({"attn.out_proj"})),
    # peft's own layer adds the delta of out_proj by hand, and once more by that projection's merge.
    "the whole attention": Row(attends("attn", "head"), WRONG, WRONG),
    "keys and values of other widths": Row(
        KEYS_AND_VALUES, (ValueError, "Only same embed for query/key/value is supported")
    ),
}

# ---- weights that are read, tied, or parameters


class Reads(nn.Module):
    """The projection's weight is read, and the projection never called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.drop, self.head = nn.Linear(6, 7), nn.Dropout(0.2), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(F.linear(x, self.proj.weight, self.proj.bias))))


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.drop(torch.tanh(self.up(self.emb(ids))))))


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


def llama() -> nn.Module:
    size = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, tie_word_embeddings=True, use_cache=False, **size, **heads)
    return transformers.LlamaForCausalLM(config)


def tokens(high: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randint(0, high, (3, 5), generator=torch.Generator().manual_seed(2)),)


READS = Case(Reads, rows_of(3, 4, 6), ("proj", "head"), ("proj.weight", "head.weight"))
LLAMA = Case(
    llama,
    tokens(30),
    ("lm_head", "model.layers.0.mlp.up_proj"),
    ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
)


def tied(*targets: str) -> Case:
    return Case(Tied, tokens(9), targets, ("emb.weight", "up.weight"))


def bare(build: Callable[[], nn.Module], head: str, *held: str) -> Case:
    return Case(build, rows_of(3, 4, 6), (*held, head), (*held, f"{head}.weight"))


def of_parameters(case: Case, adapter: Outcome = RIGHT) -> dict[str, Row]:
    """As targets peft misses them in silence; as `target_parameters` it has them."""
    *held, head = case.targets
    by_name = {"targets": [head], "target_parameters": held}
    return {
        "missed": Row(case, missed=frozenset(held)),
        "missed by all-linear": Row(case, missed=frozenset(held), theirs={"targets": "all-linear"}),
        "as parameters": Row(case, adapter, theirs=by_name),
    }


PARAMETERS = {
    "bare": of_parameters(bare(lambda: nn.Sequential(Body(), nn.Linear(5, 4)), "1", "0.w", "0.up")),
    "fused experts": of_parameters(bare(Experts, "head", "body.gate_up", "body.down")),
    "experts of the parent": of_parameters(
        bare(Outside, "head", "body.gate_up", "body.down"),
        (AttributeError, "'ParamWrapper' object has no attribute 'gate_up'"),
    ),
}
OTHERS = {
    "a weight that is read": Row(READS, WRONG, dead=frozenset({"proj"}), frontends=("export", "symbolic")),
    "a weight that is read, as a parameter": Row(
        READS, WRONG, dead=frozenset({"proj"}), theirs={"targets": ["head"], "target_parameters": ["proj.weight"]}
    ),
    # Two weights while it trains, one after the merge, with every delta in it.
    **{f"tied, {first}": Row(tied(first, "up"), WRONG) for first in ("head", "emb")},
    "tied, both": Row(tied("emb", "head", "up"), WRONG, WRONG),
    # The option ties the factors: right while it trains, and the merge adds them twice.
    "tied, ensure_weight_tying": Row(
        LLAMA,
        merge=WRONG,
        modes=(False,),
        theirs={"ensure_weight_tying": True},
    ),
    **{f"parameters, {name}, {how}": row for name, rows in PARAMETERS.items() for how, row in rows.items()},
    "parameters of the top module": Row(
        Case(Body, rows_of(3, 4, 6), ("w", "up"), ("w", "up")),
        (ValueError, r"Targeting an nn\.Parameter on the top-level module is not supported"),
        theirs={"targets": [], "target_parameters": ["w", "up"]},
    ),
}
ROWS = CONVS | ATTENTION | OTHERS


def outcome_of(found: torch.Tensor, right: torch.Tensor) -> str:
    difference = gap(found, right)
    assert difference < 10 * EXACT or difference > 0.1
    return WRONG if difference > 0.1 else RIGHT


def assert_peft(row: Row, training: bool) -> None:
    """What peft makes of the case in a mode is what the row says."""
    model, args = row.case.model().train(training), row.case.inputs()
    options = dict(row.theirs)
    targets = options.pop("targets", row.case.targets)
    if isinstance(row.adapter, tuple):
        error, text = row.adapter
        with pytest.raises(error, match=text):
            peft_of(model, targets, **options)(*args)
        return
    theirs, twin = (peft_of(model, targets, **options) for _ in range(2))  # a batch norm moves its statistics
    names = {id(value): name for name, value in model.named_parameters()}
    adapted = {names[id(model.get_parameter(name))]: value for name, value in formula_of(theirs, model).items()}
    assert set(row.case.weights) - set(adapted) == row.missed
    right = eager(model, adapted, args)
    assert outcome_of(seeded(twin, args), right) == row.adapter
    if row.dead:
        assert without_gradient(twin, args) == row.dead
    if isinstance(row.merge, tuple):
        error, text = row.merge
        with pytest.raises(error, match=text):
            theirs.merge_and_unload()
        return
    assert outcome_of(seeded(theirs.merge_and_unload(), args), right) == row.merge


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # peft's, at the merge
@pytest.mark.parametrize("name", ROWS)
def test_what_peft_computes(name: str) -> None:
    for training in ROWS[name].modes:
        assert_peft(ROWS[name], training)


@pytest.mark.parametrize(
    ("name", "frontend"),
    [
        (name, frontend)
        for name, row in ROWS.items()
        if "missed by" not in name and "as a parameter" not in name and "as parameters" not in name
        for frontend in row.frontends
    ],
)
def test_ours_is_right(name: str, frontend: str) -> None:
    assert_ours_is_right(ROWS[name].case, frontend)


@pytest.mark.parametrize("first", ["head", "emb"])
def test_a_tied_head_stays_tied(first: str) -> None:
    case = tied(first, "up")
    cascade = ours_of(case.model(), case.inputs(), case.targets)
    assert cascade.sites[0].aliases == ("head.weight",)
    released = cascade.release()
    assert released.head.weight is released.emb.weight


def test_a_target_that_matches_nothing() -> None:
    """peft names no other name, and is silent where one other target is found; ours is an error with the nearest."""
    model, args = READS.model(), READS.inputs()
    with pytest.raises(NoMatchingPeftModuleError, match=r"Target modules \{'haed'\} not found in the base model"):
        peft_of(model, ["haed"])
    assert set(formula_of(peft_of(model, ["proj", "haed"]), model)) == {"proj.weight"}
    for targets, wrong, near in (
        (["haed"], "haed", "'head'"),
        (["proj", "haed"], "haed", "'head'"),
        (["prj.weight"], "prj.weight", "'proj.weight', 'head.weight'"),
    ):
        with pytest.raises(lx.UnknownTarget) as ours:
            ours_of(model, args, targets)
        assert str(ours.value) == f"targets: {wrong!r} matches no weight; nearest: {near}"
