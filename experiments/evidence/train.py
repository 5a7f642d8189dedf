"""Runs of the protocol: train, choose the weights that are evaluated, evaluate."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.evidence.data import Part, Task
from experiments.evidence.methods import Method, ends_of, rate_factor, spec_of

__all__ = ["Training", "freeze_later", "run"]


@dataclass(frozen=True)
class Order:
    """The examples of each step, a function of (seed, step) alone: every epoch is shuffled, a short batch left out."""

    examples: int
    batch_size: int
    seed: int

    def index(self, step: int) -> Tensor:
        """Return the positions [batch] of a step (0 is the first)."""
        epoch, batch = divmod(step, max(1, self.examples // self.batch_size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.examples, generator=generator)
        return shuffled[batch * self.batch_size : (batch + 1) * self.batch_size]


@dataclass(frozen=True)
class Training:
    """What every run of a protocol has in common.

    Args:
        batch_size, warmup, cycles: see protocol.toml.
        clip: largest norm of the gradient.
    """

    batch_size: int
    warmup: int
    cycles: int
    clip: float


def run(
    task: Task,
    methods: Sequence[Method],
    training: Training,
    size: int,
    steps: int,
    rate: float,
    seed: int,
    mixes: bool = False,
    observe: Callable[[int, float, Callable[[], dict[str, float]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train once, and return what is measured of each method.

    Args:
        methods: those that train alike and differ in the weights that are evaluated.
        size: number of training examples; 0 for the whole pool.
        steps: optimizer steps.
        rate: full learning rate.
        seed: of the training examples, their order, the new head, the branches and the noise.
        mixes: whether target and source accuracy are measured with shares of the change in (WiSE-FT).
        observe: called after each step with the steps done, the training loss of its batch, and a function that returns
            the size and the stable rank of the change so far, as `delta` in the result.

    Raises:
        ValueError: two methods do not train alike.
    """
    method = methods[0]
    if any(other.training != method.training for other in methods):
        raise ValueError(f"{[other.about for other in methods]} do not train alike")
    began = time.process_time()
    examples = _drawn(task.pool, size, seed)
    ends = ends_of(method, training.cycles, steps)
    order = Order(len(examples), min(training.batch_size, len(examples)), seed)
    model = task.model(seed).train(not task.frozen_norm)
    before, template = _matrices(model), copy.deepcopy(model)
    if method.untrained:
        return [{"trained": 0} | _measured(task, template, before, model.state_dict(), mixes) for _ in methods]
    moments = {step for other in methods for step in other.moments(ends, steps)}
    states: dict[int, dict[str, Tensor]] = {}
    result: dict[str, Any] = {"diverged": False}
    trained: Callable[[], dict[str, Tensor]]
    if method.full:
        learner: nn.Module = model.requires_grad_(True)
        parameters: list[Any] = [{"params": list(model.parameters())}]
        trained = lambda: {name: value.detach().clone() for name, value in model.state_dict().items()}  # noqa: E731
    else:
        sample = examples.at(order.index(0))
        spec = spec_of(method, task.rank, len(ends), task.head, seed)
        if "embedding" not in spec.method.kinds:
            tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
            spec = replace(spec, exclude=tuple(f"{name}.weight" for name in tables))
        spec = replace(spec, exclude=(*spec.exclude, *task.exclude))
        learner = lx.adapt(model, args=sample.inputs, spec=spec)
        parameters = list(learner.param_groups(lr=rate))
        trained = learner.folded_state_dict
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    result["trained"] = sum(value.numel() for group in optimizer.param_groups for value in group["params"])
    stages: Iterator[Any] | None = None
    if isinstance(learner, lx.Cascade):
        stages = iter(learner.stages(len(ends) if method.stages else 1, optimizer))
        next(stages)
    losses: list[float] = []
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        factor = rate_factor(method, step, steps, training.cycles, training.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        batch = examples.at(order.index(step))
        watch = PeakMemory() if step == 1 and task.general is not None else None  # the optimizer has its state by then
        with watch or nullcontext():
            loss = _loss(learner(*batch.inputs), batch.labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return [result | {"diverged": True, "steps": step} for _ in methods]
            loss.backward()
            if method.growing and isinstance(learner, lx.Cascade):
                freeze_later(learner, task.rank * (1 + sum(end <= step for end in ends)))
            parameters_now = [value for group in optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters_now, training.clip)
            optimizer.step()
        if watch is not None:
            result["memory"] = watch.peak + 3 * 4 * result["trained"]  # the values and AdamW's two moments
        optimizer.zero_grad()
        done = step + 1
        if observe is not None:
            observe(done, losses[-1], lambda: _deltas(before, trained()))
        if done in moments:
            states[done] = trained()
        if done in ends and stages is not None and method.stages:
            try:
                next(stages, None)
            except lx.StateError:  # a branch with inf or nan
                return [result | {"diverged": True, "steps": done} for _ in methods]
    last = trained()
    result |= {"steps": steps, "loss": losses[-1], "cpu_s": round(time.process_time() - began, 2)}
    if task.general is not None and isinstance(learner, lx.Cascade):
        idle = 4 * result["trained"] if method.stages else 0  # the branches of a next stage, which nobody needs
        result["disk"] = _saved_size(learner) - idle
    results = []
    for other in methods:
        kept = [states[step] for step in other.moments(ends, steps)]
        of_cycles = [statistics.fmean(losses[start:end]) for start, end in itertools.pairwise((0, *ends))]
        final = _chosen(kept, other, template, task, of_cycles) if kept else last
        results.append(result | _measured(task, template, before, final, mixes))
    return results


class PeakMemory:
    """Measures how much more memory torch held at the peak of a block than at its start: `peak`, in bytes."""

    def __enter__(self) -> Self:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.profile.__exit__(*exception)
        results = self.profile.profiler.kineto_results
        changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
        self.peak = max(itertools.accumulate((size for _, size in changes), initial=0))


def _saved_size(cascade: lx.Cascade) -> int:
    """Return the bytes of tensors in a checkpoint of a cascade, without optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in lx.save(cascade, Path(folder)).rglob("*.safetensors"))


def _measured(
    task: Task, model: nn.Module, before: Mapping[str, Tensor], final: Mapping[str, Tensor], mixes: bool
) -> dict[str, Any]:
    kept = _with(model, final)
    result: dict[str, Any] = {"validation": task.measure(kept, task.validation), "test": task.measure(kept, task.test)}
    result["shifts"] = {name: task.measure(kept, part) for name, part in task.shifts.items()}
    if task.general is None:
        result["delta"] = _deltas(before, final)
    else:  # singular values of such large weights would take longer than the training
        result["general"] = task.measure(kept, task.general)["loss"]
    if mixes:
        result["kept"] = _mixings(model, before, final, task)
    return result | {"diverged": not math.isfinite(result["validation"]["loss"])}


def freeze_later(cascade: lx.Cascade, rank: int) -> None:
    """Drop the gradients of all but the first `rank` rows of lora_A [rank, ...] and columns of lora_B [out, rank]."""
    for branch in cascade.branches.values():
        if branch.lora_A.grad is not None and branch.lora_B.grad is not None:
            branch.lora_A.grad[rank:] = 0
            branch.lora_B.grad[:, rank:] = 0


def _drawn(pool: Part, size: int, seed: int) -> Part:
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool.at(order[: size or len(pool)])


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _chosen(
    states: Sequence[dict[str, Tensor]], method: Method, model: nn.Module, task: Task, losses: Sequence[float]
) -> dict[str, Tensor]:
    """Return the mean of states, weighted by 1 / the loss of their cycle or not, or the one of the lowest validation
    loss.
    """
    if method.stop_early:
        return min(states, key=lambda state: task.measure(_with(model, state), task.validation)["loss"])
    changed = {
        name
        for name, value in states[0].items()
        if value.is_floating_point() and not all(torch.equal(value, state[name]) for state in states)
    }
    if method.average == "loss":
        weights = [1 / loss / sum(1 / other for other in losses) for loss in losses]
        return {
            name: sum(
                (weight * state[name].double() for weight, state in zip(weights, states, strict=True)),
                torch.zeros((), dtype=torch.float64),
            ).to(value.dtype)
            if name in changed
            else value
            for name, value in states[0].items()
        }
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if name in changed
        else value
        for name, value in states[0].items()
    }


def _with(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a plain copy of the model with these weights, in eval mode."""
    plain = copy.deepcopy(model)
    plain.load_state_dict(dict(state))
    return plain.requires_grad_(False).eval()


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _deltas(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean over weight matrices of the size of their change over theirs, and of its stable rank."""
    norms, ranks = [], []
    for name, value in before.items():
        change = (after[name].double() - value.double()).flatten(1) if value.dim() > 1 else None
        if change is None or not change.any():
            continue
        singular = torch.linalg.svdvals(change)
        norms.append((change.norm() / value.double().norm().clamp(min=1e-30)).item())
        ranks.append((singular.square().sum() / singular[0].square()).item())
    return {"norm": sum(norms) / max(1, len(norms)), "rank": sum(ranks) / max(1, len(ranks))}


def _mixings(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], task: Task
) -> list[dict[str, float]]:
    """Return accuracy on target and source with a share of the change (WiSE-FT, 2109.01903)."""
    assert task.source is not None
    found = []
    for tenth in range(11):
        share = tenth / 10
        mixed = {
            name: torch.lerp(before[name], value, share) if name in before else value for name, value in after.items()
        }
        plain = _with(model, mixed)
        target, source = task.measure(plain, task.test), task.measure(plain, task.source)
        found.append({"share": share, "target": target["accuracy"], "source": source["accuracy"]})
    return found
