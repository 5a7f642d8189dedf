"""The table of forms: the spellings of a node beside which a branch can stand, one row each, and the ops that contract.

A row says which node it is, where its input and weight stand, how the op reads the weight, and which of its arguments
the branch must repeat. Adding an operator is adding a row here and a case in tests/passes; no pass changes. Three
dialects: ATen (torch.export), functional (the builtins that F.linear and F.conv* trace to, and methods) and modules
(`call_module`).

An op that multiplies by a weight, or looks rows of it up, and stands in no row is in CONTRACTIONS: its branch stands
on the weight.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lorasc_fx.branch import Branch, ConvBranch, DoraBranch, MatrixBranch
from lorasc_fx.errors import PassError
from lorasc_fx.graph.form import AnyNode, FunctionForm, ModuleForm, WeightForm
from lorasc_fx.graph.own_forms import OWN, own_form, own_named
from lorasc_fx.plan import Site

__all__ = [
    "ADDED_FIRST",
    "BRANCH_OF",
    "CONTRACTIONS",
    "FORMS",
    "LIKE_ANOTHER",
    "ON_CHOSEN",
    "ON_WEIGHT",
    "SCALES",
    "branch_class",
    "built_in",
    "contraction",
    "form_named",
    "form_of",
    "is_form",
    "name_of",
    "transposes",
    "weighs",
]

aten = torch.ops.aten

ON_WEIGHT = "on-weight"
"""Name of the form in which a branch stands on the weight, before whatever computes with it."""

ON_CHOSEN = "on-chosen"
"""Name of the form in which a branch stands on the matrix that an input chose out of a stack (`chosen`)."""


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
        options=(("lookup", True),),
    )


def _grouped(name: str, target: Any, parameters: tuple[str, ...], by: str) -> FunctionForm:
    return FunctionForm(
        name,
        "experts",
        (target,),
        parameters,
        3,
        weight=parameters[1],
        x=parameters[0],
        repeats=("offs",),
        needs=("offs",),  # without, or with rows that are no matrix, it is another product
        plain=(("bias", None), ("out_dtype", None)),
        options=(("by", by),),
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
    _grouped(_FALLBACK, _FALLBACK, ("input", "weight", "offs"), _FALLBACK),
    FunctionForm("F.linear", "linear", (F.linear,), _LINEAR, 2),
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
        counted=("padding_idx",),  # here, and not in torch.embedding, a row may be counted from the end
        options=(("lookup", True),),
    ),
    ModuleForm("nn.Linear", "linear", nn.Linear),
    ModuleForm("nn.Conv1d", "conv", nn.Conv1d),
    ModuleForm("nn.Conv2d", "conv", nn.Conv2d),
    ModuleForm("nn.Conv3d", "conv", nn.Conv3d),
    ModuleForm("nn.Embedding", "embedding", nn.Embedding),
)
"""Every form beside which a branch stands, in the order in which they are tried."""

CONTRACTIONS: dict[str, str] = {
    **dict.fromkeys(("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "addbmm", "einsum", "tensordot"), "linear"),
    **dict.fromkeys(
        ("mv", "addmv", "inner", "bilinear", "_trilinear", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"), "linear"
    ),
    **dict.fromkeys(("__matmul__", "__rmatmul__", "__imatmul__", "linalg_matmul", "chain_matmul"), "linear"),
    **dict.fromkeys(("linalg_multi_dot", "multi_dot", "linalg_vecdot", "vecdot", "_scaled_mm", "_int_mm"), "linear"),
    **dict.fromkeys(("conv_tbc", "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "deform_conv2d"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"),
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), "embedding"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"), "recurrent"),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell"), "recurrent"),
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), "linear"),
    **dict.fromkeys(("multi_head_attention_forward", "scaled_dot_product_attention"), "linear"),
}
"""Names of the ops that multiply by a weight or look it up, whatever their dialect, with the kind of site they make."""

ADDED_FIRST = {"addmm", "baddbmm", "addbmm", "addmv"}
"""Those that only add their first argument."""

SCALES = {"mul", "div", "truediv", "multiply", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"}
"""Names of the ops that scale one argument by another."""

LIKE_ANOTHER = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
"""Names of the ops that read no values but those of their first argument."""

BRANCH_OF: dict[str, type[Branch]] = {
    **dict.fromkeys(("linear", "embedding", "recurrent", "experts"), MatrixBranch),
    "conv": ConvBranch,
}
"""The branch of each kind of site, without magnitudes."""


def branch_class(site: Site) -> type[Branch]:
    """Return the class of a site's branch."""
    return DoraBranch if site.use_dora else BRANCH_OF[site.kind]


_BY_TARGET = {target: form for form in FORMS if isinstance(form, FunctionForm) for target in form.targets}
_BY_NAME = {form.name: form for form in FORMS}


def form_named(name: str) -> FunctionForm | ModuleForm:
    """Return the row of this name.

    Raises:
        PassError: it is a registered one, and is so no more.
    """
    form = _BY_NAME.get(name) or own_named(name)
    if form is None or isinstance(form, WeightForm):  # the latter are no node's
        raise PassError(f"no form is named {name!r} here; register it again (lorasc_fx.graph.register_form)")
    return form


def built_in(target: Any) -> FunctionForm | None:
    """Return the row of this table whose nodes call this target."""
    packet = getattr(target, "overloadpacket", target)
    return _BY_TARGET.get(target) or _BY_TARGET.get(getattr(packet, "_qualified_op_name", ""))


def is_form(name: str) -> bool:
    """Whether a row has this name now."""
    return name in (ON_WEIGHT, ON_CHOSEN) or name in _BY_NAME or own_named(name) is not None


def form_of(node: AnyNode, module: nn.Module | None) -> FunctionForm | ModuleForm | None:
    """Return the row that fits a node; `module` is the one that a `call_module` calls."""
    if node.op in ("call_function", "call_method"):
        form = built_in(node.target) or own_form(node.target)
        return form if isinstance(form, FunctionForm) else None
    if node.op == "call_module" and module is not None:
        rows = (*FORMS, *OWN.values())
        return next((form for form in rows if isinstance(form, ModuleForm) and form.fits(module)), None)
    return None


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls, whatever the dialect."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


def weighs(name: str) -> bool:
    """Whether an op of this name takes a weight as its second argument, as linear and the convolutions do."""
    return name == "linear" or name.startswith(("conv", "_conv"))


def contraction(node: fx.Node, reads: Collection[fx.Node]) -> str | None:
    """Return the kind of site that a node makes of a weight which it multiplies by or looks up, or None.

    `reads` are the node's arguments that are made of the weight; a matrix that is only added is not multiplied by.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    own = own_form(node.target)
    if isinstance(own, WeightForm):
        return own.kind if own.argument(node, own.weight) in reads else None
    if own is not None:
        return own.kind if any(source in reads for source in node.all_input_nodes) else None
    name = name_of(node)
    multiplied: list[fx.Node] = []
    fx.node.map_arg((node.args[1 if name in ADDED_FIRST else 0 :], node.kwargs), multiplied.append)
    return CONTRACTIONS.get(name) if any(source in reads for source in multiplied) else None


_T = (aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t, "t")
_SWAP = (aten.transpose.int, torch.transpose, torch.swapaxes, "transpose", "swapaxes")
_PERMUTE = (aten.permute.default, torch.permute, "permute")


def transposes(node: fx.Node, dims: int = 2) -> bool:
    """Whether a node turns a matrix around, or each in a stack of `dims` axes, and does nothing else."""
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
