"""A captured graph of a bank, whose last inputs are the factors of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.bank.adapters import Adapters, Trained
from lorasc_fx.bank.rows import Layout, layout_of, row_count
from lorasc_fx.bank.slots import Key
from lorasc_fx.branch.lora import UP
from lorasc_fx.branch.placements import FIRST_AXIS
from lorasc_fx.compile import Call
from lorasc_fx.graph import GraphEditor
from lorasc_fx.graph.function import as_function, takes_leaves
from lorasc_fx.passes import adapter_inputs
from lorasc_fx.passes.adapter_inputs import SCALE
from lorasc_fx.quantized import dense
from lorasc_fx.util.undo import PROCESS, Lock


class BankGraph:
    """Runs one graph with any adapter of a bank.

    Args:
        module: the graph after the pass `AdapterInputs`.
        model: the base, which the graph reads.
    """

    def __init__(self, module: fx.GraphModule, model: nn.Module) -> None:
        self.module, self.model = module, model
        self.inputs = adapter_inputs(module)
        self.cached: dict[int | Trained, list[torch.Tensor]] = {}  # input tensors by `Adapters.cache_key`
        self.splits: set[tuple[int, ...]] = set()  # see `check_splits`
        self._layout: Layout | None = None
        self._lock = Lock()
        self._function = as_function(module, same_bits=False)
        self._compiled: Callable[..., Any] | None = None
        self._options: Mapping[str, Any] = {}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._model_inputs = placeholders[: len(placeholders) - len(self.inputs)]
        self._takes_leaves = takes_leaves(module.graph)

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile the graph by torch.compile with these options, at its next call."""
        self._options, self._compiled = options, torch.compile(self.module, **options)

    def __call__(self, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the graph for a call with the input tensors of an adapter."""
        if self._compiled is not None or (self._takes_leaves and len(call.leaves) != len(self._model_inputs)):
            names = [item.name for item in self.inputs]
            function = self._compiled if self._compiled is not None else self.module
            return function(*call.args, **call.kwargs, **dict(zip(names, tensors, strict=True)))
        return self._function(*self._model_values(call), *tensors)

    def _model_values(self, call: Call) -> list[Any]:
        """Return the values of the placeholders that are inputs of the model, in order."""
        if self._takes_leaves:
            return list(call.leaves)
        positional = [str(node.target) for node in self._model_inputs][: len(call.args)]
        values = {**dict(zip(positional, call.args, strict=True)), **call.kwargs}
        return [values[str(node.target)] if node.target in values else node.args[0] for node in self._model_inputs]

    def layout(self, call: Call) -> Layout:
        """Return where the rows of a batch are. The first batch of several rows shows it for all."""
        if row_count(call.leaves) == 1:
            return Layout(True)
        if self._layout is None:
            with PROCESS, self._lock:
                if self._layout is None:  # otherwise another thread has found it
                    both = self.random_factors()

                    def tensors(adapter: int | Sequence[int]) -> list[torch.Tensor]:
                        scale = 1.0 if isinstance(adapter, int) else [1.0] * len(adapter)
                        return self.tensors_from({key: value[adapter] for key, value in both.items()}, scale)

                    layout = layout_of(self.module, self.model, self._model_values(call), tensors)
                    self._write_places(layout)
                    self._layout = layout  # last, because other threads read it without the lock
        return self._layout

    def random_factors(self) -> dict[Key, torch.Tensor]:
        """Return the factors of two random adapters, stacked. Their deltas are half as large as the weights."""
        source, sizes, factors = torch.Generator().manual_seed(0), dict[str, float](), dict[Key, torch.Tensor]()
        for item in self.inputs:
            if item.weight not in sizes:
                weight = dense(self.model.get_parameter(item.weight).detach())
                sizes[item.weight] = max(1e-2, float(weight.float().square().mean().sqrt()))
            if item.tensor != SCALE:
                rank = item.shape[-1 if item.tensor == UP else -2]
                size = (0.5 * sizes[item.weight] / rank**0.5) ** 0.5
                value = size * torch.randn(2, *item.shape, generator=source)
                factors[item.weight, item.tensor] = value.to(self._device(item.weight), item.dtype)
        return factors

    def _write_places(self, layout: Layout) -> None:
        """Tell the branches whose rows are not on axis 0 where they are."""
        editor = GraphEditor(self.module, "bank")
        for node in editor.nodes:
            if layout.places.get(node.name, FIRST_AXIS) != FIRST_AXIS:
                editor.set_arguments(node, node.args, {**node.kwargs, "rows": tuple(layout.places[node.name])})
        if editor.modified:
            self.module = editor.finish()
            self._function = as_function(self.module, same_bits=False)
            if self._compiled is not None:
                self.compile(self._options)

    def _device(self, weight: str) -> torch.device:
        return self.model.get_parameter(weight).device

    def tensors_of(self, adapters: Adapters, name: str | None) -> list[torch.Tensor]:
        """Return the input tensors of one adapter. They are cached."""
        key = adapters.cache_key(name)
        if key not in self.cached:
            with torch.inference_mode(False):  # a later call may train with these tensors
                self.cached[key] = self.tensors_from(*adapters.factors(name))
        return self.cached[key]

    def tensors_from(self, factors: Mapping[Key, torch.Tensor], scale: object) -> list[torch.Tensor]:
        """Return factors and scales in the order of the graph's inputs."""
        scales: dict[Any, torch.Tensor] = {}
        tensors = []
        for item in self.inputs:
            if item.tensor == SCALE:
                kind = item.dtype, self._device(item.weight)
                if kind not in scales:
                    scales[kind] = torch.tensor(scale, dtype=kind[0], device=kind[1])
                tensors.append(scales[kind])
            else:
                tensors.append(factors[item.weight, item.tensor])
        return tensors
