"""`AdapterBank`: adding, removing, mixing, training and compiling adapters, and its errors."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import lorasc_fx as lx
from lorasc_fx.branch import Factors
from tests.bank.kit import Pairs, distance, folded, random_pairs
from tests.kit import tiny
from tests.kit.errors import raises

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
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
