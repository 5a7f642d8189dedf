"""Noise that is drawn again after each optimizer step (`noise.redraw="step"`, Flat-LoRA 2409.14396).

Tests its formula, which steps count, and that no noise remains. The noise is measured as the parameters minus W0 and
the folded experts.
"""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import batches, branches, by_hand, loss_of, mlp, optimizer_of, train
from tests.kit.seams import SEAMS, seam

BY_STEP = lx.Noise(0.2, redraw="step")
FLAT = lx.Noise(0.05, distribution="filter", redraw="step")


def adapted(model: nn.Module, x: torch.Tensor, noise: lx.Noise = BY_STEP, **options: object) -> lx.Cascade:
    return lx.adapt(model, (x,), spec=lx.CascadeSpec(**{"rank": 2, "pace": 0.5, "noise": noise, **options}))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("noise", [BY_STEP, FLAT], ids=["uniform", "filter"])
def test_two_stages_are_the_formula(noise: lx.Noise) -> None:
    """Losses and slow weights follow the formula, with the noise that is measured in the parameters at each step."""
    model, calls = mlp(), batches(5, 4, 5)
    base = weights(model)
    cascade = adapted(model, calls[0], noise)
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
    cascade = adapted(model, x)
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
        cascade = adapted(mlp(), batches(1, 4, 5)[0], **options)
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
    cascade = adapted(mlp(), x)
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
        cascade = adapted(mlp(), calls[0])
        model = torch.compile(cascade, backend="eager", fullgraph=True) if compiled else cascade
        losses.append(train(model, optimizer_of(cascade, "sgd"), calls))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-14)


def test_watching_ends() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(mlp(), x)
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


def test_a_copy_redraws_before_its_first_call() -> None:
    cascade = adapted(mlp(), batches(1, 4, 5)[0])
    twin = copy.deepcopy(cascade)
    for run in (cascade, twin):
        torch.optim.SGD(run.param_groups(lr=0.0)).step()
    noisy, twin_noisy = weights(cascade.model), weights(twin.model)
    assert cascade.plan.step == twin.plan.step == 1
    assert all(torch.equal(value, twin_noisy[name]) for name, value in noisy.items())


def test_a_cascade_that_goes_during_a_step() -> None:
    """torch iterates over its hooks at that time."""
    cascades: list[lx.Cascade] = []

    def drop(*_about: object) -> None:
        cascades.pop()
        gc.collect()

    handle = torch_optimizer.register_optimizer_step_post_hook(drop)  # runs before the hook of the cascades
    try:
        cascades += [adapted(mlp(), batches(1, 4, 5)[0]), adapted(mlp(), batches(1, 4, 5)[0])]
        optimizer = torch.optim.SGD(cascades[0].param_groups(lr=0.0))
        optimizer.step()
    finally:
        handle.remove()
    assert len(cascades) == 1


def test_weights_that_somebody_changed_are_not_written_over() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(mlp(), x)
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.0))
    with torch.no_grad():
        cascade.model[2].weight.mul_(2)
    expected = cascade.model[2].weight.detach().clone()
    with raises(lx.StateError, "weights-changed-outside", "noise.redraw", "2.weight"):
        optimizer.step()
    assert torch.equal(cascade.model[2].weight, expected)


def test_a_redraw_that_raises_leaves_the_noise_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    x = batches(1, 4, 5)[0]
    cascade, twin = adapted(mlp(), x), adapted(mlp(), x)
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
