"""Front end `symbolic`: torch.fx.symbolic_trace, with the modules of torch.nn as leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.capture.live import Captured, quiet, read_live
from lorasc_fx.capture.signature import signature_of
from lorasc_fx.graph import drop_nodes

__all__ = ["capture_symbolic"]


def capture_symbolic(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False
) -> Captured:
    """Return the model's graph of functions and modules; raises what torch.fx raises.

    Arguments that are not tensors, and those left to their defaults, are constants of the graph, which their values
    in a variant's key allow.
    """
    given = signature_of(model).bind(*args, **kwargs)
    given.apply_defaults()
    constants = {name: value for name, value in given.arguments.items() if not _has_tensor(value)}
    tracer = fx.Tracer()
    with quiet():
        graph = tracer.trace(model, concrete_args=constants)
    drop_nodes(graph, _checks_a_constant)
    holder = tracer.root
    return Captured(read_live(holder, graph, model), "symbolic")


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(value))


def _checks_a_constant(node: fx.Node) -> bool:
    """Whether the node is fx's check that an argument still has the value it was traced with; the key holds that."""
    checks = (fx._symbolic_trace._assert_is_none, torch._assert)
    return node.op == "call_function" and node.target in checks
