"""Front end `symbolic`: torch.fx.symbolic_trace, with the modules of torch.nn as leaf modules."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasc_fx.capture.captured import Axis, Captured, FrontEnd, check_no_random_draws, read_live
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph.editor import drop_nodes, rename_inputs
from lorasc_fx.signature import signature_of
from lorasc_fx.util.accelerator import autocast_state, generator_states
from lorasc_fx.util.undo import Block, isolated

_CALL = "_compiled_call_impl"
"""Attribute that nn.Module.__call__ calls if it is set."""
_SWITCHES = "forward switches gradients or autocast on or off, which torch.fx.symbolic_trace does not record"
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def capture_symbolic(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Collection[Axis] = ()
) -> Captured:
    """Trace the model into a graph of functions and leaf modules. Raises any exception of torch.fx.

    Arguments without tensors, defaults included, become constants of the graph. That is safe because their values are
    part of the key under which the graph is kept. `dynamic` has no effect, because the graph holds no sizes.
    """
    bound = signature_of(model).bind(*args, **kwargs)
    bound.apply_defaults()
    constants = {
        name: value
        for name, value in bound.arguments.items()
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
    }
    tracer = _Tracer()
    with quiet(grad=torch.is_grad_enabled()):
        generators = generator_states()
        graph = tracer.trace(model, concrete_args=constants)
        check_no_random_draws(generators)
    drop_nodes(graph, _checks_a_constant)
    _check_differentiates_activations(graph)
    # fx adds a number to the names of constant arguments. Restore the names, so that a call can pass them by keyword.
    named = [name for name, parameter in signature_of(model).parameters.items() if parameter.kind not in _VARIADIC]
    rename_inputs(graph, named)
    return Captured(read_live(tracer.root, graph, model), SYMBOLIC)


SYMBOLIC = FrontEnd("symbolic", capture_symbolic, sees_inside=False)


class _Tracer(fx.Tracer):
    """fx's tracer without the patches of nn.Module and math, because other threads would see these patches too.

    Instead, calls of the model's modules are intercepted on the module instances, for the tracing thread only.
    Functions registered by `torch.fx.wrap` are patched as fx does it, which other threads do not notice.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of the module becomes one `call_module` node."""
        # A subclass of a batch norm updates its running statistics, which a symbolic trace into it would not record.
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node. Raise RuntimeError if forward has entered autocast or inference mode."""
        if _modes() != self._modes:
            raise RuntimeError(_SWITCHES)
        return super().create_node(*args, **kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module's forward, as fx.Tracer.trace does."""
        # The methods of fx.Tracer expect these attributes.
        assert isinstance(root, nn.Module)
        self.root, self.root_module_name = root, type(root).__name__
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {
            value: f"{name}.{key}".lstrip(".")
            for name, module in root.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (torch.Tensor, torch.ScriptObject))
        }
        self._modes = _modes()
        forward, args = self.create_args_for_root(type(root).forward, True, concrete_args)
        with _intercepted(self, root), _Modes():
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
        return self.graph


@isolated
def _intercepted(undo: Block, tracer: _Tracer, root: nn.Module) -> None:
    """Route calls of the model's modules to `tracer.call_module`, and reads of its parameters to proxies.

    Calls are intercepted through `_compiled_call_impl`. Functions registered by `torch.fx.wrap` become one node each.
    The caller must hold the lock of `quiet`.
    """
    tracing, proxies = threading.get_ident(), dict[str, fx.Proxy]()  # one proxy per parameter

    class Parameters(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            value = super().__getitem__(name)
            return tracer.getattr(name, value, proxies) if threading.get_ident() == tracing else value

    def interceptor(module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != tracing:
                return module._call_impl(*args, **kwargs)
            return tracer.call_module(module, module._call_impl, args, kwargs)

        return call

    originals = [(vars(module), vars(module).get(_CALL), module._parameters) for module in root.modules()]

    def restore() -> None:
        for attributes, call, parameters in originals:
            attributes.pop(_CALL, None)
            if call is not None:
                attributes[_CALL] = call
            if isinstance(parameters, dict):
                attributes["_parameters"] = parameters

    undo(restore)
    for module in root.modules():
        vars(module)[_CALL] = interceptor(module)
        if isinstance(module._parameters, dict):  # not so in a ScriptModule
            vars(module)["_parameters"] = Parameters(module._parameters)
    _symbolic_trace._patch_wrapped_functions(undo.enter(_symbolic_trace._new_patcher()))


class _Modes(TorchFunctionMode):
    """Raises RuntimeError if forward switches gradients on or off, because a symbolic trace does not record that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            raise RuntimeError(_SWITCHES)
        return func(*args, **(kwargs or {}))


def _modes() -> tuple[Any, ...]:
    """Return the inference mode and the autocast state of this thread."""
    return (torch.is_inference_mode_enabled(), autocast_state())


def _check_differentiates_activations(graph: fx.Graph) -> None:
    """Raise RuntimeError if forward calls torch.autograd.grad for a weight: weights with a branch are frozen.

    The gradient of an activation is allowed. The graph computes it through the branches.
    """
    weights: set[fx.Node] = set()  # weights, and nodes computed from weights alone
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and weights.issuperset(node.all_input_nodes)
        ):
            weights.add(node)
        if node.op == "call_function" and node.target is torch.autograd.grad:
            differentiated = node.args[1] if len(node.args) > 1 else node.kwargs["inputs"]
            inputs = differentiated if isinstance(differentiated, (tuple, list)) else (differentiated,)
            if not weights.isdisjoint(inputs):
                raise RuntimeError(
                    "forward calls torch.autograd.grad for a weight, which is frozen while its branch trains"
                )


def _checks_a_constant(node: fx.Node) -> bool:
    """Whether the node is an assert of fx that a constant argument has the value that was traced.

    These asserts are redundant, because the key of a call contains the value. Asserts of the model have another
    message, and stay.
    """
    checks = (fx._symbolic_trace._assert_is_none, torch._assert)
    message = str(node.args[-1]) if node.args else ""
    return node.op == "call_function" and node.target in checks and "has been specialized to have value" in message
