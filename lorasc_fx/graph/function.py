"""A graph as one Python function, which costs less to call than its GraphModule.

A GraphModule looks up each weight by a path of modules, takes arguments apart again, and calls each branch with the
machinery of hooks. The function reads a weight from the dictionary that holds it, so that one that was exchanged there
is seen, calls `forward` of a branch, and computes products of large frozen weights by `for_frozen`. Whoever calls it
has seen that no branch has hooks.
"""

from __future__ import annotations

import keyword
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.graph_module import _method_from_src
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from lorasc_fx.branch.products import for_frozen
from lorasc_fx.graph.branch_calls import branch_nodes

_GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)
_LITERALS = (bool, int, str, type(None))
LARGE = 1 << 16
"""Entries of a matrix from which on `for_frozen` computes its products; smaller ones gain less than the check takes."""


def takes_leaves(graph: fx.Graph) -> bool:
    """Whether the inputs of a graph are the leaves of its arguments, and not the arguments."""
    return isinstance(graph._codegen, _PyTreeCodeGen)


def hooks_of(module: fx.GraphModule) -> list[Any]:
    """Return the dictionaries of hooks on the calls of branches, those of all modules among them."""
    by_branch = [
        [branch._forward_pre_hooks, branch._forward_hooks, branch._backward_pre_hooks, branch._backward_hooks]
        for branch in branch_nodes(module).values()
    ]
    return [*_GLOBAL_HOOKS, *(hooks for of_branch in by_branch for hooks in of_branch)]


def as_function(module: fx.GraphModule) -> Callable[..., Any]:
    """Return a function that computes what the graph does; of leaves where the graph takes them apart.

    The graph must not be changed later.
    """
    written = _Source(module)
    for node in module.graph.nodes:
        written.add(node)
    source = f"def function({', '.join(written.parameters)}):\n    " + "\n    ".join(written.lines or ["pass"])
    function: Callable[..., Any] = _method_from_src("function", source, written.names)
    return function


class _Source:
    """The text of a function, and the objects that its names mean."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.parameters: list[str] = []
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        codegen = module.graph._codegen
        self._tree = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
        self._branches = branch_nodes(module)
        self._taken = {node.name for node in module.graph.nodes} | {"function", *keyword.kwlist}
        self._taken |= {str(node.target).strip("*") for node in module.graph.nodes if node.op == "placeholder"}
        self._constants: dict[int, str] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in reversed(module.graph.nodes):
            for used in node.all_input_nodes:
                last.setdefault(used, node)
        self._done: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for used, user in last.items():
            self._done[user].append(used)

    def add(self, node: fx.Node) -> None:
        """Append a node."""
        if node.op == "placeholder":
            self._add_parameter(node)
            return
        if node.op == "output":
            value = self._text(node.args[0])
            self.lines.append(f"return {self._unflattened(value)}")
            return
        self.lines.append(f"{node.name} = {self._value(node)}")
        if done := [used.name for used in self._done[node]] + ([] if node.users else [node.name]):
            self.lines.append(f"del {', '.join(done)}")

    def _add_parameter(self, node: fx.Node) -> None:
        target = str(node.target)
        default = f"={self._text(node.args[0])}" if node.args else ""
        name = node.name if takes_leaves(self.module.graph) else target
        self.parameters.append(name + default)
        if (given := name.lstrip("*")) != node.name:
            self.lines.append(f"{node.name} = {given}")

    def _unflattened(self, value: str) -> str:
        if self._tree is None:
            return value
        return f"{self._name('unflatten', pytree.tree_unflatten)}({value}, {self._name('tree', self._tree)})"

    def _value(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        arguments = self._arguments(node.args, node.kwargs)
        if node.op == "call_method":
            owner, *rest = node.args
            return f"{self._text(owner)}.{node.target}({self._arguments(rest, node.kwargs)})"
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            called = self._name(type(module).__name__, module)
            return f"{called}.forward({arguments})" if node in self._branches else f"{called}({arguments})"
        target: Any = node.target
        if (frozen := for_frozen(target)) is not None and not node.kwargs and self._reads_large_matrix(node):
            target = frozen
        elif isinstance(target, torch._ops.OpOverload):
            target = target._op  # what its __call__ calls
        return f"{self._name(getattr(node.target, '__name__', 'call'), target)}({arguments})"

    def _reads_large_matrix(self, node: fx.Node) -> bool:
        """Whether an argument is a matrix of the model, or a stack of some, that is not small."""
        read = [str(arg.target) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
        values = (getattr(*self._place(target)) for target in read)
        return any(
            isinstance(value, torch.Tensor) and value.dim() in (2, 3) and value.numel() >= LARGE for value in values
        )

    def _place(self, target: str) -> tuple[Any, str]:
        """Return the object that holds an attribute of the module, and the attribute's name there."""
        path, _, leaf = target.rpartition(".")
        holder: Any = self.module
        for part in path.split(".") if path else ():
            holder = getattr(holder, part)
        return holder, leaf

    def _attribute(self, target: str) -> str:
        holder, leaf = self._place(target)
        if isinstance(holder, nn.Module):
            for store in ("_parameters", "_buffers", "_modules"):
                if leaf in vars(holder).get(store, ()):  # a script module keeps its tensors elsewhere
                    return f"{self._name('held', vars(holder))}[{store!r}][{leaf!r}]"
        return f"{self._name('getattr', getattr)}({self._name('holder', holder)}, {leaf!r})"

    def _arguments(self, args: Sequence[Any], kwargs: Any) -> str:
        named = [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        return ", ".join([*map(self._text, args), *named])

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if type(value) in _LITERALS or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self._text(part)}, ' for part in value)})"
        if isinstance(value, dict):
            entries = (f"{self._text(key)}: {self._text(item)}" for key, item in value.items())
            return f"{{{', '.join(entries)}}}"
        if isinstance(value, slice):
            bounds = (value.start, value.stop, value.step)
            return f"{self._name('slice', slice)}({', '.join(map(self._text, bounds))})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._name(type(value).__name__, type(value))}({', '.join(map(self._text, value))})"
        return self._name("constant", value)

    def _name(self, hint: str, value: Any) -> str:
        """Return a name that means an object, and nothing else in the function."""
        if id(value) not in self._constants:
            name = "".join(letter if letter.isalnum() else "_" for letter in hint) or "_"
            name = name if name.isidentifier() else f"_{name}"
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._constants[id(value)], self.names[name] = name, value
        return self._constants[id(value)]
