"""The noise of a stage: its formula, its seeds, and that no noise remains after the stage (algorithm.md, row "noise").

The noise is measured as the difference between the parameters of a running stage and of a cascade without noise. No
function of the package computes the expected values.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import noise
from lorasc_fx.shards import ONE_PROCESS, ShardSpec
from tests.errors.models import Late
from tests.kit.models import batches, mlp, randomize, values
from tests.kit.state import noise_drawn

STRENGTH = 0.2


def big() -> nn.Module:
    """Return a model with enough entries for statistics: [300, 200], [40, 50, 3, 5] and [7, 40]."""
    torch.manual_seed(7)
    first = nn.Sequential(nn.Linear(200, 300), nn.Unflatten(1, (50, 2, 3)), nn.Conv2d(50, 40, (3, 5), padding=(1, 2)))
    return nn.Sequential(
        OrderedDict(
            body=first, head=nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1), nn.Linear(40, 7))
        )
    ).double()


def adapted(model: nn.Module, example: torch.Tensor, noise: lx.Noise | None = None, **options: Any) -> lx.Cascade:
    noise = lx.Noise(STRENGTH) if noise is None else noise
    return lx.adapt(model, (example,), spec=lx.CascadeSpec(rank=2, noise=noise, **options))


def noise_of(model: nn.Module, example: torch.Tensor, stage: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    """Return the noise of a stage before any training, by parameter name. The model is changed."""
    before = values(model)
    cascade = adapted(model, example, **options)
    for _ in range(stage - 1):
        cascade.transition(None)
    return {name: value - before[name] for name, value in values(cascade.model).items() if name in before}


BIG = ("body.0.weight", "body.2.weight")


@pytest.mark.parametrize(("distribution", "kurtosis"), [("uniform", 1.8), ("normal", 3.0)])
def test_noise_is_the_formula(distribution: str, kurtosis: float) -> None:
    """N = strength * std(W) * U(-1/2, 1/2), or normal of the same variance, 1/12: mean, spread, shape, bounds."""
    weights = values(big())
    samples = noise_of(big(), *batches(1, 2, 200), noise=lx.Noise(STRENGTH, distribution))
    for name in BIG:
        unit = samples[name] / (STRENGTH * weights[name].std())
        count = unit.numel()
        assert abs(unit.mean().item()) < 4 / (12 * count) ** 0.5
        assert unit.std().item() == pytest.approx(12**-0.5, rel=4 * ((kurtosis - 1) / (4 * count)) ** 0.5)
        assert (unit / unit.std()).pow(4).mean().item() == pytest.approx(kurtosis, rel=0.05)
        assert (unit.abs().max() <= 0.5) == (distribution == "uniform")
        assert unit.abs().max() > 0.499
        halves = unit.flatten()[: count // 2 * 2].view(-1, 2)
        assert torch.corrcoef(halves.T)[0, 1].abs() < 4 / (count / 2) ** 0.5  # neighbours are not correlated
    assert not any(value.any() for name, value in samples.items() if name.endswith("bias"))


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_noise_scales_with_strength_and_std(distribution: str) -> None:
    """For weights of the same name, noise differs only by strength and std, and std is that of W0 + S_{t-1}."""
    x = batches(1, 4, 5)[0]
    unit = {}
    for strength, size in ((0.1, 1.0), (0.7, 3.0)):
        model = mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(size).add_(0.5)  # the mean is not in the formula
        held = values(model)
        samples = noise_of(model, x, noise=lx.Noise(strength, distribution))
        for name in ("0.weight", "2.weight"):
            mine = samples[name] / (strength * held[name].std())
            torch.testing.assert_close(unit.setdefault(name, mine), mine, rtol=0, atol=1e-13)
    second = noise_of(mlp(), x, stage=2, noise=lx.Noise(0.1, distribution))
    cascade = adapted(mlp(), x, lx.Noise(0.1, distribution))
    randomize(cascade, size=2.0)
    cascade.transition(None)
    running = values(cascade.model)
    base = values(mlp())
    with cascade.weights("slow"):
        for name, value in values(cascade.model).items():
            if name in ("0.weight", "2.weight"):
                assert value.std() > 1.2 * base[name].std()
                expected = second[name] / base[name].std() * value.std()
                torch.testing.assert_close(running[name] - value, expected, rtol=0, atol=1e-13)


class Named(nn.Module):
    """Linear layers in the order of `names` in the module, called in alphabetical order on the same input."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(5, 7 if name != "c" else 3))
            with torch.no_grad():
                source = torch.Generator().manual_seed(ord(name))
                getattr(self, name).weight.copy_(torch.randn(getattr(self, name).weight.shape, generator=source))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tanh(getattr(self, name)(x)) for name in sorted(self._modules)], dim=1)


def test_noise_does_not_depend_on_other_sites() -> None:
    """The noise is equal for any order or subset of sites, when computed twice, for any rank and for any front end."""
    x = batches(1, 4, 5)[0].float()
    right = noise_of(Named("abc"), x)
    assert all(right[f"{name}.weight"].any() for name in "abc")
    for names, options in (
        ("cab", {}),
        ("ba", {}),
        ("abcd", {}),
        ("abc", {"targets": ("b",)}),
        ("abc", {"exclude": ("a",)}),
        ("abc", {"rules": (lx.Rule("b", rank=1),)}),
        ("abc", {"noise": lx.Noise(STRENGTH, where="all"), "targets": ("c",)}),
    ):
        model = Named(names)
        before = values(model)
        cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(**{"rank": 2, "noise": lx.Noise(STRENGTH), **options}))
        for view in ("slow", "base", "fast"):
            with cascade.weights(view):
                pass
        noisy = [name for name, value in values(model).items() if not torch.equal(value, before[name])]
        assert noisy
        for name in noisy:
            if name in right:
                assert torch.equal(values(model)[name] - before[name], right[name]), (names, options, name)


def test_noise_has_an_address() -> None:
    """Another stage, seed or weight name gives other noise, even for equal values. Otherwise the noise is the same."""
    x = batches(1, 4, 5)[0].float()

    def twins() -> Named:
        model = Named("ab")
        model.b.load_state_dict(model.a.state_dict())
        return model

    first = noise_of(twins(), x)
    draws = [first["a.weight"], first["b.weight"]]
    draws += [noise_of(twins(), x, stage=stage)["a.weight"] for stage in (2, 3)]
    draws += [noise_of(twins(), x, seed=1)["a.weight"], noise_of(twins(), x, stage=2, seed=1)["a.weight"]]
    for index, one in enumerate(draws):
        assert one.any()
        for other in draws[index + 1 :]:
            assert (one - other).abs().max() > 0.1 * one.abs().max()
    again = noise_of(twins(), x, stage=2)["a.weight"]
    assert torch.equal(again, draws[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restart", ["slow", "fast"])
@pytest.mark.parametrize("where", ["sites", "all"])
def test_nothing_of_the_noise_is_left(dtype: torch.dtype, restart: str, where: Any) -> None:
    """Of two cascades with equal experts, one has noise: slow, fast, base and released weights have the same bits."""
    x = batches(1, 4, 5)[0].to(dtype)
    options: dict[str, Any] = {"restart": restart, "pace": 0.7, "targets": ("0", "4")}
    noisy = adapted(mlp().to(dtype), x, lx.Noise(0.9, where=where), **options)
    clean = adapted(mlp().to(dtype), x, lx.Noise(0.0), **options)
    for seed in range(3):
        for cascade in (noisy, clean):
            randomize(cascade, seed)
        changed = {n for n, v in values(noisy.model).items() if not torch.equal(v, values(clean.model)[n])}
        assert changed == {"0.weight", "4.weight", *(["2.weight"] if where == "all" else [])}
        for view in ("slow", "fast", "base"):
            with noisy.weights(view), clean.weights(view):
                for name, value in values(clean.model).items():
                    assert torch.equal(values(noisy.model)[name], value), (view, name)
        if seed < 2:
            noisy.transition(None)
            clean.transition(None)
    state, expected = noisy.folded_state_dict(), clean.folded_state_dict()
    ours, theirs = noisy.release(), clean.release()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert torch.equal(state[name], value)
        assert torch.equal(expected[name], value)


@pytest.mark.parametrize("where", ["sites", "all"])
@pytest.mark.parametrize("restart", ["slow", "fast"])
def test_kept_noise_stays(restart: str, where: Any) -> None:
    """With keep, W_{t+1} = W0 + S_t + N_1 + ... + N_t + N_{t+1}.

    Each N is scaled by the weights of its stage, and not by the pace.
    """
    x = batches(1, 4, 5)[0]
    options: dict[str, Any] = {"restart": restart, "pace": 0.5, "targets": ("0", "4")}
    cascade = adapted(mlp(), x, lx.Noise(STRENGTH, keep=True, where=where), **options)
    clean = adapted(mlp(), x, lx.Noise(0.0), **options)
    base = values(mlp())
    unit = [noise_of(mlp(), x, stage=s, noise=lx.Noise(1.0, where=where), targets=("0", "4")) for s in (1, 2, 3)]
    kept = {name: torch.zeros_like(value) for name, value in base.items()}
    for stage in range(3):
        for adapted_model in (cascade, clean):
            randomize(adapted_model, stage)
        running, start = values(cascade.model), values(clean.model)
        for view in ("slow", "fast", "base"):  # the running stage's noise is in none
            with cascade.weights(view), clean.weights(view):
                for name, value in values(clean.model).items():
                    expected = value + (kept[name] if view != "base" else 0)
                    torch.testing.assert_close(values(cascade.model)[name], expected, rtol=0, atol=1e-13)
        for name, value in start.items():
            current = value + kept[name]
            mine = STRENGTH * current.std() * unit[stage][name] / base[name].std()
            torch.testing.assert_close(running[name], current + mine, rtol=0, atol=1e-13)
            kept[name] += mine
        if stage < 2:
            cascade.transition(None)
            clean.transition(None)
    assert {name for name, value in kept.items() if value.any()} == (
        {"0.weight", "2.weight", "4.weight"} if where == "all" else {"0.weight", "4.weight"}
    )
    expected = clean.release().state_dict()
    for name, value in cascade.release().state_dict().items():
        torch.testing.assert_close(value, expected[name] + kept[name], rtol=0, atol=1e-13)


class Text(nn.Module):
    """An embedding, a norm, a tied head, a linear layer that is not adapted, and one trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Linear(6, 5)
        self.other = nn.Linear(5, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight
        self.new = nn.Linear(11, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.new(torch.tanh(self.head(self.other(self.body(self.norm(self.words(ids)))))))


@pytest.mark.parametrize(
    ("where", "noisy"), [("sites", {"body.weight"}), ("all", {"body.weight", "other.weight", "words.weight"})]
)
def test_which_weights_get_noise(where: Any, noisy: set[str]) -> None:
    """`all` selects every weight matrix, except those trained in full. Tied weights get noise once."""
    torch.manual_seed(0)
    model = Text().double()
    before = values(model)
    ids = torch.randint(0, 11, (3, 4))
    spec = lx.CascadeSpec(targets=("body",), train=("new", "norm"), noise=lx.Noise(0.3, where=where))
    cascade = lx.adapt(model, (ids,), spec=spec)
    assert {name for name, value in values(model).items() if not torch.equal(value, before[name])} == noisy
    assert model.head.weight is model.words.weight
    randomize(cascade)
    cascade.transition(None)
    for name, value in cascade.release().named_parameters():
        assert torch.equal(value, before[name]) == (name != "body.weight")


def test_weights_without_spread_get_no_noise() -> None:
    """Weights with std 0, with one element or with none stay the same, without nan."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3), nn.Linear(3, 4)).double()
    with torch.no_grad():
        model[1].weight.fill_(0.25)
    before = values(model)
    x = batches(1, 4, 1)[0]
    cascade = adapted(model, x, lx.Noise(0.5))
    for _ in range(2):
        after = values(model)
        assert torch.equal(after["0.weight"], before["0.weight"])
        assert torch.equal(after["1.weight"], before["1.weight"])
        assert not torch.equal(after["2.weight"], before["2.weight"])
        assert torch.isfinite(cascade(x)).all()
        cascade.transition(None)


def test_no_global_generator_is_read_or_advanced() -> None:
    """In adapt, transition, a new graph, weights and release. So results do not depend on global generators."""
    released = []
    for seed in (1, 2):
        model = nn.Sequential(mlp(), nn.Dropout(0.0))
        x = batches(1, 4, 5)[0]
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
        cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
        randomize(cascade)
        cascade.transition(torch.optim.SGD(cascade.param_groups(lr=0.1)))
        cascade.eval()
        cascade(x)
        with cascade.weights("slow"):
            cascade(x)
        cascade.folded_graph()
        released.append(values(cascade.release()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()
    assert all(torch.equal(value, released[1][name]) for name, value in released[0].items())


@pytest.mark.parametrize("shape", [(700, 4000), (5, 3000), (4, 70, 1100), (90, 20, 3, 5), (3, 2)])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_a_shard_draws_its_own_numbers(
    shape: tuple[int, ...], distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard along any axis has the same values as in the full weight, and draws only its own blocks."""
    options, drawn = lx.Noise(0.1, distribution), list[int]()
    full = noise_drawn(options, 3, 2, "w", shape)
    blocks = [part.flatten()[:2] for part in full.flatten(0, -2).split(16)]
    assert len({tuple(part.tolist()) for part in blocks}) == len(blocks)  # no stream twice
    real = noise._UniformNumbers.within

    def counted(self: Any, bounds: Any) -> torch.Tensor:
        numbers = real(self, bounds)
        drawn.append(numbers.numel())
        return numbers

    monkeypatch.setattr(noise._UniformNumbers, "within", counted)
    for axis, total in enumerate(shape):
        for first, count in ((0, total), (total // 3, total // 3), (total - 1, 1), (total, 0)):
            drawn.clear()
            shard = ShardSpec(first, count, total, ONE_PROCESS, axis)
            here = torch.Size((*shape[:axis], count, *shape[axis + 1 :]))
            assert torch.equal(noise_drawn(options, 3, 2, "w", here, shard), full.narrow(axis, first, count))
            assert max(drawn, default=0) <= 32768
            assert sum(drawn) == here.numel()


@pytest.mark.parametrize("shape", [(700, 4000), (5, 3000), (4, 70, 1100), (90, 20, 3, 5), (7,)])
def test_large_pieces_have_the_numbers_of_blocks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for accelerators, run on the CPU: a full weight, and pieces that start and end inside blocks."""
    hashed = noise._UniformNumbers(noise.generator(3, 2, "noise", "w"), torch.Size(shape), torch.device("cpu"))
    full = noise_drawn(lx.Noise(0.1), 3, 2, "w", shape)
    for low, high in ((0, 1), (0.3, 0.7)):
        inside = [(int(low * length), max(1, int(high * length))) for length in shape]
        numbers, _ = hashed._hash_box(inside)
        monkeypatch.setattr(hashed, "_hash_block", lambda _, numbers=numbers: (numbers, torch.empty_like(numbers)))
        assert torch.equal(hashed.within(inside), full[tuple(slice(*pair) for pair in inside)])
    monkeypatch.setattr(noise, "PIECE", 1000)
    covered = torch.zeros(shape)
    for places in noise._large_regions(torch.Size(shape)):
        covered[places] += 1
        assert covered[places].numel() <= max(1000, shape[-1])
    assert torch.equal(covered, torch.ones(shape))


def test_noise_has_the_spectrum_of_independent_entries() -> None:
    """Singular values of a matrix, and correlations of blocks with different keys, fit independent random entries."""
    rows, columns = 1024, 2048
    one, other = (noise_drawn(lx.Noise(0.1), 3, stage, "w", (rows, columns)) for stage in (1, 2))
    for matrix in (one, one + other, one - other, one * other * 12**0.5):
        values = torch.linalg.svdvals(matrix / matrix.std())
        assert values[0] == pytest.approx(rows**0.5 + columns**0.5, rel=0.01)  # Bai and Yin, 1993
        assert values[-1] == pytest.approx(columns**0.5 - rows**0.5, rel=0.02)
    blocks = torch.cat([one.view(-1, 32, 2, 1024).transpose(1, 2).reshape(-1, 32768), other.view(-1, 32768)])
    correlations = torch.corrcoef(blocks).triu(1).mul(32768**0.5)
    assert correlations.abs().max() < 5
    assert correlations[correlations != 0].std() == pytest.approx(1, rel=0.05)
    counts = torch.histc(one, 256, -0.5, 0.5)
    assert (counts - one.numel() / 256).square().sum() / (one.numel() / 256) < 255 + 5 * (2 * 255) ** 0.5


@pytest.mark.filterwarnings("ignore::lorasc_fx.errors.LorascWarning")
@pytest.mark.parametrize(
    "options", [{"start": "pissa"}, {"adapter": "dora"}, {"adapter": "delora"}, {"adapter": "lora-xs"}]
)
def test_a_late_site_whose_weight_had_noise_starts_as_an_early_one(options: dict[str, Any]) -> None:
    """The oracle is a cascade whose first call has all sites. Values of these branches come from the weight."""
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(STRENGTH, where="all"), **options)
    x = torch.randn(6, 5)
    early, late = lx.adapt(Late().train(), (x,), spec=spec), lx.adapt(Late().eval(), (x,), spec=spec)
    assert [site.weight for site in late.sites] == ["first.weight"]
    late.train()
    assert torch.equal(late(x), early(x))
    found, expected = dict(late.branches.named_parameters()), dict(early.branches.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    same = early.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in late.model.state_dict().items())
