"""Front end `symbolic`: torch.fx.symbolic_trace, with the modules of torch.nn as leaves."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from lorasc_fx.capture.live import Captured, read_live, traced
from lorasc_fx.capture.signature import signature_of
from lorasc_fx.graph import drop_nodes, rename_inputs

__all__ = ["capture_symbolic"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def capture_symbolic(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], wide: bool = False
) -> Captured:
    """Return the model's graph of functions and modules; raises what torch.fx raises.

    Arguments that are not tensors, and those left to their defaults, are constants of the graph, which their values
    in a variant's key allow. fx numbers the names of such arguments; they get their own back, to be called by.
    """
    given = signature_of(model).bind(*args, **kwargs)
    given.apply_defaults()
    constants = {name: value for name, value in given.arguments.items() if not _has_tensor(value)}
    tracer = _Tracer()
    with traced(), _no_modes():
        graph = tracer.trace(model, concrete_args=constants)
    drop_nodes(graph, _checks_a_constant)
    rename_inputs(graph, [each.name for each in signature_of(model).parameters.values() if each.kind not in _VARIADIC])
    holder = tracer.root
    return Captured(read_live(holder, graph, model), "symbolic")


class _Tracer(fx.Tracer):
    """A norm with running statistics is a leaf under whatever class name: it updates them as no symbol shows."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the module is called whole."""
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(m, module_qualified_name)


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Refuse a model that switches gradients, autocast or inference mode: no symbolic graph holds that."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("the model switches gradients or autocast on or off inside, which no symbolic graph holds")

    modes: list[tuple[Any, str]] = [(torch.no_grad, "__enter__"), (torch.enable_grad, "__enter__")]
    modes += [(torch.set_grad_enabled, "__init__"), (torch.autocast, "__enter__"), (torch.inference_mode, "__enter__")]
    with contextlib.ExitStack() as stack:
        for owner, name in modes:
            stack.enter_context(mock.patch.object(owner, name, refuse))
        yield


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(value))


def _checks_a_constant(node: fx.Node) -> bool:
    """Whether the node is fx's check that an argument still has the value it was traced with; the key holds that."""
    checks = (fx._symbolic_trace._assert_is_none, torch._assert)
    return node.op == "call_function" and node.target in checks
