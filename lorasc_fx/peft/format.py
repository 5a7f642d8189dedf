"""The format of peft's LoRA adapters: files, keys of the configuration, keys of tensors, and layouts of the factors.

In this package, `Factors` are `b` [rows, r] and `a` [r, columns]. Their product `b @ a` is the delta of the weight in
its stored orientation. In peft, `B @ A` is the delta of a weight [out, in].

Source: peft 0.21, `tuners/lora/layer.py`, `tuners/lora/config.py`, `utils/other.py: get_pattern_key`.
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn

from lorasc_fx.branch import Factors
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec, Dropout, Rank, Rule, Tokens
from lorasc_fx.util.decode import Check

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files in an adapter's folder."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts as max_lora_rank, except 1."""

IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
"""Keys of a configuration that do not affect the values, or repeat information from the names of the tensors."""

UNSUPPORTED = {
    "alora_invocation_tokens": "an activated LoRA changes only some tokens",
    "arrow_config": "Arrow routes between adapters",
    "corda_config": "CorDA changes the base",
    "kasa_config": "KaSA changes the base",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "the factors have a bias, which is not part of a weight",
    "monteclora_config": "MonteCLoRA draws its factors",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "QA-LoRA pools the input",
    "velora_config": "VeLoRA computes in a different layer",
}
"""Keys of features that do not compute `W + s B A`, with or without DoRA's magnitudes. The value is the reason."""


TASKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "SEQ_CLS": ("SEQUENCE_CLASSIFICATION", ("classifier", "score")),
    "SEQ_2_SEQ_LM": ("SEQ_TO_SEQ_CAUSAL_LM", ()),
    "CAUSAL_LM": ("CAUSAL_LM", ()),
    "TOKEN_CLS": ("TOKEN_CLASSIFICATION", ("classifier", "score")),
    "QUESTION_ANS": ("QUESTION_ANSWERING", ("qa_outputs",)),
}
"""For each task of peft: the part of transformers' MODEL_FOR_..._MAPPING_NAMES that lists its models, and the names of
modules that peft's class for it always saves completely, if the model has them (`peft_model.py`)."""


def _is_safe(pattern: str) -> bool:
    """Return whether a pattern is a valid regular expression that cannot backtrack exponentially."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(re.findall(r"(?<!\\)[*+{]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)


Pattern = Annotated[str, Check(_is_safe, "give a regular expression with few repetitions, which is matched quickly")]
Alpha = Annotated[float, Check(lambda alpha: 0 < alpha < 1e30, "it scales the factors: give a number above 0")]
Names = tuple[Annotated[str, Check(bool, "give the name of a module or parameter")], ...] | None


@dataclass(frozen=True)
class AdapterConfig:
    """The keys of `adapter_config.json` that affect the values, under peft's names. Lists and tables may be null.

    Args:
        r, lora_alpha: defaults, for targets that match no pattern.
        use_rslora, use_dora, lora_dropout: settings of all targets.
        modules_to_save: suffixes of paths of modules that are saved completely.
        target_parameters: names of adapted parameters, or suffixes of names.
        trainable_token_indices: trained rows by suffix of a module's path. A list means the input embedding.
    """

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Alpha] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: Dropout = 0.0
    modules_to_save: Names = None
    target_parameters: Names = None
    trainable_token_indices: dict[str, Tokens] | Tokens | None = None
    bias: Literal["none", "all", "lora_only"] = "none"

    def rank_of(self, name: str) -> int:
        """Return the rank for a module or parameter with this name."""
        return by_pattern(self.rank_pattern or {}, name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return lora_alpha for a module or parameter with this name."""
        return float(by_pattern(self.alpha_pattern or {}, name, self.lora_alpha))


READ = {*(field.name for field in fields(AdapterConfig)), "init_lora_weights"}
"""Keys of a configuration that determine the spec."""

PREFIX = "base_model.model."
"""Prefix of every key in an adapter file."""


@dataclass(frozen=True)
class Layout:
    """How peft stores A and B for a kind of layer. The defaults equal the layout of `Factors`.

    Args:
        keys: suffixes of the keys of A and B in an adapter file.
        transposed: whether the weight is [in, out], or a stack of MoE experts [experts, in, out].
        is_conv: whether A is a convolution with the weight's kernel size, and B a convolution with kernel size 1.
        is_parameter: whether the weight is one of peft's `target_parameters`. peft replaces such a parameter while its
            module runs. A stack of MoE experts has one pair: A is [experts * r, in] and B is [out, r * experts].
    """

    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    transposed: bool = False
    is_conv: bool = False
    is_parameter: bool = False

    def to_peft(self, pair: Factors, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert the factors of a weight with this shape to peft's (A, B)."""
        rank = pair.a.shape[-2]
        a, b = (pair.b.mT, pair.a.mT) if self.transposed else (pair.a, pair.b)
        if a.dim() == 3:
            b = b.permute(1, 2, 0)
        shape_a, shape_b = self.shapes(shape, rank)
        return a.reshape(shape_a), b.reshape(shape_b)

    def from_peft(self, lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Sequence[int]) -> Factors:
        """Convert peft's (A, B) of a weight with this shape to factors: the inverse of `to_peft`."""
        a, b = lora_a.flatten(1), lora_b.flatten(1)
        if self.is_parameter and len(shape) == 3:
            a = a.reshape(shape[0], -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, shape[0]).permute(2, 0, 1)
        if self.transposed:
            a, b = b.mT, a.mT
        return Factors(b.contiguous(), a.contiguous())

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of peft's A and B for a weight with this shape."""
        if self.is_conv:
            return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
        *stack, out, inner = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        return (math.prod(stack) * rank, inner), (out, rank * math.prod(stack))

    def magnitude_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in which peft stores DoRA's magnitudes [out] for a weight with this shape."""
        if self.is_conv:
            return (1, shape[0], *(1 for _ in shape[2:]))
        return (shape[-1 if self.transposed else -2],)


LINEAR = Layout()
CONV1D = Layout(transposed=True)
"""The layout for transformers' Conv1D, a linear layer with the weight [in, out]."""
EMBEDDING = Layout(("lora_embedding_A", "lora_embedding_B"), transposed=True)
CONV = Layout(is_conv=True)
PARAMETER = Layout(is_parameter=True)

_LAYOUTS: Mapping[type[nn.Module], Layout] = {
    nn.Linear: LINEAR, nn.Embedding: EMBEDDING, nn.Conv1d: CONV, nn.Conv2d: CONV, nn.Conv3d: CONV,
}  # fmt: skip
"""Layouts of torch's layers that peft adapts by the module's name."""

TOKENS = "token_adapter.trainable_tokens_delta"
"""Suffix of the key of trained rows. The tensor has their values [count, in]."""

ENDS = (*LINEAR.keys, *EMBEDDING.keys)
"""Suffixes of the keys of factors."""


def layout_of(module: nn.Module, axes: int) -> Layout | None:
    """Return the layout in which peft adapts the `weight` of a module. None if peft cannot adapt it.

    Grouped convolutions have none, because peft's delta for them mixes the groups.

    Args:
        module: the module whose `weight` is adapted.
        axes: number of axes of the weight.
    """
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1:
        return None
    for kind in type(module).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
            return CONV1D if axes == 2 else None
    return next((layout for kind, layout in _LAYOUTS.items() if isinstance(module, kind)), None)


def parameter_layout(module: nn.Module, axes: int) -> Layout:
    """Return the layout of one of peft's `target_parameters`, with this number of axes, in a module.

    Stacked experts are transposed if the module says so by `is_transposed`, as in transformers.
    """
    return replace(PARAMETER, transposed=axes == 3 and bool(getattr(module, "is_transposed", False)))


@dataclass(frozen=True)
class Target:
    """A parameter that peft adapts.

    Args:
        path: path of the module that holds it.
        leaf: name of the parameter in that module.
        layout: layout of its factors.
    """

    path: str
    leaf: str
    layout: Layout

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.path}.{self.leaf}"

    @property
    def is_parameter(self) -> bool:
        """Whether it is one of peft's `target_parameters`. Otherwise peft replaces the module that holds it."""
        return self.layout.is_parameter

    @property
    def pattern(self) -> str:
        """The name that peft matches against rank_pattern and alpha_pattern."""
        return self.name if self.is_parameter else self.path


def keys_of(model: nn.Module, targets: Iterable[Target]) -> dict[Target, tuple[str, str, str]]:
    """Return the keys of A, B and DoRA's magnitudes for each target, in one adapter for all targets.

    peft wraps a module once for each of its `target_parameters`. The innermost wrapper belongs to the first parameter.
    """
    targets = list(targets)
    wraps = wrap_counts(targets)
    wrapped = {(target.path, target.leaf) for target in targets if target.is_parameter}
    keys = {}
    for target in targets:
        depth = 0
        if target.is_parameter:
            parameters = model.get_submodule(target.path).named_parameters(recurse=False)
            order = [leaf for leaf, _ in parameters if (target.path, leaf) in wrapped]
            depth = len(order) - 1 - order.index(target.leaf)
        stem = f"{PREFIX}{key_path(target.path, wraps)}.{'base_layer.' * depth}"
        a, b = target.layout.keys
        keys[target] = f"{stem}{a}", f"{stem}{b}", f"{stem}lora_magnitude_vector"
    return keys


def wrap_counts(targets: Iterable[Target]) -> Counter[str]:
    """Return how often peft wraps each module because of `target_parameters`, by path."""
    return Counter(target.path for target in targets if target.is_parameter)


def key_path(path: str, wraps: Mapping[str, int]) -> str:
    """Return a module's path after peft has wrapped each of its parents `wraps[parent]` times."""
    names = path.split(".")
    parents = (".".join(names[:count]) for count in range(1, len(names)))
    parts = ([name, *["base_layer"] * wraps.get(parent, 0)] for name, parent in zip(names, parents, strict=False))
    return ".".join([*chain.from_iterable(parts), names[-1]])


def token_rows(indices: Any, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the rows that `trainable_token_indices` trains, by module path. Modules are found as in peft.

    A list means rows of the input embedding.
    """
    modules = dict(model.named_modules())
    if indices and not isinstance(indices, Mapping):
        owner: Any = model
        embedding = owner.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        indices = {next((path for path, module in modules.items() if module is embedding), "embed_tokens"): indices}
    return {path: tuple(rows) for end, rows in (indices or {}).items() for path in modules if path.endswith(end)}


def ties_heads(model: nn.Module) -> bool:
    """Return whether the trained rows of the input embedding are also the rows of a tied head in peft."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def lora_spec(
    pairs: Mapping[str, tuple[int, float]],
    default: tuple[int, float],
    train: Iterable[str],
    tokens: Mapping[str, Sequence[int]],
    **options: Any,
) -> CascadeSpec:
    """Return a spec that adapts these weights and trains these parameters in full.

    Args:
        pairs: rank and lora_alpha by weight name.
        default: rank and lora_alpha of the spec. Weights with other values get a rule.
        train: names of the parameters that are trained in full.
        tokens: trained rows by weight name.
        options: other fields of the spec.
    """
    return CascadeSpec(
        targets=tuple(map(glob.escape, (*pairs, *tokens))),
        train=tuple(dict.fromkeys(map(glob.escape, train))),
        rules=(
            *(Rule(glob.escape(name), tokens=tuple(rows)) for name, rows in tokens.items()),
            *(
                Rule(glob.escape(name), rank, float(alpha))
                for name, (rank, alpha) in pairs.items()
                if (rank, alpha) != default
            ),
        ),
        rank=default[0],
        lora_alpha=float(default[1]),
        **options,
    )


Value = TypeVar("Value")


def by_pattern(patterns: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """Return the value of the first pattern that matches a name by peft's rule, or `otherwise`."""
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, otherwise)


def rows_with(weight: torch.Tensor, pair: Factors, transposed: bool) -> torch.Tensor:
    """Return a weight plus the delta of a pair, as a new fp64 tensor [out, in] on the CPU."""
    values = dense(weight.detach()).cpu().double()
    total = values + (pair.b.double() @ pair.a.double()).view_as(values)
    return total.mT if transposed else total.flatten(1)
