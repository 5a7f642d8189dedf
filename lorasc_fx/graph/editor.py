"""The only code that creates, erases or rewires nodes, or puts other tensors into a graph module.

A `GraphEditor` works on a copy that shares every module and tensor with the original. What it changes it copies first,
so the original is never changed. It copies `node.meta`, stamps the nodes that it makes with the name of the pass, keeps
names stable, and lints. The functions below it edit in place the graph that a front end has just made.
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

from lorasc_fx.branch import Branch, fill, shared_down
from lorasc_fx.errors import PassError
from lorasc_fx.graph.branch_calls import (
    CallTemplate,
    ReplacedCall,
    branch_nodes,
    made_by,
    replaced_call,
    shared_input,
    use_of,
)
from lorasc_fx.graph.copies import copy_graph, graph_module_like, unshared
from lorasc_fx.graph.forms import Reading
from lorasc_fx.graph.record import MADE_BY, REPLACED_CALL, USE, Record, Use, record_of, set_record
from lorasc_fx.graph.weights import BRANCHES, Memory, held_branches, named_weights, owner_of
from lorasc_fx.parameters import shallow
from lorasc_fx.quantized import is_opaque_product, quantized_linear
from lorasc_fx.util.undo import commit


class GraphEditor:
    """Edits a copy of one GraphModule, and keeps its record up to date.

    Args:
        graph_module: the original, which stays unchanged.
        name: of the pass, stamped on the nodes that it makes.
    """

    def __init__(self, graph_module: fx.GraphModule, name: str = "") -> None:
        self.module = graph_module_like(graph_module, copy_graph(graph_module.graph))
        self.name = name
        self.modified = False
        self._owned: set[int] = {id(self.module)}
        self._renewed: dict[str, Branch] = {}
        self._names = {node.name for node in self.module.graph.nodes}

    @property
    def record(self) -> Record:
        """The metadata of the graph module. Assign to replace them."""
        return record_of(self.module)

    @record.setter
    def record(self, record: Record) -> None:
        self.modified |= record != self.record
        set_record(self.module, record)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The current nodes, in order."""
        return tuple(self.module.graph.nodes)

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weights."""
        return owner_of(self.module, self.record)

    def mark(self, uses: Mapping[fx.Node, Use]) -> None:
        """Mark the nodes that use a site, and unmark all others."""
        for node in self.nodes:
            use = uses.get(node)
            if use_of(node) != use:
                self.modified = True
                node.meta.pop(USE, None)
                if use is not None:
                    node.meta[USE] = use

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The branches of the graph module, by key."""
        if self.module._modules.get(BRANCHES) is None:
            return {}
        branches = held_branches(self.module)
        if branches is None:
            raise PassError(
                f"the graph module has a child {BRANCHES!r} of its own; rename it, branches are kept there",
                code="not-a-model",
            )
        return branches

    def set_branches(self, branches: Mapping[str, Branch]) -> None:
        """Replace the branches. Without any, the child that holds them is removed."""
        before = self.branches
        self.module._modules.pop(BRANCHES, None)
        if branches:
            self.module._modules[BRANCHES] = nn.ModuleDict(dict(branches))
        self.modified |= dict(before) != dict(branches)

    def renew_branches(self, renewed: Mapping[str, Branch]) -> None:
        """Set new values for these branches. `finish` writes them into the old Parameters, which stay in use."""
        old = self.branches
        for key in renewed:
            self._renewed.setdefault(key, old[key])
        self.set_branches({**old, **renewed})

    def insert_after(self, base: fx.Node, key: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> fx.Node:
        """Insert `branches.KEY(*args, **options)` after a node, and let all users of the node read it."""
        graph = self.module.graph
        with graph.inserting_after(base):
            node = graph.create_node("call_module", f"{BRANCHES}.{key}", args, dict(options), name=f"{base.name}_lora")
        node.meta = {name: value for name, value in base.meta.items() if name != USE}
        node.meta[MADE_BY] = self.name
        if f"{base.name}_lora" not in self._names:  # fx numbers a name that was used before, even if a fold freed it
            node.name = f"{base.name}_lora"
        self._names.add(node.name)
        base.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.modified = True
        return node

    def replace_op(self, base: fx.Node, key: str, reading: Reading, product: str) -> fx.Node:
        """Replace `base` by `branches.KEY(x, weight, bias, at="in_place", op=product)`. A fold restores it."""
        graph = self.module.graph
        inputs: list[Any] = [reading.x]
        for what, tensor in (("weight", reading.weight), ("bias", reading.bias)):
            if isinstance(tensor, str):  # an attribute of the module that `base` calls
                with graph.inserting_before(base):
                    inputs.append(self._made("get_attr", tensor, (), f"{base.name}_{what}"))
            elif tensor is not None:
                inputs.append(tensor)
        replaced = CallTemplate.of(base, inputs)
        node = self.insert_after(base, key, tuple(inputs), {"at": "in_place", **reading.options, "op": product})
        node.meta = {**base.meta, MADE_BY: self.name, REPLACED_CALL: replaced}
        graph.erase_node(base)
        self._names.discard(base.name)
        return node

    def cut_before(self, nodes: Collection[fx.Node], cut: Any) -> None:
        """Put a call of `cut` right before each of these nodes, and erase all others."""
        for node in self.nodes:
            if (node.op, node.target) == ("call_function", cut) and node.next not in nodes:
                self._erase(node)
            elif node in nodes and node.prev.target is not cut:
                with self.module.graph.inserting_before(node):
                    made = self.module.graph.create_node("call_function", cut, (), {}, name=f"{node.name}_cut")
                self._names.add(made.name)
                self.modified = True

    def share(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """Let branch nodes with the same input read slices of one stacked product of it."""
        graph, x, branches = self.module.graph, nodes[0].args[1], branch_nodes(self.module)
        assert isinstance(x, fx.Node)
        with graph.inserting_before(nodes[0]):
            factors = tuple(
                self._made("get_attr", f"{node.target}.{branches[node].shared_factor}", (), f"{node.name}_A")
                for node in nodes
            )
            group = self._made("call_function", shared_down, (x, factors), f"{x.name}_shared")
            products = [
                self._made("call_function", operator.getitem, (group, index), f"{x.name}_shared_{index}")
                for index in range(len(nodes))
            ]
        for node, low in zip(nodes, products, strict=True):
            node.args, node.kwargs = (node.args[0], low, *node.args[2:]), {**node.kwargs, "at": "after_shared"}
        self.modified = True
        return group

    def unshare(self, node: fx.Node) -> None:
        """Let a branch node read its input directly again."""
        shared = shared_input(node)
        assert shared is not None
        low = node.args[1]
        assert isinstance(low, fx.Node)
        node.args = (node.args[0], shared.x, *node.args[2:])
        node.kwargs = {**node.kwargs, "at": "beside"}
        if not low.users:
            self._erase(low)
        self.modified = True

    def _made(self, op: str, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        node = self.module.graph.create_node(op, target, args, {}, name=name)
        node.meta = {MADE_BY: self.name}
        self._names.add(node.name)
        return node

    def remove_branch(self, node: fx.Node) -> None:
        """Erase a branch node. Its users read the base op again."""
        op = replaced_call(node)
        if op is not None:
            self._restore_op(node, op)
            return
        base = node.args[0]
        assert isinstance(base, fx.Node)
        node.replace_all_uses_with(base)
        self._erase(node)

    def _restore_op(self, node: fx.Node, op: ReplacedCall) -> None:
        """Restore the op that a merged branch replaced."""
        graph = self.module.graph
        with graph.inserting_before(node):
            base = graph.create_node(op.op, op.target, op.args, dict(op.kwargs), name=op.name)
        base.meta = {name: value for name, value in node.meta.items() if name not in (MADE_BY, REPLACED_CALL)}
        if op.name not in self._names:
            base.name = op.name
        self._names.add(base.name)
        node.replace_all_uses_with(base)
        self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a node without users, and the nodes that passes made for it alone."""
        read = [source for source in node.all_input_nodes if made_by(source)]
        self.module.graph.erase_node(node)
        self._names.discard(node.name)
        for source in read:
            if not source.users and not source._erased:
                self._erase(source)
        self.modified = True

    def move_after(self, node: fx.Node, place: fx.Node) -> None:
        """Move a node right behind another one."""
        if node.prev is not place:
            place.append(node)
            self.modified = True

    def give_arguments(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Replace the arguments of a node."""
        node.args, node.kwargs = args, dict(kwargs)
        self.modified = True

    def add_inputs(self, names: Sequence[str]) -> list[fx.Node]:
        """Append inputs to the signature, and return their placeholders. A name that is taken gets a number.

        Raises:
            PassError: the arguments of the graph are not known as positional and keyword ones.
        """
        graph = self.module.graph
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        default: tuple[Any, ...] = (None,) if inputs and inputs[-1].args else ()  # as Python demands after a default
        made, last = [], inputs[-1] if inputs else None
        for name in names:
            unique = graph._graph_namespace.create_name(re.sub(r"\W", "_", name).lower(), None)
            with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
                last = graph.create_node("placeholder", unique, default, {})
            last.name = unique
            self._names.add(unique)
            made.append(last)
        self._set_keywords(lambda keywords: {**keywords, **dict.fromkeys(node.name for node in made)})
        self.modified = True
        return made

    def remove_inputs(self, nodes: Sequence[fx.Node]) -> None:
        """Remove inputs that `add_inputs` has made, and that nothing reads any more."""
        names = {node.name for node in nodes}
        self._set_keywords(lambda keywords: {name: old for name, old in keywords.items() if name not in names})
        for node in nodes:
            self._erase(node)

    def _set_keywords(self, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Change the keyword arguments that a graph of leaves takes: the structure of each by name, None for a leaf."""
        codegen = self.module.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen):
            return
        names, spec, out = codegen.pytree_info
        both = _children(spec)
        if spec.type is not tuple or len(both) != 2 or both[0].type is not tuple or both[1].type is not dict:
            raise PassError(
                f"{self.name}: the graph module takes its arguments as {spec}, not as positional and keyword ones, so "
                "none can be added; trace the model again by torch.export",
                code="input-not-supported",
            )
        _, leaf = pytree.tree_flatten(0)
        keywords = change(dict(zip(both[1].context, _children(both[1]), strict=True)))
        named = pytree.TreeSpec(dict, [*keywords], [leaf if each is None else each for each in keywords.values()])
        positional = names[: len(names) - len(both[1].context)]
        info = _PyTreeInfo([*positional, *keywords], pytree.TreeSpec(tuple, None, [both[0], named]), out)
        self.module.graph.set_codegen(_PyTreeCodeGen(info))

    def drop_unused(self, drop: Callable[[fx.Node], bool]) -> None:
        """Erase the nodes without users for which `drop` is true, last first."""
        for node in drop_nodes(self.module.graph, drop):
            self._names.discard(node.name)
            self.modified = True

    def set_tensor(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """Put a new Parameter at these names of the owner, in copies of the modules on the path."""
        old = self.module.get_parameter(f"{self.record.prefix}{names[0]}")
        self._put(names, nn.Parameter(value, requires_grad=old.requires_grad))

    def _put(self, names: tuple[str, ...], new: nn.Parameter) -> None:
        for name in names:
            *path, leaf = f"{self.record.prefix}{name}".split(".")
            holder = self._own(path)
            old = holder._parameters[leaf]
            holder._parameters[leaf] = new
            for key, values in [*vars(holder).items()]:  # of recurrent layers
                if type(values) is list and any(value is old for value in values):
                    vars(holder)[key] = [new if value is old else value for value in values]
        self.modified = True

    def freeze(self, trained: Collection[str]) -> None:
        """Freeze all weights except those that are trained in full, by new Parameters on the same memory.

        The original ones, which others hold, stay trainable. `unfreeze` restores them.
        """
        named, frozen = named_weights(self.owner), {}
        for name, parameter in named.parameters.items():
            if parameter.requires_grad and name not in trained:
                frozen[name] = parameter
                self._put(named.names[name], nn.Parameter(parameter.detach(), requires_grad=False))
        self.record = replace(self.record, frozen={**self.record.frozen, **frozen})

    def unfreeze(self) -> None:
        """Restore the Parameters that `freeze` replaced. A weight with another value gets a new trainable one."""
        named = named_weights(self.owner)
        for name, original in self.record.frozen.items():
            current = named.parameters.get(name)
            if current is not None:
                same = Memory.of(current) is not None and Memory.of(current) == Memory.of(original)
                self._put(named.names[name], original if same else nn.Parameter(current.detach()))
        self.record = replace(self.record, frozen={})

    def release_module(self) -> fx.GraphModule:
        """Lint, compile, and return the copy for a foreign pass, which may replace modules and parameters in it.

        It shares only tensors with the original, and the live model if there is one.
        """
        self.compiled()
        memo: dict[nn.Module, nn.Module] = {}
        for name, child in self.module._modules.items():
            if child is not None and name != self.record.owner:
                self.module._modules[name] = unshared(child, memo)
        return self.module

    def compiled(self) -> fx.GraphModule:
        """Lint, compile, and return the copy."""
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def resume(self, graph_module: fx.GraphModule) -> GraphEditor:
        """Return an editor of the result of a foreign pass, which still writes the renewed branches."""
        after = GraphEditor(graph_module, self.name)
        after.modified = self.modified
        after._renewed = dict(self._renewed)
        return after

    def finish(self) -> fx.GraphModule:
        """Lint, compile, write renewed branches in place (all or none), and return the edited copy."""
        self.compiled()
        holder = self.module._modules.get(BRANCHES)
        if not isinstance(holder, nn.ModuleDict):
            return self.module
        pairs = [(key, old, holder._modules.get(key)) for key, old in self._renewed.items()]
        moves = [(key, old, new) for key, old, new in pairs if isinstance(new, Branch) and new is not old]
        with torch.no_grad(), commit() as undo:
            for key, old, new in moves:
                undo(partial(setattr, old, "scale", old.scale))
                for factor, value in zip(old.parameters(), new.parameters(), strict=True):
                    undo(partial(fill, factor, factor.detach().clone()))
                    fill(factor, value)
                old.scale = new.scale
                holder[key] = old
            return self.module

    def _own(self, path: list[str]) -> nn.Module:
        """Return the module at a path, after replacing each module on the path by a copy."""
        holder: nn.Module = self.module
        for part in path:
            child = holder._modules[part]
            assert child is not None
            if id(child) not in self._owned:
                child = shallow(child)
                holder._modules[part] = child
                self._owned.add(id(child))
            holder = child
        return holder


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """Return the parts of a structure."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs  # torch 2.9


def drop_nodes(graph: fx.Graph, drop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Erase the nodes without users for which `drop` is true, last first, and return them."""
    erased = []
    for node in reversed(list(graph.nodes)):
        if not node.users and drop(node):
            graph.erase_node(node)
            erased.append(node)
    return erased


def weights_from_inputs(graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
    """Let a graph read weights by name that it gets as inputs. The inputs stay, unread: the caller passes them."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for placeholder, name in names.items():
        with graph.inserting_after(last):
            node = graph.create_node("get_attr", name)
        node.meta = {"val": value} if (value := placeholder.meta.get("example_value")) is not None else {}
        placeholder.replace_all_uses_with(node)


def regions_as_modules(
    graph: fx.Graph,
    op: Any,
    weights: Collection[str],
    module_for: Callable[[str, tuple[str | None, ...], Mapping[str, Any]], str],
) -> None:
    """Replace each call of a higher-order op by a call of a module, which reads its weights itself.

    Args:
        graph: is changed.
        op: called with a body and its inputs.
        weights: names that the graph reads as weights; the module does not get them as inputs.
        module_for: gets the name of the body, for each input the weight's name or None, and the options of the op.
            Returns the name of the module.
    """
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target is op]:
        body, *inputs = node.args
        named = [
            str(source.target) if isinstance(source, fx.Node) and source.op == "get_attr" else None for source in inputs
        ]
        names = tuple(name if name in weights else None for name in named)
        target = module_for(str(body.target), names, node.kwargs)
        with graph.inserting_before(node):
            call = graph.create_node(
                "call_module", target, tuple(source for source, name in zip(inputs, names, strict=True) if name is None)
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        read = [weight for weight in node.all_input_nodes if weight.op == "get_attr"]
        graph.erase_node(node)
        for weight in read:
            if not weight.users and not weight._erased:
                graph.erase_node(weight)


def call_instead(
    graph: fx.Graph,
    old: Callable[..., Any],
    new: Callable[..., Any],
    where: Callable[[fx.Node], bool],
) -> bool:
    """Let the nodes that call `old`, and for which `where` is true, call `new`. Return whether there were any."""
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target is old and where(node)]
    for node in calls:
        node.target = new
    return bool(calls)


def call_directly(graph: fx.Graph, function_of: Callable[[fx.Node], Callable[..., Any] | None]) -> None:
    """Let each node call the function that `function_of` returns for it, unless that is None."""
    functions = {node: function for node in graph.nodes if (function := function_of(node)) is not None}
    for node, function in functions.items():
        node.op, node.target, node.type = "call_function", function, None
        node.meta.pop("is_wrapped", None)  # or fx would wrap the function


def products_with_weights(graph: fx.Graph, modules: Mapping[str, tuple[str, bool]]) -> None:
    """Let each opaque product of a `QuantizedLinear` read weight and bias of its module.

    Args:
        graph: is changed.
        modules: path of each module by its key, and whether it has a bias.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and is_opaque_product(node.target)]
    for node in calls:
        path, biased = modules[str(node.args[1])]
        with graph.inserting_before(node):
            held = [graph.create_node("get_attr", f"{path}.{leaf}") for leaf in ("weight", "bias")[: 1 + biased]]
        node.target, node.args = quantized_linear, (node.args[0], *held)


def retarget(graph: fx.Graph, rename: Callable[[fx.Node], str]) -> None:
    """Rename the target of each node that reads an attribute or calls a module."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = rename(node)


def refuse_smaller(graph: fx.Graph, inputs: Sequence[str], least: Mapping[tuple[int, int], int]) -> None:
    """Let a graph raise RuntimeError if an axis of an input is too small.

    Args:
        graph: of ATen operators; is changed.
        inputs: names of the placeholders of inputs, in order.
        least: smallest size, by the number of the input and of the axis.
    """
    nodes = {node.name: node for node in graph.nodes}
    first = [node for node in graph.nodes if node.op == "placeholder"][-1].next
    for (index, axis), size in least.items():
        source = nodes[inputs[index]]
        sentence = (
            f"axis {axis} of {source.name} has to be {size} or more: below that the model does something else than its "
            "graph. Export the model with example inputs of that size"
        )
        with graph.inserting_before(first):
            read = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
            holds = graph.call_function(operator.ge, (read, size))
            graph.call_function(torch.ops.aten._assert_scalar.default, (holds, sentence)).meta["val"] = None
        read.meta["val"] = source.meta["val"].shape[axis]
        holds.meta["val"] = read.meta["val"] >= size


def rename_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Rename the inputs, in order, unless their number differs."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) == len(names):
        for node, name in zip(inputs, names, strict=True):
            node.target = name


def adjust(
    graph: fx.Graph,
    inputs: Sequence[int | None],
    outputs: Sequence[int | tuple[Any]],
    flags: Mapping[Any, tuple[int, list[tuple[Any, Any]]]],
    counters: tuple[Collection[str], Collection[str]],
    names: list[str],
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
) -> fx.Graph | None:
    """Return the graph of another kind of call, or None if the nodes are not as expected.

    Args:
        graph: takes the leaves of its arguments.
        inputs: for each leaf of the new arguments the index of the old one, or None.
        outputs: for each leaf of the new output the index of the old one, or a tuple with another value.
        flags: for each op the position of an argument, and the values of its nodes before and after, in order.
        counters: names of nodes' buffers that are no longer counted up, and of those that are now.
        names: of the new arguments.
        specs: structures of the new arguments and of the new output.
    """
    old, (stopped, started) = list(graph.nodes), counters
    for target, (position, values) in flags.items():
        nodes = [node for node in old if node.target is target]
        if len(nodes) != len(values):
            return None
        for node, (before, after) in zip(nodes, values, strict=True):
            default = node.target._schema.arguments[position].default_value
            missing = [argument.default_value for argument in node.target._schema.arguments[len(node.args) : position]]
            if (node.args[position] if len(node.args) > position else default) != before:
                return None
            if before != after:
                node.args = (*node.args[:position], *missing, after, *node.args[position + 1 :])
    additions = [node for node in old if node.target is torch.ops.aten.add_.Tensor and not node.users]
    dropped = {node for node in additions if getattr(node.args[0], "target", None) in stopped}
    if len(dropped) != len(stopped):
        return None
    kept = {node for node in old if _has_effect(node) and node not in dropped}
    before = old[-1].args[0]
    results = [before[each] if isinstance(each, int) else each[0] for each in outputs]
    waiting = [*kept, *(result for result in results if isinstance(result, fx.Node))]
    while waiting:
        node = waiting.pop()
        kept.add(node)
        waiting += [other for other in node.all_input_nodes if other not in kept]
    placeholders = [node for node in old if node.op == "placeholder"]
    new, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    leaves = [placeholders[index].name if index is not None else None for index in inputs]
    for number, (index, name) in enumerate(zip(inputs, leaves, strict=True)):
        placeholder = new.placeholder(name or f"unused_{number}")
        if index is not None:
            placeholder.meta = dict(placeholders[index].meta)
            copied[placeholders[index]] = placeholder
    for name in sorted(started):
        new.call_function(torch.ops.aten.add_.Tensor, (new.get_attr(name), 1))
    for node in old[:-1]:
        if node in kept and node.op != "placeholder":
            if any(other not in copied for other in node.all_input_nodes):
                return None  # it reads an argument that the new call does not have
            copied[node] = new.node_copy(node, copied.__getitem__)
    if any(isinstance(result, fx.Node) and result not in copied for result in results):
        return None
    new.output([copied[result] if isinstance(result, fx.Node) else result for result in results])
    new.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, *specs)))
    return new


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something besides computing its result: it writes, draws, or is of an unknown kind."""
    if node.op != "call_function":
        return node.op == "call_module"
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
