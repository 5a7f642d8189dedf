"""One run: train on a task, or on one task after another, and measure after each."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.evidence.methods import Method, rate_factor, spec_of
from experiments.evidence.tasks import IGNORED, IMAGES, Part, Task, general, measure

__all__ = ["run", "train"]

State = dict[str, Tensor]
LOOKS = 10
"""How often weights are kept, to average them or to choose from them."""


def run(
    tasks: Sequence[Task],
    method: Method,
    training: dict[str, Any],
    rates: Sequence[float],
    seed: int,
    scales: Sequence[float] = (),
    tested: bool = True,
) -> dict[str, Any]:
    """Train on one task after another, and return what is measured of all of them after each.

    Args:
        tasks: one, or a sequence.
        method: of METHODS.
        training: the table of the protocol.
        rates: a learning rate for each task.
        seed: of the examples, their order, the branches and the noise.
        scales: with one task, the shares of the change that are measured.
        tested: whether the test examples and general text are measured; a run that finds a rate only validates.
    """
    began = time.process_time()
    original = tasks[0].model()
    state, old = _state(original), list[Part]()
    bases: dict[str, Tensor] = {}
    result: dict[str, Any] = {"after": [], "diverged": False}
    states: list[State] = []
    for index, (task, rate) in enumerate(zip(tasks, rates, strict=True)):
        examples = _drawn(task.pool, training["examples"], seed)
        if method.replay and old:
            count = max(1, round(method.replay * len(examples) / len(old)))
            for part in old:
                examples = examples.and_(part.at(torch.arange(count)))
        before = _state(original) if method.separate else state
        try:
            trained, validation = train(
                task, examples, _with(original, before), method, training, rate, seed + 101 * index, bases
            )
        except lx.StateError:  # a branch with inf or nan
            return result | {"diverged": True}
        if not math.isfinite(validation["loss"]):
            return result | {"diverged": True}
        state = _mixed(before, trained, method.scale)
        states.append(state)
        old.append(_drawn(task.pool, training["examples"], seed))
        result["validation"] = validation
        if not tested:
            continue
        kept = [states[min(i, index)] if method.separate else state for i in range(len(tasks))]
        measured = {
            other.name: measure(_with(original, own), other.test) for other, own in zip(tasks, kept, strict=True)
        }
        result["after"].append(measured | _general(original, state, task))
    if scales:
        base = _state(original)
        result["scaled"] = [_scaled(original, tasks[0], _mixed(base, state, scale)) for scale in scales]
    return result | {"cpu_s": round(time.process_time() - began, 1)}


def train(
    task: Task,
    examples: Part,
    model: nn.Module,
    method: Method,
    training: dict[str, Any],
    rate: float,
    seed: int,
    bases: dict[str, Tensor],
) -> tuple[State, dict[str, float]]:
    """Train on one task, and return the weights that are evaluated and what they give on the validation examples.

    Args:
        task: with its validation examples.
        examples: that are trained on.
        model: with the weights to start from. It is changed.
        method, training, rate, seed: see `run`.
        bases: by weight, the rows that lora_A had in the tasks before; updated if the method starts orthogonally.
    """
    stages = training["stages"] if method.stages else 1
    spec = spec_of(method, training, task.train, task.exclude, seed)
    sample = examples.at(torch.arange(training["batch_size"]))
    cascade = lx.adapt(model.eval(), args=sample.inputs, spec=spec)
    if method.orthogonal:
        _start_orthogonally(cascade, bases)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=rate), lr=rate, weight_decay=0.01)
    kept: list[State] = []
    step = 0
    for stage in cascade.stages(stages, optimizer):
        while step < training["steps"] * stage.number // stages:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(method, step, training)
            batch = examples.at(_order(len(examples), training["batch_size"], seed, step))
            torch.manual_seed(seed * 1_000_003 + step)
            loss = F.cross_entropy(cascade(*batch.inputs).flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, training["clip"])
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if method.keep != "last" and step % (training["steps"] // LOOKS) == 0:
                kept.append(_copied(cascade.folded_state_dict()))
    if method.orthogonal:
        for site in cascade.sites:
            rows = cascade.branches[site.key].lora_A.detach().clone()
            bases[site.weight] = torch.cat([bases[site.weight], rows]) if site.weight in bases else rows
    trained = _copied(cascade.folded_state_dict())
    cascade.release()
    if method.keep == "mean":
        half = kept[LOOKS // 2 :]
        trained = {name: _mean([state[name] for state in half]) for name in trained}
    elif method.keep == "best":
        trained = min(kept, key=lambda state: measure(_with(model, state), task.validation)["loss"])
    return trained, measure(_with(model, trained), task.validation)


@torch.no_grad()
def _start_orthogonally(cascade: lx.Cascade, bases: Mapping[str, Tensor]) -> None:
    """Remove from lora_A [rank, in] its part in the span of the rows of the tasks before, and keep the norm."""
    for site in cascade.sites:
        if site.weight in bases:
            lora_a = cascade.branches[site.key].lora_A
            span = torch.linalg.qr(bases[site.weight].T).Q
            orthogonal = lora_a - lora_a @ span @ span.T
            lora_a.copy_(orthogonal * (lora_a.norm() / orthogonal.norm().clamp(min=1e-12)))


def _scaled(model: nn.Module, task: Task, state: State) -> dict[str, Any]:
    return measure(_with(model, state), task.test) | _general(model, state, task)


def _general(model: nn.Module, state: State, task: Task) -> dict[str, float]:
    """Return the loss on general text. Images have none: there the earlier task shows what is forgotten."""
    return {} if task.name in IMAGES else {"general": measure(_with(model, state), general())["loss"]}


def _order(examples: int, size: int, seed: int, step: int) -> Tensor:
    """Return the positions [batch] of a step. Every epoch is shuffled, and a short last batch is left out."""
    epoch, batch = divmod(step, examples // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator)[batch * size : (batch + 1) * size]


def _drawn(pool: Part, count: int, seed: int) -> Part:
    return pool.at(torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count])


def _state(model: nn.Module) -> State:
    return _copied(model.state_dict())


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[-1]
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _mixed(before: State, after: State, scale: float) -> State:
    """Return `before + scale (after - before)`; entries that are not floating point are those of `after`."""
    return {
        name: torch.lerp(before[name], value, scale) if value.is_floating_point() else value
        for name, value in after.items()
    }


def _with(model: nn.Module, state: State) -> nn.Module:
    """Return a copy of the model with these weights, in eval mode."""
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)
    return plain.requires_grad_(True).eval()
