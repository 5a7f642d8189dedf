"""Forms: the kinds of calls that a branch can stand beside, one row each, and the ops that contract with a weight.

A row says which node it is, where its input and weight stand, how the op reads the weight, and which arguments the
branch must repeat. Adding an operator is adding a row to FORMS and a case in tests/kit/operators; no pass changes.
There are three dialects: ATen (torch.export), functional (the builtins that F.linear and F.conv* trace to, and methods)
and modules (`call_module`).

An op in no row that multiplies by a weight, or looks rows of it up, is in CONTRACTIONS: its branch stands on the
weight. `register_form` adds rows of the user.
"""

from __future__ import annotations

import abc
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.hooks import RemovableHandle

from lorasc_fx.errors import PassError, SpecError, nearest
from lorasc_fx.quantized import quantized_linear
from lorasc_fx.spec import KINDS


class AnyNode(Protocol):
    """An `fx.Node`, or the stored call of an op that a merged branch replaced."""

    @property
    def op(self) -> str:
        """The kind of node."""

    @property
    def target(self) -> Any:
        """What it calls."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Its positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


@dataclass(frozen=True)
class Reading:
    """The parts of a node: input, arguments that the branch repeats, weight and bias.

    Weight and bias are nodes, or names if a module holds them.
    """

    x: fx.node.Argument
    options: Mapping[str, Any]
    weight: fx.Node | str | None = None
    bias: fx.Node | str | None = None


@dataclass(frozen=True)
class Form(abc.ABC):
    """A row: a `name` for messages, and the `kind` of its sites."""

    name: str
    kind: str

    @abc.abstractmethod
    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the node's input and options."""

    @property
    def product(self) -> str:
        """The op that a branch may be merged into, as `lorasc_fx.branch` names it, or ""."""
        return {"linear": self.name.rpartition(".")[2].lower(), "conv": "conv"}.get(self.kind, "")


class _Call:
    """A row whose nodes call a function or method with named parameters."""

    parameters: tuple[str, ...]

    def argument(self, node: AnyNode, name: str) -> Any:
        """Return an argument of the node by name, or None."""
        position = self.parameters.index(name) if name in self.parameters else len(node.args)
        return node.args[position] if position < len(node.args) else node.kwargs.get(name)


@dataclass(frozen=True)
class FunctionForm(Form, _Call):
    """A call that a branch can stand beside: the op is linear in its weight.

    Args:
        name, kind: see `Form`.
        targets: functions, names of methods, or `namespace::name` of ops that another library defines.
        parameters: names of the target's arguments, in order.
        dims: number of axes of the weight.
        weight, x: which parameters are the weight and the input.
        repeats: parameters that the branch repeats.
        plain: parameters that must have this value or None.
        counted: parameters that must not be negative.
        options: more options of the branch.
        needs: parameters that must be given.
        layout: `out_in` if the op reads the weight as [out, in], or `in_out`.
    """

    targets: tuple[Callable[..., Any] | str, ...]
    parameters: tuple[str, ...]
    dims: int
    weight: str = "weight"
    x: str = "input"
    repeats: tuple[str, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()
    counted: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    layout: str = "out_in"

    def fits(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether the node reads `source` as its weight and nowhere else, and its other arguments fit the row."""
        reads: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), reads.append)
        plain = all(self.argument(node, name) in (None, value) for name, value in self.plain)
        plain = plain and all((self.argument(node, name) or 0) >= 0 for name in self.counted)
        plain = plain and all(self.argument(node, name) is not None for name in self.needs)
        return plain and self.argument(node, self.weight) is source and reads.count(source) == 1

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the parts of the node."""
        given = {name: self.argument(node, name) for name in self.repeats}
        options = {name: value for name, value in given.items() if value is not None}
        bias = self.argument(node, "bias") if "bias" in self.parameters else None
        return Reading(
            self.argument(node, self.x), {**dict(self.options), **options}, self.argument(node, self.weight), bias
        )


@dataclass(frozen=True)
class WeightForm(_Call):
    """A call that computes with its weight in any way. The branch stands on the weight, before the op.

    The op may do anything with `W + s B A`. The full gradient of the weight is computed.

    Args:
        name: in plans and messages.
        kind: of the sites, one of `lorasc_fx.spec.KINDS`. The targets of a spec may name it.
        targets: functions, torch ops, or names of methods.
        parameters: names of the target's arguments, in order.
        weight: which of them is the weight.
    """

    name: str
    kind: str
    targets: tuple[Callable[..., Any] | str, ...]
    parameters: tuple[str, ...]
    weight: str = "weight"


@dataclass(frozen=True)
class ModuleForm(Form):
    """A call of a module whose forward is that of the class `module`. Its own class may be a subclass."""

    module: type[nn.Module]
    layout: str = "out_in"

    def fits(self, module: nn.Module) -> bool:
        """Whether the module computes as the class of the row: without hooks, and without a forward of its own."""
        kind = type(module)
        if module._forward_pre_hooks or module._forward_hooks:
            return False
        if not isinstance(module, self.module) or kind.forward is not self.module.forward or "forward" in vars(module):
            return False
        convolves = getattr(self.module, "_conv_forward", None)
        same = convolves is None or getattr(kind, "_conv_forward", None) is convolves
        plain = not any(getattr(module, option, None) for option in ("max_norm", "scale_grad_by_freq"))
        return same and plain

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the parts of the call; the options are attributes of the module."""
        x = node.args[0] if node.args else node.kwargs["input"]
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        weights = (f"{node.target}.weight", bias)
        if isinstance(module, nn.Embedding):
            return Reading(
                x, {"at": "at_lookup", "padding_idx": -1 if module.padding_idx is None else module.padding_idx}
            )
        if not isinstance(module, nn.modules.conv._ConvNd):
            return Reading(x, {}, *weights)
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
        options |= {"dilation": module.dilation, "groups": module.groups}
        if module.padding_mode != "zeros":
            pad = tuple(module._reversed_padding_repeated_twice)
            options |= {"padding": (0,) * len(module.stride), "pad": pad, "pad_mode": module.padding_mode}
        return Reading(x, options, *weights)


RegisteredForm = FunctionForm | ModuleForm | WeightForm

REGISTERED: OrderedDict[int, RegisteredForm] = OrderedDict()
"""The registered rows by the id of their handle. Torch's handles need a dictionary of this type."""


def registered_form(target: Any) -> FunctionForm | WeightForm | None:
    """Return the registered row that names this target, or None."""
    for form in REGISTERED.values() if REGISTERED else ():
        if not isinstance(form, ModuleForm) and target in targets_of(form):
            return form
    return None


def registered_named(name: str) -> RegisteredForm | None:
    """Return the registered row of this name, or None."""
    return next((form for form in REGISTERED.values() if form.name == name), None)


def targets_of(form: FunctionForm | WeightForm) -> tuple[Any, ...]:
    """Return the targets of a row, and the packet of each op whose default overload is one of them."""
    ops = [target for target in form.targets if isinstance(target, OpOverload)]
    return (*form.targets, *(op.overloadpacket for op in ops if op._overloadname == "default"))


aten = torch.ops.aten

ON_WEIGHT = "on-weight"
"""Name of the form in which a branch stands on the weight, before the op that computes with it."""

ON_INDEXED_EXPERT = "on-indexed-expert"
"""Name of the form in which a branch stands on the matrix that an input selects from a stack."""


_LINEAR = ("input", "weight", "bias")
_REPEAT = ("stride", "padding", "dilation", "groups")
_CONV = (*_LINEAR, *_REPEAT)
_ADDMM = ("bias", "input", "weight")
_ONE = (("alpha", 1), ("beta", 1))
_LOOKUP = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
_GROUPED = ("offs", "bias", "out_dtype")
_FALLBACK = "transformers::grouped_mm_fallback"
_EVENLY = (("scale_grad_by_freq", False),)


def _conv(name: str, targets: tuple[Any, ...], dims: int) -> FunctionForm:
    return FunctionForm(name, "conv", targets, _CONV, dims, repeats=_REPEAT)


def _product(name: str, targets: tuple[Any, ...], parameters: tuple[str, ...], **more: Any) -> FunctionForm:
    return FunctionForm(name, "linear", targets, parameters, 2, layout="in_out", **more)


def _lookup(name: str, target: Any) -> FunctionForm:
    return FunctionForm(
        name,
        "embedding",
        (target,),
        _LOOKUP,
        2,
        repeats=("padding_idx",),
        plain=_EVENLY,
        options=(("at", "at_lookup"),),
    )


def _grouped(name: str, target: Any, parameters: tuple[str, ...], by: str, *more: str) -> FunctionForm:
    return FunctionForm(
        name,
        "experts",
        (target,),
        parameters,
        3,
        weight=parameters[1],
        x=parameters[0],
        repeats=("offs", *more),
        needs=("offs",),  # without offsets it is another product
        plain=(("bias", None), ("out_dtype", None)),
        options=(("at", "grouped"), ("by", by)),
        layout="in_out",
    )


FORMS: tuple[FunctionForm | ModuleForm, ...] = (
    FunctionForm("aten.linear", "linear", (aten.linear.default,), _LINEAR, 2),
    _product("aten.addmm", (aten.addmm.default,), _ADDMM, plain=_ONE),
    _product("aten.mm", (aten.mm.default,), ("input", "weight")),
    _product("aten.matmul", (aten.matmul.default,), ("input", "weight")),
    _conv("aten.conv1d", (aten.conv1d.default, aten.conv1d.padding), 3),
    _conv("aten.conv2d", (aten.conv2d.default, aten.conv2d.padding), 4),
    _conv("aten.conv3d", (aten.conv3d.default, aten.conv3d.padding), 5),
    _lookup("aten.embedding", aten.embedding.default),
    _grouped("aten._grouped_mm", aten._grouped_mm.default, ("self", "mat2", *_GROUPED), "aten::_grouped_mm"),
    # Its own backward computes the gradient of a frozen weight too. The branch computes that of the input alone.
    _grouped(_FALLBACK, _FALLBACK, ("input", "weight", "offs"), _FALLBACK, "weight"),
    FunctionForm("F.linear", "linear", (F.linear,), _LINEAR, 2),
    FunctionForm("quantized_linear", "linear", (quantized_linear,), _LINEAR, 2),
    _product("torch.addmm", (torch.addmm, "addmm"), _ADDMM, plain=_ONE),
    _product("torch.mm", (torch.mm, "mm"), ("input", "weight")),
    _product("torch.matmul", (torch.matmul, operator.matmul, "matmul"), ("input", "weight")),
    _conv("F.conv1d", (F.conv1d,), 3),
    _conv("F.conv2d", (F.conv2d,), 4),
    _conv("F.conv3d", (F.conv3d,), 5),
    _lookup("torch.embedding", torch.embedding),
    _grouped("torch._grouped_mm", torch._grouped_mm, ("self", "mat2", *_GROUPED), "aten::_grouped_mm"),
    FunctionForm(
        "F.embedding",
        "embedding",
        (F.embedding,),
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        2,
        repeats=("padding_idx",),
        plain=(("max_norm", None), *_EVENLY),
        counted=("padding_idx",),  # F.embedding, unlike torch.embedding, counts a negative one from the end
        options=(("at", "at_lookup"),),
    ),
    ModuleForm("nn.Linear", "linear", nn.Linear),
    ModuleForm("nn.Conv1d", "conv", nn.Conv1d),
    ModuleForm("nn.Conv2d", "conv", nn.Conv2d),
    ModuleForm("nn.Conv3d", "conv", nn.Conv3d),
    ModuleForm("nn.Embedding", "embedding", nn.Embedding),
)
"""Every form that a branch can stand beside, in the order in which they are tried."""

_CONTRACTIONS = {
    "linear": "linear addmm mm matmul bmm baddbmm addbmm einsum tensordot mv addmv inner bilinear _trilinear "
    "grouped_mm _grouped_mm grouped_mm_fallback __matmul__ __rmatmul__ __imatmul__ linalg_matmul chain_matmul "
    "linalg_multi_dot multi_dot linalg_vecdot vecdot _scaled_mm _int_mm _native_multi_head_attention "
    "_transformer_encoder_layer_fwd multi_head_attention_forward scaled_dot_product_attention",
    "conv": "conv_tbc conv1d conv2d conv3d convolution _convolution deform_conv2d conv_transpose1d conv_transpose2d "
    "conv_transpose3d",
    "embedding": "embedding embedding_bag _embedding_bag",
    "recurrent": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
}
CONTRACTIONS = {name: kind for kind, names in _CONTRACTIONS.items() for name in names.split()}
"""Names of the ops that multiply by a weight or look it up, in all dialects, with the kind of site they make."""

ADDED_FIRST = {"addmm", "baddbmm", "addbmm", "addmv"}
"""Contractions that only add their first argument."""

SCALES = {"mul", "div", "truediv", "multiply", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"}
"""Names of the ops that scale one argument by another."""

LIKE_ANOTHER = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
"""Names of the ops that read only the values of their first argument."""

_BY_TARGET = {target: form for form in FORMS if isinstance(form, FunctionForm) for target in form.targets}
_BY_NAME = {form.name: form for form in FORMS}


def form_named(name: str) -> FunctionForm | ModuleForm:
    """Return the row of this name.

    Raises:
        PassError: there is none; a registered row may have been removed.
    """
    form = _BY_NAME.get(name) or registered_named(name)
    if form is None or isinstance(form, WeightForm):  # no use is marked with the name of a WeightForm
        raise PassError(
            f"no form is named {name!r} here; register it again (lorasc_fx.graph.register_form)",
            code="unknown-name",
        )
    return form


def built_in(target: Any) -> FunctionForm | None:
    """Return the built-in row that has this target, or None."""
    packet = getattr(target, "overloadpacket", target)
    return _BY_TARGET.get(target) or _BY_TARGET.get(getattr(packet, "_qualified_op_name", ""))


def is_form(name: str) -> bool:
    """Whether a row has this name."""
    return name in (ON_WEIGHT, ON_INDEXED_EXPERT) or name in _BY_NAME or registered_named(name) is not None


def form_of(node: AnyNode, module: nn.Module | None) -> FunctionForm | ModuleForm | None:
    """Return the row that fits a node, or None. `module` is the module that a `call_module` calls."""
    if node.op in ("call_function", "call_method"):
        form = built_in(node.target) or registered_form(node.target)
        return form if isinstance(form, FunctionForm) else None
    if node.op == "call_module" and module is not None:
        rows = (*FORMS, *REGISTERED.values())
        return next((form for form in rows if isinstance(form, ModuleForm) and form.fits(module)), None)
    return None


def name_of(node: fx.Node) -> str:
    """Return the name of the target of a node, the same in all dialects."""
    return _name(node.target)


def weighs(name: str) -> bool:
    """Whether an op of this name takes a weight as its second argument, as linear and the convolutions do."""
    return name == "linear" or name.startswith(("conv", "_conv"))


def contraction(node: fx.Node, reads: Collection[fx.Node]) -> str | None:
    """Return the kind of site if the node multiplies by the weight or looks it up, otherwise None.

    Args:
        node: any node.
        reads: its arguments that are computed from the weight. A matrix that is only added does not count.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    form = registered_form(node.target)
    if isinstance(form, WeightForm):
        return form.kind if form.argument(node, form.weight) in reads else None
    if form is not None:
        return form.kind if any(source in reads for source in node.all_input_nodes) else None
    name = name_of(node)
    multiplied: list[fx.Node] = []
    fx.node.map_arg((node.args[1 if name in ADDED_FIRST else 0 :], node.kwargs), multiplied.append)
    return CONTRACTIONS.get(name) if any(source in reads for source in multiplied) else None


_T = (aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t, "t")
_SWAP = (aten.transpose.int, torch.transpose, torch.swapaxes, "transpose", "swapaxes")
_PERMUTE = (aten.permute.default, torch.permute, "permute")


def without_transposes(source: Any, dims: int) -> tuple[Any, bool]:
    """Return the node where a chain of transposes starts, and whether the chain transposes it."""
    transposed = False
    while isinstance(source, fx.Node) and source.all_input_nodes and _transposes(source, dims):
        source, transposed = source.all_input_nodes[0], not transposed
    return source, transposed


def turned(layout: str, transposed: bool) -> str:
    """Return the layout of a weight that an op reads in `layout`, perhaps behind a transpose."""
    return {"out_in": "in_out", "in_out": "out_in"}[layout] if transposed else layout


def _transposes(node: fx.Node, dims: int) -> bool:
    """Whether a node transposes a matrix, or each matrix of a stack with `dims` axes, and does nothing else."""
    if node.target is getattr:
        return node.args[1:2] == ("mT",) or (dims == 2 and node.args[1:2] == ("T",))
    rest: Any = node.args[1:]
    if node.target in _T:
        return not rest and (dims == 2 or node.target is aten.mT.default)
    if node.target in _SWAP:
        return len(rest) == 2 and {axis % dims for axis in rest} == {dims - 2, dims - 1}
    if node.target in _PERMUTE:
        axes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return [axis % dims for axis in axes] == [*range(dims - 2), dims - 1, dims - 2]
    return False


BESIDE = ("linear", "conv", "embedding")


def register_form(form: RegisteredForm) -> RemovableHandle:
    """Add a form, until `remove()` is called on the handle or its `with` block ends.

    `WeightForm` is always right: the branch stands on the weight, before the op. `FunctionForm` and `ModuleForm` say
    that a branch may stand beside the op, `op(x, W + D) = op(x, W) + D x`, which needs less memory. Only your own tests
    check that. Graphs that were captured before stay as they are.

    Args:
        form: the row. Its name appears in plans and messages; its `kind` is one of `lorasc_fx.spec.KINDS`.

    Returns:
        A handle as torch returns it for hooks.

    Raises:
        SpecError: the row is incomplete, its name is taken, or a built-in row has its target.
    """
    if isinstance(form, (FunctionForm, WeightForm)):
        if not isinstance(form.targets, tuple) or not form.targets:
            raise SpecError(
                f"{form.name}: targets is {form.targets!r}; give a tuple of functions, ops or names of methods"
            )
        # Graphs call the op of a `torch.library.custom_op`, not the function.
        ops = (target._opoverload if isinstance(target, CustomOpDef) else target for target in form.targets)
        form = replace(form, targets=tuple(ops))
    _check(form)
    handle = RemovableHandle(REGISTERED)
    REGISTERED[handle.id] = form
    return handle


def forms_missing(names: Iterable[str]) -> dict[str, str]:
    """Return the names among these that are not registered, each with a hint."""
    known = [form.name for form in REGISTERED.values()]
    return {name: nearest(name, known) for name in names if name and registered_named(name) is None}


def _check(form: RegisteredForm) -> None:
    if not isinstance(form, (FunctionForm, ModuleForm, WeightForm)):
        raise SpecError(f"form is {type(form).__name__}; give a FunctionForm, a ModuleForm or a WeightForm")
    if not isinstance(form.name, str) or not form.name:
        raise SpecError(f"the form's name is {form.name!r}; give one that people can read, such as 'my.linear'")
    if any(form.name == row.name for row in FORMS):
        raise SpecError(f"{form.name} is the name of a form that is built in; give yours another")
    if registered_named(form.name) is not None:
        raise SpecError(f"{form.name} is registered already; call remove() on its handle before")
    kinds = KINDS if isinstance(form, WeightForm) else BESIDE
    if form.kind not in kinds:
        raise SpecError(
            f"{form.name}: kind is {form.kind!r}{nearest(str(form.kind), kinds)}; known: {', '.join(kinds)}",
            code="unknown-name",
        )
    if not isinstance(form, ModuleForm):
        _check_targets(form)
        return
    for row in FORMS:
        if isinstance(row, ModuleForm) and form.module.forward is row.module.forward:
            raise SpecError(f"{form.name}: {form.module.__name__} computes as {row.name} does, which is built in")


def _check_targets(form: FunctionForm | WeightForm) -> None:
    named = [form.weight] + ([form.x] if isinstance(form, FunctionForm) else [])
    for name in named:
        if name not in form.parameters:
            hint = nearest(name, form.parameters)
            raise SpecError(
                f"{form.name}: {name!r} is not one of its parameters{hint}; they are {form.parameters}",
                code="unknown-name",
            )
    for target in targets_of(form):
        for row, how in ((built_in(target), "built in"), (registered_form(target), "registered")):
            if row is not None:
                raise SpecError(f"{form.name}: {_shown(target)} is a form already: {row.name}, which is {how}")
        if _is_torchs(target) and _name(target) in CONTRACTIONS:
            raise SpecError(f"{form.name}: {_shown(target)} is known already: its branch stands on the weight")
        schema = getattr(target, "_schema", None)
        arguments = tuple(argument.name for argument in schema.arguments) if schema is not None else form.parameters
        if arguments[: len(form.parameters)] != form.parameters:
            raise SpecError(f"{form.name}: parameters is {form.parameters}, but {_shown(target)} takes {arguments}")


def _is_torchs(target: Any) -> bool:
    """Whether a target is torch's own, or a method's name."""
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.startswith(("aten::", "prims::"))
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, str) or module.split(".")[0] in ("torch", "_operator", "builtins", "")


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


def _shown(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
