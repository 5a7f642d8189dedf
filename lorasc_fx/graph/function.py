"""Convert a graph to one Python function, which is faster to call than its GraphModule.

A GraphModule resolves the path of each weight, flattens its arguments, and calls each branch through
`Module.__call__`. The function avoids this:

- a weight is read from the `_parameters` dict of its module in each call, because the Parameter may be replaced;
- a branch is called by the method of its placement. The caller checks that no branch has hooks;
- products with large frozen weights are computed by `for_frozen`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.fx.graph_module import _method_from_src
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch
from lorasc_fx.branch.products import for_frozen
from lorasc_fx.graph.branch_calls import branch_nodes
from lorasc_fx.graph.copies import copy_graph
from lorasc_fx.graph.editor import call_directly
from lorasc_fx.util.torch_private import OpOverload

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Names of the dicts of hooks that a module call runs. The global dicts of `torch.nn` have the prefix `_global`."""
MIN_ENTRIES = 1 << 16
"""Minimum entries of a matrix for `for_frozen`. For smaller ones, that function checks longer than it saves."""


def takes_leaves(graph: fx.Graph) -> bool:
    """Whether the placeholders of a graph are the flattened arguments (pytree leaves), as in graphs of torch.export."""
    return isinstance(graph._codegen, _PyTreeCodeGen)


def hooks_of(module: fx.GraphModule) -> list[Any]:
    """Return the hook dicts of all branches, and the global ones of `torch.nn.Module`."""
    by_branch = [getattr(branch, name) for branch in branch_nodes(module).values() for name in HOOKS]
    return [*(getattr(torch_module, f"_global{name}") for name in HOOKS), *by_branch]


def as_function(module: fx.GraphModule, same_bits: bool = True) -> Callable[..., Any]:
    """Return a function that computes the same as the graph module.

    Args:
        module: the graph module. Later changes of its graph have no effect on the function.
        same_bits: whether the function must compute the same bits as the graph if gradients are disabled. Otherwise it
            computes the same values up to rounding.

    Returns:
        The function. It takes flattened arguments if `takes_leaves(module.graph)`.
    """
    graph, codegen = copy_graph(module.graph), module.graph._codegen
    branches = {node.name for node in branch_nodes(module)}
    call_directly(graph, lambda node: _target(module, node, node.name in branches, same_bits))
    _read_attributes(graph, module)
    graph.set_codegen(CodeGen())
    tree = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    if tree is not None and tree.is_leaf():  # the graph returns a list with one tensor
        output = graph.output_node()
        outputs: Any = output.args[0]
        output.args, tree = (outputs[0],), None
    code = graph.python_code("self")
    names = {name: value.unwrapped if isinstance(value, _Call) else value for name, value in code.globals.items()}
    function: Callable[..., Any] = _method_from_src("forward", code.src, names)
    if tree is None:
        return functools.partial(function, None)
    return lambda *leaves: pytree.tree_unflatten(function(None, *leaves), tree)


class _Call(functools.partial[Any]):
    """A function, perhaps with bound arguments, that has the `__name__` that fx needs to generate code."""

    __name__ = "call"

    @property
    def unwrapped(self) -> Callable[..., Any]:
        """The plain function, which is faster, if no arguments are bound; otherwise this object."""
        return self if self.args or self.keywords else self.func


def _target(module: fx.GraphModule, node: fx.Node, is_branch: bool, same_bits: bool) -> Callable[..., Any] | None:
    """Return the function that a node calls in the generated code, or None to keep the node.

    If the function follows from the keyword `at` of a branch node, remove the keyword.
    """
    target: Any = node.target
    if node.op == "call_module":
        called: Any = module.get_submodule(target)
        if not is_branch:
            return _Call(called)
        if "tensors" in node.kwargs or not _keeps_forward(called):
            return _Call(called.forward)
        options = dict(node.kwargs)
        method = called.function_at(options.pop("at"), max(map(_entries, node.args)))
        node.kwargs = options
        return _Call(method)
    if node.op != "call_function":
        return None
    if (frozen := for_frozen(target, same_bits)) is not None and not node.kwargs and _reads_large_matrix(module, node):
        return _Call(frozen)
    return _Call(target._op if isinstance(target, OpOverload) else target)  # skips OpOverload.__call__


def _keeps_forward(branch: Branch) -> bool:
    """Whether `forward` is that of `Branch`, which only calls the method of the placement."""
    return getattr(branch.forward, "__func__", None) is Branch.forward


def _entries(argument: object) -> float:
    """Return the number of entries of a node's tensor, or inf if it is unknown or differs between calls."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    static = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
    return value.numel() if static and value is not None else math.inf


def _read_attributes(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Make each get_attr node read `vars(owner)[store][name]`, with a store such as `_parameters`.

    This calls no Python function, and reads a Parameter that replaced another one.
    """
    for node in graph.find_nodes(op="get_attr"):
        holder, leaf = _holder_of(module, str(node.target))
        stores = ("_parameters", "_buffers", "_modules") if isinstance(holder, nn.Module) else ()
        store = next((name for name in stores if leaf in vars(holder).get(name, ())), "")  # TorchScript has none
        node.op, node.args = "call_function", ()
        if not store:
            node.target = _Call(getattr, holder, leaf)
            continue
        with graph.inserting_before(node):
            values = graph.call_function(_Call(operator.getitem, vars(holder), store))
        node.target, node.args = operator.getitem, (values, leaf)


def _reads_large_matrix(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an argument is a large matrix, or a large stack of matrices, that the module owns."""
    read = [str(arg.target) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    values = [getattr(*_holder_of(module, target)) for target in read]
    return any(
        isinstance(value, torch.Tensor) and value.dim() in (2, 3) and value.numel() >= MIN_ENTRIES for value in values
    )


def _holder_of(module: fx.GraphModule, target: str) -> tuple[Any, str]:
    """Return (object that has the attribute at a dotted path, name of the attribute in this object)."""
    path, _, leaf = target.rpartition(".")
    return (operator.attrgetter(path)(module) if path else module), leaf
