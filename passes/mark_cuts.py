"""Mark where a graph is cut into the stages of torch's pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.errors import PassError, named, nearest
from lorasc_fx.graph import GraphEditor
from lorasc_fx.graph.flow import is_impure
from lorasc_fx.graph.weights import module_at

from .base import CascadePass


@dataclass(frozen=True)
class MarkCuts(CascadePass):
    """Put torch's `pipe_split` before the first node that computes with a weight of each of these modules.

    `torch.distributed.pipelining.pipeline` splits the graph there. Marks elsewhere go: without names all of them.

    Args:
        before: names of modules, as in `named_modules` of the user's model.

    Raises:
        PassError: no node computes with a weight of such a module, or nothing is computed with weights before it.
    """

    before: tuple[str, ...] = ()

    name: ClassVar[str] = "mark-cuts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(self.before))  # a list, as JSON has it

    def rewrite(self, graph: GraphEditor) -> None:
        """Insert and erase marks; no other node is changed."""
        import torch.distributed.pipelining  # noqa: PLC0415 - defines the operator; seldom needed, slow

        cut, reads = torch.ops.pippy._pipe_split.default, dict(_reads(graph))
        firsts: dict[fx.Node, str] = {}
        for path in self.before:
            first = next((node for node, names in reads.items() if any(_inside(name, path) for name in names)), None)
            if first is None:
                known = {module for names in reads.values() for name in names for module in _around(name)}
                raise PassError(
                    f"{self.name}: no node computes with a weight of {path!r}{nearest(path, sorted(known))}; give "
                    f"names of modules of the model: {named(sorted(known))}",
                    code="unknown-name",
                )
            if first in firsts or first is next(iter(reads)):
                other = f"{firsts[first]!r} begins there too" if first in firsts else "no weight is read before it"
                raise PassError(
                    f"{self.name}: a cut before {path!r}, at node {first.name}, leaves a stage without weights, as "
                    f"{other}; leave it out",
                    code="invalid-value",
                )
            firsts[first] = path
        graph.cut_before(firsts, cut)


def _reads(graph: GraphEditor) -> Iterator[tuple[fx.Node, set[str]]]:
    """Yield each node that computes with weights and an input, with the weights' names; in order."""
    prefix, module = graph.record.prefix, graph.module
    weights_only: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        names, sources = set[str](), node.all_input_nodes
        if node.op == "get_attr":
            names.add(str(node.target).removeprefix(prefix))
        elif node.op == "call_module":
            called = module_at(module, str(node.target))
            own = str(node.target).removeprefix(prefix)
            names |= {called.weight_name} if isinstance(called, Branch) else _parameters(called, own)
        names = names.union(*(weights_only.get(source, ()) for source in sources))
        alone = bool(sources) and all(source in weights_only for source in sources)
        if node.op == "get_attr" or (alone and node.op != "output" and not is_impure(node)):
            weights_only[node] = names
        elif names and node.op != "output":
            yield node, names


def _parameters(called: torch.nn.Module | None, path: str) -> set[str]:
    return {f"{path}.{name}" for name, _ in called.named_parameters()} if called is not None else set()


def _around(weight: str) -> Iterator[str]:
    """Yield the names of the modules that hold a weight, or hold such a one."""
    parts = weight.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def _inside(weight: str, path: str) -> bool:
    return weight.startswith(f"{path}.")
