"""A safe read of a .pt2 archive: torch gets a sanitized copy of it, in which nothing can run.

`torch.export.load` unpickles example inputs, and weights and constants that the archive declares as pickled; evaluates
symbolic sizes (sympy); imports what the tree of the inputs names; and writes node names into the source of a forward.
It has no `weights_only`. So an archive is read here first, as a zip of JSON and raw tensors: example inputs, guards on
them and node metadata are left out, every string is compared with what an export writes at its place, and anything else
is refused. Who trusts the file loads it with torch and passes the program.

Opening takes memory in proportion to the file. A run of the graph takes what the graph computes, as with any model.
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

_MODEL = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_SAMPLES, _EXTRA = "data/sample_inputs/model.pt", "extra/"
_PARTS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*"
)
_MAX_JSON = 1 << 28
"""Bytes of JSON in an archive, at most."""
_MAX_CLAIMED = 1 << 22
"""Entries that the tensors of an archive may claim beyond its bytes (expanded buffers)."""
_MAX_LITERAL = 1 << 26
"""Entries beyond those bytes of a tensor that one op makes of literals: an attention mask over 8,192 positions."""
_MAX_POWER = 64
"""Product of the exponents that apply to one term of a symbolic size, at most: a tower makes a number of any length."""

_TEXT = re.compile(r"[\w .,:;/+<>=@\-]*")
_NAME = re.compile(r"\w*")
_PATH = re.compile(r"(?!__)\w*(\.(?!__)\w+)*")
_KEY = re.compile(r"\w[\w.\-]*")
_SYMBOL = re.compile(r"[suzf]+\d+")
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed|torchao)"
    r"\.([a-zA-Z]\w*|_[a-zA-Z]\w*|__(and|or|xor|lshift|rshift)__)\.[a-zA-Z]\w*"
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
"""String arguments of ops that choose how to compute; others name files."""
_CHECKS = re.compile(
    r"aten::(_assert_(async|scalar|tensor_metadata)|sym_constrain_range(_for_size)?|_linalg_check_errors)"
)
"""Ops that return nothing and compute nothing: exports hold them as checks."""
_FOREIGN = ("Any", "Stream", "Future", "Storage", "Capsule", "__torch__")
"""Types of arguments that are neither tensors nor numbers."""
_SIZES = (
    "size", "sizes", "shape", "target_shape", "repeats", "dims", "output_size", "n", "m", "row",
    "col", "steps", "window_length", "num_classes", "minlength",
)  # fmt: skip
"""Arguments of ops that say how large the result is."""
_VIEWS = re.compile(
    r"torch\.ops\.\w+\.(view\w*|\w*reshape\w*|_unsafe_view|unflatten|slice\w*|permute\w*|flip|roll|as_strided)\..*"
)
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)
_FUNCTIONS = re.compile(
    r"FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural"
    r"|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    r"|RoundDecimal|ToFloat|Identity|Min|Max|Abs|Eq|Ne|Lt|Le|Gt|Ge|Not|And|Or|Add|Mul|Pow|ceiling|floor|sqrt"
    r"|Symbol|Integer|Rational|Equality|Unequality|LessThan|GreaterThan|StrictLessThan|StrictGreaterThan"
    r"|[suzf]+\d+|True|False|true|false|oo|int_oo"
)
"""Names in symbolic sizes."""
_ASSUMPTIONS = ("positive", "nonnegative", "nonzero", "integer", "real", "finite")
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.Load,
)  # fmt: skip


class _Refused(Exception):
    """The archive holds what only its owner can vouch for."""


def sanitized(path: Path) -> io.BytesIO:
    """Return a copy of a .pt2 archive that `torch.export.load` can open without running anything.

    Raises:
        CaptureError: the file holds what would be unpickled, imported or evaluated; names the part.
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
    program["guards_code"] = []  # torch checks them where there are example inputs; ranges of sizes stay
    for table in _tables(program):
        table |= {key: {} for key in ("metadata", "treespec_namedtuple_fields") if key in table}
    _check(program, "", "the program")
    _check_literals(program, size)
    texts = {_MODEL: json.dumps(program).encode(), _SAMPLES: b""}
    claims: set[tuple[Any, ...]] = set()
    for name in _CONFIGS:
        config = _json(archive, parts[name])
        claims |= _claims(config, name.rpartition("/")[0], parts)
        texts[name] = json.dumps(config).encode()
    if sum(map(math.prod, (sizes for _, sizes, *_ in claims))) > size + _MAX_CLAIMED:
        raise _Refused(f"its tensors have more entries than the {size} bytes of the file can hold")
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as copy:
        for name, info in parts.items():
            if not name.startswith(_EXTRA):
                copy.writestr(f"model/{name}", texts[name] if name in texts else archive.read(info))
    result.seek(0)
    return result


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
    if info.file_size > _MAX_JSON:
        raise _Refused(f"its {info.filename!r:.80} has {info.file_size} bytes")
    return json.loads(archive.read(info).decode("utf-8"))


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in a value, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(item)


def _check(value: Any, key: str, path: str) -> None:
    """Refuse a string that torch would take for more than a name."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _NAME.fullmatch(name) or (name in ("custom_obj_values", "as_custom_obj", "custom_obj") and item):
                raise _Refused(f"{path} has {name!r:.80}")
            _check(item, name, f"{path}.{name}"[-200:])
    elif isinstance(value, list):
        for item in value:
            _check(item, key, path)
    elif isinstance(value, str) and not _is_allowed(value, key):
        raise _Refused(f"{path} is {value!r:.80}")


def _is_allowed(text: str, key: str) -> bool:
    match key:
        case "target" | "as_operator":
            return _TARGET.fullmatch(text) is not None and _is_pure(text)
        case "expr_str":
            return _is_size(text)
        case "in_spec" | "out_spec":
            return text == "" or _is_tree(json.loads(text))
        case "as_string" | "as_strings" | "torch_version" | "verifiers":
            return _TEXT.fullmatch(text) is not None
        case "parameter_name" | "buffer_name" | "tensor_constant_name" | "fqn":
            return _PATH.fullmatch(text) is not None
    return _NAME.fullmatch(text) is not None


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
    types = [(argument.name, str(argument.type)) for argument in schema.arguments]
    return all("str" not in kind or name in _TEXT_ARGUMENTS for name, kind in types) and not any(
        foreign in kind for _, kind in types for foreign in _FOREIGN
    )


def _is_size(text: str) -> bool:
    """Whether a string is arithmetic on symbols, and nothing else."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    waiting: list[tuple[ast.AST, float]] = [(tree, 1.0)]
    while waiting:
        node, power = waiting.pop()  # the product of the exponents of this node and above it
        match node:
            case ast.Constant(value=str(value)):
                allowed = _SYMBOL.fullmatch(value) is not None
            case ast.Constant(value=int() | float() as value):
                allowed = abs(value) < 2**64
            case ast.Name(id=name):
                allowed = _FUNCTIONS.fullmatch(name) is not None
            case (
                ast.BinOp(op=ast.Pow() | ast.LShift(), right=exponent)
                | ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow" | "LShift"), args=[_, exponent])
            ):
                power *= _exponent(exponent)
                allowed = not isinstance(node, ast.Call) or not node.keywords
            case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str())], keywords=keywords):
                allowed = all(keyword.arg in _ASSUMPTIONS for keyword in keywords)
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                allowed = name not in ("Pow", "PowByNatural", "FloatPow", "LShift")
            case _:
                allowed = isinstance(node, (*_ARITHMETIC, ast.keyword))
        if not allowed or power > _MAX_POWER:
            return False
        waiting += [(child, power) for child in ast.iter_child_nodes(node)]
    return True


def _exponent(node: ast.expr) -> float:
    """Return the size of a literal exponent, at least 1; infinity for any other."""
    match node:
        case ast.UnaryOp(operand=literal) | ast.Call(func=ast.Name(id="Integer"), args=[literal], keywords=[]):
            return _exponent(literal)
        case ast.Constant(value=int() | float() as value):
            return max(1.0, abs(value))
    return math.inf


def _is_tree(spec: Any) -> bool:
    """Whether a spec of torch's pytree has containers of Python only, with plain keys."""
    if not isinstance(spec, list) or len(spec) != 2 or spec[0] != 1:
        return False
    waiting = [spec[1]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or node.get("type") not in _CONTAINERS:
            return False
        context = node.get("context")
        keys = json.loads(context) if isinstance(context, str) else context
        if keys is not None and not (isinstance(keys, list) and all(map(_is_key, keys))):
            return False
        waiting += node["children_spec"]
    return True


def _is_key(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and _KEY.fullmatch(key) is not None)


def _check_literals(program: Any, size: int) -> None:
    """Refuse an op that makes a tensor of any size of literals."""
    for node in _tables(program["graph_module"]["graph"]):
        if not isinstance(node.get("target"), str) or _VIEWS.fullmatch(node["target"]):
            continue
        if (entries := _literal_entries(node)) > size + _MAX_LITERAL:
            raise _Refused(f"{node['target']} makes a tensor of {entries:.0f} entries")


def _literal_entries(node: Mapping[str, Any]) -> float:
    """Return how many entries the result of an op has at least, by its literals."""
    literals = {
        argument["name"]: list(_numbers(argument["arg"]))
        for argument in node.get("inputs", ())
        if isinstance(argument.get("name"), str) and isinstance(argument.get("arg"), dict)
    }
    name = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]
    if name == "arange":
        start, end, step = (
            (literals.get(key) or [default])[0] for key, default in (("start", 0), ("end", 0), ("step", 1))
        )
        return abs(end - start) / abs(step) if step else math.inf
    entries = float(math.prod(max(1, abs(number)) for key in _SIZES for number in literals.get(key, ())))
    if name == "eye" and "m" not in literals:
        entries **= 2
    return max(entries, *(literals.get("pad") or [0]), 0)


def _numbers(argument: Mapping[str, Any]) -> Iterator[float]:
    """Yield the literal numbers of an argument."""
    for value in argument.values():
        for item in value if isinstance(value, list) else (value,):
            number = item.get("as_int", item.get("as_float")) if isinstance(item, dict) else item
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield number


def _claims(config: Any, folder: str, parts: Mapping[str, zipfile.ZipInfo]) -> set[tuple[Any, ...]]:
    """Return part, sizes, strides and offset of each tensor; tied ones have the same.

    A tensor may be a view of its part, of strides of 0, that takes any memory once it is copied.
    """
    claims = set()
    if set(config) != {"config"}:
        raise _Refused(f"{folder} has a table of an unknown kind")
    for name, payload in config["config"].items():
        entry = f"{name!r:.80} of {folder}"
        info = parts.get(f"{folder}/{payload['path_name']}")
        if payload["use_pickle"] is not False or payload["tensor_meta"] is None:
            raise _Refused(f"{entry} is pickled")
        if not _PATH.fullmatch(name) or info is None:
            raise _Refused(f"{entry} is no name of a tensor, or has none")
        _check(payload, "", entry)
        sizes = [size.get("as_int") for size in payload["tensor_meta"]["sizes"]]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise _Refused(f"{entry} has no plain sizes")
        if math.prod(sizes) and not info.file_size:
            raise _Refused(f"{entry} has {math.prod(sizes)} entries in {info.file_size} bytes")
        strides, offset = (json.dumps(payload["tensor_meta"].get(key)) for key in ("strides", "storage_offset"))
        claims.add((info.filename, tuple(sizes), strides, offset))
    return claims
