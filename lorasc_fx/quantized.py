"""Quantized weights, and the layers of libraries that store them in their own format.

torchao quantizes a weight: the parameter of an nn.Linear becomes a tensor subclass with a shape, a dtype and a
`dequantize`. bitsandbytes, HQQ and quanto quantize a layer: their own module holds packed values and computes with them
in its forward. While a cascade is alive, a `QuantizedLinear` replaces such a layer. Its weight, a `QuantizedWeight`, is
also a tensor subclass: it has the shape of the dense weight, and `F.linear(x, weight, bias)` calls the layer's forward.
So all libraries give the same kind of quantized weight. The graph computes with it unchanged, and the branch computes
beside the op.

A row of `LIBRARIES` says how a library dequantizes and re-quantizes. No library is imported before a model holds one of
its layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.parameters import shallow
from lorasc_fx.util.undo import Block, Undo, isolated

T = TypeVar("T", bound=torch.Tensor)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a quantized weight: a tensor subclass with its own `dequantize`, as in torchao.

    Such a weight is never written. Its branch computes the unmerged delta.
    """
    return is_traceable_wrapper_subclass(tensor) and type(tensor).dequantize is not torch.Tensor.dequantize


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight as a plain tensor in its own dtype, dequantized if necessary."""
    plain: torch.Tensor = tensor.detach().dequantize() if is_quantized(tensor) else tensor
    return plain


def quantized_in(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the quantized weights among some tensors, by name."""
    return {name: tensor for name, tensor in tensors.items() if is_quantized(tensor)}


def writable(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors that can hold new values: all except quantized weights."""
    return {name: tensor for name, tensor in tensors.items() if not is_quantized(tensor)}


def can_require_grad(tensor: torch.Tensor) -> bool:
    """Whether a parameter can require a gradient."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_quantized(tensor)


def same_quantized(one: torch.Tensor, other: torch.Tensor) -> bool | None:
    """Whether two quantized weights have the same values. None if neither tensor is quantized."""
    kinds = {is_quantized(one), is_quantized(other)}
    return None if kinds == {False} else kinds == {True} and torch.equal(dense(one), dense(other))


# ---- the libraries


@dataclass(frozen=True)
class Library:
    """How a library stores the weight of a layer.

    Args:
        holds: whether a layer of the class is quantized and computes a plain product.
        dequantize: returns the dense weight [out, in] of a layer.
        requantize: returns a copy of a layer with another weight [out, in], quantized with the layer's settings. None
            if this needs more than the weight.
        attributes: values for attributes of the layer while a cascade is alive.
    """

    holds: Callable[[Any], bool]
    dequantize: Callable[[Any], torch.Tensor]
    requantize: Callable[[Any, torch.Tensor], nn.Module] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def _dequantize_4bit(layer: Any) -> torch.Tensor:
    weight = layer.weight
    plain: torch.Tensor = sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.data, weight.quant_state)
    return plain


def _requantize_4bit(layer: Any, value: torch.Tensor) -> nn.Module:
    old, new = layer.weight, shallow(layer)
    options = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    weight = type(old)(value, False, module=new, **{name: getattr(old, name) for name in options})
    new.weight = weight.to(value.device)
    return new


def _dequantize_8bit(layer: Any) -> torch.Tensor:
    first = layer.weight.CB is not None  # before its first call
    numbers, scale = (layer.weight.CB, layer.weight.SCB) if first else (layer.state.CB, layer.state.SCB)
    like = layer.bias.dtype if layer.bias is not None else torch.get_default_dtype()
    plain: torch.Tensor = numbers.float() * (scale.float() / 127).unsqueeze(1)
    return plain.to(like)


def _requantize_8bit(layer: Any, value: torch.Tensor) -> nn.Module:
    new, state = shallow(layer), copy.copy(layer.state)
    state.CB = state.SCB = None
    new.state = state
    new.weight = type(layer.weight)(value.cpu(), False, has_fp16_weights=False).to(value.device)
    return new


def _requantize_hqq(layer: Any, value: torch.Tensor) -> nn.Module:
    made = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(value.to(layer.compute_dtype), False)
    config = {**layer.quant_config, "offload_meta": layer.offload_meta}
    new: nn.Module = type(layer)(made, config, compute_dtype=layer.compute_dtype, device=layer.device)
    new.bias = layer.bias
    return new


def _requantize_quanto(layer: Any, value: torch.Tensor) -> nn.Module:
    new = shallow(layer)
    new.weight = nn.Parameter(value, False)
    freeze: Any = new.freeze
    freeze()
    return new


def _dequantize_awq(layer: Any) -> torch.Tensor:
    dequantize: Any = vars(sys.modules[type(layer).__module__])["dequantize_gemm"]
    packed = (layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
    plain: torch.Tensor = dequantize(*packed)
    return plain.T.contiguous()


LIBRARIES: dict[str, Library] = {
    "bitsandbytes.nn.modules.Linear4bit": Library(
        lambda layer: getattr(layer.weight, "quant_state", None) is not None,
        _dequantize_4bit,
        _requantize_4bit,
        # On CPUs with bf16 instructions, eval mode would repack the weight for a product without gradients.
        {"support_avx512bf16_for_cpu": False},
    ),
    "bitsandbytes.nn.modules.Linear8bitLt": Library(
        lambda layer: layer.weight.dtype == torch.int8 and not layer.state.has_fp16_weights,
        _dequantize_8bit,
        _requantize_8bit,
    ),
    "hqq.core.quantize.HQQLinear": Library(
        lambda layer: layer.is_initialized(), lambda layer: layer.dequantize(), _requantize_hqq
    ),
    # GPTQ and AWQ: the packed values come from an optimization, which is not repeated here.
    "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear": Library(
        lambda layer: layer.adapter is None, _dequantize_awq
    ),
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": Library(
        lambda layer: layer.adapter is None, lambda layer: layer.dequantize_weight().T.contiguous()
    ),
    "optimum.quanto.nn.qlinear.QLinear": Library(
        lambda layer: layer.frozen and layer.activation_qtype is None,
        lambda layer: layer.weight.dequantize(),
        _requantize_quanto,
    ),
}
"""Rows by the full name of the layer's class."""


def library_of(layer: nn.Module) -> Library | None:
    """Return the row of a quantized layer. None for any other module."""
    rows = (LIBRARIES.get(f"{kind.__module__}.{kind.__qualname__}") for kind in type(layer).__mro__)
    return next((row for row in rows if row is not None and row.holds(layer)), None)


# ---- the weight, and the module that holds it


class QuantizedWeight(torch.Tensor):
    """The weight [out, in] of a library's layer. It has no memory of its own: the layer holds the values.

    `F.linear` calls the layer's forward, in the layer's mode and with its gradient for the input. Any other operation
    computes with the dequantized weight. No operation may write to it.
    """

    layer: Any

    @staticmethod
    def __new__(cls, layer: nn.Module, device: torch.device | None = None) -> Self:
        """Return the weight of a layer of a library in `LIBRARIES`, on its device or on another one."""
        row = library_of(layer)
        assert row is not None
        with torch.no_grad():
            plain = row.dequantize(layer)
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=plain.device if device is None else device
        )
        made.layer = layer
        return made

    def dequantize(self) -> torch.Tensor:
        """Return the dense weight [out, in]."""
        row = library_of(self.layer)
        assert row is not None
        with torch.no_grad():
            return row.dequantize(self.layer).detach()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output of the layer for x [..., in], with this bias [out] instead of its own."""
        stores = (self.layer._parameters, self.layer._buffers, vars(self.layer))
        store: Any = next(store for store in stores if "bias" in store)
        held = store["bias"]
        if held is bias:
            made: torch.Tensor = self.layer(x)
            return made
        try:
            store["bias"] = bias
            made = self.layer(x)
            return made
        finally:
            store["bias"] = held

    def entries(self) -> dict[str, torch.Tensor]:
        """Return the entries of the layer's state dict that store its weight."""
        saved = self.layer.state_dict(keep_vars=True)
        return {
            name: value.detach() for name, value in saved.items() if isinstance(value, torch.Tensor) and name != "bias"
        }

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("layer."):
            return self.entries()[name.removeprefix("layer.")]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return [f"layer.{name}" for name in sorted(self.entries())], type(self.layer).__name__

    @staticmethod
    def __tensor_unflatten__(*args: Any) -> torch.Tensor:
        raise NotImplementedError("a quantized layer cannot be traced: its product is one call")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            if isinstance(given["weight"], cls):
                return given["weight"].product(given["input"], given.get("bias"))
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func in (
            aten.detach.default,
            aten.alias.default,
            aten.clone.default,
        ):  # nothing writes to it
            return _alias(args[0])
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            return cls(args[0].layer, torch.device("meta"))
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a quantized weight, which has no memory of its own")
        args, kwargs = pytree.tree_map_only(cls, lambda weight: weight.dequantize(), (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made = type(self)(copy.deepcopy(self.layer, memo))
            memo[id(self)] = nn.Parameter(made, False) if isinstance(self, nn.Parameter) else made
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and layer class, without values."""
        return (
            f"QuantizedWeight(shape={tuple(self.shape)}, of {type(self.layer).__module__}.{type(self.layer).__name__})"
        )


def _alias(weight: QuantizedWeight) -> QuantizedWeight:
    kind = type(weight)
    made: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
        kind, weight.shape, dtype=weight.dtype, device=weight.device
    )
    made.layer = weight.layer
    return made


_KEYS = count()
_PLACED: WeakValueDictionary[str, QuantizedLinear] = WeakValueDictionary()


class QuantizedLinear(nn.Linear):
    """Replaces a library's layer in the model and calls it. With a dense weight in place it is a linear layer.

    Mode, device and saved entries are those of the layer. Missing attributes are read from the layer.

    Args:
        layer: a layer of a library in `LIBRARIES`.
    """

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        row = library_of(layer)
        assert row is not None
        layer.state_dict()  # when it saves, bitsandbytes undoes its packing for inference
        self.__dict__["layer"] = layer
        self.__dict__["before"] = {name: getattr(layer, name) for name in row.attributes if hasattr(layer, name)}
        for name in self.before:
            setattr(layer, name, row.attributes[name])
        self.hold(layer)
        bias = getattr(layer, "bias", None)
        store: Any = self._parameters if bias is None or isinstance(bias, nn.Parameter) else self._buffers
        store["bias"] = bias
        self.out_features, self.in_features = self.weight.shape
        self.key = str(next(_KEYS))  # a string: tracers would make a symbol of a number
        _PLACED[self.key] = self

    def hold(self, layer: nn.Module) -> None:
        """Replace the layer."""
        self.__dict__["layer"] = layer
        self._parameters["weight"] = nn.Parameter(QuantizedWeight(layer), False)

    @property
    def holds_layer(self) -> bool:
        """Whether it calls the layer. Otherwise a dense weight, or one of another library, is in place."""
        return isinstance(self._parameters["weight"], QuantizedWeight)

    def released(self) -> nn.Module:
        """Return the module to put back into the model: the layer, or a linear layer with the current weight."""
        if self.holds_layer:
            layer: nn.Module = self.layer
            return layer
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = self.weight
        bias = self.bias
        made.bias = nn.Parameter(bias, False) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        return made.train(self.training)

    @property
    def training(self) -> bool:
        """The layer's mode."""
        return bool(self.layer.training) if "layer" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "layer" in self.__dict__:
            self.layer.train(mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product of the layer, or of the dense weight in its place."""
        if _capturing and torch.compiler.is_compiling():
            opaque: torch.Tensor = torch.ops.lorasc_fx.quantized_linear(input, self.key)
            return opaque
        return quantized_linear(input, self.weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" in self.__dict__ and not name.startswith("__"):
                return getattr(self.__dict__["layer"], name)
            raise

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if not self.holds_layer:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        before, bias = self.weight.device, getattr(self.layer, "bias", None)
        self.layer._apply(fn)
        if QuantizedWeight(self.layer).device != before:
            self.hold(self.layer)
        if (now := getattr(self.layer, "bias", None)) is not bias:
            store: Any = self._parameters if "bias" in self._parameters else self._buffers
            store["bias"] = now
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.holds_layer:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, value in self.layer.state_dict(keep_vars=keep_vars).items():
            destination[prefix + name] = value

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.holds_layer:
            self.layer._load_from_state_dict(*args, **kwargs)
        else:
            super()._load_from_state_dict(*args, **kwargs)


@fx.wrap  # one node in a trace of torch.fx
def quantized_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the product with a quantized weight, or with a dense weight that replaces it.

    A dense weight computes in its own dtype, and the result has the dtype of the input, as for the layers.

    Args:
        input: [..., in].
        weight: [out, in], quantized or dense.
        bias: [out].
    """
    if isinstance(weight, QuantizedWeight) or input.dtype == weight.dtype:
        return F.linear(input, weight, bias)
    bias = bias.to(weight.dtype) if bias is not None else None
    return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)


# ---- capture: one op that finds its weight by the key of its module

_capturing = 0


@isolated
def as_opaque_products(undo: Block) -> None:
    """Let tracers record the product of each `QuantizedLinear` as one opaque op."""
    global _capturing  # noqa: PLW0603 - dynamo guards it
    _capturing += 1

    def end() -> None:
        global _capturing  # noqa: PLW0603
        _capturing -= 1

    undo(end)


@torch.library.custom_op("lorasc_fx::quantized_linear", mutates_args=())
def _product(input: torch.Tensor, key: str) -> torch.Tensor:
    raise NotImplementedError("this op is only in graphs whose weights are not yet read from the model")


@_product.register_fake
def _(input: torch.Tensor, key: str) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], _PLACED[key].out_features)


def is_opaque_product(target: Any) -> bool:
    """Whether a call target is that op, which takes input [..., in] and the key of a module."""
    op = torch.ops.lorasc_fx.quantized_linear
    return target is op or target is op.default


# ---- in a model


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def place_layers(model: nn.Module, undo: Undo) -> None:
    """Replace each quantized layer of a library by a `QuantizedLinear`. A layer that is shared stays shared."""
    made: dict[int, QuantizedLinear] = {}
    for parent, name, child in list(_places(model)):
        if not isinstance(child, QuantizedLinear) and library_of(child) is not None:
            if id(child) not in made:
                made[id(child)] = QuantizedLinear(child)
                undo(partial(_restore, made[id(child)]))
            undo(partial(parent._modules.__setitem__, name, child))
            parent._modules[name] = made[id(child)]


def restore_layers(model: nn.Module, undo: Undo) -> None:
    """Put the layers back into the model, or a linear layer if the weight is dense now."""
    made: dict[int, nn.Module] = {}
    for parent, name, child in list(_places(model)):
        if isinstance(child, QuantizedLinear):
            if id(child) not in made:
                made[id(child)] = child.released()
                undo(partial(_restore, child, {key: getattr(child.layer, key) for key in child.before}))
                _restore(child)
            undo(partial(parent._modules.__setitem__, name, child))
            parent._modules[name] = made[id(child)]


def _restore(module: QuantizedLinear, attributes: Mapping[str, Any] | None = None) -> None:
    for name, value in (module.before if attributes is None else attributes).items():
        setattr(module.layer, name, value)
