"""`AdapterBank`: adding, removing, mixing, training and compiling adapters, rows and slots of calls, and errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

import lorasc_fx as lx
from lorasc_fx import Site
from lorasc_fx.bank.rows import segments
from lorasc_fx.branch import Factors
from tests.errors.state import unchanged
from tests.kit import tiny
from tests.kit.compare import tensors
from tests.kit.errors import raises
from tests.kit.models import train

Pairs = dict[str, Factors]


def random_pairs(sites: Iterable[Site], rank: int, seed: int, size: float = 0.2) -> Pairs:
    """Return factors for every site, in the stored layout of its weight. Each changes its weight by about `size`."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for site in sites:
        lead = 1 if site.stacked else 0
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


def distance(got: Any, expected: Any, row: int | None = None, rows: int = 0) -> float:
    """Return the largest difference, relative to the largest entry, over all outputs.

    With `row`, only this row is compared, of outputs that have `rows` rows on axis 0.
    """
    worst = 0.0
    for output, right in zip(tensors(got), tensors(expected), strict=True):
        assert output.shape == right.shape
        if not right.is_floating_point() or (row is not None and len(right) != rows):
            continue
        difference = (output - right).abs() if row is None else (output[row] - right[row]).abs()
        if difference.numel():
            worst = max(worst, (difference.max() / right.abs().max().clamp_min(1e-30)).item())
    return worst


def assert_rows(
    mixed: Any, mix: Sequence[str | None], alone: Callable[[str | None], Any], tolerance: float = 1e-13
) -> None:
    """Assert that each row of a mixed batch is this row of a batch in which all rows have its adapter."""
    for row, name in enumerate(mix):
        assert distance(mixed, alone(name), row, len(mix)) < tolerance


def fill(bank: lx.AdapterBank, names: str = "ab", **options: Any) -> lx.AdapterBank:
    for seed, name in enumerate(names):
        bank.add(name, random_pairs(bank.sites, 2, seed, **options))
    return bank


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
    bank = bank_of("a")
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    bank.add("b", pairs(ord("b")))
    mixed = bank(X, adapter=["b", "a", None, "a", "b"])
    assert_rows(mixed, ["b", "a", None, "a", "b"], expected)
    bank.remove("a")
    assert bank.names == ("b",)
    with raises(lx.StateError, "unknown-name", "'a'", "'b'"):
        bank(X, adapter="a")
    bank.add("a", pairs(7))
    assert distance(bank(X, adapter="a"), folded(mlp(), pairs(7))(X)) < 1e-13
    assert all(torch.equal(value, before[name]) for name, value in bank.model.state_dict().items())
    assert len(bank._variants) == 1


def test_threads_call_while_adapters_come_and_go() -> None:
    bank, right, failed = bank_of("a"), expected("a"), []

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
    for name, factors in (("a", pairs(1, 1)), ("b", pairs(2, 4))):
        assert distance(bank(X, adapter=name), folded(mlp(), factors)(X)) < 1e-13
    twice = {name: Factors(torch.cat([p.b, p.b], 1), torch.cat([p.a, p.a], 0)) for name, p in pairs(2, 4).items()}
    bank.add("twice", twice)  # of rank 4, in factors of rank 8
    assert distance(bank(X, adapter="twice"), folded(mlp(), twice)(X)) < 1e-12
    with raises(lx.SpecError, "rank-too-large", "'wide' has rank 5 at 0.weight", "max_rank is 4"):
        bank.add("wide", pairs(1, 5))


def test_runs_and_checkpoints_are_sources(tmp_path: Path) -> None:
    cascade = lx.adapt(mlp(), args=(X,), spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    for _ in cascade.stages(2, optimizer):
        train(cascade, optimizer, [X])
    lx.save(cascade, tmp_path)
    bank = lx.AdapterBank(mlp(), {"run": cascade, "saved": tmp_path}, args=(X,))
    slow = copy.deepcopy(cascade).release()(X)
    for name in ("run", "saved"):
        assert distance(bank(X, adapter=name), slow) < 1e-13
    changed = mlp()
    with torch.no_grad():
        changed[0].weight.add_(1)
    with raises(lx.CheckpointError, "base-differs", "0.weight"):
        lx.AdapterBank(changed, {"run": cascade}, args=(X,))
    assert all(parameter.requires_grad for parameter in changed.parameters())


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
        assert_rows(mixed, mix, expected)
    assert len(graphs) == 2


def test_generate() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(3, 40, (3, 5))
    bank = lx.AdapterBank(copy.deepcopy(model), kwargs={"input_ids": ids}, targets=("*attn*", "*mlp*"), max_rank=2)
    models = {None: model}
    for seed, name in enumerate(("a", "b")):
        factors = random_pairs(bank.sites, 2, seed, size=1.0)
        bank.add(name, factors)
        models[name] = folded(copy.deepcopy(model), factors)
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


class Generating(nn.Sequential):
    generate = nn.Sequential.forward


def test_generate_calls_lookups_convolutions_and_transposed_layers() -> None:
    torch.manual_seed(0)
    layers = nn.Embedding(9, 6, padding_idx=0), Conv1D(8, 6), nn.Conv1d(4, 4, 3, groups=2, padding=1)
    model, ids = Generating(*layers).double().eval(), torch.tensor([[0, 3, 4, 1], [2, 8, 0, 5], [7, 7, 6, 0]])
    bank = lx.AdapterBank(copy.deepcopy(model), args=(ids,), targets=("embedding", "linear", "conv"), max_rank=2)
    bank.add("a", random_pairs(bank.sites, 2, 0, size=1.0))
    right = folded(copy.deepcopy(model), bank.pairs("a"))(ids)
    assert distance(bank.generate(ids, adapter="a"), right) < 1e-13
    mixed = bank.generate(ids, adapter=["a", None, "a"])
    assert_rows(mixed, ["a", None, "a"], lambda name: right if name else model(ids))


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


@pytest.mark.parametrize("traced", [False, True])
def test_batch_norm_in_train_mode_is_refused_also_for_equal_rows(traced: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    model = torch.fx.symbolic_trace(model) if traced else model
    x = X[:1].expand(4, 6).clone()
    bank = lx.AdapterBank(model, {"a": {"0.weight": pairs(1)["0.weight"]}}, args=(x,))
    mix = ["a", None, "a", None]
    assert distance(bank(x, adapter=mix), bank(x, adapter="a"), 2, 4) < 1e-13
    model.train()
    with unchanged(model), raises(lx.StateError, "rows-not-independent", "1 is a BatchNorm1d in train mode"):
        bank(x, adapter=mix)


class Masked(nn.Module):
    """Attention with a mask [sequence, sequence] or [batch, sequence, sequence]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(torch.softmax(x @ x.mT + mask, -1) @ x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [2, 4])
def test_a_mask_with_as_many_rows_as_the_batch_is_not_cut(rows: int) -> None:
    torch.manual_seed(rows)
    x, mask = torch.randn(rows, rows, 6).double(), torch.randn(rows, rows).double()
    bank = lx.AdapterBank(Masked().double().eval(), args=(x, mask), targets=("linear.weight",))
    fill(bank)
    mix = [*"ab"] * (rows // 2)
    assert distance(bank(x, mask, adapter=mix), bank(x, mask, adapter="b"), rows - 1, rows) < 1e-12


def test_dropout_in_train_mode_is_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Dropout(0.5), nn.Flatten(0)).double()
    bank = lx.AdapterBank(model.train(), args=(X,), targets=("linear",), max_rank=2)
    fill(bank)
    mix, outputs = ["a", "b", "b", None, "a"], {}
    for adapter in ("a", "b", None, mix):
        torch.manual_seed(3)
        outputs[str(adapter)] = bank(X, adapter=adapter) if adapter else model(X)
    assert_rows(outputs[str(mix)], mix, lambda name: outputs[str(name)], 1e-12)


def test_refusals() -> None:
    bank = bank_of("a")
    with raises(lx.StateError, "unknown-name", "no adapter 'aa'"):
        bank(X, adapter="aa")
    with raises(lx.StateError, "rows-differ", "2 rows, and the batch has 5"):
        bank(X, adapter=["a", None])
    with raises(lx.StateError, "unknown-name", "an adapter 'a' already"):
        bank.add("a", pairs(1))
    with raises(lx.SpecError, "invalid-value", "is None; give a string. None is the base, which a bank always has"):
        bank.add(None, pairs(1))  # type: ignore[arg-type]
    with raises(lx.SpecError, "invalid-value", "'b' has None for 0.weight; give lorasc_fx.branch.Factors"):
        bank.add("b", {"0.weight": None})  # type: ignore[dict-item]
    with raises(
        lx.SpecError, "adapter-does-not-fit", "'b' has b (8, 2) and a (2, 5) for 0.weight", "Give b (8, 2) and a (2, 6)"
    ):
        bank.add("b", {"0.weight": Factors(torch.zeros(8, 2), torch.zeros(2, 5))})
    with raises(lx.SpecError, "sites-differ", "'b' changes 1.weight"):
        bank.add("b", {"1.weight": Factors(torch.zeros(8, 2), torch.zeros(2, 5))})
    for options, text in (
        ({"rank": 3}, "the rank of 'b' is 3; give one from 1 to 2"),
        ({"rank": "1"}, "the rank of 'b' is '1'"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with raises(lx.SpecError, "invalid-value", text):
            bank.start("b", **options)  # type: ignore[arg-type]
    for factor, value in (("a", torch.nan), ("b", torch.inf), ("b", 1e300)):
        single, broken = lx.AdapterBank(mlp().float(), {"a": pairs(1)}, args=(X.float(),)), pairs(2)
        getattr(broken["2.weight"], factor)[0, 0] = value
        with raises(lx.SpecError, "non-finite", "'b' has inf or nan in its factors for 2.weight, as torch.float32"):
            single.add("b", broken)
        assert single.names == ("a",)
    with raises(lx.SpecError, "invalid-value", "targets is 'linear'; give a tuple: targets=('linear',)"):
        lx.AdapterBank(mlp(), args=(X,), targets="linear")
    for copied in (copy.copy, copy.deepcopy):
        with raises(lx.StateError, "not-serializable", "Build another bank"):
            copied(bank)
    with raises(lx.SpecError, "invalid-value", "max_rank is 0"):
        bank_of("a", max_rank=0)
    with raises(lx.SpecError, "invalid-value", "no adapter changes a weight"):
        lx.AdapterBank(mlp(), args=(X,))
    cascade = lx.adapt(mlp(), args=(X,))
    with raises(lx.StateError, "already-adapted"):
        lx.AdapterBank(cascade.model, {"a": pairs(1)}, args=(X,))
    assert bank.names == ("a",)
    assert "2 sites, rank 2, adapters a" in repr(bank)
    assert all(parameter.requires_grad for parameter in bank.release().parameters())


def test_two_banks_on_one_model_restore_its_flags() -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    bank, later = (lx.AdapterBank(model, {"a": pairs(1)}, args=(X,)) for _ in range(2))
    for _ in range(2):  # a second release of the same bank has no effect
        bank.release()
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert distance(later(X, adapter="a"), folded(mlp(), pairs(1))(X)) < 1e-13
    later.release()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_model_in_a_bank_cannot_be_adapted(tmp_path: Path) -> None:
    lx.save(lx.adapt(mlp(), args=(X,)), tmp_path)
    bank = bank_of("a")
    later = lx.AdapterBank(bank.model, {"a": pairs(1)}, args=(X,))
    for call in (lambda: lx.adapt(bank.model, args=(X,)), lambda: lx.load(tmp_path, bank.model)):
        with raises(lx.StateError, "already-adapted", "A bank uses this model", "0.weight", "release()"):
            call()
    lx.adapt(copy.deepcopy(bank.model), args=(X,))
    bank.release()
    with raises(lx.StateError, "already-adapted", "A bank uses this model"):
        lx.adapt(bank.model, args=(X,))
    del later  # without `release`
    lx.adapt(bank.model, args=(X,)).release()


def filled(names: str) -> lx.AdapterBank:
    return fill(lx.AdapterBank(mlp(), args=(X,), targets=("linear",), max_rank=2), names)


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "windows"])
def test_sorted_rows_share_factors(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
        "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3, groups=2)),
        "windows": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(0, (6, 3))),
    }[kind]()
    x = torch.randn({"mlp": (6, 6), "convolutions": (6, 3, 7, 7), "windows": (6, 3, 6)}[kind]).double()
    bank = lx.AdapterBank(model.double().eval(), args=(x,), targets=("linear", "conv"), max_rank=2)
    fill(bank)
    for mix, count in ((["a", "a", "b", "b", None, None], 3), (["b", "b", "b", "b", "a", "a"], 3), ([*"abbbba"], 6)):
        mixed = bank(x, adapter=mix)
        assert len(segments(mix)) == count
        assert_rows(mixed, mix, lambda name: bank(x, adapter=name), 1e-12)


class Layer(nn.Module):
    """A linear layer that gets the rows of x [rows, tokens, 6] in another way."""

    def __init__(self, layer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(6, 6)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(self.linear, *inputs)


def flat(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x.transpose(0, 1).reshape(-1, 6)).view(-1, len(x), 6).transpose(0, 1)


def gated(linear: nn.Linear, x: Tensor, gate: Tensor) -> Tensor:
    """The gate hides the layer in the first batch, so this batch does not show its rows."""
    return x + gate * linear(x.transpose(0, 1)).transpose(0, 1)


def permuted(linear: nn.Linear, x: Tensor) -> Tensor:
    """Row 0 keeps its place, so only the other rows show that the layer gets them in another order."""
    y = linear(torch.cat([x[:1], x[1:].flip(0)]))
    return torch.cat([y[:1], y[1:].flip(0)])


DEPENDENT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "reversed": (lambda linear, x: linear(x.flip(0)).flip(0), "does not have the rows"),
    "permuted": (permuted, "does not have the rows"),
    "sequence first": (lambda linear, x: linear(x.transpose(0, 1)).transpose(0, 1), "does not have the rows"),
    "flat": (flat, "does not have the rows"),
    "gated": (lambda linear, x: gated(linear, x, torch.zeros(()).double()), "no effect on this batch"),
    "normalized": (lambda linear, x: x @ (linear.weight / linear.weight.norm()).t(), "linear.weight is used by"),
    "loss": (lambda linear, x: linear(x).square().mean(), "no output has the rows"),
    "sum": (lambda linear, x: linear(x) + linear(x).sum(0), "does not have the rows"),
}


@pytest.mark.parametrize(
    ("case", "rows"), [(case, rows) for case in DEPENDENT for rows in (2, 5) if (case, rows) != ("permuted", 2)]
)
def test_rows_that_are_not_on_the_first_axis_or_depend_on_each_other(case: str, rows: int) -> None:
    torch.manual_seed(0)
    x, (layer, reason) = torch.randn(rows, 2 * rows, 6).double(), DEPENDENT[case]
    bank = lx.AdapterBank(Layer(layer).double(), args=(x,), targets=("linear.weight",), max_rank=2)
    fill(bank)
    for _ in range(2):
        with raises(lx.StateError, "rows-not-independent", reason, "Call the bank once for each adapter"):
            bank(x, adapter=["a", "b", *[None] * (rows - 2)])
    bank(x, adapter="a")


def test_a_later_batch_shows_the_rows() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(2, 4, 6).double(), torch.tensor(0.0).double()
    model = Layer(lambda linear, x, gate: x + gate * linear(x)).double()
    bank = lx.AdapterBank(model, args=(x, gate), targets=("linear",), max_rank=2)
    fill(bank)
    with raises(lx.StateError, "rows-not-independent", "no effect on this batch"):
        bank(x, gate, adapter=["a", "b"])
    for value in (gate + 1, gate):
        alone: dict[str | None, Tensor] = {name: bank(x, value, adapter=name) for name in "ab"}
        assert_rows(bank(x, value, adapter=["a", "b"]), "ab", alone.__getitem__)


def test_positions_have_no_rows() -> None:
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
    for targets in (("linear", "tokens.weight"), ("linear", "embedding")):
        bank = lx.AdapterBank(Positions().double().eval(), args=(ids,), targets=targets, max_rank=2)
        fill(bank, size=3.0)
        if "embedding" in targets:
            with raises(lx.StateError, "rows-not-independent"):
                bank(ids, adapter=[*"abba"])
        else:
            mixed = bank(ids, adapter=[*"abba"])
            alone: dict[str | None, Tensor] = {name: bank(ids, adapter=name) for name in "ab"}
            assert_rows(mixed, "abba", alone.__getitem__, 1e-12)


def test_a_batch_without_rows() -> None:
    bank = filled("a")
    assert bank(X[:0], adapter=[]).shape == (0, 4)
    with raises(lx.StateError, "rows-differ", "1 rows, and the batch has 0"):
        bank(X[:0], adapter=["a"])


def test_backward_after_the_adapter_was_removed() -> None:
    bank, x = filled("a"), X.clone().requires_grad_()
    bank(x, adapter="a").sum().backward()
    right, x.grad = x.grad, None
    output = bank(x, adapter="a").sum()
    bank.remove("a")
    bank.add("a", random_pairs(bank.sites, 2, 4))
    output.backward()
    assert right is not None
    torch.testing.assert_close(x.grad, right)


@pytest.mark.parametrize("building", [False, True])
def test_training_after_inference_mode(building: bool) -> None:
    """The same gradients as without inference mode, also if the bank is built and filled in it."""
    gradients = []
    for inference in (False, True):
        with torch.inference_mode(inference and building):
            bank = filled("f")
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


class Writes(nn.Module):
    """A linear layer, with a forward that also writes into its second argument."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.write, self.linear = write, nn.Linear(6, 6)

    def forward(self, x: Tensor, argument: Any) -> Tensor:
        self.write(argument, x)
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_forward_that_writes_into_an_argument() -> None:
    stores = Writes(lambda cache, x: cache.update(x=x)).double()
    for cache in ({}, {"x": torch.zeros(5, 6).double()}):
        with raises(lx.CaptureError, "no-graph", "writes into an argument, such as a cache", "bank.generate"):
            lx.AdapterBank(stores, args=(X, cache), targets=("linear",))
    calls, counts = torch.zeros(1), Writes(lambda calls, _: calls.add_(1)).double()
    bank = fill(lx.AdapterBank(counts, args=(X, calls), targets=("linear",), max_rank=2))
    bank(X, calls, adapter=["a", None, "a", None, "a"])
    assert calls.item() == 1
