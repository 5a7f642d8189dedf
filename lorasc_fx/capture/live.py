"""Make a front end's graph read the live model: weights are `model.NAME`, the front end's own copies are dropped."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.graph import Record, graph_module_like, retarget, set_record

__all__ = ["OWNER", "Captured", "quiet", "read_live"]

OWNER = "model"


@dataclass(frozen=True)
class Captured:
    """What a front end returns.

    Args:
        module: graph module that reads the live model under `model.`.
        frontend: name of the front end that made it.
        guards: raises AssertionError for inputs that this graph is not for; None where it takes what its key takes.
        refused: names and reasons of the front ends that were tried before.
    """

    module: fx.GraphModule
    frontend: str
    guards: Callable[..., Any] | None = None
    refused: tuple[tuple[str, str], ...] = field(default=())

    def after(self, refused: tuple[tuple[str, str], ...]) -> Captured:
        """Return the same capture, with what was tried before it."""
        return replace(self, refused=refused)


def read_live(holder: nn.Module, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
    """Return a graph module in which every name of the model is read from the model.

    Args:
        holder: module on which the graph's names resolve now; what is not the model's is taken from it.
        graph: is changed.
        model: the live model.
    """
    own = {name for name, _ in [*model.named_parameters(remove_duplicate=False)]}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def rename(node: fx.Node) -> str:
        target = str(node.target)
        mine = target in modules if node.op == "call_module" else target in own
        return f"{OWNER}.{target}" if mine else target

    retarget(graph, rename)
    rest = nn.Module()
    for name in {str(node.target).partition(".")[0] for node in graph.nodes if node.op in ("get_attr", "call_module")}:
        for store in ("_modules", "_parameters", "_buffers"):
            if name != OWNER and name in getattr(holder, store):
                getattr(rest, store)[name] = getattr(holder, store)[name]
        if name in vars(holder):
            setattr(rest, name, getattr(holder, name))
    rest._modules[OWNER] = model
    rest.training = model.training
    live = graph_module_like(rest, graph)
    live.meta = {}
    set_record(live, Record(owner=OWNER))
    live.graph.lint()
    return live


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Trace without a trace: random generators, and the warnings of the tracer about itself, stay as they were.

    Raises:
        RuntimeError: the trace has drawn random numbers; no call of its graph would draw others.
    """
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        drawn = torch.get_rng_state()
        try:
            yield
            if random.getstate() != state or not torch.equal(torch.get_rng_state(), drawn):
                raise RuntimeError("the model draws random numbers in Python, which the graph would hold as constants")
        finally:
            random.setstate(state)
