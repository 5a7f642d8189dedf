"""Quantized weights, in the form in which each library stores them.

Libraries quantize in one of two ways:

1. torchao quantizes a weight. The parameter of an nn.Linear becomes a tensor subclass with the shape of the dense
   weight and its own `dequantize`.
2. bitsandbytes replaces a layer. Its module holds packed values, and its forward computes with them.

While a cascade exists, each layer of the second kind is wrapped by a `QuantizedLinear`. The weight of the wrapper, a
`QuantizedWeight`, is a tensor subclass of the first kind, and `F.linear(x, weight, bias)` calls the forward of the
wrapped layer. So the rest of the package sees one kind of quantized weight. The op keeps its quantized weight, and the
branch computes beside the op.

To support another library of the second kind, add a row to `LIBRARIES`. No library is imported before a model contains
one of its layers.
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
from lorasc_fx.util.torch_private import DisableTorchFunctionSubclass
from lorasc_fx.util.undo import Block, Undo, isolated

T = TypeVar("T", bound=torch.Tensor)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a quantized weight: a tensor subclass with its own `dequantize`, as in torchao.

    While a cascade exists, nothing is merged into a quantized weight. Its branch also computes the deltas of earlier
    stages.
    """
    return is_traceable_wrapper_subclass(tensor) and type(tensor).dequantize is not torch.Tensor.dequantize


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Dequantize a quantized weight to a plain tensor of its dtype. Any other tensor is returned unchanged."""
    plain: torch.Tensor = tensor.detach().dequantize() if is_quantized(tensor) else tensor
    return plain


def quantized_in(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return {name: tensor} of those tensors that are quantized weights."""
    return {name: tensor for name, tensor in tensors.items() if is_quantized(tensor)}


def writable(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return {name: tensor} of those tensors that can be written to: all except quantized weights."""
    return {name: tensor for name, tensor in tensors.items() if not is_quantized(tensor)}


def can_require_grad(tensor: torch.Tensor) -> bool:
    """Whether a parameter can require a gradient."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_quantized(tensor)


def same_quantized(a: torch.Tensor, b: torch.Tensor) -> bool | None:
    """Whether two tensors are quantized weights with equal values. None if neither is quantized."""
    kinds = {is_quantized(a), is_quantized(b)}
    return None if kinds == {False} else kinds == {True} and torch.equal(dense(a), dense(b))


# ---- Libraries that replace layers


@dataclass(frozen=True)
class Library:
    """Functions for one class of layers of a quantization library.

    Args:
        holds: returns whether a layer of this class is quantized, and its forward is only `x W^T + b`.
        dequantize: returns the dense weight [out, in] of a layer.
        requantize: returns a copy of a layer that holds another dense weight [out, in], quantized with the settings of
            the layer.
        attributes: {name: value} of attributes that the layer must have while a cascade exists. The previous values
            are restored afterwards.
    """

    holds: Callable[[Any], bool]
    dequantize: Callable[[Any], torch.Tensor]
    requantize: Callable[[Any, torch.Tensor], nn.Module]
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
    # The first forward moves the values from the weight to the state.
    source = layer.weight if layer.weight.CB is not None else layer.state
    dtype = layer.bias.dtype if layer.bias is not None else torch.get_default_dtype()
    plain: torch.Tensor = source.CB.float() * (source.SCB.float() / 127).unsqueeze(1)
    return plain.to(dtype)


def _requantize_8bit(layer: Any, value: torch.Tensor) -> nn.Module:
    new, state = shallow(layer), copy.copy(layer.state)
    # Quantization happens on the move to the device. The next forward then fills the state.
    state.CB = state.SCB = None
    new.state = state
    new.weight = type(layer.weight)(value.cpu(), False, has_fp16_weights=False).to(value.device)
    return new


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
}
"""{full name of a layer's class: its library}."""


def library_of(layer: nn.Module) -> Library | None:
    """Return the library of a quantized layer, or None for any other module."""
    libraries = (LIBRARIES.get(f"{kind.__module__}.{kind.__qualname__}") for kind in type(layer).__mro__)
    return next((library for library in libraries if library is not None and library.holds(layer)), None)


# ---- Libraries that quantize a weight


def _like_int8(old: Any, value: torch.Tensor) -> torch.Tensor:
    settings = _settings(
        old, "act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range"
    )
    quantized: torch.Tensor = type(old).from_hp(
        value, _granularity(old), scale=old.scale, zero_point=old.zero_point, **settings
    )
    return quantized


def _like_intx(old: Any, value: torch.Tensor) -> torch.Tensor:
    scales = {"custom_scale": old.scale, "custom_zero_point": old.zero_point}
    quantized: torch.Tensor = type(old).from_hp(
        value,
        old.block_size,
        old.target_dtype,
        intx_choose_qparams_algorithm=None,
        **scales,
        **_settings(old, "activation_quantization"),
    )
    return quantized


def _like_float8(old: Any, value: torch.Tensor) -> torch.Tensor:
    settings = _settings(old, "mm_config", "kernel_preference", "act_quant_kwargs")
    quantized: torch.Tensor = type(old).from_hp(value, old.qdata.dtype, _granularity(old), **settings)
    return quantized


def _like_nvfp4(old: Any, value: torch.Tensor) -> torch.Tensor:
    scale: Any = sys.modules[type(old).__module__].per_tensor_amax_to_scale
    tensor_scale = None if old.per_tensor_scale is None else scale(value.abs().amax())
    quantized: torch.Tensor = type(old).to_nvfp4(
        value,
        per_tensor_scale=tensor_scale,
        **_settings(old, "block_size", "is_swizzled_scales", "act_quant_kwargs", "act_per_tensor_scale"),
    )
    return quantized


def _like_mx(old: Any, value: torch.Tensor) -> torch.Tensor:
    names = ("elem_dtype", "block_size", "kernel_preference", "act_quant_kwargs", "is_swizzled_scales")
    quantized: torch.Tensor = type(old).to_mx(value, **_settings(old, *names))
    return quantized


def _settings(old: object, *names: str) -> dict[str, Any]:
    """Return the attributes with these names that this version of the library has."""
    return {name: getattr(old, name) for name in names if hasattr(old, name)}


def _granularity(old: Any) -> Any:
    library: Any = sys.modules["torchao.quantization"]
    block = tuple(old.block_size)
    if block == tuple(old.shape):
        return library.PerTensor()
    return library.PerRow() if block == (1, old.shape[-1]) else library.PerBlock(block)


TENSORS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "torchao.quantization.Int8Tensor": _like_int8,
    "torchao.quantization.IntxUnpackedToInt8Tensor": _like_intx,
    "torchao.quantization.Float8Tensor": _like_float8,
    "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor": _like_nvfp4,
    "torchao.prototype.mx_formats.mx_tensor.MXTensor": _like_mx,
}
"""{full name of a quantized weight's class: function}. `function(quantized, dense)` quantizes a dense weight with the
settings of the quantized one."""


def quantizer_of(weight: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
    """Return a function that quantizes a dense weight [out, in] with the settings of `weight`. None if unsupported.

    If `weight` is a `QuantizedWeight`, the function returns a layer, otherwise a weight.
    """
    if isinstance(weight, QuantizedWeight):
        library = library_of(weight.layer)
        return None if library is None else partial(library.requantize, weight.layer)
    function = TENSORS.get(f"{type(weight).__module__}.{type(weight).__qualname__}")
    return None if function is None else partial(function, weight.detach())


def requantized(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Quantize the dense `value` with the settings of a quantized weight, and return the dequantized result."""
    quantize = quantizer_of(weight)
    assert quantize is not None, "checked when the branch was inserted"
    with torch.no_grad():
        coded = quantize(value)
        plain: torch.Tensor = (
            QuantizedWeight(coded).dequantize() if isinstance(coded, nn.Module) else coded.dequantize()
        )
    return plain.to(value.dtype)


# ---- The weight of a layer, and the module that wraps the layer


class QuantizedWeight(torch.Tensor):
    """The weight [out, in] of a layer of a library, as a tensor subclass without storage. The layer holds the values.

    `F.linear` with this weight calls the layer, whose own backward computes the gradient. All other operations
    dequantize the weight first. Operations that would write to the weight raise RuntimeError.

    Args:
        layer: a layer of a library in `LIBRARIES`.
        device: device to report, by default the device of the layer. The meta device is for shape propagation.
    """

    layer: Any

    @staticmethod
    def __new__(cls, layer: nn.Module, device: torch.device | None = None) -> Self:
        """Create the weight of a layer."""
        library = library_of(layer)
        assert library is not None
        with torch.no_grad():
            plain = library.dequantize(layer)
        weight: Self = torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=plain.device if device is None else device
        )
        weight.layer = layer
        return weight

    def dequantize(self) -> torch.Tensor:
        """Return the dense weight [out, in]."""
        library = library_of(self.layer)
        assert library is not None
        with torch.no_grad():
            return library.dequantize(self.layer).detach()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the output [..., out] of the layer for x [..., in], with `bias` [out] instead of the layer's own."""
        # Libraries store the bias as a parameter, a buffer or a plain attribute.
        stores = (self.layer._parameters, self.layer._buffers, vars(self.layer))
        store: Any = next(store for store in stores if "bias" in store)
        own_bias = store["bias"]
        try:
            store["bias"] = bias
            output: torch.Tensor = self.layer(x)
            return output
        finally:
            store["bias"] = own_bias

    def entries(self) -> dict[str, torch.Tensor]:
        """Return {name: tensor} of the layer's state dict without the bias. These tensors store the weight."""
        state = self.layer.state_dict(keep_vars=True)
        return {
            name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor) and name != "bias"
        }

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("layer."):
            return self.entries()[name.removeprefix("layer.")]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return [f"layer.{name}" for name in sorted(self.entries())], type(self.layer).__name__

    @staticmethod
    def __tensor_unflatten__(*args: object) -> torch.Tensor:
        raise NotImplementedError("a quantized layer cannot be traced, because its forward is one opaque call")

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            if isinstance(arguments["weight"], cls):
                return arguments["weight"].product(arguments["input"], arguments.get("bias"))
        with DisableTorchFunctionSubclass():  # otherwise results would be of this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        # A clone can share the layer too, because nothing writes to the weight.
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return _alias(args[0])
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            return cls(args[0].layer, torch.device("meta"))
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a quantized weight, which is read-only")
        args, kwargs = pytree.tree_map_only(cls, lambda weight: weight.dequantize(), (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            weight = type(self)(copy.deepcopy(self.layer, memo))
            memo[id(self)] = nn.Parameter(weight, False) if isinstance(self, nn.Parameter) else weight
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """Return the shape and the class of the layer, without values."""
        return (
            f"QuantizedWeight(shape={tuple(self.shape)}, of {type(self.layer).__module__}.{type(self.layer).__name__})"
        )


def _alias(weight: QuantizedWeight) -> QuantizedWeight:
    """Return another tensor object of the same layer."""
    alias: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
        type(weight), weight.shape, dtype=weight.dtype, device=weight.device
    )
    alias.layer = weight.layer
    return alias


_KEYS = count()
_MODULES: WeakValueDictionary[str, QuantizedLinear] = WeakValueDictionary()
"""All `QuantizedLinear` modules by their key, for the fake kernel of the op below."""


class QuantizedLinear(nn.Linear):
    """Wraps a layer of a library in the user's model, and calls it.

    If a dense weight replaces the parameter `weight`, this module computes like an nn.Linear and has its state dict.
    Otherwise it has the state dict of the layer. Training mode and missing attributes are always those of the layer.

    Args:
        layer: a layer of a library in `LIBRARIES`.
    """

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        library = library_of(layer)
        assert library is not None
        layer.state_dict()  # has a side effect: bitsandbytes undoes its repacking for inference
        originals = {name: getattr(layer, name) for name in library.attributes if hasattr(layer, name)}
        self.__dict__["original_attributes"] = originals
        for name in originals:
            setattr(layer, name, library.attributes[name])
        self.set_layer(layer)
        bias = getattr(layer, "bias", None)
        store: Any = self._parameters if bias is None or isinstance(bias, nn.Parameter) else self._buffers
        store["bias"] = bias
        self.out_features, self.in_features = self.weight.shape
        self.key = str(next(_KEYS))  # a string, because tracers would replace an int by a symbol
        _MODULES[self.key] = self

    def set_layer(self, layer: nn.Module) -> None:
        """Wrap another layer of the same shape."""
        # Write to __dict__, so that the layer is not a child module: the model does not have the layer's names.
        self.__dict__["layer"] = layer
        self._parameters["weight"] = nn.Parameter(QuantizedWeight(layer), False)

    @property
    def holds_layer(self) -> bool:
        """Whether the weight is the quantized weight of the layer, and not a dense weight that replaces it."""
        return isinstance(self._parameters["weight"], QuantizedWeight)

    def unwrapped(self) -> nn.Module:
        """Return the module that replaces this one at release: the layer, or an nn.Linear if the weight is dense."""
        if self.holds_layer:
            layer: nn.Module = self.layer
            return layer
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        bias = self.bias
        linear.bias = nn.Parameter(bias, False) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        return linear.train(self.training)

    @property
    def training(self) -> bool:
        """Training mode of the layer."""
        return bool(self.layer.training) if "layer" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "layer" in self.__dict__:
            self.layer.train(mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output [..., out] of the layer, or of the dense weight that replaces its weight."""
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

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        if not self.holds_layer:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        weight, bias = self.weight, getattr(self.layer, "bias", None)
        self.layer._apply(fn)
        # After a move or a cast, refer to the new weight and bias of the layer.
        if ((moved := QuantizedWeight(self.layer)).device, moved.dtype) != (weight.device, weight.dtype):
            self.set_layer(self.layer)
        if (new_bias := getattr(self.layer, "bias", None)) is not bias:
            store: Any = self._parameters if "bias" in self._parameters else self._buffers
            store["bias"] = new_bias
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.holds_layer:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, value in self.layer.state_dict(keep_vars=keep_vars).items():
            destination[prefix + name] = value

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        if self.holds_layer:
            self.layer._load_from_state_dict(*args, **kwargs)
        else:
            super()._load_from_state_dict(*args, **kwargs)


@fx.wrap  # torch.fx.symbolic_trace records a call of this function as one node
def quantized_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `input weight^T + bias` [..., out] for a quantized weight, or for a dense weight that replaces it.

    With a dense weight, the product is computed in the dtype of the weight and converted to the dtype of the input. The
    layers of the libraries do this too.

    Args:
        input: [..., in].
        weight: [out, in], quantized or dense.
        bias: [out].
    """
    if isinstance(weight, QuantizedWeight) or input.dtype == weight.dtype:
        return F.linear(input, weight, bias)
    bias = bias.to(weight.dtype) if bias is not None else None
    return F.linear(input.to(weight.dtype), weight, bias).to(input.dtype)


# ---- Capture: one opaque op per layer. The op finds its layer by the key of the QuantizedLinear.

_capturing = 0
"""Number of active `as_opaque_products` blocks."""


@isolated
def as_opaque_products(undo: Block) -> None:
    """Context manager: let compilers trace each `QuantizedLinear` as one call of `lorasc_fx::quantized_linear`."""
    global _capturing  # noqa: PLW0603 - a global, because dynamo guards globals
    _capturing += 1

    def end() -> None:
        global _capturing  # noqa: PLW0603
        _capturing -= 1

    undo(end)


@torch.library.custom_op("lorasc_fx::quantized_linear", mutates_args=())
def _product(input: torch.Tensor, key: str) -> torch.Tensor:
    raise NotImplementedError("only graphs during a capture contain this op, and they are not run")


@_product.register_fake
def _(input: torch.Tensor, key: str) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], _MODULES[key].out_features)


def is_opaque_product(target: object) -> bool:
    """Whether the target of a node is the op above. The op's arguments are the input [..., in] and a module's key."""
    op = torch.ops.lorasc_fx.quantized_linear
    return target is op or target is op.default


# ---- Wrapping the layers of a model


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield every (parent, name, child) of a model. A shared child occurs once for each parent and name."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def wrap_layers(model: nn.Module, undo: Undo) -> None:
    """Replace each quantized layer of a library by a `QuantizedLinear`. Shared layers stay shared."""
    wrappers: dict[int, QuantizedLinear] = {}
    for parent, name, child in list(_children(model)):
        if not isinstance(child, QuantizedLinear) and library_of(child) is not None:
            if id(child) not in wrappers:
                wrapper = wrappers[id(child)] = QuantizedLinear(child)
                undo(partial(_set_attributes, child, wrapper.original_attributes))
            undo(partial(parent._modules.__setitem__, name, child))
            parent._modules[name] = wrappers[id(child)]


def unwrap_layers(model: nn.Module, undo: Undo) -> None:
    """Replace each `QuantizedLinear` by its layer, or by an nn.Linear if its weight is dense now."""
    unwrapped: dict[int, nn.Module] = {}
    for parent, name, child in list(_children(model)):
        if isinstance(child, QuantizedLinear):
            if id(child) not in unwrapped:
                unwrapped[id(child)] = child.unwrapped()
                current = {key: getattr(child.layer, key) for key in child.original_attributes}
                undo(partial(_set_attributes, child.layer, current))
                _set_attributes(child.layer, child.original_attributes)
            undo(partial(parent._modules.__setitem__, name, child))
            parent._modules[name] = unwrapped[id(child)]


def _set_attributes(layer: nn.Module, attributes: Mapping[str, object]) -> None:
    for name, value in attributes.items():
        setattr(layer, name, value)
