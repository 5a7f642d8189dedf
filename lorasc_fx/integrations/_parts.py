"""Runs an adapted graph on DTensors: torch says how each op goes on parts, and here is what it does not say.

Products with weights in parts go as Megatron-LM has them (1909.08053, section 3), whatever torch would think cheapest:
an input that column-wise weights share is whole, and its gradient is summed once; what a row-wise weight makes is
summed at once. A plain tensor that meets a DTensor (a constant, a mask, a frozen weight outside the plan) counts as a
copy on every process. Attention whose heads are split goes head by head. An op that torch has no rule for is computed
whole, on every process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils import _pytree as pytree

from lorasc_fx.branch import MatrixBranch, shared_down
from lorasc_fx.branch.functions import PRODUCTS
from lorasc_fx.errors import StateError
from lorasc_fx.graph import BRANCHES

__all__ = ["PartsInterpreter", "copied_everywhere", "whole"]

log = logging.getLogger("lorasc_fx")

_PRODUCTS = {
    torch.ops.aten.linear.default: (0, 1, 2, 0),
    torch.ops.aten.addmm.default: (1, 2, 0, 1),
    torch.ops.aten.mm.default: (0, 1, None, 1),
    torch.ops.aten.matmul.default: (0, 1, None, 1),
}
"""Where an op has its input, its weight and its bias, and which axis of the weight is that of the outputs."""
_SPELLED = {
    "linear": torch.ops.aten.linear.default,
    "addmm": torch.ops.aten.addmm.default,
    "mm": torch.ops.aten.mm.default,
    "matmul": torch.ops.aten.matmul.default,
}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CAT = torch.ops.aten.cat.default
_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async")
_HEADS = 1


def copied_everywhere(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return a plain tensor, equal on every process, as a DTensor; one that is a DTensor stays itself."""
    if isinstance(value, DTensor):
        return value
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return what a DTensor stands for as a plain tensor, on every process; a plain one stays itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class PartsInterpreter(fx.Interpreter):
    """Runs a graph node by node on DTensors.

    Args:
        module: an adapted graph.
        mesh: of the processes.
        resting: whether branches add nothing: other weights are in place.
        told: names of nodes that were said to be computed whole.
    """

    def __init__(self, module: fx.GraphModule, mesh: DeviceMesh, resting: bool, told: set[str]) -> None:
        super().__init__(module)
        self.outputs = module.graph.process_outputs
        self.mesh, self.resting, self.told = mesh, resting, told
        self._last: dict[bool, tuple[DTensor, DTensor]] = {}  # inputs of products, as they were and as they are read

    def call(self, leaves: list[Any]) -> Any:
        """Compute the graph for the leaves of a call's arguments, and return what the model returns."""
        spread = [copied_everywhere(leaf, self.mesh) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        with implicit_replication():
            output = self.run(*spread, enable_io_processing=False)
        return self.outputs(pytree.tree_map_only(torch.Tensor, whole, output))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a branch, or leave it out."""
        assert str(target).startswith(f"{BRANCHES}.")
        args, kwargs = self._spread(args, kwargs)
        branch = self.fetch_attr(str(target))
        if "op" in kwargs:
            x, weight, *bias = args
            base = self._of_parts(kwargs["op"], x, weight, bias[0] if bias else None)
            return base if self.resting else self._beside(branch, base, x, False)
        if self.resting:
            return args[0]
        if type(branch) is MatrixBranch and len(args) == 2 and not branch.parts and not kwargs.keys() - {"shared"}:
            return self._beside(branch, *args, **kwargs)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an op on parts, or whole."""
        held = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, DTensor)]
        if getattr(target, "__name__", "").partition(".")[0] in _ASSERTS:
            return None  # they hold for all calls of this graph
        if not held:
            return super().call_function(target, args, kwargs)
        args, kwargs = self._spread(args, kwargs)
        self._check_random(target, args, kwargs)
        if target is _ATTENTION:
            found = self._by_heads(args, kwargs)
            return found if found is not None else self._whole(target, args, kwargs)
        if target in _PRODUCTS and not kwargs:
            x, weight, bias, _ = _PRODUCTS[target]
            given = args[bias] if bias is not None and bias < len(args) else None
            return self._of_parts(target, args[x], args[weight], given)
        if target is shared_down:
            return shared_down(self._read(args[0], False), args[1])
        if target is _CAT:  # a cache begins with an empty tensor of one axis, which DTensor does not leave out
            args = ([each for each in args[0] if each.dim() > 1 or each.numel()] or args[0], *args[1:])
        try:
            return super().call_function(target, args, kwargs)
        except (NotImplementedError, RuntimeError) as fault:
            # DTensor says in these ways that it has no rule for an op; a fault of the op itself comes again below.
            log.debug("%s: %s", target, fault)
            return self._whole(target, args, kwargs)

    def _spread(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda each: copied_everywhere(each, self.mesh), (args, dict(kwargs)))

    def _of_parts(self, op: Any, x: DTensor, weight: DTensor, bias: DTensor | None) -> Any:
        """Return a product, of an op or of its name in `PRODUCTS`: by columns in parts, by rows summed."""
        name = op if isinstance(op, str) else next(each for each, known in _SPELLED.items() if known is op)
        (place,), out = weight.placements, _PRODUCTS[_SPELLED[name]][3]
        if not isinstance(place, Shard) or weight.dim() != 2:
            return PRODUCTS[name](x, weight, bias)
        if place.dim == out:
            return PRODUCTS[name](self._read(x, False), weight, bias)
        x = self._read(x, True)
        made = F.linear(x, weight) if name == "linear" else torch.matmul(x, weight)
        made = made.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        return made if bias is None else made + bias

    def _beside(self, branch: MatrixBranch, base: DTensor, x: DTensor, shared: bool = False) -> Any:
        """Return what `MatrixBranch` computes beside a product, with one sum over [tokens, rank]."""
        a, b = branch.lora_A.to(x.dtype), branch.lora_B.to(x.dtype)
        by_rows = a.placements == (Shard(1),)  # type: ignore[attr-defined]
        low = x if shared else F.linear(self._read(x, by_rows), a)
        low = low.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        return base + F.linear(low, b) * branch.scale

    def _read(self, x: DTensor, by_rows: bool) -> DTensor:
        """Return a product's input, whole or in parts along its last axis; the same for all that read it in turn."""
        last = self._last.get(by_rows)
        if last is None or last[0] is not x:
            place = Shard(x.dim() - 1) if by_rows else Replicate()
            last = self._last[by_rows] = (x, x.redistribute(placements=[place]))
        return last[1]

    def _check_random(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        schema = getattr(target, "_schema", None)
        if schema is None:
            return
        given = {each.name: value for each, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        share = given.get("p", 0.0) if "dropout" in target.__name__ and given.get("train", True) else 0.0
        if share or given.get("dropout_p", 0.0):
            raise StateError(
                f"{target}: each process would draw another mask for its part; set dropout to 0, or call eval()",
                code="dropout-not-supported",
            )

    def _by_heads(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return attention of the heads that lie here; None where heads are not split alike."""
        query, key, value, *rest = args
        if query.dim() != 4 or not all(each.is_replicate() or each.is_shard(_HEADS) for each in query.placements):
            return None
        if key.placements != query.placements and all(
            each.is_replicate() for each in (*key.placements, *value.placements)
        ):
            key, value = (self._heads_of(query, each) for each in (key, value))
        if not key.placements == value.placements == query.placements:
            return None
        mask = rest[0] if rest else kwargs.get("attn_mask")
        if mask is not None and mask.dim() > 3 and mask.shape[_HEADS] != 1:
            return None
        own = [each.to_local() for each in (query, key, value)]
        if rest and mask is not None:
            rest[0] = self._copy(mask)
        elif mask is not None:
            kwargs = {**kwargs, "attn_mask": self._copy(mask)}
        made = _ATTENTION(*own, *rest, **kwargs)
        return DTensor.from_local(made, self.mesh, query.placements, run_check=False)

    def _heads_of(self, query: DTensor, few: DTensor) -> DTensor:
        """Return keys or values that are whole here, few heads for many of the query, as the query's heads lie."""
        times = query.shape[_HEADS] // few.shape[_HEADS]
        many = few.to_local().repeat_interleave(times, _HEADS)
        return DTensor.from_local(many, self.mesh, few.placements, run_check=False).redistribute(
            placements=query.placements
        )

    def _copy(self, value: Any) -> torch.Tensor:
        found: torch.Tensor = value.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
        return found

    def _whole(self, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Compute an op on whole tensors, on every process."""
        if str(target) not in self.told:
            self.told.add(str(target))
            log.info("tensor parallel: %s is computed whole, on every process", target)
        args, named = pytree.tree_map_only(DTensor, self._copy, (args, dict(kwargs)))
        made = super().call_function(target, args, named)
        return pytree.tree_map_only(torch.Tensor, lambda each: copied_everywhere(each, self.mesh), made)
