"""Lets peft wrap a copy of a model, and reads from peft's layers which weights it adapts, and how.

So peft's rules for finding modules, naming keys and storing factors are not repeated here. Source: peft 0.21.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Factors
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.graph import named_weights
from lorasc_fx.graph.copies import unshared
from lorasc_fx.quantized import dense
from lorasc_fx.util.environment import kept_generators, module_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files in an adapter's folder."""
ADAPTER = "default"
"""The name of the adapter in peft's layers."""
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
"""Options of a configuration that do not affect an adapter's values, or only its initial values."""
READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out",
    "ensure_weight_tying", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "target_parameters", "trainable_token_indices", "bias",
}  # fmt: skip
"""All other supported options of a LoRA, except `init_lora_weights`."""
_HEADS = {"classifier", "score", "qa_outputs"}
"""Names of the modules that peft's classes for some tasks save completely, if the model has them (`peft_model.py`)."""


class Mirror:
    """A copy of a model that peft has wrapped. It shares all tensors with the model, and its factors have no values.

    Args:
        model: the model, which is not changed.
        config: a configuration of peft.

    Attributes:
        wrapped: peft's model.
        config: peft's configuration, which lists the modules that peft has found.
        modules: {path of a module of the model: its copy}.
        layers: {name of an adapted parameter: peft's layer}.
        tokens: {name of a parameter with trained rows: peft's layer}.
        saved: {path of a module that is saved completely: peft's wrapper}.
        biases: names of the biases that peft trains.

    Raises:
        MissingExtra: peft is not installed.
        ValueError: the configuration does not fit the model. peft raises other types, too.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        peft = module_of("peft", "peft")
        config = copy.deepcopy(config)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # other initial values are computed from the weights
        if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            config.task_type = None  # peft's classes for these tasks require methods of transformers
        config.inference_mode = False  # so that peft marks the biases that it trains
        copies: dict[nn.Module, nn.Module] = {}
        skeleton = unshared(model, copies)
        for module in copies.values():  # the model must not get the hooks that peft registers
            module._forward_hooks = module._forward_hooks.copy()
        self.modules = {path: copies[module] for path, module in model.named_modules()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            # On the meta device, factors of a huge rank need no memory. Layers of other methods than LoRA need values.
            meta = torch.device("meta") if config.peft_type == "LORA" else nullcontext()
            with warnings.catch_warnings(), kept_generators(), meta:
                warnings.simplefilter("ignore")
                self.wrapped: Any = peft.get_peft_model(
                    skeleton, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False
                )
            self.biases = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        self.config = self.wrapped.peft_config[ADAPTER]
        self.layers: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self._sort_layers()
        for name in getattr(config, "modules_to_save", None) or ():
            if name not in _HEADS and not any(path.endswith(name) for path in self.saved):
                raise ValueError(f"modules_to_save: the model has no module {name}{nearest(name, self.modules)}")

    def _sort_layers(self) -> None:
        """Fill `layers`, `tokens` and `saved`."""
        tuners, wrappers = module_of("peft", "peft.tuners.tuners_utils"), module_of("peft", "peft.utils.other")
        rows = module_of("peft", "peft.tuners.trainable_tokens.layer").TrainableTokensLayer
        paths = {id(module): path for path, module in self.modules.items()}
        for module in self.wrapped.modules():
            if isinstance(module, wrappers.ModulesToSaveWrapper):
                self.saved[paths[id(module.original_module)]] = module
            elif isinstance(module, tuners.BaseTunerLayer):
                name = f"{paths[id(module.get_base_layer())]}.{getattr(module, 'parameter_name', 'weight')}"
                (self.tokens if isinstance(module, rows) else self.layers)[name] = module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return {key in a file: tensor} of the adapter. The tensors are the parameters themselves, not copies."""
        save = module_of("peft", "peft").get_peft_model_state_dict
        everything = self.wrapped.state_dict(keep_vars=True)
        tensors: dict[str, torch.Tensor] = save(self.wrapped, everything, save_embedding_layers=False)
        return tensors

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """Return {name in the model: tensor} of the modules that peft saves completely."""
        return {
            f"{path}.{name}": value
            for path, wrapper in self.saved.items()
            for name, value in wrapper.modules_to_save[ADAPTER].state_dict(keep_vars=True).items()
        }

    def trained(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Return the names of the parameters that peft trains in full, and the names of the tied ones that it unties.

        If peft saves a module completely, it trains a copy of the module, which is not tied to the model's weight.
        """
        copies, train, untie = self.saved_tensors(), list[str](), list[str]()
        tied = getattr(self.config, "modules_to_tie", None) or ()  # by ensure_weight_tying
        for canonical, names in named_weights(model).names.items():
            together = any(name.rpartition(".")[0] in tied for name in names)
            groups: dict[str, list[str]] = {}  # names that are one tensor in peft
            for name in names:
                group = "model" if name not in copies else "together" if together else name
                groups.setdefault(group, []).append(name)
            saved = [group for group in groups.values() if group[0] in copies]
            if canonical in self.biases or (saved and len(groups) == 1):
                train.append(canonical)
                continue
            apart = saved[1:] if len(saved) == len(groups) else saved
            if any(len(group) > 1 for group in apart):
                raise SpecError(
                    f"spec: {' and '.join(names)} are names of one tied weight, and peft trains a separate copy of "
                    f"{' and '.join(apart[-1])}, which a cascade cannot do. Name all of their modules in "
                    "modules_to_save, with ensure_weight_tying=True",
                    code="tied-weights-differ",
                )
            train += [group[0] for group in saved]
            untie += [group[0] for group in apart]
        return train, untie


# ---- the factors of one layer of peft


def is_transposed(layer: Any) -> bool:
    """Return whether the weight of a layer is [in, out], or a stack of matrices [matrices, in, out]."""
    kind = type(layer).__name__
    if kind == "ParamWrapper":
        return layer.num_experts > 1 and not layer._did_swap_in_out_features
    return kind == "Embedding" or bool(getattr(layer, "fan_in_fan_out", False))


def _holders(layer: Any) -> list[tuple[Any, str]]:
    """Return (dictionary of parameters, key in it) of A, and the same of B, in a LoRA layer."""
    if ADAPTER in layer.lora_embedding_A:
        return [(factors._parameters, ADAPTER) for factors in (layer.lora_embedding_A, layer.lora_embedding_B)]
    return [(factors[ADAPTER]._parameters, "weight") for factors in (layer.lora_A, layer.lora_B)]


def put(layer: Any, pair: Factors, dtype: torch.dtype, magnitudes: torch.Tensor | None) -> None:
    """Write a pair of factors, and DoRA's magnitudes, into a LoRA layer. The scale of the layer must be 1."""
    a, b = (pair.b.mT, pair.a.mT) if is_transposed(layer) else (pair.a, pair.b)
    b = b.permute(1, 2, 0) if b.dim() == 3 else b
    places = [(holder, key, value) for (holder, key), value in zip(_holders(layer), (a, b), strict=True)]
    if magnitudes is not None:
        places.append((layer.lora_magnitude_vector[ADAPTER]._parameters, "weight", magnitudes))
    for holder, key, value in places:
        new = value.reshape(holder[key].shape).to(dtype).clone(memory_format=torch.contiguous_format)
        holder[key] = nn.Parameter(new)


def pair_in(layer: Any, shape: Sequence[int], dtype: torch.dtype) -> Factors:
    """Return the factors of a LoRA layer for a weight of this shape, on the host, with the scale in `b`."""
    a, b = (holder[key].detach().cpu().to(dtype).flatten(1) for holder, key in _holders(layer))
    if type(layer).__name__ == "ParamWrapper" and len(shape) == 3:
        a = a.reshape(shape[0], -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, shape[0]).permute(2, 0, 1)
    if is_transposed(layer):
        a, b = b.mT, a.mT
    return Factors(b.contiguous() * layer.scaling[ADAPTER], a.contiguous())


def rows_with(weight: torch.Tensor, pair: Factors, transposed: bool) -> torch.Tensor:
    """Return a weight plus the delta of a pair, as a new fp64 tensor [out, in] on the CPU."""
    values = dense(weight.detach()).cpu().double()
    total = values + (pair.b.double() @ pair.a.double()).view_as(values)
    return total.mT if transposed else total.flatten(1)
