"""The one surgeon: the only code that makes, erases or rewires nodes, or puts other tensors into a graph module.

A `GraphEditor` works on a copy of a graph module that shares every module and tensor with the original; what it changes
it copies first, so that the original stays as it was, whatever happens. It copies `node.meta`, stamps the pass that
made a node, keeps names stable, and lints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.errors import PassError
from lorasc_fx.graph.copies import copy_graph, graph_module_like, shallow
from lorasc_fx.graph.record import MADE_BY, USE, Record, Use, record_of, set_record
from lorasc_fx.graph.weights import BRANCHES, module_at, owner_of

__all__ = [
    "GraphEditor",
    "branch_nodes",
    "call_instead",
    "drop_nodes",
    "made_by",
    "rename_inputs",
    "retarget",
    "use_of",
    "weights_from_inputs",
]


def use_of(node: fx.Node) -> Use | None:
    """Return the use that a match marked on the node."""
    found = node.meta.get(USE)
    return found if isinstance(found, Use) else None


def made_by(node: fx.Node) -> str:
    """Return the name of the pass of ours that made the node, or ""."""
    found = node.meta.get(MADE_BY, "")
    return found if isinstance(found, str) else ""


def branch_nodes(graph_module: fx.GraphModule) -> dict[fx.Node, Branch]:
    """Return the nodes that call a branch, with their branches."""
    found: dict[fx.Node, Branch] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = module_at(graph_module, node.target)
            if isinstance(module, Branch):
                found[node] = module
    return found


class GraphEditor:
    """A graph module under the knife, and what is known of it.

    Args:
        graph_module: the original, which stays untouched.
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
        """What the graph module carries; assign to replace it."""
        return record_of(self.module)

    @record.setter
    def record(self, record: Record) -> None:
        if record != self.record:
            set_record(self.module, record)
            self.modified = True

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes in order, as they are now."""
        return tuple(self.module.graph.nodes)

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weights."""
        return owner_of(self.module, self.record)

    def mark(self, uses: Mapping[fx.Node, Use]) -> None:
        """Mark the nodes that use a site, and take the mark from all others."""
        for node in self.nodes:
            use = uses.get(node)
            if use_of(node) != use:
                self.modified = True
                node.meta.pop(USE, None)
                if use is not None:
                    node.meta[USE] = use

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The branches that the graph module holds, by key."""
        found = self.module._modules.get(BRANCHES)
        if found is None:
            return {}
        if not isinstance(found, nn.ModuleDict) or not all(isinstance(each, Branch) for each in found.values()):
            raise PassError(f"the graph module has a child {BRANCHES!r} of its own; rename it, branches are kept there")
        return {key: each for key, each in found.items() if isinstance(each, Branch)}

    def set_branches(self, branches: Mapping[str, Branch]) -> None:
        """Hold these branches, in a dictionary of this copy's own; without any, the child goes."""
        before = self.branches
        self.module._modules.pop(BRANCHES, None)
        if branches:
            self.module._modules[BRANCHES] = nn.ModuleDict(dict(branches))
        self.modified |= dict(before) != dict(branches)

    def renew_branches(self, renewed: Mapping[str, Branch]) -> None:
        """Hold new values for these branches; `finish` writes them into the old Parameters, which stay in use."""
        old = self.branches
        for key in renewed:
            self._renewed.setdefault(key, old[key])
        self.set_branches({**old, **renewed})

    def put_beside(self, base: fx.Node, key: str, x: Any, options: Mapping[str, Any]) -> fx.Node:
        """Insert `branches.KEY(base, x, **options)` after `base`, and give its value to all users of `base`."""
        return self._insert(base, key, (base, x), options)

    def _insert(self, base: fx.Node, key: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> fx.Node:
        graph = self.module.graph
        with graph.inserting_after(base):
            node = graph.create_node("call_module", f"{BRANCHES}.{key}", args, dict(options), name=f"{base.name}_lora")
        node.meta = {name: value for name, value in base.meta.items() if name != USE}
        node.meta[MADE_BY] = self.name
        if f"{base.name}_lora" not in self._names:  # a name that a fold gave back is free again, fx would number it
            node.name = f"{base.name}_lora"
        self._names.add(node.name)
        base.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.modified = True
        return node

    def put_on(self, weight: fx.Node, key: str) -> fx.Node:
        """Insert `branches.KEY(weight)` after a weight's node, and give its value to all users of the weight."""
        return self._insert(weight, key, (weight,), {})

    def take_out(self, node: fx.Node) -> None:
        """Erase a branch node; its users get the base op's value again."""
        base = node.args[0]
        assert isinstance(base, fx.Node)
        node.replace_all_uses_with(base)
        self.module.graph.erase_node(node)
        self._names.discard(node.name)
        self.modified = True

    def set_tensor(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """Put a new Parameter at these names of the owner, in copies of the modules on the way there."""
        new: nn.Parameter | None = None
        for name in names:
            *path, leaf = f"{self.record.prefix}{name}".split(".")
            holder = self._own(path)
            old = holder._parameters[leaf]
            assert old is not None
            new = nn.Parameter(value, requires_grad=old.requires_grad) if new is None else new
            holder._parameters[leaf] = new
        self.modified = True

    def compiled(self) -> fx.GraphModule:
        """Lint, compile, and return the copy as it is: for another's pass in the middle of a pipeline."""
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def go_on(self, graph_module: fx.GraphModule) -> GraphEditor:
        """Return an editor of what such a pass made of the copy; what was renewed here is still to be written."""
        after = GraphEditor(graph_module, self.name)
        after.modified = self.modified
        after._renewed = dict(self._renewed)
        return after

    def finish(self) -> fx.GraphModule:
        """Lint, compile, write renewed branches in place, all or none, and return the edited copy."""
        self.compiled()
        holder = self.module._modules.get(BRANCHES)
        if not isinstance(holder, nn.ModuleDict):
            return self.module
        pairs = [(key, old, holder._modules.get(key)) for key, old in self._renewed.items()]
        moves = [(key, old, new) for key, old, new in pairs if isinstance(new, Branch) and new is not old]
        kept = [(old, old.lora_A.detach().clone(), old.lora_B.detach().clone()) for _, old, _ in moves]
        with torch.no_grad():
            try:
                for _, old, new in moves:
                    old.lora_A.copy_(new.lora_A)
                    old.lora_B.copy_(new.lora_B)
            except BaseException:
                for old, a, b in kept:
                    old.lora_A.copy_(a)
                    old.lora_B.copy_(b)
                raise
        for key, old, _ in moves:
            holder[key] = old
        return self.module

    def _own(self, path: list[str]) -> nn.Module:
        """Return the module at a path, with each module on the way replaced by a copy that is this editor's own."""
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


def call_instead(
    graph: fx.Graph,
    old: Callable[..., Any],
    new: Callable[..., Any],
    where: Callable[[fx.Node], bool] = lambda node: True,
) -> bool:
    """Let every node that calls one function (and that `where` means) call another one; whether there was any."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is old and where(node)]
    for node in found:
        node.target = new
    return bool(found)


def retarget(graph: fx.Graph, rename: Callable[[fx.Node], str]) -> None:
    """Give each node that names an attribute or module the target that `rename` returns."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = rename(node)


def rename_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Give the inputs these names, in order, by which a call may pass them; as they are if there are not as many."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) == len(names):
        for node, name in zip(inputs, names, strict=True):
            node.target = name


def drop_nodes(graph: fx.Graph, drop: Callable[[fx.Node], bool]) -> None:
    """Erase the nodes without users that `drop` names, last first."""
    for node in reversed(list(graph.nodes)):
        if not node.users and drop(node):
            graph.erase_node(node)


def weights_from_inputs(graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
    """Let a graph read weights by name that it gets as inputs; the inputs stay, unread, for the caller's sake."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for placeholder, name in names.items():
        with graph.inserting_after(last):
            node = graph.create_node("get_attr", name)
        node.meta = {"val": value} if (value := placeholder.meta.get("example_value")) is not None else {}
        placeholder.replace_all_uses_with(node)
