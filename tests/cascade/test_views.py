"""Several runs on one base: each view has the same bits as the fold of its run, and does not affect the host run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cascade import views
from tests.checkpoint.test_resume import Teacher
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.kit.state import weight_states

X = torch.randn(6, 14, generator=torch.Generator().manual_seed(2))
SPEC = lx.CascadeSpec(rank=2, targets=("0.weight", "3.weight"), train=("4.*",), noise=lx.Noise(0.1))

SPECS = {
    "plain": SPEC,
    "more ranks": replace(SPEC, rank=3, pace=1.0, restart="slow"),
    "dense": replace(SPEC, rank=6),  # of two stages the experts outgrow the weights
    "dora": replace(SPEC, adapter="dora"),
    "pissa": replace(SPEC, start="pissa", noise=lx.Noise()),
    "kept noise": replace(SPEC, noise=lx.Noise(0.1, keep=True)),
    "other kinds": replace(SPEC, targets=("0.weight", "4.weight"), train=("3.*",)),
    "fewer sites": replace(SPEC, targets=("0.weight",), train=()),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(14, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 20, bias=False), nn.Linear(20, 3)
    return nn.Sequential(*parts)


def trained(cascade: lx.Cascade, seed: int, stages: int = 2, last: bool = True) -> lx.Cascade:
    """Train some stages, and with `last` a running one. Steps change all trained parameters and running statistics."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.3))
    for number in range(stages + last):
        for _ in range(2):
            cascade(torch.randn(6, 14) + seed).square().sum().backward()
            nn.utils.clip_grad_norm_(cascade.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number < stages:
            cascade.transition(optimizer)
    return cascade


def run(kind: str, seed: int, **more: Any) -> lx.Cascade:
    return trained(lx.adapt(base(), (X,), spec=SPECS[kind]), seed, **more)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name not in but:
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("given", ["folder", "cascade"])
def test_a_view_is_the_fold_of_its_run(kind: str, given: str, tmp_path: Path) -> None:
    host, guest = run("plain", 1), run(kind, 2)
    states = weight_states(guest).values()
    assert any(state.is_dense for state in states) == (kind in ("dense", "other kinds"))
    lx.save(guest, tmp_path)
    host.add("legal", tmp_path if given == "folder" else guest)
    expected = values(guest.release())
    assert not torch.equal(expected["1.running_mean"], values(host.model)["1.running_mean"])
    with unchanged(host):
        for _ in range(2):
            with host.weights("legal"):
                placed = values(host.model)
                assert torch.equal(host(X), host.model(X))
            same(placed, expected)
        same(host.folded_state_dict(view="legal"), placed)
        file = lx.export.safetensors(host, tmp_path / "legal.safetensors", view="legal")
        same(load_file(file), placed)
    folded = host.eval().folded_graph(view="legal")
    with host.weights("legal"), torch.no_grad():
        assert torch.equal(folded(X), host.model(X))
    host.zero_grad()
    same(values(host.release(view="legal")), placed)


def test_a_site_that_the_host_trains_in_full_is_rounded_once() -> None:
    host = lx.adapt(base(), (X,), spec=replace(SPEC, targets=("0.weight",), train=("3.*", "4.*")))
    for seed in (2, 3, 4):
        host.add("legal", guest := run("kept noise", seed))
        with host.weights("legal"):
            placed = values(host.model)
        host.remove("legal")
        same(placed, values(guest.release()))


@pytest.mark.parametrize("given", ["folder", "cascade"])
def test_a_parameter_that_forward_writes_comes_with_its_run(given: str, tmp_path: Path) -> None:
    def teacher(calls: int) -> lx.Cascade:
        torch.manual_seed(0)
        cascade = lx.adapt(Teacher(), (X[:, :5],), spec=lx.CascadeSpec(targets=("student",), rank=1))
        for _ in range(calls):
            cascade(X[:, :5])
        return cascade

    host, guest = teacher(1), teacher(4)
    lx.save(guest, tmp_path)
    host.add("legal", tmp_path if given == "folder" else guest)
    expected = values(guest.release())
    assert not torch.equal(expected["teacher.weight"], values(host.model)["teacher.weight"])
    with unchanged(host), host.weights("legal"):
        same(values(host.model), expected)
    same(host.folded_state_dict(view="legal"), expected)
    same(values(host.release(view="legal")), expected)


def test_the_own_run_sees_nothing_of_it(tmp_path: Path) -> None:
    alone, host = run("plain", 1), run("plain", 1)
    host.add("legal", run("dense", 2))
    with host.weights("legal"):
        pass
    for cascade in (alone, host):
        trained(cascade, 3)
    for view in ("slow", "fast", "base"):
        with alone.weights(view), host.weights(view):
            same(values(host.model), values(alone.model))
    expected = values(run("dense", 2).release())
    with host.weights("legal"):  # after two transitions more
        same(values(host.model), expected)
    host.rewind(1, None)
    with host.weights("legal"):
        same(values(host.model), expected)


def test_a_checkpoint_is_of_one_run(tmp_path: Path) -> None:
    host, guest = run("plain", 1), run("more ranks", 2)
    torch.manual_seed(0)
    before = host.state_dict()
    host.add("legal", guest)
    after = host.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lx.save(host, tmp_path)
    again = lx.load(tmp_path, base(), (X,))
    assert again.views == ("slow", "fast", "base")
    with raises(lx.StateError, "unknown-name", "legal"):
        again.weights("legal").__enter__()
    again.add("legal", guest)
    with host.weights("legal"), again.weights("legal"):
        same(values(again.model), values(host.model))
    again.load_state_dict(before)
    assert again.views == ("slow", "fast", "base", "legal")


@pytest.mark.filterwarnings("ignore:merge. 2 buffers differ:lorasc_fx.errors.LorascWarning")
def test_sums_are_those_of_merge_and_of_the_formula() -> None:
    host, one, guest = run("plain", 1, last=False), run("more ranks", 2), run("dense", 3)
    host.add("one", one)
    host.add("other", guest)
    assert host.views == ("slow", "fast", "base", "one", "other")
    shares = {"one": 0.75, "other": -0.5, "slow": 0.25}
    w0 = dict(base().named_parameters())
    with host.weights("slow"):
        slow = values(host.model)
    merged = lx.merge([one, guest, host], base(), (X,), weights=[*shares.values()])
    parts = [values(copy.deepcopy(each).release()) for each in (one, guest)] + [slow]
    expected = values(merged.release())
    with unchanged(host), host.weights(shares):
        placed = values(host.model)
    for name, value in w0.items():
        assert torch.equal(placed[name], expected[name]), name
        exact = value.double() + sum(
            share * (part[name].double() - value.double()) for share, part in zip(shares.values(), parts, strict=True)
        )
        torch.testing.assert_close(placed[name].double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(placed["1.running_mean"], values(host.model)["1.running_mean"])  # no two runs agree on it
    with host.weights("one"):
        alone = values(host.model)
    with host.weights({"one": 1}):
        same(values(host.model), alone)
    same(values(host.release(view=shares)), {**values(host.model), **{name: placed[name] for name in w0}})


@pytest.mark.parametrize("slow_train", [True, False])
def test_the_own_run_by_itself_is_the_slow_weights(slow_train: bool) -> None:
    """Parameters trained in full that do not follow the slow rule have their current values."""
    spec = replace(SPEC, slow_train=slow_train, pace=0.5)
    host = trained(lx.adapt(base(), (X,), spec=spec), 1)
    current = values(host.model)["4.weight"]
    with host.weights("slow"):
        slow = values(host.model)
    assert torch.equal(slow["4.weight"], current) != slow_train
    with unchanged(host), host.weights({"slow": 1}):
        same(values(host.model), slow)
    same(host.folded_state_dict(view={"slow": 1}), host.folded_state_dict())


def test_a_name_is_added_once_and_free_after_a_removal() -> None:
    host, guest = run("plain", 1), run("plain", 3)
    host.add("legal", run("plain", 2))
    with unchanged(host), raises(lx.SpecError, "invalid-value", "add", "'legal'", "remove"):
        host.add("legal", guest)
    assert host.views.count("legal") == 1
    with host.weights("legal"), raises(lx.StateError, "inside-weights", "remove"):
        host.remove("legal")
    with raises(lx.StateError, "unknown-name", "remove", "'legel'", "legal"):
        host.remove("legel")
    host.remove("legal")
    assert host.views == ("slow", "fast", "base")
    with raises(lx.StateError, "unknown-name", "legal"):
        host.weights("legal").__enter__()
    host.add("legal", guest)
    with host.weights("legal"):
        same(values(host.model), values(guest.release()))


def test_what_cannot_be_added() -> None:
    host = run("plain", 1)
    changed = base()
    nn.init.ones_(changed[3].weight)
    guest = trained(lx.adapt(changed, (X,), spec=SPEC), 2)
    more = trained(lx.adapt(base(), (X,), spec=replace(SPEC, train=("0.bias", "4.*"))), 2)
    with unchanged(host):
        with raises(lx.CheckpointError, "base-differs", "'legal'", "3.weight"):
            host.add("legal", guest)
        with raises(lx.SpecError, "sites-differ", "'legal'", "0.bias"):
            host.add("legal", more)
        for name in ("slow", "base", "averaged", "", 3):
            with raises(lx.SpecError, "invalid-value", "add"):
                host.add(name, guest)  # type: ignore[arg-type]  # what is tested
        with raises(lx.SpecError, "invalid-value", "int"):
            host.add("legal", 3)  # type: ignore[arg-type]
        with host.weights("slow"), raises(lx.StateError, "inside-weights", "add"):
            host.add("legal", guest)
    assert host.views == ("slow", "fast", "base")


def test_what_is_no_sum() -> None:
    host = run("plain", 1, last=False)
    host.add("legal", run("plain", 2))
    host.add("scaled", run("dora", 3))
    for view, code in (
        ({}, "invalid-value"),
        ({"legal": float("nan")}, "invalid-value"),
        ({"legal": "much"}, "invalid-value"),
        ({"legal": 0.5, "scaled": 0.5}, "method-not-supported"),
        ({"scaled": 0.5}, "method-not-supported"),
    ):
        for act in (lambda view=view: host.weights(view).__enter__(), lambda view=view: host.release(view=view)):
            with unchanged(host), raises(lx.SpecError, code):
                act()
    host.add("1", run("plain", 4))
    for view in ({"legel": 1}, {"fast": 1}, {1: 1.0}, "legel"):
        with unchanged(host), raises(lx.StateError, "unknown-name", "legal"):
            host.weights(view).__enter__()
    with host.weights("legal"), raises(lx.StateError, "inside-weights", "legal"):
        host.transition(None)


def test_statistics_that_are_estimated_inside_a_view() -> None:
    host = run("plain", 1)
    host.add("legal", run("plain", 2))
    with unchanged(host), host.weights({"legal": 0.5, "slow": 0.5}):
        before = values(host.model)["1.running_mean"]
        torch.optim.swa_utils.update_bn([X], host)
        assert not torch.equal(values(host.model)["1.running_mean"], before)


@pytest.mark.parametrize("kind", ["plain", "dense", "other kinds"])
def test_a_sum_beyond_the_dtype_of_a_weight(kind: str) -> None:
    host, guest = run("plain", 1, last=False), run(kind, 2)
    host.add("legal", guest)
    huge = {"legal": 3e38, "slow": 1e38}
    with unchanged(host), raises(lx.SpecError, "invalid-value", "weights", "4.weight"):
        host.weights({name: 30 * weight for name, weight in huge.items()}).__enter__()
    with unchanged(host), raises(lx.SpecError, "invalid-value", "release", "0.weight"):
        host.release(view={name: 30 * weight for name, weight in huge.items()})
    with unchanged(model := base()), raises(lx.SpecError, "invalid-value", "merge", "overflows the dtype", "4.weight"):
        lx.merge([guest, host], model, (X,), weights=[9e39, 3e39])


PLAIN = replace(SPEC, noise=lx.Noise(), train=())
WRITTEN: dict[str, tuple[lx.CascadeSpec, str, bool]] = {
    "slow": (PLAIN, "slow", False),
    "fast": (PLAIN, "fast", True),
    "slow, noise": (replace(PLAIN, noise=lx.Noise(0.1)), "slow", True),
    "slow, from the fast weights": (replace(PLAIN, restart="fast"), "slow", True),
    "slow, pissa": (replace(PLAIN, start="pissa"), "slow", True),
    "averaged": (replace(PLAIN, average="ema"), "averaged", True),
    "slow, noise kept": (replace(PLAIN, noise=lx.Noise(0.1, keep=True)), "slow", True),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_weights_with_the_right_values_are_not_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, view, writes = WRITTEN[case]
    cascade = trained(lx.adapt(base(), (X,), spec=spec), 1)
    written: list[str] = []
    write = views.Weights.write
    monkeypatch.setattr(views.Weights, "write", lambda self, name, out: (written.append(name), write(self, name, out)))
    before = {name: value.clone() for name, value in cascade.model.state_dict().items()}
    with cascade.weights(view):
        same = [torch.equal(value, before[name]) for name, value in cascade.model.named_parameters()]
    assert all(same) == (not writes)
    assert written == (["0.weight", "3.weight"] if writes else [])
    assert all(torch.equal(value, before[name]) for name, value in cascade.model.state_dict().items())


def test_slow_weights_after_a_cast_to_a_wider_dtype() -> None:
    """The weights of the stage were rounded to the dtype of W0, and slow weights are not."""
    model = base().bfloat16()
    cascade = lx.adapt(model, (X.bfloat16(),), spec=PLAIN)
    randomize(cascade, 1)
    cascade.transition(None)
    cascade.float()
    weight = cascade.model.get_parameter("0.weight")
    start = weight.clone()
    with cascade.weights("slow"):
        slow = weight.clone()
    assert torch.equal(slow.bfloat16().float(), start)
    assert not torch.equal(slow, start)
    assert torch.equal(slow, cascade.release().get_parameter("0.weight"))
