"""Runs drawn at random, and events between their steps that must not change a bit of them.

`draw_case` makes a case: a model, three to five options, an optimizer, a program of steps and stages, and events at
places of the program. `play` runs the program, with or without the events, and returns all numbers. `check` compares
the two, and reports the smallest case that still fails.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorasc_fx as lx
from tests.accelerator import models as shared
from tests.errors.inject import FailAt, Interrupted, failing
from tests.errors.state import assert_same, numbers, raw
from tests.kit.state import branches_of
from tests.property import nets

Draw = random.Random

# ---- models


class Recomputed(nn.Module):
    """Two blocks with dropout that backward computes again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 3)

    def block(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(torch.tanh(self.first(x))), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        y: Tensor = self.head(x)
        return y


class Normed(nn.Module):
    """Attention and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        return y


def _net(build: nets.Build) -> tuple[Callable[[], nn.Module], Callable[[], Any]]:
    return lambda: nets.Net(build), lambda: (nets.inputs(build, 4, 3, True, torch.float32), {})


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "recomputed": (Recomputed, lambda: ((torch.randn(4, 12),), {})),
    "normed": (Normed, lambda: ((torch.randn(4, 5, 12),), {})),
    "shared": _net(nets.Build(groups=2, norm=True, again=True, tied=True, words=False, seed=5)),
    "words": _net(nets.Build(groups=0, norm=False, again=True, tied=False, words=True, seed=6)),
}
MODELS = {name: shared.MODELS[name] for name in ("mlp", "conv", "tied", "dropout")} | OWN
DROPS = ("dropout", "recomputed")
"""Models with dropout."""
TRACED = ("mlp", "conv", "tied", "dropout", "shared", "words")
"""Models that torch.fx traces, which is quick; the others are left to `auto`."""


def build(case: Case) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = MODELS[case.model][0]()
    return model.to(case.dtype).train(case.training)


def example(case: Case) -> tuple[Any, ...]:
    torch.manual_seed(4)
    args = MODELS[case.model][1]()[0]
    return tuple(each.to(case.dtype) if each.is_floating_point() else each for each in args)


# ---- cases


def _noise(draw: Draw) -> lx.Noise:
    return lx.Noise(
        0.2,
        draw.choice(["uniform", "normal", "filter"]),
        keep=draw.random() < 0.3,
        where=draw.choice(["sites", "all"]),
        redraw=draw.choice(["stage", "step"]),
    )


OPTIONS: dict[str, Callable[[Draw], Any]] = {
    "noise": _noise,
    "ranks": lambda draw: draw.choice([(1, 2), (3, 1), (2, 3, 1)]),
    "rules": lambda draw: (lx.Rule("*head*", rank=1, lora_alpha=draw.choice([None, 2.0])),),
    "restart": lambda draw: "fast",
    "restart_A": lambda draw: "kept",
    "start": lambda draw: draw.choice(["pissa", "milora", "olora"]),
    "adapter": lambda draw: "dora",
    "use_rslora": lambda draw: True,
    "train": lambda draw: draw.choice([("*.bias",), ("*head.*",), ("*head.*", "*.bias")]),
    "train_rules": lambda draw: (lx.TrainRule("*", lr=0.01, slow=draw.choice([None, False])),),
    "slow_train": lambda draw: False,
    "average": lambda draw: draw.choice(["ema", "swa"]),
    "dropout": lambda draw: 0.3,
    "train_A": lambda draw: False,
    "lr_ratio": lambda draw: 4.0,
    "on_nonfinite": lambda draw: "skip",
    "placement": lambda draw: draw.choice(lx.spec.PLACEMENTS),
    "pace": lambda draw: draw.choice([1.0, "mean", (0.3, 0.8, 1.0)]),
    "optimizer_state": lambda draw: draw.choice(["kept", 0.5]),
}
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.7, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "nadam": lambda groups: torch.optim.NAdam(groups, foreach=False),
    "asgd": lambda groups: torch.optim.ASGD(groups, t0=2, foreach=False),
}
"""Without `foreach`: torch uses it on accelerators alone, and it rounds differently."""
EVENTS = ("fail", "load", "state_dict", "copy", "look", "evaluate", "export", "move", "interrupt")
"""Methods of `Going` that change nothing of the run."""


@dataclass(frozen=True)
class Case:
    """A run, and the events between its steps.

    Args:
        model, training: a name in MODELS, and its mode.
        options: fields of the spec, besides rank 2.
        optimizer: a name in OPTIMIZERS.
        dtype, autocast: of the model; and whether it is called under autocast to bf16.
        program: names of methods of `Going` with an argument each.
        events: the same, each with the place in the program before which it comes.
    """

    model: str
    training: bool
    options: Mapping[str, Any]
    optimizer: str
    dtype: torch.dtype
    autocast: bool
    program: tuple[tuple[str, int], ...]
    events: tuple[tuple[int, str, int], ...]

    @property
    def spec(self) -> lx.CascadeSpec:
        return spec_of(self.options)

    @property
    def drops(self) -> bool:
        """Whether numbers of the device's own generator are in the run."""
        return self.model in DROPS or "dropout" in self.options


def spec_of(options: Mapping[str, Any]) -> lx.CascadeSpec:
    """The spec, of rank 2 where the options give no ranks."""
    return lx.CascadeSpec(**{"lora_alpha": 3.0, **({} if "ranks" in options else {"rank": 2}), **options})


def draw_options(draw: Draw) -> dict[str, Any]:
    """Three to five options, which may exclude each other.

    Raises:
        SpecError: their values do, or those of one.
    """
    names = draw.sample(list(OPTIONS), draw.randint(3, 5))
    if "train_rules" in names and "train" not in names:
        names[-1 if names[-1] != "train_rules" else 0] = "train"
    options = {name: OPTIONS[name](draw) for name in names}
    spec_of(options)
    return options


def draw_program(draw: Draw) -> tuple[tuple[str, int], ...]:
    """Three to four stages of one or two steps; a step may add up the gradients of two backwards."""
    program: list[tuple[str, int]] = []
    for _ in range(draw.randint(3, 4)):
        for _ in range(draw.randint(1, 2)):
            program += [("backward", 0)] * draw.randint(1, 2) + [("update", 0)]
        program.append(
            draw.choice([("fold", 0), ("fold", 0), ("fold", 0), ("rewind", draw.randint(0, 2)), ("loop", 2)])
        )
    return (*program, ("backward", 0), ("update", 0))


def draw_case(draw: Draw) -> tuple[Case, int]:
    """A case whose spec is valid, and the number of refused draws before it."""
    for refused in range(1000):
        try:
            options = draw_options(draw)
        except lx.SpecError:
            continue
        program = draw_program(draw)
        if "on_nonfinite" in options:
            program = (*program, ("spoil", 0), ("backward", 0), ("update", 0))
        events = [(draw.randint(0, len(program)), draw.choice(EVENTS), draw.randint(0, 99)) for _ in range(7)]
        model = draw.choice(list(MODELS))
        dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        return Case(
            model=model,
            training=model in DROPS or "dropout" in options or draw.random() < 0.7,
            options=options,
            optimizer=draw.choice(list(OPTIMIZERS)),
            dtype=dtype,
            autocast=dtype == torch.float32 and draw.random() < 0.3,
            program=program,
            events=tuple(sorted(events)),
        ), refused
    raise AssertionError("no draw is valid")


# ---- runs


class Going:
    """A run under way."""

    def __init__(self, case: Case, folder: Path, device: str, elsewhere: str) -> None:
        self.case, self.folder, self.device, self.elsewhere = case, folder, device, elsewhere
        self.example = tuple(each.to(device) for each in example(case))
        self.losses: list[Any] = []
        self.left: list[tuple[lx.Cascade, Any]] = []  # cascades that were copied, and their numbers then
        self.fail_at = 0
        self.adopt(self.adapted())
        torch.manual_seed(7)
        random.seed(7)

    def model(self) -> nn.Module:
        return build(self.case).to(self.device)

    def adapted(self) -> lx.Cascade:
        frontend = "symbolic" if self.case.model in TRACED else "auto"
        return lx.adapt(self.model(), self.example, spec=self.case.spec, frontend=frontend)

    def adopt(self, cascade: lx.Cascade) -> None:
        self.cascade = cascade
        self.optimizer = OPTIMIZERS[self.case.optimizer](cascade.param_groups(lr=0.02))

    def call(self, args: tuple[Any, ...]) -> Tensor:
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.case.autocast):
            output: Tensor = self.cascade(*args)
            return output.float()

    # ---- the program

    def backward(self, _: int) -> None:
        shift, step = torch.rand(()) + random.random(), int(torch.randint(5, ()))
        held = [each.cpu() for each in self.example]
        args = [each + shift if each.is_floating_point() else (each + step) % nets.WORDS for each in held]
        loss = nets.loss_of(self.call(tuple(each.to(old) for each, old in zip(args, self.example, strict=True))))
        loss.backward()
        self.losses.append(loss.item())

    def update(self, _: int) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fold(self, _: int) -> None:
        self.uninterrupted(lambda: self.cascade.transition(self.optimizer))

    def rewind(self, stage: int) -> None:
        try:
            self.uninterrupted(lambda: self.cascade.rewind(stage, self.optimizer))
        except lx.StateError as refused:
            if refused.code != "unknown-stage":
                raise
            self.losses.append(refused.code)

    def uninterrupted(self, call: Callable[[], Any]) -> None:
        """Call, after a try that an exception ends at some operation where `interrupt` has asked for it."""
        at, self.fail_at = self.fail_at, 0
        if at:
            with contextlib.suppress(Interrupted), FailAt(at, failing(Interrupted())):
                call()
                return
        call()

    def loop(self, count: int) -> None:
        """End the stage, and run a loop, which leaves the cascade without a running stage."""
        self.fold(0)
        for _ in self.cascade.stages(count, self.optimizer):
            self.backward(0)
            self.update(0)

    def spoil(self, _: int) -> None:
        with torch.no_grad():
            next(iter(branches_of(self.cascade).values())).lora_B[0, 0] = torch.inf
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the branch of .* holds inf or nan", lx.errors.LorascWarning)
            self.fold(0)

    # ---- events

    def seed_otherwise(self) -> None:
        """Be as in another process: its generators are somewhere else."""
        torch.manual_seed(12345)
        random.seed(54321)

    def fail(self, number: int) -> None:
        """Be interrupted at some operation of a call that changes no number, or let it go through."""
        cascade, state = self.cascade, self.cascade.state_dict()
        calls: tuple[Callable[[], Any], ...] = (
            lambda: lx.save(cascade, self.folder / "other", optimizer=self.optimizer),
            lambda: cascade.to(self.device),
            lambda: cascade.load_state_dict(state),
            cascade.folded_state_dict,
            lambda: copy.deepcopy(cascade),
        )
        with contextlib.suppress(Interrupted), FailAt(1 + 3 * number, failing(Interrupted())):
            calls[number % len(calls)]()

    def load(self, number: int) -> None:
        """Go on in a new cascade, with or without inputs for it."""
        lx.save(self.cascade, self.folder, optimizer=self.optimizer, extra={"losses": self.losses})
        self.seed_otherwise()
        self.adopt(lx.load(self.folder, self.model(), self.example if number % 2 else ()))
        torch.rand(3)
        self.losses = self.cascade.resume(self.optimizer)["losses"]

    def state_dict(self, number: int) -> None:
        """Go on in a new cascade that takes the state dict, by way of bytes."""
        held, of_optimizer = safetensors.torch.save(self.cascade.state_dict()), io.BytesIO()
        torch.save(self.optimizer.state_dict(), of_optimizer)
        self.seed_otherwise()
        fresh, state = self.adapted(), safetensors.torch.load(held)
        fresh.load_state_dict({name: each.to(self.device) for name, each in state.items()} if number % 2 else state)
        self.adopt(fresh)
        of_optimizer.seek(0)
        give_state(self.optimizer, torch.load(of_optimizer))  # noqa: TID251 (written by this test)
        fresh.resume()

    def copy(self, number: int) -> None:
        """Go on with a deep copy, of the optimizer too, or of its state. torch copies no gradients."""
        old = self.cascade
        if number % 2:
            self.cascade, self.optimizer = copy.deepcopy((old, self.optimizer))
        else:
            state = copy.deepcopy(self.optimizer.state_dict())
            self.adopt(copy.deepcopy(old))
            give_state(self.optimizer, state)
        for one, other in zip(old.parameters(), self.cascade.parameters(), strict=True):
            other.grad = None if one.grad is None else one.grad.clone()
        self.left.append((old, numbers(old)))

    def look(self, number: int) -> None:
        """Put other weights in place for a call; and be interrupted on the way in or out."""
        which = self.cascade.views[number % len(self.cascade.views)]
        with self.evaluating(), self.cascade.weights(which):
            self.call(self.example)
        with contextlib.suppress(Interrupted), FailAt(1 + number, failing(Interrupted())), self.cascade.weights(which):
            pass

    def evaluate(self, number: int) -> None:
        """Call in eval mode, with another number of rows."""
        rows = (1, 2, 4, 7)[number % 4]
        with self.evaluating():
            self.call(tuple(torch.cat([each, each])[:rows] for each in self.example))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.cascade.eval()
        with torch.no_grad():
            yield
        self.cascade.train(self.case.training)

    def export(self, number: int) -> None:
        """Read folded weights and what else describes the run."""
        self.cascade.folded_state_dict()
        lx.export.safetensors(self.cascade, self.folder / f"{number}.safetensors")
        str(self.cascade), self.cascade.state_dict()

    def move(self, number: int) -> None:
        """To another device and back, or only to the same one."""
        for device in (self.elsewhere, self.device):
            self.cascade.to(device)
            give_state(self.optimizer, self.optimizer.state_dict())

    def interrupt(self, number: int) -> None:
        """Let the next transition or rewind fail at an operation, and be repeated."""
        self.fail_at = 1 + 3 * number

    # ---- the end

    def result(self) -> dict[str, Any]:
        """All numbers, bit for bit, also those of the released model."""
        found = numbers(self.cascade, self.optimizer)
        found |= {"losses": self.losses, "torch": raw(torch.get_rng_state()), "python": random.getstate()}
        if self.case.drops and self.device != "cpu":
            found["device"] = raw(torch.get_device_module(self.device).get_rng_state())
        for cascade, before in self.left:
            assert_same(numbers(cascade), before)
        state = self.cascade.release().state_dict()
        return found | {f"released {name}": raw(value) for name, value in state.items()}


def give_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, and keep the numbers in it as they are: torch casts them to the dtype of the parameter."""
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, entries in state["state"].items():
        kept = {name: value for name, value in entries.items() if isinstance(value, Tensor) and not value.dim()}
        optimizer.state[parameters[place]].update(kept)


class Invalid(Exception):
    """A case whose run does not go through by itself: the model does not go with the options, or training diverges."""


def play(case: Case, events: bool, device: str = "cpu", elsewhere: str = "cpu") -> dict[str, Any]:
    """Run a case on a device, with events or without; they move the cascade to `elsewhere` and back."""
    with tempfile.TemporaryDirectory(prefix="lorasc-fx-") as folder:
        going = Going(case, Path(folder), device, elsewhere)
        for place in range(len(case.program) + 1):
            for at, event, number in case.events if events else ():
                if at == place:
                    getattr(going, event)(number)
            if place < len(case.program):
                name, argument = case.program[place]
                getattr(going, name)(argument)
        return going.result()


def fault(case: Case, device: str = "cpu", elsewhere: str = "cpu") -> str:
    """Why the run with events differs from that without; an empty string if it does not.

    Raises:
        Invalid: the run without events does not go through.
    """
    try:
        whole = play(case, False, "cpu" if not case.drops else device)
    except (lx.SpecError, lx.NonFiniteBranch) as refused:
        raise Invalid from refused
    if not all(math.isfinite(loss) for loss in whole["losses"] if isinstance(loss, float)):
        raise Invalid
    try:
        assert_same(play(case, True, device, elsewhere), whole)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one event, option or step less."""
    for place in range(len(case.events)):
        yield replace(case, events=case.events[:place] + case.events[place + 1 :])
    for name in case.options:
        yield replace(case, options={key: value for key, value in case.options.items() if key != name})
    for place in range(len(case.program)):
        events = tuple((at - (at > place), event, number) for at, event, number in case.events)
        yield replace(case, program=case.program[:place] + case.program[place + 1 :], events=events)
    for other in (
        replace(case, autocast=False),
        replace(case, dtype=torch.float32),
        replace(case, optimizer="sgd"),
        replace(case, model="mlp"),
    ):
        if other != case:
            yield other


def check(
    seed: int, device: str = "cpu", elsewhere: str = "cpu", wanted: Callable[[Case], bool] = lambda _: True
) -> None:
    """Draw a case by the seed, and fail with the smallest one where events change its run."""
    draw, why = Draw(seed), None
    while why is None:
        case = draw_case(draw)[0]
        with contextlib.suppress(Invalid):
            why = fault(case, device, elsewhere) if wanted(case) else None
    if why:
        raise AssertionError(f"seed {seed}: {smallest(case, device, elsewhere)}, at first {why}")


def smallest(case: Case, device: str = "cpu", elsewhere: str = "cpu") -> tuple[Case, str]:
    """Make a failing case smaller until every smaller one passes; returns its fault too."""
    found = ""
    while True:
        for other in smaller(case):
            try:
                why = fault(other, device, elsewhere)
            except Exception:  # the run without events does not go through
                continue
            if why:
                case, found = other, why
                break
        else:
            return case, found
