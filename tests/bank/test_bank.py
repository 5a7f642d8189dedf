"""`AdapterBank`: adding, removing, mixing, training and compiling adapters, rows and slots of calls, and errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

import lorasc_fx as lx
from lorasc_fx import Site
from lorasc_fx.bank import graph as bank_graph
from lorasc_fx.bank.rows import segments
from lorasc_fx.bank.slots import Slots
from lorasc_fx.branch import Factors
from tests.kit import tiny
from tests.kit.errors import raises

Pairs = dict[str, Factors]


def random_pairs(sites: Iterable[Site], rank: int, seed: int, size: float = 0.2) -> Pairs:
    """Return factors for every site, in the stored layout of its weight. Each changes its weight by about `size`."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for site in sites:
        lead = 1 if site.experts else 0
        stack, rows, columns = site.shape[:lead], site.shape[lead], torch.Size(site.shape[lead + 1 :]).numel()
        b = torch.randn(*stack, rows, rank, generator=generator, dtype=torch.float64)
        a = torch.randn(*stack, rank, columns, generator=generator, dtype=torch.float64)
        pairs[site.weight] = Factors(b * size / rank, a * columns**-0.5)
    return pairs


def folded(model: nn.Module, pairs: Mapping[str, Factors]) -> nn.Module:
    """Return the model after writing `W0 + b @ a` into its weights, rounded once."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, pair in pairs.items():
            weights[name].copy_(
                (weights[name].double() + (pair.b @ pair.a).view(weights[name].shape)).to(weights[name])
            )
    return model


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(got: Any, expected: Any, row: int | None = None, rows: int = 0) -> float:
    """Return the largest difference, relative to the largest entry, over all outputs.

    With `row`, only this row is compared, of outputs that have `rows` rows on axis 0.
    """
    worst = 0.0
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.shape == other.shape
        if row is not None and len(other) != rows:
            continue
        difference = (one - other).abs() if row is None else (one[row] - other[row]).abs()
        worst = max(
            worst, (difference.max() / other.abs().max().clamp_min(1e-30)).item() if difference.numel() else 0.0
        )
    return worst


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


SITES = lx.AdapterBank(mlp(), args=(X,), targets=("linear",)).sites


def pairs(seed: int, rank: int = 2) -> Pairs:
    return random_pairs(SITES, rank, seed)


def bank_of(*names: str, **options: Any) -> lx.AdapterBank:
    return lx.AdapterBank(mlp(), {name: pairs(ord(name)) for name in names}, args=(X,), **options)


def expected(name: str | None) -> Tensor:
    model = mlp() if name is None else folded(mlp(), pairs(ord(name)))
    output: Tensor = model(X).detach()
    return output


def test_add_and_remove_while_it_serves() -> None:
    bank = bank_of("a", capacity=2)
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    bank.add("b", pairs(ord("b")))
    mixed = bank(X, adapter=["b", "a", None, "a", "b"])
    for row, name in enumerate(["b", "a", None, "a", "b"]):
        assert distance(mixed, expected(name), row, len(X)) < 1e-13
    with raises(lx.SpecError, "bank-full", "room for 2 adapters"):
        bank.add("c", pairs(3))
    bank.remove("a")
    assert bank.names == ("b",)
    with raises(lx.StateError, "unknown-name", "'a'", "'b'"):
        bank(X, adapter="a")
    bank.add("a", pairs(7))  # the slot is used again
    assert distance(bank(X, adapter="a"), folded(mlp(), pairs(7))(X)) < 1e-13
    assert all(torch.equal(value, before[name]) for name, value in bank.model.state_dict().items())
    assert len(bank._variants) == 1


def test_threads_call_while_adapters_come_and_go() -> None:
    bank, right, failed = bank_of("a", capacity=2), expected("a"), []

    def serve() -> None:
        try:
            for _ in range(50):
                assert distance(bank(X, adapter="a"), right) < 1e-13
                assert distance(bank(X, adapter=["a", None] * 2 + ["a"]), right, 2, len(X)) < 1e-13
        except BaseException as fault:
            failed.append(fault)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(20):
        bank.add("b", pairs(seed))
        bank.remove("b")
    for thread in threads:
        thread.join()
    assert not failed


def test_ranks_may_differ_and_stages_are_summed() -> None:
    bank = lx.AdapterBank(mlp(), {"a": pairs(1, 1), "b": pairs(2, 4)}, args=(X,))
    assert bank.max_rank == 4
    for name, each in (("a", pairs(1, 1)), ("b", pairs(2, 4))):
        assert distance(bank(X, adapter=name), folded(mlp(), each)(X)) < 1e-13
    twice = {name: Factors(torch.cat([p.b, p.b], 1), torch.cat([p.a, p.a], 0)) for name, p in pairs(2, 4).items()}
    bank.add("twice", twice)  # of rank 4, in factors of rank 8
    assert distance(bank(X, adapter="twice"), folded(mlp(), twice)(X)) < 1e-12
    with raises(lx.SpecError, "rank-too-large", "'wide' has rank 5 at 0.weight", "max_rank is 4"):
        bank.add("wide", pairs(1, 5))


def test_runs_and_checkpoints_are_sources(tmp_path: Path) -> None:
    cascade = lx.adapt(mlp(), args=(X,), spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    for _ in cascade.stages(2, optimizer):
        cascade(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    lx.save(cascade, tmp_path)
    bank = lx.AdapterBank(mlp(), {"run": cascade, "saved": tmp_path}, args=(X,))
    slow = copy.deepcopy(cascade).release()(X)
    for name in ("run", "saved"):
        assert distance(bank(X, adapter=name), slow) < 1e-13
    other = mlp()
    with torch.no_grad():
        other[0].weight.add_(1)
    with raises(lx.CheckpointError, "base-differs", "0.weight"):
        lx.AdapterBank(other, {"run": cascade}, args=(X,))
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_bf16_is_rounded_as_a_folded_model_is() -> None:
    model = mlp().bfloat16()
    bank = lx.AdapterBank(copy.deepcopy(model), {"a": pairs(1), "b": pairs(2)}, args=(X.bfloat16(),))
    mixed = bank(X.bfloat16(), adapter=["a", "b", None, "a", "b"]).double()
    for row, seed in enumerate([1, 2, None, 1, 2]):
        exact = copy.deepcopy(model).double()
        rounded = copy.deepcopy(model)
        if seed is not None:
            exact, rounded = folded(exact, pairs(seed)), folded(rounded, pairs(seed))
        error = (mixed[row] - exact(X)[row]).norm()
        assert error <= 3 * (rounded(X.bfloat16()).double() - exact(X)).norm(dim=1).max()


def test_training_several_runs_is_training_each() -> None:
    """The rows of each adapter train it as a separate cascade with the same seed would be trained."""
    rates, x = {"slow": 1e-2, "fast": 1e-1}, X[:4]
    bank = lx.AdapterBank(mlp(), args=(x,), targets=("linear",), max_rank=4)
    for name in rates:
        bank.start(name, rank=2, lora_alpha=3.0, seed=5)
    optimizers = {name: torch.optim.AdamW(bank.parameters_of(name).values(), lr=lr) for name, lr in rates.items()}
    for _ in range(4):
        output = bank(torch.cat([x] * len(rates)), adapter=[name for name in rates for _ in x])
        sum(part.square().mean() for part in output.chunk(len(rates))).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in bank.model.parameters())
    for name, lr in rates.items():
        cascade = lx.adapt(mlp(), args=(x,), spec=lx.CascadeSpec(rank=2, lora_alpha=3.0, seed=5))
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=lr))
        for _ in range(4):
            cascade(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(bank(x, adapter=name), cascade(x), rtol=1e-10, atol=1e-10)
        again = lx.AdapterBank(mlp(), {name: bank.pairs(name)}, args=(x,))
        torch.testing.assert_close(again(x, adapter=name), cascade(x), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_once_for_all_adapters_and_mixes() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    bank = bank_of("a", "b")
    bank.compile(backend=backend)
    for name in ("a", "b", None):
        assert distance(bank(X, adapter=name), expected(name)) < 1e-13
    assert len(graphs) == 1
    bank.remove("a")
    bank.add("c", pairs(ord("c")))
    assert distance(bank(X, adapter="c"), expected("c")) < 1e-13
    assert len(graphs) == 1
    for mix in (["b", "c", None, "b", "c"], ["c", "c", "b", None, None], [None, "b", "b", "b", "b"]):
        mixed = bank(X, adapter=mix)
        for row, name in enumerate(mix):
            assert distance(mixed, expected(name), row, len(X)) < 1e-13
    assert len(graphs) == 2


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_generate(make: Any) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(3, 40, (3, 5))
    bank = lx.AdapterBank(copy.deepcopy(model), kwargs={"input_ids": ids}, targets=("*attn*", "*mlp*"), max_rank=2)
    models = {None: model}
    for seed, name in enumerate(("a", "b")):
        each = random_pairs(bank.sites, 2, seed, size=1.0)
        bank.add(name, each)
        models[name] = folded(copy.deepcopy(model), each)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    mix = ["b", None, "a"]
    for more in ({}, {"num_beams": 2}):
        got = bank.generate(ids, adapter=mix, **options, **more)
        alone = [models[name].generate(ids, **options, **more)[row] for row, name in enumerate(mix)]
        assert torch.equal(got, torch.stack(alone))
        assert torch.equal(bank.generate(ids, adapter="a", **options, **more)[2], alone[2])
    assert not any(module._forward_hooks for module in bank.model.modules())
    with raises(lx.StateError, "rows-differ", "2 rows, and the batch has 3"):
        bank.generate(ids, adapter=["a", "b"], **options)


def test_a_model_that_reads_a_weight_past_its_module_does_not_generate() -> None:
    class Past(type(tiny.llama())):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            weight = self.model.layers[0].mlp.down_proj.weight
            output.logits = output.logits + linear(output.logits[..., : weight.shape[1]], weight).sum()
            return output

    torch.manual_seed(0)
    ids = torch.randint(3, 40, (2, 5))
    model = Past(tiny.llama().config).double().eval()
    bank = lx.AdapterBank(model, kwargs={"input_ids": ids, "use_cache": False}, targets=("*down_proj*",), max_rank=2)
    bank.add("a", random_pairs(bank.sites, 2, 0))
    with raises(lx.StateError, "not-available", "a weight is used past its module"):
        bank.generate(ids, adapter="a", max_new_tokens=2)


def test_rows_that_depend_on_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    statistics = model[1].running_mean.clone()
    bank = lx.AdapterBank(model, args=(X,), targets=("linear",))
    bank.add("a", random_pairs(bank.sites, 2, 0))
    with raises(lx.StateError, "rows-not-independent", "layers that compute over the batch (BatchNorm)"):
        bank(X, adapter=["a", None, "a", None, "a"])
    assert torch.equal(model[1].running_mean, statistics)
    model.eval()
    mixed, alone = bank(X, adapter=["a", None, "a", None, "a"]), bank(X, adapter="a")
    assert distance(mixed, alone, 0, len(X)) < 1e-13
    assert distance(mixed, bank(X), 1, len(X)) < 1e-13


@pytest.mark.parametrize("traced", [False, True])
def test_batch_norm_in_train_mode_is_refused_also_for_equal_rows(traced: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    model = torch.fx.symbolic_trace(model) if traced else model
    x = X[:1].expand(4, 6).clone()
    bank = lx.AdapterBank(model, {"a": {"0.weight": pairs(1)["0.weight"]}}, args=(x,))
    mix = ["a", None, "a", None]
    assert distance(bank(x, adapter=mix), bank(x, adapter="a"), 2, 4) < 1e-13
    before = copy.deepcopy(model.state_dict())
    model.train()
    with raises(lx.StateError, "rows-not-independent", "1 is a BatchNorm1d in train mode"):
        bank(x, adapter=mix)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Weighted(nn.Module):
    """Normalizes its weight, so that each adapter has its own batch, and adds an argument to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return (x + more).tanh() @ (self.linear.weight / self.linear.weight.norm()).t()


class Masked(nn.Module):
    """Attention with a mask [sequence, sequence] or [batch, sequence, sequence]."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.weighted, self.linear = weighted, nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.softmax(x @ x.mT + mask, -1) @ x
        return y @ (self.linear.weight / self.linear.weight.norm()).t() if self.weighted else self.linear(y)


def sequences(rows: int, length: int, *shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, length, 6).double(), torch.randn(*shape).double()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("first", ["other sizes", "zeros"])
@pytest.mark.parametrize("rows", [2, 4])
def test_an_argument_without_rows_is_not_cut(rows: int, first: str, train: bool) -> None:
    """Whether rows can be cut out of an argument is not known from other arguments, nor from equal rows."""
    bank = lx.AdapterBank(Weighted().double().train(train), args=sequences(2, 5, 5, 1), targets=("linear.weight",))
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    mix = [*"ab"] * (rows // 2)
    if first == "zeros" and rows == 2:
        x, more = sequences(2, 2, 2, 1)
        with raises(lx.StateError, "rows-not-independent"):
            bank(x, 0 * more, adapter=mix)
    elif first == "other sizes":
        x, more = sequences(rows, 7, 7, 1)
        assert distance(bank(x, more, adapter=mix), bank(x, more, adapter="b"), 1, rows) < 1e-12
    with raises(lx.StateError, "rows-not-independent"):
        bank(*sequences(rows, rows, rows, 1), adapter=mix)


def test_equal_rows_do_not_show_that_an_argument_can_be_cut() -> None:
    class Mean(Weighted):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x, more.mean(0)), training=self.training)

    x, more = sequences(5, 1, 5, 6)
    bank = lx.AdapterBank(Mean().double().train(), args=(x[:, 0], more), targets=("linear.weight",))
    bank.add("a", random_pairs(bank.sites, 2, 0))
    mix = ["a", None, "a", None, "a"]
    assert bank(x[:, 0], more[:1].expand(5, 6), adapter=mix).shape == (5, 6)  # right for any part of the rows
    with raises(lx.StateError, "rows-not-independent", "something else for a part of the rows"):
        bank(x[:, 0], more, adapter=mix)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_mask_with_as_many_rows_as_the_batch(rows: int) -> None:
    """It is right in one pass, and refused if each adapter needs its own batch."""
    for weighted in (False, True):
        x, mask = sequences(rows, rows, rows, rows)
        bank = lx.AdapterBank(Masked(weighted).double().eval(), args=(x, mask), targets=("linear.weight",))
        for seed, name in enumerate("ab"):
            bank.add(name, random_pairs(bank.sites, 2, seed))
        mix = [*"ab"] * (rows // 2)
        if weighted:
            with raises(lx.StateError, "rows-not-independent"):
                bank(x, mask, adapter=mix)
        else:
            assert distance(bank(x, mask, adapter=mix), bank(x, mask, adapter="b"), rows - 1, rows) < 1e-12


def test_buffers_that_forward_writes_are_written_once() -> None:
    class Counts(nn.Module):
        def __init__(self, weighted: bool) -> None:
            super().__init__()
            self.weighted, self.linear = weighted, nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x @ (self.linear.weight / self.linear.weight.norm()).t() if self.weighted else self.linear(x)

    for weighted in (False, True):
        model = Counts(weighted).double()
        bank = lx.AdapterBank(model, args=(X,), targets=("linear.weight",))
        bank.add("a", random_pairs(bank.sites, 2, 0))
        if weighted:
            with raises(lx.StateError, "rows-not-independent", "writes into the buffer calls, once for each adapter"):
                bank(X, adapter=["a", None, "a", None, "a"])
        else:
            bank(X, adapter=["a", None, "a", None, "a"])
        assert model.calls == (0 if weighted else 1)


def test_dropout_in_train_mode_is_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    bank = lx.AdapterBank(model.train(), args=(X,), targets=("linear",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    mix, outputs = ["a", "b", "b", None, "a"], {}
    for adapter in ("a", "b", None, mix):
        torch.manual_seed(3)
        outputs[str(adapter)] = bank(X, adapter=adapter) if adapter else model(X)
    for row, name in enumerate(mix):
        assert distance(outputs[str(mix)], outputs[str(name)], row, len(X)) < 1e-12


def test_refusals() -> None:
    bank = bank_of("a")
    with raises(lx.StateError, "unknown-name", "no adapter 'aa'"):
        bank(X, adapter="aa")
    with raises(lx.StateError, "rows-differ", "2 rows, and the batch has 5"):
        bank(X, adapter=["a", None])
    with raises(lx.StateError, "unknown-name", "adapter is a int"):
        bank(X, adapter=3)  # type: ignore[arg-type]
    with raises(lx.StateError, "unknown-name", "an adapter 'a' already"):
        bank.add("a", pairs(1))
    with raises(lx.SpecError, "invalid-value", "the name of an adapter is ''"):
        bank.add("", pairs(1))
    with raises(lx.SpecError, "invalid-value", "'b' has None for 0.weight; give lorasc_fx.branch.Factors"):
        bank.add("b", {"0.weight": None})  # type: ignore[dict-item]
    with raises(lx.SpecError, "adapter-does-not-fit", "'b' has b (8, 2) and a (2, 5) for 0.weight"):
        bank.add("b", {"0.weight": Factors(torch.zeros(8, 2), torch.zeros(2, 5))})
    with raises(lx.SpecError, "sites-differ", "'b' changes 1.weight"):
        bank.add("b", {"1.weight": Factors(torch.zeros(8, 2), torch.zeros(2, 5))})
    with raises(lx.SpecError, "invalid-value", "the rank of 'b' is 3; give one from 1 to 2"):
        bank.start("b", rank=3)
    with raises(lx.SpecError, "invalid-value", "max_rank is 0"):
        bank_of("a", max_rank=0)
    with raises(lx.SpecError, "invalid-value", "no adapter changes a weight"):
        lx.AdapterBank(mlp(), args=(X,))
    with raises(lx.SpecError, "bank-full"):
        bank_of("a", "b", capacity=1)
    cascade = lx.adapt(mlp(), args=(X,))
    with raises(lx.StateError, "already-adapted"):
        lx.AdapterBank(cascade.model, {"a": pairs(1)}, args=(X,))
    assert bank.names == ("a",)
    assert "2 sites, rank 2, adapters a" in repr(bank)
    assert all(parameter.requires_grad for parameter in bank.release().parameters())


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("lora_alpha", "16", "lora_alpha of 'b' is '16'; give a number above 0"),
        ("lora_alpha", 0.0, "lora_alpha of 'b' is 0.0"),
        ("lora_alpha", float("nan"), "lora_alpha of 'b' is nan"),
        ("seed", 1.5, "the seed of 'b' is 1.5; give an integer"),
        ("seed", -1, "the seed of 'b' is -1"),
        ("rank", "1", "the rank of 'b' is '1'"),
    ],
)
def test_start_checks_its_arguments_before_it_adds_the_adapter(option: str, value: Any, text: str) -> None:
    bank = bank_of("a", capacity=2)
    with raises(lx.SpecError, "invalid-value", text):
        bank.start("b", **{option: value})
    assert bank.names == ("a",)
    bank.start("b")  # the slot is still free
    assert bank.names == ("a", "b")


@pytest.mark.parametrize("name", [None, "", 3, ["a"]])
def test_names_of_adapters_are_strings(name: Any) -> None:
    bank = bank_of("a")
    for call in (bank.start, bank.remove, bank.parameters_of, bank.pairs, lambda name: bank.add(name, pairs(1))):
        with raises(lx.SpecError, "invalid-value", f"the name of an adapter is {name!r}; give a string"):
            call(name)
    assert bank.names == ("a",)
    assert distance(bank(X, adapter=["a", None, None, None, None]), expected(None), 1, len(X)) < 1e-13


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_factors_must_be_finite(factor: str, value: float) -> None:
    bank, broken = bank_of("a"), pairs(ord("b"))
    getattr(broken["2.weight"], factor)[0, 0] = value
    with raises(lx.SpecError, "non-finite", "'b' has inf or nan in its factors for 2.weight"):
        bank.add("b", broken)
    assert bank.names == ("a",)


@pytest.mark.parametrize(
    ("dtype", "b", "a"),
    [(torch.float16, 1e5, 1e-5), (torch.float16, 6e4, 1e-8), (torch.float32, 1e300, 1e-300)],
    ids=["overflow", "vanishes", "fp32"],
)
def test_factors_must_fit_the_dtype_of_the_bank(dtype: torch.dtype, b: float, a: float) -> None:
    bank = lx.AdapterBank(mlp().to(dtype), args=(X.to(dtype),), targets=("linear",), max_rank=1)
    pair = Factors(torch.full((4, 1), b, dtype=torch.float64), torch.full((1, 8), a, dtype=torch.float64))
    with raises(lx.SpecError, "non-finite", "'b' has values in lora_", f"of 2.weight that {dtype} cannot hold"):
        bank.add("b", {"2.weight": pair})
    assert bank.names == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda factor: factor > 0, "torch.bool"),
        (lambda factor: factor + 0j, "torch.complex128"),
        (lambda factor: factor.to("meta"), "on meta"),
        (lambda factor: factor.to_sparse(), "torch.sparse_coo"),
        (lambda factor: factor[0], "with 1 axes"),
        (lambda factor: factor.round().int(), "torch.int32"),
    ],
    ids=["bool", "complex", "meta", "sparse", "vector", "integers"],
)
def test_factors_are_dense_real_matrices(change: Callable[[Tensor], Tensor], text: str) -> None:
    for factor in ("a", "b"):
        broken = pairs(1)
        broken["2.weight"] = replace(broken["2.weight"], **{factor: change(getattr(broken["2.weight"], factor))})
        with raises(lx.SpecError, "invalid-value", "'b' has a factor for 2.weight", text, "Give dense matrices"):
            lx.AdapterBank(mlp(), {"b": broken}, args=(X,))


def test_targets_are_a_tuple() -> None:
    with raises(lx.SpecError, "invalid-value", "targets is 'linear'; give a tuple: targets=('linear',)"):
        lx.AdapterBank(mlp(), args=(X,), targets="linear")


def test_two_banks_on_one_model_restore_its_flags() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    first, second = (lx.AdapterBank(model, {"a": pairs(1)}, args=(X,)) for _ in range(2))
    for bank in (first, first):  # a second release of the same bank has no effect
        bank.release()
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert distance(second(X, adapter="a"), folded(mlp(), pairs(1))(X)) < 1e-13
    second.release()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    third = lx.AdapterBank(model, {"a": pairs(1)}, args=(X,))
    first.release()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    third.release()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_model_in_a_bank_cannot_be_adapted(tmp_path: Path) -> None:
    lx.save(lx.adapt(mlp(), args=(X,)), tmp_path)
    bank = bank_of("a")
    other = lx.AdapterBank(bank.model, {"a": pairs(1)}, args=(X,))
    for call in (lambda: lx.adapt(bank.model, args=(X,)), lambda: lx.load(tmp_path, bank.model)):
        with raises(lx.StateError, "already-adapted", "A bank uses this model", "0.weight", "release()"):
            call()
    lx.adapt(copy.deepcopy(bank.model), args=(X,))
    bank.release()
    with raises(lx.StateError, "already-adapted", "A bank uses this model"):
        lx.adapt(bank.model, args=(X,))
    del other  # without `release`
    lx.adapt(bank.model, args=(X,)).release()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_bank_cannot_be_copied(copied: Callable[[lx.AdapterBank], object]) -> None:
    bank = bank_of("a")
    with raises(lx.StateError, "not-serializable", "Build another bank"):
        copied(bank)
    bank(X, adapter="a")


@pytest.mark.parametrize("write", ["load_state_dict", "data"])
def test_the_base_is_compared_again_after_a_write_from_outside(write: str, tmp_path: Path) -> None:
    cascade = lx.adapt(mlp(), args=(X,))
    lx.save(cascade, tmp_path)
    bank = bank_of("a", max_rank=16)
    bank.add("before", tmp_path)
    original = copy.deepcopy(bank.model.state_dict())
    if write == "data":  # this does not change the version counter
        bank.model.get_parameter("2.weight").data[0, 0] += 1
    else:
        bank.model.load_state_dict({**original, "2.weight": original["2.weight"] + 1})
    with raises(lx.CheckpointError, "base-differs", "2.weight"):
        bank.add("after", tmp_path)
    bank.model.load_state_dict(original)
    bank.add("again", tmp_path)
    assert bank.names == ("a", "before", "again")


def test_the_dtype_of_the_model_must_not_change() -> None:
    bank = lx.AdapterBank(mlp().float(), {"a": pairs(1)}, args=(X.float(),))
    before = bank(X.float(), adapter="a")
    bank.model.double()
    for adapter in ("a", ["a", None, "a", None, "a"]):
        with raises(lx.StateError, "weights-changed-outside", "0.weight was torch.float32", "is torch.float64 now"):
            bank(X, adapter=adapter)
    assert bank(X).dtype == torch.float64  # the base needs no factors
    bank.model.float()
    assert torch.equal(bank(X.float(), adapter="a"), before)


def test_a_spec_cannot_name_the_method_of_a_bank() -> None:
    assert all(site.options.method.__name__ == "PairBranch" for site in bank_of("a").sites)
    with raises(lx.SpecError, "invalid-value", "adapter", "'pair'"):
        lx.CascadeSpec(adapter="pair")


def bank_with(*names: str, **options: Any) -> lx.AdapterBank:
    bank = lx.AdapterBank(mlp(), args=(X,), targets=("linear",), max_rank=2, **options)
    for name in names:
        bank.add(name, random_pairs(bank.sites, 2, ord(name)))
    return bank


class Encoder(nn.Module):
    """A text encoder with padding. `nn.MultiheadAttention` computes with sequence-first tensors."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


class SequenceFirst(nn.Module):
    """Linear layers whose input is [T, B, in], flattened or not. The sum over T comes last."""

    def __init__(self, flat: bool, layers: int = 1) -> None:
        super().__init__()
        self.flat, self.embedding = flat, nn.Embedding(20, 6, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        length, rows, size = x.shape
        for linear_layer in self.layers:
            x = linear_layer(x.reshape(length * rows, size) if self.flat else x).tanh().view(length, rows, size)
        return x.transpose(0, 1)  # type: ignore[no-any-return]


def padded(*texts: tuple[int, ...], length: int) -> Tensor:
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])


@pytest.mark.parametrize(
    ("model", "ids"),
    [
        (lambda: Encoder(1), padded((3, 4), (5, 6), length=6)),
        (lambda: Encoder(2), padded((3, 4), (5,), (3, 7, 8), (9, 9), length=8)),
        (lambda: SequenceFirst(flat=False), padded((3, 4), (5, 6), length=6)),
        (lambda: SequenceFirst(flat=True), padded((3, 4), (5, 6), length=6)),
        (lambda: SequenceFirst(flat=True), padded((3, 4), (3, 5), length=3)),  # agrees with batch-first, too
        (lambda: SequenceFirst(flat=True), padded((3,), (5, 6), (3,), length=9)),
    ],
    ids=["encoder", "two layers", "sequence first", "flat", "ambiguous", "equal rows"],
)
def test_rows_that_differ_in_few_tokens(model: Any, ids: Tensor) -> None:
    torch.manual_seed(0)
    base = model().double().eval()
    bank = lx.AdapterBank(base, args=(ids,), targets=("layers*",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed, size=1.0))
    mix = [("a", None, "b")[row % 3] if len(ids) > 2 else "ab"[row] for row in range(len(ids))]
    for batch in (ids, torch.randint(1, 20, ids.shape), ids.flip(0)):
        mixed = bank(batch, adapter=mix)
        for row, adapter in enumerate(mix):
            assert distance(mixed, bank(batch, adapter=adapter), row, len(ids)) < 1e-12


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [("aaaabb", "aab"), ("aabbcc", "abc"), ("aabcc", "aabcc"), ("abab", "abab"), ("aaaaabb", "aaaaabb")],
)
def test_sorted_rows_are_segments(adapters: str, expected: str) -> None:
    assert "".join(segments(list(adapters))) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "flat", "sequence first"])
def test_sorted_rows_share_factors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the rows are the inner part of a flattened axis, each row needs its own factors."""
    torch.manual_seed(0)
    model: nn.Module = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
        "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3, groups=2)),
        "flat": lambda: SequenceFirst(flat=True),
        "sequence first": lambda: SequenceFirst(flat=False),
    }[kind]()
    x = {"mlp": torch.randn(6, 6), "convolutions": torch.randn(6, 3, 7, 7)}.get(kind, torch.randint(1, 20, (6, 3)))
    x = x.double() if x.is_floating_point() else x
    bank = lx.AdapterBank(model.double().eval(), args=(x,), targets=("linear", "conv"), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    gathered: list[int] = []
    gather = Slots.gather
    monkeypatch.setattr(Slots, "gather", lambda self, slots: gathered.append(len(slots)) or gather(self, slots))
    for mix, count in ((["a", "a", "b", "b", None, None], 3), (["b", "b", "b", "b", "a", "a"], 3), ([*"abbbba"], 6)):
        mixed = bank(x, adapter=mix)
        assert gathered.pop() == (6 if kind == "flat" else count)
        for row, name in enumerate(mix):
            assert distance(mixed, bank(x, adapter=name), row, 6) < 1e-12


def test_a_permutation_of_the_rows_is_not_one_pass() -> None:
    """Row 0 keeps its place, so only the other rows show that the layer gets them in another order."""

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.cat([x[:1], x[1:].flip(0)]))
            return torch.cat([y[:1], y[1:].flip(0)])

    torch.manual_seed(0)
    bank = lx.AdapterBank(Permuted().double(), args=(X,), targets=("linear.weight",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    mix = ["a", "b", "b", None, "a"]
    mixed = bank(X, adapter=mix)
    for row, adapter in enumerate(mix):
        assert distance(mixed, bank(X, adapter=adapter), row, len(X)) < 1e-13


@pytest.mark.parametrize("rows", [2, 4, 5, 8])
def test_reversed_rows_are_not_one_pass(rows: int) -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flip(0)).flip(0)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.randn(rows, 6).double()
    bank = lx.AdapterBank(Reversed().double(), args=(x,), targets=("linear.weight",), max_rank=2)
    bank.add("a", random_pairs(bank.sites, 2, 0))
    mix = ["a" if row < rows // 2 else None for row in range(rows)]
    mixed = bank(x, adapter=mix)
    for row, adapter in enumerate(mix):
        assert distance(mixed, bank(x, adapter=adapter), row, rows) < 1e-13


def test_a_branch_without_effect_in_the_first_batch() -> None:
    """The gate hides the layer whose input is [T, B, in] in the first batch, so this batch does not show its rows."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            hidden = self.hidden(x.transpose(0, 1)).transpose(0, 1)
            return self.first(x) + gate * hidden  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, gate = torch.randn(2, 4, 6).double(), torch.tensor(0.0).double()
    bank = lx.AdapterBank(Gated().double(), args=(x, gate), targets=("linear",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    for value in (gate, gate + 1):
        for row, name in enumerate("ab"):
            assert distance(bank(x, value, adapter=["a", "b"]), bank(x, value, adapter=name), row, 2) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_positions_have_no_rows(dtype: torch.dtype) -> None:
    """The positions [T] of a learned embedding have as many entries as the batch has rows."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(20, 16), nn.Embedding(8, 16), nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            return self.head(x.tanh())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    ids = torch.randint(20, (4, 4))
    bank = lx.AdapterBank(Positions().to(dtype).eval(), args=(ids,), targets=("linear", "embedding"), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed, size=3.0))
    mixed = bank(ids, adapter=[*"abba"])
    for row, name in enumerate("abba"):
        assert distance(mixed, bank(ids, adapter=name), row, 4) < (1e-12 if dtype is torch.float64 else 0.03)


def test_a_model_that_returns_only_a_loss_is_not_mixed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    loss = type("Loss", (nn.Module,), {"forward": lambda self, x: self.model(x).square().mean()})()
    loss.model = model
    bank = lx.AdapterBank(loss, args=(X,), targets=("linear",))
    bank.add("a", random_pairs(bank.sites, 2, 0))
    with raises(lx.StateError, "rows-not-independent"):
        bank(X, adapter=["a", None, "a", None, "a"])


def test_the_first_mixed_calls_may_run_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads the layout must find the graph that uses it."""
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (2, 3))
    bank = lx.AdapterBank(SequenceFirst(True).double(), args=(ids,), targets=("layers*",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    writing, outputs = threading.Event(), []
    original = bank_graph.as_function  # type: ignore[attr-defined]

    def slow(module: Any, **options: Any) -> Any:
        writing.set()
        thread.join(0.5)
        return original(module, **options)

    def call() -> None:
        writing.wait(30)
        outputs.append(bank(ids, adapter=["a", "b"]))

    thread = threading.Thread(target=call)
    thread.start()
    monkeypatch.setattr(bank_graph, "as_function", slow)
    outputs.append(bank(ids, adapter=["a", "b"]))
    thread.join()
    for mixed in outputs:
        for row, name in enumerate("ab"):
            assert distance(mixed, bank(ids, adapter=name), row, 2) < 1e-13


def test_a_batch_without_rows() -> None:
    bank = bank_with("a")
    assert bank(X[:0], adapter=[]).shape == (0, 4)
    with raises(lx.StateError, "rows-differ", "1 rows, and the batch has 0"):
        bank(X[:0], adapter=["a"])


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_call_keeps_an_adapter_that_is_removed_during_the_call() -> None:
    bank = bank_with("a", capacity=1)
    right = bank(X, adapter="a")

    def replace(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            if "a" in bank.names:
                bank.remove("a")
                with raises(lx.SpecError, "bank-full", "1 of them were removed, but calls that use them are still"):
                    bank.add("b", random_pairs(bank.sites, 2, 3))
            return graph.forward(*args)

        return run

    bank.compile(backend=replace)
    assert distance(bank(X, adapter="a"), right) < 1e-13
    bank.add("b", random_pairs(bank.sites, 2, ord("a")))
    assert distance(bank(X, adapter="b"), right) < 1e-13


def test_generate_keeps_an_adapter_that_is_removed_meanwhile() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(3, 40, (2, 5))
    bank = lx.AdapterBank(model, kwargs={"input_ids": ids}, targets=("*mlp*",), max_rank=2, capacity=2)
    for name in "ab":
        bank.add(name, random_pairs(bank.sites, 2, ord(name), size=2.0))
    removed: list[str] = []

    def stop(tokens: Tensor, scores: Tensor) -> Tensor:
        if not removed:
            bank.remove("a")
            removed.append("a")
            with raises(lx.SpecError, "bank-full", "still running"):
                bank.add("c", random_pairs(bank.sites, 2, 7, size=2.0))
        return torch.zeros(len(tokens), dtype=torch.bool)

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    right = bank.generate(ids, adapter="a", **options)
    assert torch.equal(bank.generate(ids, adapter="a", stopping_criteria=[stop], **options), right)
    bank.add("c", random_pairs(bank.sites, 2, 7, size=2.0))
    assert bank.names == ("b", "c")


def test_an_error_of_a_call_does_not_keep_its_slot() -> None:
    bank = bank_with("a", capacity=1)
    with pytest.raises(lx.CaptureError) as fault:
        bank(X[:, :3], adapter="a")
    bank.remove("a")
    bank.add("b", random_pairs(bank.sites, 2, 3))
    assert fault.tb is not None


def test_backward_after_another_adapter_was_added() -> None:
    """Only if the slot of the call itself is used again, its saved factors are gone, and backward raises."""
    bank, x = bank_with("a", capacity=2), X.clone().requires_grad_()
    bank(x, adapter="a").sum().backward()
    right, x.grad = x.grad, None
    output = bank(x, adapter="a").sum()
    bank.add("b", random_pairs(bank.sites, 2, 3))
    output.backward()
    assert right is not None
    torch.testing.assert_close(x.grad, right)
    output = bank(x, adapter="a").sum()
    bank.remove("a")
    bank.add("c", random_pairs(bank.sites, 2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("building", [False, True])
def test_training_after_inference_mode(building: bool) -> None:
    """The same gradients as without inference mode, also if the bank is built and filled in it."""
    gradients = []
    for inference in (False, True):
        with torch.inference_mode(inference and building):
            bank = bank_with("f")
            bank.start("r", seed=1)
        with torch.inference_mode(inference):
            for adapter in ("r", "f", ["r", "f", None, "r", "r"]):
                bank(X, adapter=adapter)
            bank.add("g", random_pairs(bank.sites, 2, 9))
            bank.parameters_of("g")
        parameters = [value for name in "rg" for value in bank.parameters_of(name).values()]
        for adapter in ("r", "g", ["g", "r", "r", None, "f"]):
            bank(X, adapter=adapter).square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
    for right, gradient in zip(*gradients, strict=True):
        assert right is not None
        torch.testing.assert_close(gradient, right)


def test_a_forward_that_writes_into_an_argument() -> None:
    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["x"] = x
            return self.linear(x)  # type: ignore[no-any-return]

    for cache in ({}, {"x": torch.zeros(5, 6).double()}):
        with raises(lx.CaptureError, "no-graph", "writes into an argument, such as a cache", "bank.generate"):
            lx.AdapterBank(Stores().double(), args=(X, cache), targets=("linear",))


def test_finding_the_rows_does_not_write_into_arguments() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, calls: Tensor) -> Tensor:
            calls.add_(1)
            return self.linear(x)  # type: ignore[no-any-return]

    calls = torch.zeros(1)
    bank = lx.AdapterBank(Writes().double(), args=(X, calls), targets=("linear",))
    bank.add("a", random_pairs(bank.sites, 2, 3))
    bank(X, calls, adapter=["a", None, "a", None, "a"])
    assert calls.item() == 1


def test_a_batch_for_each_adapter_writes_into_arguments() -> None:
    """A branch on a weight, which the model normalizes, has no factors by row, so each adapter has its own batch."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            counts.add_(x.square())
            return x @ (self.linear.weight / self.linear.weight.norm()).t()

    counts = torch.zeros(5, 6).double()
    bank = lx.AdapterBank(Counts().double(), args=(X, counts), targets=("linear.weight",))
    bank.add("a", random_pairs(bank.sites, 2, 3))
    for inference, train in ((False, True), (True, True), (False, False), (True, False)):
        counts = torch.zeros(5, 6).double()
        bank.model.train(train)
        with torch.inference_mode(inference):
            mixed = bank(X, counts, adapter=["a", None, "a", None, "a"])
        torch.testing.assert_close(counts, X.square())
        assert distance(mixed, bank(X, counts.clone(), adapter="a"), 0, 5) < 1e-12
