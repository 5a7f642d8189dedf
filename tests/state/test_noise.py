"""The noise of a stage: its formula, its seeds, and that no noise remains after the stage (algorithm.md, row "noise").

The noise is measured as the difference between the parameters of a running stage and of a cascade without noise. No
function of the package computes the expected values.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import lorasc_fx as lx
from lorasc_fx.branch import noise
from lorasc_fx.shards import ONE_PROCESS, ShardSpec
from lorasc_fx.spec import DISTRIBUTIONS
from tests.errors.models import Late
from tests.kit.errors import raises
from tests.kit.models import batches, branches, by_hand, loss_of, mlp, optimizer_of, randomize, train, values
from tests.kit.seams import SEAMS, seam
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
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_shard_draws_its_own_numbers(
    shape: tuple[int, ...], distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard along any axis has the same values as in the full weight, and draws only its own blocks."""
    noise, kind, drawn = lx.Noise(0.1, distribution), type(DISTRIBUTIONS[distribution]), list[int]()
    full = noise_drawn(noise, 3, 2, "w", shape)
    blocks = [part.flatten()[:2] for part in full.flatten(0, -2).split(16)]
    assert len({tuple(part.tolist()) for part in blocks}) == len(blocks)  # no stream twice
    real = kind.from_uniform

    def counted(self: Any, numbers: torch.Tensor) -> torch.Tensor:
        drawn.append(numbers.numel())
        return real(self, numbers)

    monkeypatch.setattr(kind, "from_uniform", counted)
    for axis, total in enumerate(shape):
        for first, count in ((0, total), (total // 3, total // 3), (total - 1, 1), (total, 0)):
            drawn.clear()
            shard = ShardSpec(first, count, total, ONE_PROCESS, axis)
            here = torch.Size((*shape[:axis], count, *shape[axis + 1 :]))
            assert torch.equal(noise_drawn(noise, 3, 2, "w", here, shard), full.narrow(axis, first, count))
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


BY_STEP = lx.Noise(0.2, redraw="step")
FLAT = lx.Noise(0.05, distribution="filter", redraw="step")


def adapted_net(model: nn.Module, x: torch.Tensor, noise: lx.Noise = BY_STEP, **options: object) -> lx.Cascade:
    return lx.adapt(model, (x,), spec=lx.CascadeSpec(**{"rank": 2, "pace": 0.5, "noise": noise, **options}))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("noise", [BY_STEP, FLAT], ids=["uniform", "filter"])
def test_two_stages_are_the_formula(noise: lx.Noise) -> None:
    """Losses and slow weights follow the formula, with the noise that is measured in the parameters at each step."""
    model, calls = mlp(), batches(5, 4, 5)
    base = weights(model)
    cascade = adapted_net(model, calls[0], noise)
    reference = by_hand(mlp(), cascade, pace=0.5)
    optimizer, other = optimizer_of(cascade, "sgd"), torch.optim.SGD(reference.parameters(), lr=5e-2, momentum=0.9)
    seen = []
    for _ in range(2):
        for call in calls:
            start = {name: base[name] + reference.slow[name] for name in base}
            reference.noise = {name: value - start[name] for name, value in weights(cascade.model).items()}
            seen.append(reference.noise)
            losses = [train(each, own, [call]) for each, own in ((cascade, optimizer), (reference, other))]
            torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        cascade.transition(optimizer)
        reference.end()
        reference.begin({name: branch.lora_A for name, branch in branches(cascade).items()})
        other = torch.optim.SGD(reference.parameters(), lr=5e-2, momentum=0.9)
    for one, two in itertools.pairwise(seen):
        assert all((one[name] - two[name]).abs().min() > 0 for name in base)
    for name, value in cascade.release().named_parameters():
        if name in base:
            torch.testing.assert_close(value, base[name] + reference.slow[name], rtol=0, atol=1e-13)


def test_filter_noise_is_flat_loras() -> None:
    """N_ij ~ N(0, (strength / sqrt(n))^2 |W_i|^2) for output rows i, also for a convolution and a weight [in, out]."""
    torch.manual_seed(1)
    conv = nn.Conv2d(300, 8, (3, 3)).double()
    with torch.no_grad():
        conv.weight.mul_(torch.linspace(0.1, 5, 8).view(8, 1, 1, 1))
    base = conv.weight.detach().clone()
    adapted_conv = lx.adapt(conv, (torch.randn(1, 300, 3, 3).double(),), spec=lx.CascadeSpec(rank=2, noise=FLAT))
    assert adapted_conv.stage == 1
    noise = (conv.weight.detach() - base).flatten(1)
    norms, count = base.flatten(1).norm(dim=1), noise.shape[1]
    unit = noise / (0.05 * norms[:, None] / count**0.5)
    assert ((unit.std(dim=1) - 1).abs() < 5 / (2 * count) ** 0.5).all()
    assert (unit.mean(dim=1).abs() < 5 / count**0.5).all()
    assert 3.5 < unit.abs().max() < 7  # no bound, as a uniform one has

    from transformers.pytorch_utils import Conv1D

    transposed = nn.Sequential(Conv1D(4, 3000)).double()  # [3000, 4]: the rows are its columns
    with torch.no_grad():
        transposed[0].weight.mul_(torch.tensor([1.0, 2.0, 30.0, 0.1]))
    base = transposed[0].weight.detach().clone()
    cascade = lx.adapt(transposed, (torch.randn(2, 3000).double(),), spec=lx.CascadeSpec(rank=2, noise=FLAT))
    assert cascade.sites[0].layout == "in_out"
    unit = (transposed[0].weight.detach() - base) / (0.05 * base.norm(dim=0) / 3000**0.5)
    assert ((unit.std(dim=0) - 1).abs() < 5 / 6000**0.5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_left(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), batches(1, 4, 5)[0].to(dtype)
    base = weights(model)
    cascade = adapted_net(model, x)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.0))
    for _ in range(2):
        for _ in range(3):
            train(cascade, optimizer, [x])
            assert all(not torch.equal(value, base[name]) for name, value in weights(cascade.model).items())
            with cascade.weights("slow"):
                assert all(torch.equal(value, base[name]) for name, value in weights(cascade.model).items())
        cascade.transition(optimizer)
    assert all(torch.equal(value, base[name]) for name, value in weights(cascade.release()).items())


def test_the_address_is_seed_stage_step_and_name() -> None:
    """Noise does not depend on other sites or on earlier uses of `weights`. Another seed gives other noise."""

    def of(steps: int, look: bool = False, **options: object) -> torch.Tensor:
        cascade = adapted_net(mlp(), batches(1, 4, 5)[0], **options)
        optimizer = torch.optim.SGD(cascade.param_groups(lr=0.0))
        for _ in range(steps):
            optimizer.step()
            if look:
                with cascade.weights("fast"):
                    optimizer.step()  # a step in here counts, and is seen outside
        return cascade.model[2].weight.detach().clone()

    assert torch.equal(of(4), of(4, targets=("2",)))
    assert torch.equal(of(4), of(2, look=True))
    assert not torch.equal(of(4), of(3))
    assert not torch.equal(of(4), of(4, seed=1))


def test_what_is_a_step() -> None:
    """A backward, a step that a scaler skips, and a step of another optimizer do not count.

    An optimizer that has only lora_A counts as another one.
    """
    x = batches(1, 4, 5)[0]
    cascade = adapted_net(mlp(), x)
    groups = {group["name"]: group["params"] for group in cascade.param_groups(lr=0.01)}
    optimizer_b, optimizer_a = torch.optim.SGD(groups["lora_B"], lr=0.01), torch.optim.SGD(groups["lora_A"], lr=0.01)
    before = weights(cascade.model)

    def same() -> bool:
        return all(torch.equal(value, before[name]) for name, value in weights(cascade.model).items())

    for _ in range(2):
        loss_of(cascade(x)).backward()
    optimizer_a.step()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (scaler.scale(loss_of(cascade(x))) * float("inf")).backward()
    scaler.step(optimizer_b)
    scaler.update()
    assert same()
    optimizer_b.zero_grad()
    loss_of(cascade(x)).backward()
    optimizer_b.step()
    assert not same()


def test_under_a_compiler() -> None:
    """The hook is outside the graph: there is one compilation, and the losses equal those without compilation."""
    calls = batches(4, 4, 5)
    losses = []
    for compiled in (False, True):
        cascade = adapted_net(mlp(), calls[0])
        model = torch.compile(cascade, backend="eager", fullgraph=True) if compiled else cascade
        losses.append(train(model, optimizer_of(cascade, "sgd"), calls))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-14)


def test_watching_ends() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted_net(mlp(), x)
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    twin = copy.deepcopy(cascade)
    twin(x)
    optimizer = torch.optim.SGD(twin.param_groups(lr=0.0))
    before, twin_before = weights(cascade.model), weights(twin.model)
    optimizer.step()  # of the twin: the other has no gradients, and its step is none
    assert all(torch.equal(value, before[name]) for name, value in weights(cascade.model).items())
    assert not any(torch.equal(value, twin_before[name]) for name, value in weights(twin.model).items())
    plain = weights(cascade.release())
    optimizer.step()
    assert all(torch.equal(value, plain[name]) for name, value in weights(cascade.model).items())
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks  # one hook serves all cascades


def test_weights_that_somebody_changed_are_not_written_over() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted_net(mlp(), x)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.0))
    with torch.no_grad():
        cascade.model[2].weight.mul_(2)
    expected = cascade.model[2].weight.detach().clone()
    with raises(lx.StateError, "weights-changed-outside", "noise.redraw", "2.weight"):
        optimizer.step()
    assert torch.equal(cascade.model[2].weight, expected)


def test_a_redraw_that_raises_leaves_the_noise_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    x = batches(1, 4, 5)[0]
    cascade, twin = adapted_net(mlp(), x), adapted_net(mlp(), x)
    optimizers = [torch.optim.SGD(run.param_groups(lr=0.0)) for run in (cascade, twin)]
    for optimizer in optimizers:
        optimizer.step()
    before, write, count = weights(cascade.model), seam("redraw"), iter(range(99))

    def failing(*args: object, **options: object) -> None:
        if next(count) == 1:
            raise RuntimeError("no memory")
        write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*SEAMS["redraw"], failing)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizers[0].step()
    assert all(torch.equal(value, before[name]) for name, value in weights(cascade.model).items())
    for optimizer in optimizers:
        optimizer.step()
    after = weights(twin.model)
    assert all(torch.equal(value, after[name]) for name, value in weights(cascade.model).items())


def test_a_graph_of_its_own_has_no_steps() -> None:
    from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline

    pipeline = Pipeline([MatchSites(lx.CascadeSpec(noise=BY_STEP)), InsertBranches()])
    with raises(lx.PassError, "requirement-not-met"):
        pipeline(torch.fx.symbolic_trace(mlp()))


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
