"""Edit graphs. Passes create, erase and rewire nodes of a graph module only by methods and functions of this file.

A `GraphEditor` edits a copy of a graph module. The copy shares modules and tensors with the original; before the editor
changes a module, it copies the module (copy on write). It copies `node.meta` to new nodes, marks them with the name of
the pass, keeps the names of nodes stable, and lints the result.

The functions after the class edit a graph in place. They are for graphs that nothing else uses yet.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from lorasc_fx.branch import Branch, fill
from lorasc_fx.errors import PassError
from lorasc_fx.graph.branch_calls import (
    CallTemplate,
    Kept,
    ReplacedCall,
    branch_nodes,
    made_by,
    replaced_call,
)
from lorasc_fx.graph.copies import copy_graph, graph_module_like, unshared
from lorasc_fx.graph.record import MADE_BY, REPLACED_CALL, Record, record_of, set_record
from lorasc_fx.graph.weights import BRANCHES, Memory, branches_in, named_weights, owner_of
from lorasc_fx.parameters import shallow
from lorasc_fx.quantized import is_opaque_product, quantized_linear
from lorasc_fx.util.undo import commit


class GraphEditor:
    """Edits a copy of one GraphModule, and keeps the record of the copy up to date.

    Args:
        graph_module: the original. It is not changed.
        name: name of the pass, with which each new node is marked (`MADE_BY`).
    """

    def __init__(self, graph_module: fx.GraphModule, name: str = "") -> None:
        self.module = graph_module_like(graph_module, copy_graph(graph_module.graph))
        self.name = name
        self.modified = False
        self._copied: set[int] = {id(self.module)}
        self._renewed: dict[str, Branch] = {}
        self._names = {node.name for node in self.module.graph.nodes}

    @property
    def record(self) -> Record:
        """The record of the graph module. Assign to replace it."""
        return record_of(self.module)

    @record.setter
    def record(self, record: Record) -> None:
        self.modified |= record != self.record
        set_record(self.module, record)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The current nodes of the copy, in order."""
        return tuple(self.module.graph.nodes)

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weights."""
        return owner_of(self.module, self.record)

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The branches of the graph module, as {key: branch}."""
        if self.module._modules.get(BRANCHES) is None:
            return {}
        branches = branches_in(self.module)
        if branches is None:
            raise PassError(
                f"the model has a submodule named {BRANCHES!r}, where lorasc_fx stores branches; rename the submodule",
                code="not-a-model",
            )
        return branches

    def set_branches(self, branches: Mapping[str, Branch]) -> None:
        """Replace all branches. An empty mapping removes the child module that contains them."""
        before = self.branches
        self.module._modules.pop(BRANCHES, None)
        if branches:
            self.module._modules[BRANCHES] = nn.ModuleDict(dict(branches))
        self.modified |= dict(before) != dict(branches)

    def renew_branches(self, renewed: Mapping[str, Branch]) -> None:
        """Replace the branches under some keys. `finish` writes the new values in place into the old Parameters.

        Optimizers that refer to the old Parameters stay valid.
        """
        old = self.branches
        for key in renewed:
            self._renewed.setdefault(key, old[key])
        self.set_branches({**old, **renewed})

    def insert_after(self, source: fx.Node, key: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> fx.Node:
        """Insert `branches.KEY(*args, **options)` after a node, and make all users of the node read the result."""
        graph = self.module.graph
        with graph.inserting_after(source):
            node = graph.create_node(
                "call_module", f"{BRANCHES}.{key}", args, dict(options), name=f"{source.name}_lora"
            )
        node.meta = {**source.meta, MADE_BY: self.name}
        # fx adds a number to a name that was used before, even if a fold has erased the node of this name.
        if f"{source.name}_lora" not in self._names:
            node.name = f"{source.name}_lora"
        self._names.add(node.name)
        source.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.modified = True
        return node

    def replace_op(self, source: fx.Node, key: str, args: tuple[object, ...], options: Mapping[str, object]) -> fx.Node:
        """Replace an op by `branches.KEY(x, weight, bias, at="merged", op=...)`. A str in `args` is an attribute path.

        The call of `source` is stored in the metadata of the new node, so that a fold can restore the op.
        """
        graph, inputs = self.module.graph, [*args]
        for index, name in enumerate(args):
            if isinstance(name, str):  # an attribute of the module that `source` calls
                with graph.inserting_before(source):
                    inputs[index] = self._create("get_attr", name, (), f"{source.name}_{name.rpartition('.')[2]}")
        replaced = CallTemplate.of(source, inputs)
        node = self.insert_after(source, key, tuple(inputs), options)
        node.meta[REPLACED_CALL] = replaced
        graph.erase_node(source)
        self._names.discard(source.name)
        return node

    def _create(self, op: str, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        """Create a helper node at the insert point. `_erase` of its last user erases the helper too."""
        node = self.module.graph.create_node(op, target, args, {}, name=name)
        node.meta = {MADE_BY: self.name}
        self._names.add(node.name)
        return node

    def insert_formula(self, inputs: Sequence[fx.Node], formula: fx.Graph) -> fx.Node:
        """Insert a formula after `inputs[0]`, make the users of that node read the result, and return the result."""
        graph, source = self.module.graph, inputs[0]
        users = list(source.users)
        values = dict(zip((node for node in formula.nodes if node.op == "placeholder"), inputs, strict=True))
        with graph.inserting_before(source.next):
            result = graph.graph_copy(formula, values)
        assert isinstance(result, fx.Node)
        for node in set(values.values()) - set(inputs):
            node.meta = {MADE_BY: self.name}
            self._names.add(node.name)
        result.meta |= {name: value for name, value in source.meta.items() if name != MADE_BY}
        for user in users:
            user.replace_input_with(source, result)
        self.modified = True
        return result

    def remove_formula(self, result: fx.Node, source: fx.Node, nodes: Collection[fx.Node]) -> None:
        """Make the users of `result` read `source`, and erase the nodes of the formula that have no users then."""
        result.replace_all_uses_with(source)
        self.drop_unused(lambda node: node in nodes)

    def remove_branch(self, node: fx.Node) -> None:
        """Erase a branch node, so that its users read the op or the weight again. Restore the op if it was replaced."""
        op = replaced_call(node)
        if op is not None:
            self._restore_op(node, op)
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        self._erase(node)

    def _restore_op(self, node: fx.Node, op: ReplacedCall) -> None:
        """Restore the op that a merged branch replaced."""
        graph = self.module.graph
        with graph.inserting_before(node):
            restored = graph.create_node(op.op, op.target, op.args, dict(op.kwargs), name=op.name)
        restored.meta = {name: value for name, value in node.meta.items() if name not in (MADE_BY, REPLACED_CALL)}
        if op.name not in self._names:
            restored.name = op.name
        self._names.add(restored.name)
        node.replace_all_uses_with(restored)
        self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a node without users, and the helper nodes that no other node reads."""
        read = [source for source in node.all_input_nodes if made_by(source)]
        self.module.graph.erase_node(node)
        self._names.discard(node.name)
        for source in read:
            if not source.users and not source._erased:
                self._erase(source)
        self.modified = True

    def move_after(self, node: fx.Node, predecessor: fx.Node) -> None:
        """Move a node directly behind `predecessor`."""
        if node.prev is not predecessor:
            predecessor.append(node)
            self.modified = True

    def set_arguments(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Replace the arguments of a node."""
        node.args, node.kwargs = args, dict(kwargs)
        self.modified = True

    def add_inputs(self, names: Sequence[str]) -> list[fx.Node]:
        """Append inputs to the signature, and return their placeholders. A name that exists already gets a number.

        Raises:
            PassError: the signature of the graph is not a tuple of args and a dict of kwargs.
        """
        graph = self.module.graph
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        # Python allows no parameter without a default after one with a default.
        default: tuple[Any, ...] = (None,) if inputs and inputs[-1].args else ()
        placeholders, last = [], inputs[-1] if inputs else None
        for name in names:
            unique = graph._graph_namespace.create_name(re.sub(r"\W", "_", name).lower(), None)
            with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
                last = graph.create_node("placeholder", unique, default, {})
            last.name = unique
            self._names.add(unique)
            placeholders.append(last)
        self._add_keywords([node.name for node in placeholders])
        self.modified = True
        return placeholders

    def _add_keywords(self, names: Sequence[str]) -> None:
        """Append keyword arguments for tensors to the signature of a graph that takes flattened arguments."""
        codegen = self.module.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            return
        inputs, spec, out = codegen.pytree_info
        both = _children(spec)
        if spec.type is not tuple or len(both) != 2 or both[0].type is not tuple or both[1].type is not dict:
            raise PassError(
                f"{self.name}: inputs can be added only to a signature of args and kwargs, but the graph module has "
                f"{spec}; trace the model again with torch.export",
                code="input-not-supported",
            )
        # The signature is (args, kwargs). Only the keys and subtrees of kwargs change.
        _, leaf = pytree.tree_flatten(0)
        keywords = {**dict(zip(both[1].context, _children(both[1]), strict=True)), **dict.fromkeys(names, leaf)}
        named = pytree.TreeSpec(dict, [*keywords], [*keywords.values()])
        info = _PyTreeInfo([*inputs, *names], pytree.TreeSpec(tuple, None, [both[0], named]), out)
        self.module.graph.set_codegen(_PyTreeCodeGen(info))

    def drop_unused(self, drop: Callable[[fx.Node], bool]) -> None:
        """Erase the nodes without users for which `drop` returns True, from last to first."""
        for node in drop_nodes(self.module.graph, drop):
            self._names.discard(node.name)
            self.modified = True

    def set_tensor(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """Set a new Parameter under all names of one weight of the owner. The modules on the paths are copied first."""
        old = self.module.get_parameter(f"{self.record.prefix}{names[0]}")
        self._put(names, nn.Parameter(value, requires_grad=old.requires_grad))

    def _put(self, names: tuple[str, ...], new: nn.Parameter) -> None:
        """Replace one Parameter of the owner under all of its names."""
        for name in names:
            *path, leaf = f"{self.record.prefix}{name}".split(".")
            holder = self._writable(path)
            old = holder._parameters[leaf]
            holder._parameters[leaf] = new
            # Recurrent layers also have their Parameters in the list `_flat_weights`.
            for key, values in [*vars(holder).items()]:
                if type(values) is list and any(value is old for value in values):
                    vars(holder)[key] = [new if value is old else value for value in values]
        self.modified = True

    def freeze(self, trained: Collection[str]) -> None:
        """Replace each trainable weight outside `trained` by a frozen Parameter on the same memory.

        The original Parameters, which the traced model may share, stay trainable. `unfreeze` restores them.
        """
        named, frozen = named_weights(self.owner), {}
        for name, parameter in named.parameters.items():
            if parameter.requires_grad and name not in trained:
                frozen[name] = parameter
                self._put(named.names[name], nn.Parameter(parameter.detach(), requires_grad=False))
        self.record = replace(self.record, frozen={**self.record.frozen, **frozen})

    def unfreeze(self) -> None:
        """Restore the Parameters that `freeze` replaced. A weight that changed since gets a new trainable Parameter."""
        named = named_weights(self.owner)
        for name, original in self.record.frozen.items():
            current = named.parameters.get(name)
            if current is not None:
                same = Memory.of(current) is not None and Memory.of(current) == Memory.of(original)
                self._put(named.names[name], original if same else nn.Parameter(current.detach()))
        self.record = replace(self.record, frozen={})

    def release_module(self) -> fx.GraphModule:
        """Return the copy for a foreign pass, which may replace modules and parameters of the copy.

        The copy has its own modules, but the tensors of the original. A live model is not copied: both graphs read it.
        """
        self._compile()
        # The live model is shared, because the graph must read the weights that the cascade changes.
        memo: dict[nn.Module, nn.Module] = {}
        for name, child in self.module._modules.items():
            if child is not None and name != self.record.owner:
                self.module._modules[name] = unshared(child, memo)
        return self.module

    def _compile(self) -> None:
        """Lint the graph and generate the code of the copy."""
        self.module.graph.lint()
        self.module.recompile()

    def resume(self, graph_module: fx.GraphModule) -> GraphEditor:
        """Return an editor for the result of another pass, with the pending values of `renew_branches`."""
        editor = GraphEditor(graph_module, self.name)
        editor.modified = self.modified
        editor._renewed = dict(self._renewed)
        return editor

    def finish(self) -> fx.GraphModule:
        """Write the renewed branches in place, in one transaction, and return the edited copy, linted and compiled."""
        self._compile()
        holder = self.module._modules.get(BRANCHES)
        if not isinstance(holder, nn.ModuleDict):
            return self.module
        if not self.record.owner:
            kept = Kept.of(self.module, self.record)
            for branch in branch_nodes(self.module).values():
                branch.kept = kept
        # Write the new values into the old Parameters. On an exception, `commit` restores the old values.
        pairs = [(key, old, holder._modules.get(key)) for key, old in self._renewed.items()]
        moves = [(key, old, new) for key, old, new in pairs if isinstance(new, Branch) and new is not old]
        with torch.no_grad(), commit() as undo:
            for key, old, new in moves:
                # The rank, the scale and the shared tensors of VeRA may change too.
                undo(partial(vars(old).update, vars(old).copy()))
                attributes = {name: value for name, value in vars(new).items() if not name.startswith("_")}
                vars(old).update(attributes, training=old.training)
                for factor, value in zip(old.parameters(), new.parameters(), strict=True):
                    undo(partial(fill, factor, factor.detach().clone()))
                    fill(factor, value)
                holder[key] = old
            return self.module

    def _writable(self, path: list[str]) -> nn.Module:
        """Return the module at a path of the copy. On first use, replace each module on the path by a copy of it."""
        holder: nn.Module = self.module
        for part in path:
            child = holder._modules[part]
            assert child is not None
            if id(child) not in self._copied:
                child = shallow(child)
                holder._modules[part] = child
                self._copied.add(id(child))
            holder = child
        return holder


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """Return the direct subtrees of a pytree structure."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs  # torch 2.9


def drop_nodes(graph: fx.Graph, drop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Erase the nodes without users for which `drop` returns True, from last to first, and return them."""
    erased = []
    for node in reversed(list(graph.nodes)):
        if not node.users and drop(node):
            graph.erase_node(node)
            erased.append(node)
    return erased


def weights_from_inputs(graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
    """Make the graph read weights as attributes instead of as inputs.

    The placeholders stay in the signature without users, because the caller still passes values for them.

    Args:
        graph: the graph, which is changed.
        names: {placeholder: attribute that replaces it}.
    """
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for placeholder, name in names.items():
        with graph.inserting_after(last):
            node = graph.create_node("get_attr", name)
        value = placeholder.meta.get("example_value", placeholder.meta.get("val"))
        node.meta = {} if value is None else {"val": value}
        placeholder.replace_all_uses_with(node)


def call_directly(graph: fx.Graph, function_of: Callable[[fx.Node], Callable[..., Any] | None]) -> None:
    """Make each node call the function that `function_of` returns for it. If it returns None, keep the node."""
    functions = {node: function for node in graph.nodes if (function := function_of(node)) is not None}
    for node, function in functions.items():
        node.op, node.target, node.type = "call_function", function, None
        node.meta.pop("is_wrapped", None)  # with it, the generated code would call `torch.fx.wrap`


def products_with_weights(graph: fx.Graph, modules: Mapping[str, tuple[str, bool]]) -> None:
    """Replace each opaque product of a `QuantizedLinear` by `quantized_linear(x, weight, bias)`.

    Args:
        graph: the graph, which is changed.
        modules: {key in the call: (path of the `QuantizedLinear`, whether the layer has a bias)}.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and is_opaque_product(node.target)]
    for node in calls:
        path, biased = modules[str(node.args[1])]
        with graph.inserting_before(node):
            tensors = [graph.create_node("get_attr", f"{path}.{leaf}") for leaf in ("weight", "bias")[: 1 + biased]]
        node.target, node.args = quantized_linear, (node.args[0], *tensors)


def retarget(graph: fx.Graph, rename: Callable[[fx.Node], str]) -> None:
    """Rename the target of each node that reads an attribute or calls a module."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = rename(node)


def assert_min_sizes(graph: fx.Graph, inputs: Sequence[str], minimum: Mapping[tuple[int, int], int]) -> None:
    """Insert assertions that raise RuntimeError if an axis of an input is smaller than the graph supports.

    Args:
        graph: a graph of ATen operators, which is changed.
        inputs: names of the placeholders of inputs, in order.
        minimum: {(index of an input, axis): minimum size}.
    """
    nodes = {node.name: node for node in graph.nodes}
    after_inputs = [node for node in graph.nodes if node.op == "placeholder"][-1].next
    for (index, axis), size in minimum.items():
        source = nodes[inputs[index]]
        message = (
            f"axis {axis} of {source.name} must be {size} or more: for smaller sizes, the model differs from this "
            "graph. Export the model again with example inputs of the smaller size"
        )
        with graph.inserting_before(after_inputs):
            actual = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
            condition = graph.call_function(operator.ge, (actual, size))
            graph.call_function(torch.ops.aten._assert_scalar.default, (condition, message)).meta["val"] = None
        actual.meta["val"] = source.meta["val"].shape[axis]
        condition.meta["val"] = actual.meta["val"] >= size
