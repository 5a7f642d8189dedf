"""The noise of a stage: its formula, its seeds, and that no noise remains after the stage (algorithm.md, row "noise").

The noise is measured as the difference between the parameters of a running stage and of a cascade without noise. No
function of the package computes the expected values.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import noise
from lorasc_fx.shards import ONE_PROCESS, ShardSpec
from tests.errors.models import Late
from tests.errors.state import unchanged
from tests.kit import compare
from tests.kit.models import batches, mlp, randomize, values
from tests.kit.state import noise_drawn

STRENGTH = 0.2


def big() -> nn.Module:
    """Return a model with enough entries for statistics: [300, 200], [40, 50, 3, 5] and [7, 40]."""
    torch.manual_seed(7)
    body = nn.Sequential(nn.Linear(200, 300), nn.Unflatten(1, (50, 2, 3)), nn.Conv2d(50, 40, (3, 5), padding=(1, 2)))
    return nn.Sequential(
        OrderedDict(
            body=body, head=nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1), nn.Linear(40, 7))
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
    for value in (1, 2):
        model = nn.Sequential(mlp(), nn.Dropout(0.0))
        x = batches(1, 4, 5)[0]
        compare.seed(value)
        with unchanged():
            cascade = lx.adapt(model, (x,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.3)))
            randomize(cascade)
            cascade.transition(torch.optim.SGD(cascade.param_groups(lr=0.1)))
            cascade.eval()
            cascade(x)
            with cascade.weights("slow"):
                cascade(x)
            cascade.folded_graph()
            released.append(values(cascade.release()))
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
        for start, count in ((0, total), (total // 3, total // 3), (total - 1, 1), (total, 0)):
            drawn.clear()
            shard = ShardSpec(start, count, total, ONE_PROCESS, axis)
            local = torch.Size((*shape[:axis], count, *shape[axis + 1 :]))
            assert torch.equal(noise_drawn(options, 3, 2, "w", local, shard), full.narrow(axis, start, count))
            assert max(drawn, default=0) <= 32768
            assert sum(drawn) == local.numel()


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
    matrix_1, matrix_2 = (noise_drawn(lx.Noise(0.1), 3, stage, "w", (rows, columns)) for stage in (1, 2))
    for matrix in (matrix_1, matrix_1 * matrix_2 * 12**0.5):
        values = torch.linalg.svdvals(matrix / matrix.std())
        assert values[0] == pytest.approx(rows**0.5 + columns**0.5, rel=0.01)  # Bai and Yin, 1993
        assert values[-1] == pytest.approx(columns**0.5 - rows**0.5, rel=0.02)
    blocks = torch.cat([matrix_1.view(-1, 32, 2, 1024).transpose(1, 2).reshape(-1, 32768), matrix_2.view(-1, 32768)])
    correlations = torch.corrcoef(blocks).triu(1).mul(32768**0.5)
    assert correlations.abs().max() < 5
    assert correlations[correlations != 0].std() == pytest.approx(1, rel=0.05)
    counts = torch.histc(matrix_1, 256, -0.5, 0.5)
    assert (counts - matrix_1.numel() / 256).square().sum() / (matrix_1.numel() / 256) < 255 + 5 * (2 * 255) ** 0.5


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
    actual, expected = dict(late.branches.named_parameters()), dict(early.branches.named_parameters())
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    same = early.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in late.model.state_dict().items())
