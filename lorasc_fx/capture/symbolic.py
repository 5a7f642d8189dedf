"""Front end `symbolic`: torch.fx.symbolic_trace, with the modules of torch.nn as leaves."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode

from lorasc_fx.capture.captured import Captured, check_drew_nothing, read_live
from lorasc_fx.check.isolation import quiet
from lorasc_fx.graph import drop_nodes, rename_inputs
from lorasc_fx.signature import signature_of
from lorasc_fx.util.accelerator import autocast_state, generator_states
from lorasc_fx.util.undo import Block, isolated

_CALL = "_compiled_call_impl"
_SWITCHES = "the model switches gradients or autocast on or off inside, which no symbolic graph holds"
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
    with quiet(grad=torch.is_grad_enabled()):
        drawn = generator_states()
        graph = tracer.trace(model, concrete_args=constants)
        check_drew_nothing(drawn)
    drop_nodes(graph, _checks_a_constant)
    _check_differentiates_activations(graph)
    rename_inputs(
        graph,
        [parameter.name for parameter in signature_of(model).parameters.values() if parameter.kind not in _VARIADIC],
    )
    holder = tracer.root
    return Captured(read_live(holder, graph, model), "symbolic")


class _Tracer(fx.Tracer):
    """fx's tracer without its patches of nn.Module and math, which other threads would meet as well.

    Calls of modules are intercepted on the model's own modules, in the tracing thread only. Functions that were
    registered by `torch.fx.wrap` are exchanged as fx does; for arguments that are no proxies they are as before.

    A norm with running statistics is a leaf under whatever class name: it updates them as no symbol shows.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the module is called whole."""
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an op; refuse one under another autocast or inference mode than the call's."""
        if _modes() != self._modes:
            raise RuntimeError(_SWITCHES)
        return super().create_node(*args, **kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module's forward."""
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
        with _intercepted(self, root), _exchanged_functions(), _Modes():
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
        return self.graph


@isolated
def _intercepted(undo: Block, tracer: _Tracer, root: nn.Module) -> None:
    """Route calls of the model's modules to `call_module`, by the attribute that nn.Module.__call__ tries first, and
    reads of its parameters to proxies.
    """
    tracing, proxies = threading.get_ident(), dict[str, fx.Proxy]()

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

    held = [(vars(module), vars(module).get(_CALL, tracer), module._parameters) for module in root.modules()]

    def put_back() -> None:
        for attributes, call, parameters in held:
            attributes[_CALL] = call
            if call is tracer:
                del attributes[_CALL]
            if isinstance(parameters, dict):
                attributes["_parameters"] = parameters

    undo(put_back)
    for module in root.modules():
        vars(module)[_CALL] = interceptor(module)
        if isinstance(module._parameters, dict):  # a script module has its own kind
            vars(module)["_parameters"] = Parameters(module._parameters)


class _Modes(TorchFunctionMode):
    """Refuse a model that switches gradients on or off, in this thread: no symbolic graph holds that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            raise RuntimeError(_SWITCHES)
        return func(*args, **(kwargs or {}))


def _modes() -> tuple[Any, ...]:
    """Return the calling thread's inference mode, and its autocast."""
    return (torch.is_inference_mode_enabled(), autocast_state())


@isolated
def _exchanged_functions(undo: Block) -> None:
    """Record functions registered by `torch.fx.wrap` as one call each. The caller is inside `quiet`, one at a time."""
    _symbolic_trace._patch_wrapped_functions(undo.enter(_symbolic_trace._new_patcher()))


def _check_differentiates_activations(graph: fx.Graph) -> None:
    """Raise RuntimeError for a graph that asks for gradients of weights, which are frozen beside their branches."""
    weights: set[fx.Node] = set()  # and what is made of them alone
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and weights.issuperset(node.all_input_nodes)
        ):
            weights.add(node)
        if node.op == "call_function" and node.target is torch.autograd.grad:
            differentiated = node.args[1] if len(node.args) > 1 else node.kwargs["inputs"]
            inputs = differentiated if isinstance(differentiated, (tuple, list)) else (differentiated,)
            if not weights.isdisjoint(inputs):
                raise RuntimeError("the model differentiates by a weight, which is frozen where its branch trains")


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(value))


def _checks_a_constant(node: fx.Node) -> bool:
    """Whether the node is fx's check that an argument still has the value it was traced with; the key holds that.

    An assert of the model has another message, and stays.
    """
    checks = (fx._symbolic_trace._assert_is_none, torch._assert)
    message = str(node.args[-1]) if node.args else ""
    return node.op == "call_function" and node.target in checks and "has been specialized to have value" in message
