"""Random small models under random specs through random sequences of operations, beside `plain.Plain` after each one.

After each operation these are compared: parameters, branches, slow, fast and base weights, the folded state, buffers,
the optimizer's momentum, and an output. After a cast to fp32, the tolerance is that of fp32. The reference then copies
the values that the optimizer has written, so that only the rounding of one operation is compared.
"""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.passes import AdapterInputs, adapter_inputs, adapter_values
from tests.cascade.methods import DELTAS
from tests.cascade.nets import Build, Net, inputs, loss_of
from tests.cascade.plain import Law, Plain
from tests.kit.errors import raises
from tests.kit.state import graphs_of

EXACT = {"rtol": 1e-9, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}

BUILDS = st.builds(
    Build,
    groups=st.sampled_from([0, 1, 2]),
    norm=st.booleans(),
    again=st.booleans(),
    tied=st.booleans(),
    words=st.booleans(),
    seed=st.integers(0, 1000),
)
STRENGTH = st.sampled_from([0.0, 0.3])


WEIGHT_ONLY = {"hira", "shira", "oft", "lokr"}
"""Methods whose delta has no low rank."""


@st.composite
def specs(draw: st.DrawFn) -> lx.CascadeSpec:
    """Half of them have a method other than lora, which has fewer options."""
    adapter = draw(st.sampled_from(["lora"] * 8 + [name for name in DELTAS if name != "lora"]))
    lora, scaled = adapter == "lora", adapter in ("lora", "lora-xs", "lokr")
    targets = list(TARGETS) if adapter != "lokr" else [("first", "mix", "other")]  # lokr is not for embeddings
    options: dict[str, Any] = {}
    if scaled:
        options = {"lora_alpha": draw(st.sampled_from([1.0, 3.0])), "use_rslora": draw(st.booleans())}
    if adapter == "delora":  # plain SGD leaps at B = 0, where the gradient is lambda / 1e-4, and may end in inf
        options = {"adapter_options": {"bound": 1e-3}}
    if lora:
        options |= {
            "rules": draw(st.sampled_from([(), (lx.Rule("mix", rank=1, lora_alpha=1.5),)])),
            "restart_factors": draw(st.sampled_from(["both", "B"])),
        }
    return lx.CascadeSpec(
        adapter=adapter,
        targets=draw(st.sampled_from(targets)),
        exclude=draw(st.sampled_from([(), (), ("first",)])),
        train=draw(st.sampled_from([(), ("head",), ("head", "*.bias")])),
        rank=draw(st.integers(1, 2 if adapter == "miss" else 3)),  # MiSS has at most as many rows as inputs
        placement=draw(
            st.sampled_from(["auto", "merged", "weight", *(["beside"] if adapter not in WEIGHT_ONLY else [])])
        ),
        pace=draw(st.sampled_from([0.3, 0.5, 1.0])),
        restart=draw(st.sampled_from(["slow", "fast"])),
        optimizer_state=draw(st.sampled_from(["reset", "kept", 0.5])),
        slow_train=draw(st.booleans()),
        noise=lx.Noise(
            draw(STRENGTH),
            draw(st.sampled_from(["uniform", "normal"])),
            keep=draw(st.booleans()),
            where=draw(st.sampled_from(["sites", "all"])),
        ),
        seed=draw(st.integers(0, 2**63 - 1)),
        **options,
    )


TARGETS = {
    ("linear", "conv", "embedding"): ("conv", "first", "other", "mix", "back", "words", "head"),
    ("first", "mix", "other"): ("first", "mix", "other"),
    ("mix*", "*o*r*"): ("mix", "other", "words"),
}
"""The modules that the targets mean, written out: `*o*r*` means other and words."""


def sites_of(spec: lx.CascadeSpec, model: Net, with_y: bool) -> list[str]:
    """The weights that the spec adapts among the ones that a call uses."""
    targets = [f"{name}.weight" for name in TARGETS[spec.targets] if f"{name}" not in (*spec.exclude, *spec.train)]
    return [name for name in model.matrices(with_y) if name in targets]


def scaling(spec: lx.CascadeSpec, name: str) -> tuple[int, float]:
    """Rank, and s = lora_alpha / r, or under rsLoRA / sqrt(r); 1 by default."""
    rank, alpha = (1, 1.5) if spec.rules and name == "mix.weight" else (spec.rank, spec.lora_alpha)
    alpha = rank if alpha is None else alpha
    return rank, alpha / (math.sqrt(rank) if spec.use_rslora else rank)


def law_of(spec: lx.CascadeSpec) -> Law:
    """Take the fields of a law that a spec and its noise have too; the optimizer's are left at their defaults."""
    given = vars(spec) | vars(spec.noise)
    return Law(**{field.name: given[field.name] for field in fields(Law) if field.name in given})


class Machine(RuleBasedStateMachine):
    """A cascade, its optimizer, and the plain reference."""

    cascade: lx.Cascade

    @initialize(build=BUILDS, spec=specs(), with_y=st.booleans(), train=st.booleans())
    def start(self, build: Build, spec: lx.CascadeSpec, with_y: bool, train: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lorasc-fx-")
        self.build, self.with_y, self.near = build, with_y, EXACT
        self.dtype = torch.float64
        self.adapt(Net(build).double().train(train), spec)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # ---- both sides

    def adapt(self, model: Net, spec: lx.CascadeSpec) -> None:
        self.spec, self.untouched, self.origin = spec, copy.deepcopy(model), self.dtype
        self.flags = [(parameter.requires_grad, model.training) for parameter in model.parameters()]
        dimensions = {name: value.dim() for name, value in model.named_parameters()}
        trained = [
            n
            for n in dimensions
            if ("head" in spec.train and n.startswith("head.")) or ("*.bias" in spec.train and n.endswith(".bias"))
        ]
        trained = [n for n in trained if n.rpartition(".")[0] not in spec.exclude]
        noisy: list[str] = []
        if spec.noise.strength and spec.noise.where == "all":
            noisy = [n for n, axes in dimensions.items() if axes > 1 and n not in trained]
            noisy = [n for n in noisy if n.rpartition(".")[0] not in spec.exclude]
        self.plain = Plain(model, law_of(spec), noisy, trained, self.taken)
        self.cascade = lx.adapt(model, self.inputs(3, 0, self.with_y), spec=spec)
        self.optimizer = self.fresh_optimizer()
        self.know(self.with_y)

    def inputs(self, batch: int, seed: int, with_y: bool) -> tuple[Any, ...]:
        return inputs(self.build, batch, seed, with_y, self.dtype)

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        law = self.plain.law
        return torch.optim.SGD(self.cascade.param_groups(lr=law.lr, momentum=law.momentum))

    def know(self, with_y: bool) -> None:
        """Sites that came with a call: branches of both, and a new optimizer that goes on with the old one's state."""
        new = [name for name in sites_of(self.spec, self.untouched, with_y) if name not in self.plain.adapters]
        for name in new:
            self.plain.add_site(name, *scaling(self.spec, name))
        assert {site.weight for site in self.cascade.sites} == set(self.plain.adapters)
        for name in self.plain.adapters:  # before a step changes them
            self.plain.adapter(name)
        if new:
            old, self.optimizer = self.optimizer, self.fresh_optimizer()
            for parameter, state in old.state.items():
                self.optimizer.state[parameter] = state

    def near_to(self, computed: Tensor, expected: Tensor, name: str) -> None:
        torch.testing.assert_close(
            computed.detach().double(), expected.detach(), **self.near, msg=lambda text: f"{name}: {text}"
        )

    def both(self, args: tuple[Any, ...]) -> Tensor:
        """Call both; returns the cascade's output."""
        output = self.cascade(*args)
        self.know(len(args) > 1 and args[1] is not None)
        self.near_to(output, self.plain(*args), "output")
        return output

    def leaves(self) -> dict[tuple[str, str], nn.Parameter]:
        branches = {site.weight: self.cascade.branches[site.key] for site in self.cascade.sites}
        parameters = dict(self.cascade.model.named_parameters())
        leaves = {(name, key): value for name, branch in branches.items() for key, value in branch.trainable().items()}
        return leaves | {(name, "value"): parameters[name] for name in self.plain.values}

    def taken(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the branch of a weight starts with: trained, and fixed."""
        branch: Any = next(self.cascade.branches[site.key] for site in self.cascade.sites if site.weight == name)
        trained = {key: value.detach().to(torch.float64, copy=True) for key, value in branch.trainable().items()}
        fixed: dict[str, Tensor] = {}
        if self.spec.adapter == "vera":
            like = torch.zeros(1, dtype=torch.float64)
            fixed = {"A": branch.vera_A.like(like), "B": branch.vera_B.like(like)}
        elif self.spec.adapter == "lora-xs":
            # The next stage writes into the same memory.
            fixed = {name: getattr(branch, f"xs_{name}").detach().to(torch.float64, copy=True) for name in "AB"}
        elif self.spec.adapter == "shira":
            fixed = {"places": branch.positions[: len(branch.shira_values)].clone()}
        return trained, fixed

    def velocity(self, leaf: nn.Parameter) -> Tensor:
        return self.optimizer.state.get(leaf, {}).get("momentum_buffer", torch.zeros_like(leaf)).detach()

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "cascade"):
            return
        cascade, plain = self.cascade, self.plain
        assert cascade.stage == plain.stage
        for name, value in plain.present().items():
            self.near_to(dict(cascade.model.named_parameters())[name], value, name)
        leaves = self.leaves()
        assert leaves.keys() == plain.leaves().keys()
        for key, value in plain.leaves().items():
            assert leaves[key].requires_grad
            self.near_to(leaves[key], value, str(key))
            expected = plain.velocity.get(key, torch.zeros_like(value))
            self.near_to(self.velocity(leaves[key]), expected, f"momentum of {key}")
        if self.near is ROUNDED:
            self.hand_over(leaves)
        for view in ("slow", "fast", "base"):
            with cascade.weights(view):
                for name, value in plain.weights(view).items():
                    self.near_to(dict(cascade.model.named_parameters())[name], value, f"{view} {name}")
        folded = cascade.folded_state_dict()
        for name, value in plain.released().items():
            self.near_to(folded[name], value, f"folded {name}")
        self.both(self.inputs(3, 0, self.with_y))
        for name, buffer in plain.model.named_buffers():
            self.near_to(dict(cascade.model.named_buffers())[name], buffer.double(), name)

    def hand_over(self, leaves: dict[tuple[str, str], nn.Parameter]) -> None:
        plain = self.plain
        for key, leaf in leaves.items():
            plain.leaves()[key].copy_(leaf.detach())
            if key in plain.velocity:
                plain.velocity[key] = self.velocity(leaf).to(torch.float64, copy=True)

    # ---- operations

    def one_step(self, batch: int, seed: int, with_y: bool) -> None:
        args = self.inputs(batch, seed, with_y)
        output = self.cascade(*args)
        self.know(with_y)
        loss_of(output).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.near_to(output, self.plain.step(*args), "output")

    @rule(batch=st.integers(2, 4), seed=st.integers(1, 9), with_y=st.booleans())
    def step(self, batch: int, seed: int, with_y: bool) -> None:
        self.one_step(batch, seed, with_y)

    @rule(with_optimizer=st.sampled_from([True, True, False]))
    def transition(self, with_optimizer: bool) -> None:
        self.cascade.transition(self.optimizer if with_optimizer else None)
        self.plain.transition(resets_optimizer=with_optimizer)

    def trained_since_idle(self) -> bool:
        return self.plain.idle and self.plain.begun

    @rule(count=st.integers(1, 2), steps=st.integers(0, 2), leave=st.booleans())
    def loop(self, count: int, steps: int, leave: bool) -> None:
        stages = self.cascade.stages(count, self.optimizer)
        if self.trained_since_idle():
            with raises(lx.StateError, "stage-not-ended"):
                next(stages)
            return
        if self.plain.idle:
            self.plain.end_idle()
        for stage in stages:
            assert (stage.number, stage.count) == (self.plain.stage, count)
            for seed in range(steps):
                self.one_step(3, seed, self.with_y)
            if leave and stage.index == count:
                break
            self.plain.transition(idle=stage.index == count)

    @rule(view=st.sampled_from(["slow", "fast", "base"]), batch=st.integers(2, 4), with_y=st.booleans())
    def look(self, view: Any, batch: int, with_y: bool) -> None:
        args = self.inputs(batch, 5, with_y)
        statistics = [buffer.clone() for buffer in self.plain.model.buffers()]
        with self.cascade.weights(view):
            output = self.cascade(*args)
            self.near_to(output, self.plain(*args, weights=self.plain.weights(view)), f"output by {view}")
        for buffer, value in zip(self.plain.model.buffers(), statistics, strict=True):  # restored with the weights
            buffer.copy_(value)

    @rule(batch=st.integers(2, 4), with_y=st.booleans())
    def call(self, batch: int, with_y: bool) -> None:
        self.both(self.inputs(batch, 6, with_y))

    @precondition(lambda self: self.spec.adapter == "lora")
    @rule(rank=st.integers(3, 5))
    def lift(self, rank: int) -> None:
        """A graph with its adapters as inputs has the factors of the branches as values, padded with zeros."""
        for graph in graphs_of(self.cascade):
            lifted = AdapterInputs(rank)(graph).graph_module
            values = adapter_values(lifted)
            branches = {branch.weight_name: branch for branch in graph.branches.children()}
            for item in adapter_inputs(lifted):
                if item.tensor != "scale":
                    factor, padded = branches[item.weight].get_parameter(item.tensor), values[item.name]
                    assert torch.equal(padded[padded != 0], factor[factor != 0])

    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.cascade.train(train)
        self.plain.model.train(train)

    @rule()
    def save_and_load(self) -> None:
        path = Path(self.folder.name) / "run"
        lx.save(self.cascade, path, optimizer=self.optimizer, extra={"stage": self.cascade.stage})
        training = self.cascade.training
        self.dtype = self.origin
        model = copy.deepcopy(self.untouched).train(training)
        self.flags = [(parameter.requires_grad, training) for parameter in model.parameters()]
        self.cascade = lx.load(path, model, self.inputs(3, 0, self.with_y))
        self.optimizer = self.fresh_optimizer()
        assert self.cascade.resume(self.optimizer) == {"stage": self.plain.stage}
        self.plain.loaded()

    def adopt(self, cascade: lx.Cascade) -> None:
        """Go on with a cascade of the same state, and with the state of the optimizer so far."""
        state = copy.deepcopy(self.optimizer.state_dict())
        self.cascade = cascade
        self.optimizer = self.fresh_optimizer()
        self.optimizer.load_state_dict(state)

    @rule()
    def copy(self) -> None:
        self.adopt(copy.deepcopy(self.cascade))

    @precondition(lambda self: self.dtype == self.origin)
    @rule()
    def state_dict(self) -> None:
        """Go on in a new cascade that takes the state dict, by way of bytes."""
        state = safetensors.torch.load(safetensors.torch.save(self.cascade.state_dict()))
        model = copy.deepcopy(self.untouched).train(self.cascade.training)
        fresh = lx.adapt(model, self.inputs(3, 0, self.with_y), spec=self.spec)
        if len(fresh.sites) < len(self.cascade.sites):  # the other kind of call brought the rest
            fresh(*self.inputs(3, 0, not self.with_y))
        fresh.load_state_dict(state)
        self.flags = [(parameter.requires_grad, model.training) for parameter in self.untouched.parameters()]
        self.adopt(fresh)
        self.plain.loaded()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.float32]))
    def cast(self, dtype: torch.dtype) -> None:
        self.cascade.to(dtype)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # torch: the state gets its parameters' dtype
        self.plain.cast(dtype)
        self.dtype = dtype
        if dtype == torch.float32:
            self.near = ROUNDED

    @precondition(lambda self: self.plain.stage > 1)
    @rule(spec=specs(), switch_inputs=st.booleans())
    def release_and_adapt(self, spec: lx.CascadeSpec, switch_inputs: bool) -> None:
        expected, training = self.plain.released(), self.cascade.training
        buffers = {name: value.clone() for name, value in self.plain.model.named_buffers()}
        model = self.cascade.release()
        assert isinstance(model, Net)
        assert [(p.requires_grad, model.training) for p in model.parameters()] == self.flags
        assert training in (True, False)
        for name, value in expected.items():
            self.near_to(dict(model.named_parameters())[name], value, f"released {name}")
        for name, value in buffers.items():
            self.near_to(dict(model.named_buffers())[name], value.double(), f"released {name}")
        with raises(lx.StateError, "released"):
            self.cascade(*self.inputs(3, 0, self.with_y))
        self.with_y = self.with_y != switch_inputs
        self.adapt(model, spec)


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.timeout(300)
def test_operations_against_the_law() -> None:
    run(examples=8, steps=10)


@pytest.mark.slow
def test_operations_against_the_law_at_length() -> None:
    run(examples=60, steps=12)
