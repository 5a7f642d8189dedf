"""The graph that an AdapterBank captures of its model. The last inputs of the graph are the factors of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.bank.adapters import Key
from lorasc_fx.bank.rows import check_independent
from lorasc_fx.branch.lora import UP
from lorasc_fx.compile import Call
from lorasc_fx.graph.function import as_function, takes_leaves
from lorasc_fx.passes import adapter_inputs
from lorasc_fx.passes.adapter_inputs import SCALE
from lorasc_fx.quantized import dense
from lorasc_fx.util.undo import PROCESS


class BankGraph:
    """Runs one graph with any adapter of a bank.

    Args:
        module: the graph after the pass `AdapterInputs`.
        model: the base, which the graph reads.
    """

    def __init__(self, module: fx.GraphModule, model: nn.Module) -> None:
        self.module, self.model = module, model
        self.inputs = adapter_inputs(module)
        self._independent = False
        self._function = as_function(module, same_bits=False)
        self._compiled: Callable[..., Any] | None = None
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._model_inputs = placeholders[: len(placeholders) - len(self.inputs)]
        self._takes_leaves = takes_leaves(module.graph)

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile the graph by torch.compile with these options, at its next call."""
        self._compiled = torch.compile(self.module, **options)

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

    def check_independent(self, call: Call) -> None:
        """Raise StateError unless each row of a batch can have its own adapter. A graph is checked with one batch."""
        with PROCESS:
            if not self._independent:
                both = self.random_factors()

                def tensors(adapter: int | Sequence[int]) -> list[torch.Tensor]:
                    scale = 1.0 if isinstance(adapter, int) else [1.0] * len(adapter)
                    return self.tensors_from({key: value[adapter] for key, value in both.items()}, scale)

                check_independent(self.module, self.model, self._model_values(call), tensors)
                self._independent = True

    def random_factors(self) -> dict[Key, torch.Tensor]:
        """Return the stacked factors of two random adapters. A delta has about half the norm of its weight."""
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

    def _device(self, weight: str) -> torch.device:
        return self.model.get_parameter(weight).device

    def tensors_from(self, factors: Mapping[Key, torch.Tensor], scale: object) -> list[torch.Tensor]:
        """Return factors and scales as tensors, in the order of the graph's inputs."""
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
