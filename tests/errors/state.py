"""Everything that an error must not change, as plain values that compare bit for bit."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch._dynamo
from torch import fx, nn

import lorasc_fx as lx
from tests.kit.state import graphs_of, is_released, placed_weights, slow_values

State = dict[str, Any]


def raw(value: Any) -> Any:
    """A tensor as dtype, shape and bytes (nan equals nan, -0.0 is not 0.0), in lists too; other values unchanged."""
    if isinstance(value, (list, tuple)):
        return [raw(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach().cpu().contiguous()
    return (str(plain.dtype), tuple(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes())


def of_model(model: nn.Module) -> State:
    """Parameters (the objects too), gradients, flags, hooks, buffers, modes, and a graph module's graph."""
    state: State = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = (id(parameter), raw(parameter), parameter.requires_grad, raw(parameter.grad))
        state[f"hooks {name}"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = (id(buffer), raw(buffer))
    for name, module in model.named_modules():
        state[f"mode {name}"] = (id(module), module.training)
    if isinstance(model, fx.GraphModule):
        state["graph"] = (str(model.graph), model.code, dict(model.meta))
        for node in model.graph.nodes:
            arguments = repr(node.args), repr(node.kwargs), list(node.users)
            state[f"node {node.name}"] = (id(node), str(node.target), *arguments, dict(node.meta))
    return state


def of_optimizer(optimizer: torch.optim.Optimizer) -> State:
    """State by place, and groups."""
    content = optimizer.state_dict()
    state: State = {"groups": content["param_groups"], "step hooks": len(optimizer._optimizer_step_pre_hooks)}
    for index, entries in content["state"].items():
        state |= {f"state {index} {name}": raw(value) for name, value in entries.items()}
    return state


def of_slow(cascade: lx.Cascade) -> State:
    """The plan and the slow state: no objects, so that two cascades can be compared."""
    return {"plan": cascade.plan.to_json()} | {name: raw(value) for name, value in slow_values(cascade).items()}


def of_cascade(cascade: lx.Cascade) -> State:
    """The user's model, branches, slow state, decisions and the graphs made so far."""
    state = {f"model {key}": value for key, value in of_model(cascade.model).items()}
    state |= {f"branches {key}": value for key, value in of_model(cascade.branches).items()} | of_slow(cascade)
    state["decided"] = (cascade.sites, cascade.refusals, cascade.unreached, cascade.frontend)
    state["placed"] = (placed_weights(cascade), is_released(cascade), cascade.training)
    state["graphs"] = [(id(module), str(getattr(module, "graph", ""))) for module in graphs_of(cascade)]
    return state


def of_process() -> State:
    """What a call may change for the whole process: random generators, modes, filters, and torch itself."""
    attributes = {
        f"torch.{owner.__name__}.{name}": vars(owner).get(name)
        for owner in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.autocast, torch.inference_mode)
        for name in ("__init__", "__enter__", "__exit__")
    }
    generator: Any = numpy.random.get_state(legacy=False)
    return attributes | {
        "rng torch": raw(torch.get_rng_state()),
        "rng python": random.getstate(),
        "rng numpy": [
            generator["state"]["key"].tobytes(),
            *(generator[name] for name in ("has_gauss", "gauss")),
            generator["state"]["pos"],
        ],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "logging": (logging.root.manager.disable, logging.getLogger("torch._dynamo").level),
        "warnings": list(warnings.filters),
        "streams": (id(sys.stdout), id(sys.stderr)),
        "recompile limit": torch._dynamo.config.recompile_limit,
        "handler": signal.getsignal(signal.SIGINT),
    }


def of(*things: Any) -> State:
    """The state of models, cascades and optimizers, and of the process."""
    state = of_process()
    for index, thing in enumerate(things):
        kinds = ((lx.Cascade, of_cascade), (torch.optim.Optimizer, of_optimizer), (nn.Module, of_model))
        read = next(read for kind, read in kinds if isinstance(thing, kind))
        state |= {f"{index} {key}": value for key, value in read(thing).items()}
    return state


def assert_same(after: State, before: State) -> None:
    """No entry differs. The error names the entries that do."""
    differ = sorted(key for key in after.keys() | before.keys() if after.get(key) != before.get(key))
    assert not differ, f"changed: {', '.join(differ)}"


def numbers(*things: Any) -> State:
    """Values to compare with a twin's: no objects, and no state of the process."""
    state: State = {}
    for index, thing in enumerate(things):
        if isinstance(thing, torch.optim.Optimizer):
            values = of_optimizer(thing)
        else:
            values = {name: raw(value) for name, value in (*thing.named_parameters(), *thing.named_buffers())}
            values |= {f"flag {name}": value.requires_grad for name, value in thing.named_parameters()}
        if isinstance(thing, lx.Cascade):
            values |= of_slow(thing)
        state |= {f"{index} {key}": value for key, value in values.items()}
    return state


@contextlib.contextmanager
def unchanged(*things: Any) -> Iterator[None]:
    """The block does not change models, cascades, optimizers and random generators, bit for bit."""
    before = of(*things)
    yield
    assert_same(of(*things), before)
