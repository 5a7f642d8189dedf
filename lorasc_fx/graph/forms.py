"""The table of ops whose weight can be adapted.

A form describes one kind of node, as a row of `FORMS`: the targets, which arguments are input and weight, the layout of
the weight, and the arguments that the branch needs too. The op of a form is linear in the weight, so a branch can be
added to the output: `op(x, W + D) = op(x, W) + D x`. To support another op, add a row here and a case in
tests/kit/operators. Passes need no change.

There are rows for three dialects of graphs: ATen (torch.export), functional (`F.linear` and other functions, and
methods of tensors, from `fx.symbolic_trace`) and modules (`call_module`).

Other ops that multiply by a weight or look up its rows are in `CONTRACTIONS`. For these, the branch is added to the
weight before the op. `register_form` adds rows at run time.
"""

from __future__ import annotations

import abc
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from lorasc_fx.branch import Placement
from lorasc_fx.errors import PassError, SpecError, nearest
from lorasc_fx.quantized import quantized_linear
from lorasc_fx.spec import KINDS
from lorasc_fx.util.torch_private import CustomOpDef, OpOverload, grouped_mm


@dataclass(frozen=True)
class StoredCall:
    """The call of an op without its node, such as an op that a merged branch replaced, or a call in eager mode."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


AnyNode = fx.Node | StoredCall


@dataclass(frozen=True)
class Reading:
    """The arguments of an op that a branch needs.

    Args:
        x: the input.
        options: keyword arguments for the branch node, such as stride and padding.
        weight, bias: nodes, or names of attributes if the node calls a module.
    """

    x: fx.node.Argument
    options: Mapping[str, Any]
    weight: fx.Node | str | None = None
    bias: fx.Node | str | None = None


@dataclass(frozen=True)
class Form(abc.ABC):
    """A row of the table of ops.

    Args:
        name: unique name, which plans and messages contain.
        kind: kind of the sites, such as `linear` or `conv`.
    """

    name: str
    kind: str

    @abc.abstractmethod
    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the arguments of a node of this form. `module` is the module that a `call_module` node calls."""

    @property
    def product(self) -> str:
        """Option `op` of the merged branch node for this form, or "" if no merged branch can replace the op."""
        return {"linear": self.name.rpartition(".")[2].lower(), "conv": "conv"}.get(self.kind, "")


class _NamedArguments:
    """Looks up arguments of a call by parameter name."""

    parameters: tuple[str, ...]

    def argument(self, node: AnyNode, name: str) -> Any:
        """Return the argument of the node for a parameter of this name, or None if it is not passed."""
        position = self.parameters.index(name) if name in self.parameters else len(node.args)
        return node.args[position] if position < len(node.args) else node.kwargs.get(name)


@dataclass(frozen=True)
class FunctionForm(Form, _NamedArguments):
    """A call of a function or method that is linear in its weight. A branch can be added to its output.

    Args:
        name, kind: see `Form`.
        targets: functions, names of methods, or `namespace::name` of ops that another library defines.
        parameters: names of the target's parameters, in order.
        dims: number of axes of the weight.
        weight, x: names of the parameters that are the weight and the input.
        repeats: names of the parameters that the branch node also gets.
        plain: (parameter, value): a node has the form only if the parameter is None or has this value.
        counted: names of the parameters that must not be negative.
        options: (name, value) of further keyword arguments of the branch node.
        needs: names of the parameters that must not be None.
        layout: `out_in` if the op reads the weight as [out, in], `in_out` if it reads [in, out].
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
        """Whether `source` is the node's weight and not another argument too, and all arguments match the form."""
        reads: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), reads.append)
        fits = all(self.argument(node, name) in (None, value) for name, value in self.plain)
        fits = fits and all((self.argument(node, name) or 0) >= 0 for name in self.counted)
        fits = fits and all(self.argument(node, name) is not None for name in self.needs)
        return fits and self.argument(node, self.weight) is source and reads.count(source) == 1

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the arguments of a node of this form."""
        repeated = {name: self.argument(node, name) for name in self.repeats}
        options = {name: value for name, value in repeated.items() if value is not None}
        bias = self.argument(node, "bias") if "bias" in self.parameters else None
        return Reading(
            self.argument(node, self.x), {**dict(self.options), **options}, self.argument(node, self.weight), bias
        )


@dataclass(frozen=True)
class WeightForm(_NamedArguments):
    """A call of an op that may be nonlinear in its weight. The branch is added to the weight before the op.

    The op gets `W + s B A`. The backward computes the full gradient of this sum.

    Args:
        name: unique name, which plans and messages contain.
        kind: kind of the sites, one of `lorasc_fx.spec.KINDS`. The targets of a spec may name it.
        targets: functions, torch ops, or names of methods.
        parameters: names of the target's parameters, in order.
        weight: name of the parameter that is the weight.
    """

    name: str
    kind: str
    targets: tuple[Callable[..., Any] | str, ...]
    parameters: tuple[str, ...]
    weight: str = "weight"


@dataclass(frozen=True)
class ModuleForm(Form):
    """A call of a module whose class is `module`, or a subclass that inherits the forward of `module`.

    Args:
        name, kind: see `Form`.
        module: the class, such as `nn.Linear`.
        layout: see `FunctionForm`.
    """

    module: type[nn.Module]
    layout: str = "out_in"

    def fits(self, module: nn.Module) -> bool:
        """Whether a module computes what the class computes: it has no hooks and inherits forward."""
        kind = type(module)
        if module._forward_pre_hooks or module._forward_hooks:
            return False
        # An assignment to `module.forward` also overrides the class.
        if not isinstance(module, self.module) or kind.forward is not self.module.forward or "forward" in vars(module):
            return False
        conv_forward = getattr(self.module, "_conv_forward", None)
        inherits = conv_forward is None or getattr(kind, "_conv_forward", None) is conv_forward
        # Embeddings with these options write into the weight or scale its gradient, which a branch cannot reproduce.
        return inherits and not any(getattr(module, option, None) for option in ("max_norm", "scale_grad_by_freq"))

    def reads(self, node: AnyNode, module: nn.Module | None) -> Reading:
        """Return the arguments of a call. The options come from attributes of the module."""
        x = node.args[0] if node.args else node.kwargs["input"]
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        weights = (f"{node.target}.weight", bias)
        if isinstance(module, nn.Embedding):
            return Reading(
                x, {"at": Placement.LOOKUP, "padding_idx": -1 if module.padding_idx is None else module.padding_idx}
            )
        if not isinstance(module, nn.modules.conv._ConvNd):
            return Reading(x, {}, *weights)
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
        options |= {"dilation": module.dilation, "groups": module.groups}
        if module.padding_mode != "zeros":  # forward calls F.pad before a convolution without padding
            pad = tuple(module._reversed_padding_repeated_twice)
            options |= {"padding": (0,) * len(module.stride), "pad": pad, "pad_mode": module.padding_mode}
        return Reading(x, options, *weights)


RegisteredForm = FunctionForm | ModuleForm | WeightForm

REGISTERED: OrderedDict[int, RegisteredForm] = OrderedDict()
"""{id of the handle: registered row}. `RemovableHandle` requires an OrderedDict."""


def registered_form(target: object) -> FunctionForm | WeightForm | None:
    """Return the registered row that has this target, or None."""
    for form in REGISTERED.values() if REGISTERED else ():
        if not isinstance(form, ModuleForm) and target in targets_of(form):
            return form
    return None


def registered_named(name: str) -> RegisteredForm | None:
    """Return the registered row of this name, or None."""
    return next((form for form in REGISTERED.values() if form.name == name), None)


def targets_of(form: FunctionForm | WeightForm) -> tuple[Any, ...]:
    """Return the targets of a row, and for each default overload (`op.default`) also its packet (`op`)."""
    ops = [target for target in form.targets if isinstance(target, OpOverload)]
    return (*form.targets, *(op.overloadpacket for op in ops if op._overloadname == "default"))


aten = torch.ops.aten

ON_WEIGHT = "on-weight"
"""Name of the form of a use at the weight itself: the branch is added to the weight before any op reads it."""


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
        options=(("at", Placement.LOOKUP),),
    )


def _grouped(name: str, target: Any, parameters: tuple[str, ...], by: str, *more: str) -> FunctionForm:
    return FunctionForm(
        name,
        "stacked",
        (target,),
        parameters,
        3,
        weight=parameters[1],
        x=parameters[0],
        repeats=("offs", *more),
        needs=("offs",),  # without offsets, the op is a batched product of two 3-d tensors
        plain=(("bias", None), ("out_dtype", None)),
        options=(("at", Placement.GROUPED), ("by", by)),
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
    # This op's backward computes the gradient of a frozen weight too. The branch node computes only the input gradient.
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
    _grouped("torch._grouped_mm", grouped_mm, ("self", "mat2", *_GROUPED), "aten::_grouped_mm"),
    FunctionForm(
        "F.embedding",
        "embedding",
        (F.embedding,),
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        2,
        repeats=("padding_idx",),
        plain=(("max_norm", None), *_EVENLY),
        counted=("padding_idx",),  # F.embedding counts a negative index from the end, but torch.embedding ignores one
        options=(("at", Placement.LOOKUP),),
    ),
    ModuleForm("nn.Linear", "linear", nn.Linear),
    ModuleForm("nn.Conv1d", "conv", nn.Conv1d),
    ModuleForm("nn.Conv2d", "conv", nn.Conv2d),
    ModuleForm("nn.Conv3d", "conv", nn.Conv3d),
    ModuleForm("nn.Embedding", "embedding", nn.Embedding),
)
"""The built-in forms, in the order in which they are tried."""

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
"""{name of an op in any dialect: kind of site}, for the ops that multiply by a weight or look up its rows."""

ADDED_FIRST = {"addmm", "baddbmm", "addbmm", "addmv"}
"""Names of the contractions that add their first argument to the product of the others."""

SCALES = {"mul", "div", "truediv", "multiply", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"}
"""Names of the ops that scale one argument by another."""

LIKE_ANOTHER = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
"""Names of the ops that read values of their first argument only. Of other tensors they read shape, dtype or device."""

_BY_TARGET = {target: form for form in FORMS if isinstance(form, FunctionForm) for target in form.targets}
_BY_NAME = {form.name: form for form in FORMS}


def form_named(name: str) -> FunctionForm | ModuleForm:
    """Return the row of this name.

    Raises:
        PassError: there is no such row, for example because a registered row was removed.
    """
    form = _BY_NAME.get(name) or registered_named(name)
    if form is None or isinstance(form, WeightForm):  # uses of a WeightForm are marked as ON_WEIGHT
        raise PassError(
            f"there is no form named {name!r}. Register it again (lorasc_fx.graph.register_form).",
            code="unknown-name",
        )
    return form


def built_in_form(target: Any) -> FunctionForm | None:
    """Return the built-in row that has this target, or None."""
    packet = getattr(target, "overloadpacket", target)
    return _BY_TARGET.get(target) or _BY_TARGET.get(getattr(packet, "_qualified_op_name", ""))


def is_form(name: str) -> bool:
    """Whether there is a form of this name."""
    return name == ON_WEIGHT or name in _BY_NAME or registered_named(name) is not None


def form_of(node: AnyNode, module: nn.Module | None) -> FunctionForm | ModuleForm | None:
    """Return the row for the target of a node, or None. `FunctionForm.fits` checks the arguments of the node."""
    if node.op in ("call_function", "call_method"):
        form = built_in_form(node.target) or registered_form(node.target)
        return form if isinstance(form, FunctionForm) else None
    if node.op == "call_module" and module is not None:
        rows = (*FORMS, *REGISTERED.values())
        return next((form for form in rows if isinstance(form, ModuleForm) and form.fits(module)), None)
    return None


def name_of(node: fx.Node) -> str:
    """Return the name of a node's target without namespace and overload, such as `linear` in all dialects."""
    return _name(node.target)


def has_weight_argument(name: str) -> bool:
    """Whether the second argument of an op of this name is its weight, as for linear and the convolutions."""
    return name == "linear" or name.startswith(("conv", "_conv"))


def contraction(node: fx.Node, reads: Collection[fx.Node]) -> str | None:
    """Return the kind of site if a node multiplies by one of `reads` or looks up rows of one. Otherwise None."""
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


def without_transposes(source: object, dims: int) -> tuple[Any, bool]:
    """Return (the node before any transposes of its last two axes, whether the number of transposes is odd)."""
    transposed = False
    while isinstance(source, fx.Node) and source.all_input_nodes and _transposes(source, dims):
        source, transposed = source.all_input_nodes[0], not transposed
    return source, transposed


def stored_layout(layout: str, transposed: bool) -> str:
    """Return the layout of the stored weight if an op reads it as `layout`, transposed before or not."""
    return {"out_in": "in_out", "in_out": "out_in"}[layout] if transposed else layout


def _transposes(node: fx.Node, dims: int) -> bool:
    """Whether a node only transposes the last two of the `dims` axes of its argument."""
    if node.target is getattr:
        return node.args[1:2] == ("mT",) or (dims == 2 and node.args[1:2] == ("T",))
    axes: Any = node.args[1:]
    if node.target in _T:
        return not axes and (dims == 2 or node.target is aten.mT.default)
    if node.target in _SWAP:
        return len(axes) == 2 and {axis % dims for axis in axes} == {dims - 2, dims - 1}
    if node.target in _PERMUTE:
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        return [axis % dims for axis in axes] == [*range(dims - 2), dims - 1, dims - 2]
    return False


BESIDE_KINDS = ("linear", "conv", "embedding")
"""Kinds that a registered `FunctionForm` or `ModuleForm` may have."""


def register_form(form: RegisteredForm) -> RemovableHandle:
    """Register an op whose weight can be adapted.

    `WeightForm` is correct for every op: the branch is added to the weight before the op. With `FunctionForm` and
    `ModuleForm`, the branch is added to the output of the op, which needs less memory. This is correct only if the op
    is linear in its weight, `op(x, W + D) = op(x, W) + D x`. Registration does not check linearity, so test the op.

    Graphs that were captured earlier are not changed.

    Args:
        form: the row. Its name appears in plans and messages; its `kind` is one of `lorasc_fx.spec.KINDS`.

    Returns:
        A handle like that of a torch hook. The form is registered until `handle.remove()`, or the end of
        `with handle:`.

    Raises:
        SpecError: the row is incomplete, its name is taken, or another row has its target.
    """
    if not isinstance(form, ModuleForm):
        # `torch.library.custom_op` returns a wrapper; graphs call the op inside it.
        ops = (target._opoverload if isinstance(target, CustomOpDef) else target for target in form.targets)
        form = replace(form, targets=tuple(ops))
    _check(form)
    handle = RemovableHandle(REGISTERED)
    REGISTERED[handle.id] = form
    return handle


def forms_missing(names: Iterable[str]) -> dict[str, str]:
    """Return {name: hint at similar registered names, or ""} for each name without a registered form."""
    registered = [form.name for form in REGISTERED.values()]
    return {name: nearest(name, registered) for name in names if name and registered_named(name) is None}


def _check(form: RegisteredForm) -> None:
    """Raise SpecError if another form has the name or a target, or if the kind or a parameter does not exist."""
    if is_form(form.name):
        raise SpecError(
            f"{form.name!r} is the name of another form. Choose another name, or call remove() on its handle."
        )
    kinds = KINDS if isinstance(form, WeightForm) else BESIDE_KINDS
    if form.kind not in kinds:
        raise SpecError(
            f"{form.name}: kind is {form.kind!r}{nearest(str(form.kind), kinds)}. Allowed: {', '.join(kinds)}.",
            code="unknown-name",
        )
    if isinstance(form, ModuleForm):
        return
    for name in (form.weight, form.x) if isinstance(form, FunctionForm) else (form.weight,):
        if name not in form.parameters:
            hint = nearest(name, form.parameters)
            raise SpecError(
                f"{form.name}: {name!r} is not one of its parameters{hint}. They are {form.parameters}.",
                code="unknown-name",
            )
    for target in targets_of(form):
        row = built_in_form(target) or registered_form(target)
        if row is not None:
            raise SpecError(f"{form.name}: {_shown(target)} is already a target of the form {row.name}.")
        schema = getattr(target, "_schema", None)
        arguments = tuple(argument.name for argument in schema.arguments) if schema is not None else form.parameters
        if arguments[: len(form.parameters)] != form.parameters:
            raise SpecError(f"{form.name}: parameters is {form.parameters}, but {_shown(target)} takes {arguments}.")


def _name(target: object) -> str:
    """Return the name of a target without namespace and overload."""
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


def _shown(target: object) -> str:
    """Return the name of a target for a message."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
