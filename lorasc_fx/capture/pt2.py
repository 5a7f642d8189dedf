"""A .pt2 archive of which nothing is run while it is opened: what torch reads is a copy without what could be.

`torch.export.load` unpickles the example inputs, and weights and constants that an archive says are pickled; evaluates
the text of sizes (sympy) and of guards, imports what the tree of the inputs names, and writes the names of nodes into
the source of a forward. So an archive is read here first, as a zip of JSON and raw numbers; every text in it is held
against what an export of a plain model has there, and torch is given a new archive of those parts alone. What needs
more is refused: whoever trusts the file loads it and gives the program.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.errors import CaptureError

__all__ = ["sanitized"]

_PARTS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*"
)
_SAMPLES, _EXTRA = "data/sample_inputs/model.pt", "extra/"
_MODEL = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_LONGEST = 1 << 28
"""Bytes of JSON in an archive, at most."""

_TEXT = re.compile(r"[\w .,:;/+<>=@\-]*")
_NAME = re.compile(r"\w*")
_PATH = re.compile(r"(?!__)\w*(\.(?!__)\w+)*")
_KEY = re.compile(r"\w[\w.\-]*")
_NAMESPACES = "aten|prims|torchvision|quantized_decomposed|torchao"
_TARGET = re.compile(
    rf"torch\.ops\.({_NAMESPACES})\.([a-zA-Z]\w*|_[a-zA-Z]\w*|__(and|or|xor|lshift|rshift)__)\.[a-zA-Z]\w*"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|invoke_subgraph|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast|tag_activation_checkpoint)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt|pow)|torch\.(sym_\w+|_sym_sqrt)"
)
_TEXT_ARGUMENTS = {
    "UPLO", "activation", "algorithm", "api_name", "approximate", "assert_msg", "driver", "equation", "indexing",
    "interpolation", "mapping_type", "mode", "norm", "ord", "p", "pad_mode", "padding", "padding_side", "reduce",
    "rounding_mode", "side",
}  # fmt: skip
"""Arguments of ops that are texts and choose among ways to compute; others name files."""
_CHECKS = re.compile(
    r"aten::(_assert_(async|scalar|tensor_metadata)|sym_constrain_range(_for_size)?|_linalg_check_errors)"
)
"""Ops that return nothing, and compute nothing: exports hold them as checks."""
_FOREIGN = ("Any", "Stream", "Future", "Storage", "Capsule", "__torch__")
"""Kinds of arguments that are no tensors and no numbers."""
_SIZES = (
    "size", "sizes", "shape", "target_shape", "repeats", "dims", "output_size", "n", "m", "row",
    "col", "steps", "window_length", "num_classes", "minlength",
)  # fmt: skip
"""Arguments of ops that say how large the result is."""
_VIEWS = re.compile(
    r"torch\.ops\.\w+\.(view\w*|\w*reshape\w*|_unsafe_view|unflatten|slice\w*|permute\w*|flip|roll|as_strided)\..*"
)
_ROOM = 1 << 22
"""Entries of tensors that an archive may claim beyond its bytes."""
_WIDEST = 1 << 26
"""Entries that a constant in the graph may have beyond those bytes: an attention mask over 8,192 positions."""
_TREES = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)
_SIZE = re.compile(
    r"FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural"
    r"|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    r"|RoundDecimal|ToFloat|Identity|Min|Max|Abs|Eq|Ne|Lt|Le|Gt|Ge|Not|And|Or|Add|Mul|Pow|ceiling|floor|sqrt"
    r"|Symbol|Integer|Rational|Equality|Unequality|LessThan|GreaterThan|StrictLessThan|StrictGreaterThan"
    r"|[suzf]+\d+|True|False|true|false|oo|int_oo"
)
_SYMBOL = re.compile(r"[suzf]+\d+")
_ASSUMED = ("positive", "nonnegative", "nonzero", "integer", "real", "finite")
_GUARD = ("L", "math")
_ASKED = ("size", "stride", "storage_offset", "ceil", "floor", "trunc", "sqrt", "pow")
_GROWING = ("LShift", "PowByNatural", "FloatPow", "Pow")
_MOST_POWER = 64
_PLAIN = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.Load, ast.Constant, ast.Name, ast.Call, ast.Attribute, ast.Subscript,
)  # fmt: skip


class _Refused(Exception):
    """What an archive holds that only its owner can vouch for."""


def sanitized(path: Path) -> io.BytesIO:
    """Return an archive with the program of a .pt2 file, in which there is nothing that opening it would run.

    Raises:
        CaptureError: the file holds what has to be unpickled, imported or evaluated; names the part.
        OSError, ValueError, KeyError, zipfile.BadZipFile: it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _copied(archive, path.stat().st_size)
    except _Refused as fault:
        raise CaptureError(
            f"{path}: {fault}, which can do more than describe a model, and is not opened. If you trust the file, give "
            "the program itself: adapt(torch.export.load(path), ...)",
            code="unsafe-pt2",
        ) from None


def _copied(archive: zipfile.ZipFile, size: int) -> io.BytesIO:
    parts = _parts(archive)
    if sum(info.file_size for info in parts.values()) > size:
        raise _Refused("its parts are larger than the file")
    if _MODEL not in parts or any(name not in parts for name in _CONFIGS):
        raise _Refused("it has not the parts of an archive that this torch writes (an older format is pickled)")
    program = _json(archive, parts[_MODEL])
    _check(program, "", "the program")
    _check_constants(program, size)
    _without(program)
    texts = {_MODEL: json.dumps(program).encode(), _SAMPLES: b""}
    claimed: set[tuple[Any, ...]] = set()
    for name in _CONFIGS:
        config = _json(archive, parts[name])
        claimed |= _claimed(config, name.rpartition("/")[0], parts)
        texts[name] = json.dumps(config).encode()
    if sum(map(math.prod, (sizes for _, sizes, *_ in claimed))) > size + _ROOM:
        raise _Refused(f"its tensors have more entries than the {size} bytes of the file can hold")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as copy:
        for name, info in parts.items():
            if not name.startswith(_EXTRA):
                copy.writestr(f"model/{name}", texts[name] if name in texts else archive.read(info))
    made.seek(0)
    return made


def _parts(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the parts of an archive by their names below its one folder."""
    parts: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if name in parts or not _PARTS.fullmatch(name):
            raise _Refused(f"it holds {info.filename!r:.80}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _Refused(f"its {name!r:.80} is compressed")
        parts[name] = info
    return parts


def _json(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    if info.file_size > _LONGEST:
        raise _Refused(f"its {info.filename!r:.80} has {info.file_size} bytes")
    return json.loads(archive.read(info).decode("utf-8"))


def _without(program: Any) -> None:
    """Take away what is only for people: where a node came from, as text that torch would look up."""
    graphs = [program["graph_module"]["graph"]]
    program["graph_module"] |= {"metadata": {}, "treespec_namedtuple_fields": {}}
    while graphs:
        for node in graphs.pop()["nodes"]:
            node["metadata"] = {}
            graphs += [each["graph"] for each in _tables(node["inputs"]) if isinstance(each.get("graph"), dict)]


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(each)


def _check(value: Any, key: str, place: str) -> None:
    """Refuse a text that stands where torch would take it for more than a name."""
    if isinstance(value, dict):
        if key in ("metadata", "treespec_namedtuple_fields"):
            return  # taken away
        for name, each in value.items():
            if not _NAME.fullmatch(name) or (name in ("custom_obj_values", "as_custom_obj", "custom_obj") and each):
                raise _Refused(f"{place} has {name!r:.80}")
            _check(each, name, f"{place}.{name}"[-200:])
    elif isinstance(value, list):
        for each in value:
            _check(each, key, place)
    elif isinstance(value, str) and not _fits(value, key):
        raise _Refused(f"{place} is {value!r:.80}")


def _fits(text: str, key: str) -> bool:
    if key in ("target", "as_operator"):
        return _TARGET.fullmatch(text) is not None and _is_pure(text)
    if key == "expr_str":
        return _computes(text)
    if key == "guards_code":
        return _computes(text, guard=True)
    if key in ("in_spec", "out_spec"):
        return text == "" or _is_tree(json.loads(text))
    if key in ("as_string", "as_strings", "torch_version", "verifiers"):
        return _TEXT.fullmatch(text) is not None
    dotted = key in ("parameter_name", "buffer_name", "tensor_constant_name", "fqn")
    return (_PATH if dotted else _NAME).fullmatch(text) is not None


def _is_pure(target: str) -> bool:
    """Whether an op, if it is one of torch.ops, computes tensors of tensors and touches nothing else: no file, process,
    stream or setting.
    """
    if not target.startswith("torch.ops.") or target.startswith("torch.ops.higher_order."):
        return True
    namespace, name, overload = target.split(".")[2:]
    qualified = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    if not torch._C._dispatch_has_kernel(qualified):  # unknown here, or of TorchScript alone, as aten::save is
        return False
    schema = torch._C._get_schema(f"{namespace}::{name}", "" if overload == "default" else overload)
    if _CHECKS.fullmatch(schema.name) is None and not schema.returns:
        return False
    kinds = [(argument.name, str(argument.type)) for argument in schema.arguments]
    return all("str" not in kind or name in _TEXT_ARGUMENTS for name, kind in kinds) and not any(
        foreign in kind for _, kind in kinds for foreign in _FOREIGN
    )


def _check_constants(program: Any, size: int) -> None:
    """Refuse ops that make a tensor of any size of literals."""
    for node in _tables(program["graph_module"]["graph"]):
        if not isinstance(node.get("target"), str) or _VIEWS.fullmatch(node["target"]):
            continue
        if (entries := _made(node)) > size + _WIDEST:
            raise _Refused(f"{node['target']} makes a tensor of {entries:.0f} entries")


def _made(node: Mapping[str, Any]) -> float:
    """Return how many entries the result of an op has at least, by its literals."""
    literals = {
        argument["name"]: list(_numbers(argument["arg"]))
        for argument in node.get("inputs", ())
        if isinstance(argument.get("name"), str) and isinstance(argument.get("arg"), dict)
    }
    name = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]
    if name == "arange":
        start, end, step = ((literals.get(key) or [usual])[0] for key, usual in (("start", 0), ("end", 0), ("step", 1)))
        return abs(end - start) / abs(step) if step else math.inf
    entries = float(math.prod(max(1, abs(number)) for key in _SIZES for number in literals.get(key, ())))
    if name == "eye" and "m" not in literals:
        entries **= 2
    return max(entries, *(literals.get("pad") or [0]), 0)


def _numbers(argument: Mapping[str, Any]) -> Iterator[float]:
    """Yield the literal numbers of an argument."""
    for value in argument.values():
        for each in value if isinstance(value, list) else (value,):
            number = each.get("as_int", each.get("as_float")) if isinstance(each, dict) else each
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield number


def _is_tree(spec: Any) -> bool:
    """Whether a spec of torch's pytree has containers of Python only, with plain keys."""
    if not isinstance(spec, list) or len(spec) != 2 or spec[0] != 1:
        return False
    left = [spec[1]]
    while left:
        each = left.pop()
        if not isinstance(each, dict) or each.get("type") not in _TREES:
            return False
        context = each.get("context")
        keys = json.loads(context) if isinstance(context, str) else context
        if keys is not None and not (isinstance(keys, list) and all(map(_is_key, keys))):
            return False
        left += each["children_spec"]
    return True


def _is_key(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and _KEY.fullmatch(key) is not None)


def _computes(text: str, guard: bool = False) -> bool:
    """Whether a text is arithmetic on sizes, and nothing else; a guard may ask inputs for theirs."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_plain(node, guard) for node in ast.walk(tree))


def _plain(node: ast.AST, guard: bool) -> bool:
    match node:
        case ast.Constant(value=value):
            if isinstance(value, str):  # the name of an input, or of a symbol
                return (_TEXT if guard else _SYMBOL).fullmatch(value) is not None
            return value is None or (isinstance(value, (int, float)) and abs(value) < 2**64)
        case ast.Name(id=name):
            return _SIZE.fullmatch(name) is not None or (guard and name in _GUARD)
        case ast.Attribute(attr=name):
            return guard and name in _ASKED
        case ast.Subscript():
            return guard
        case ast.BinOp(op=ast.Pow() | ast.LShift(), right=right):
            return _small(right)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str())], keywords=keywords):
            return all(each.arg in _ASSUMED for each in keywords)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name not in _GROWING or all(map(_small, args[1:]))
        case ast.Call(func=ast.Attribute(), keywords=[]) | ast.keyword():
            return True
        case _:
            return isinstance(node, _PLAIN) and not isinstance(node, ast.Call)


def _small(node: ast.expr) -> bool:
    """Whether an exponent cannot make a number of any size out of a short text."""
    match node:
        case ast.UnaryOp(operand=inner) | ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            return _small(inner)
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and abs(node.value) <= _MOST_POWER


def _claimed(config: Any, folder: str, parts: Mapping[str, zipfile.ZipInfo]) -> set[tuple[Any, ...]]:
    """Return part, sizes, strides and offset of each tensor; tied ones have the same.

    A tensor may be a view of its part, of strides of 0, that takes any memory once it is copied.
    """
    found = set()
    if set(config) != {"config"}:
        raise _Refused(f"{folder} has a table of an unknown kind")
    for name, payload in config["config"].items():
        where = f"{name!r:.80} of {folder}"
        info = parts.get(f"{folder}/{payload['path_name']}")
        if payload["use_pickle"] is not False or payload["tensor_meta"] is None:
            raise _Refused(f"{where} is pickled")
        if not _PATH.fullmatch(name) or info is None:
            raise _Refused(f"{where} is no name of a tensor, or has none")
        _check(payload, "", where)
        sizes = [size.get("as_int") for size in payload["tensor_meta"]["sizes"]]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise _Refused(f"{where} has no plain sizes")
        if math.prod(sizes) and not info.file_size:
            raise _Refused(f"{where} has {math.prod(sizes)} entries in {info.file_size} bytes")
        strides, offset = (json.dumps(payload["tensor_meta"].get(key)) for key in ("strides", "storage_offset"))
        found.add((info.filename, tuple(sizes), strides, offset))
    return found
