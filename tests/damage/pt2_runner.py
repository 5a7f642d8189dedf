"""Opens hostile .pt2 archives, watched: `python -m tests.damage.pt2_runner FOLDER` prints what came of each.

In a process of its own, as an audit hook cannot be taken away again.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 - the attacker's tool
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lorasc_fx as lx
from lorasc_fx.capture import open_model
from tests.errors.models import inputs, mlp

MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
Parts = dict[str, bytes]


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def saved(canary: Path) -> bytes:
    data = io.BytesIO()
    torch.save(({"x": Payload(canary)},), data)
    return data.getvalue()


def edited(part: str, change: Callable[[Any], Any]) -> Callable[[Parts, Path], None]:
    def run(parts: Parts, canary: Path) -> None:
        value = json.loads(parts[part])
        changed = change(value)
        parts[part] = json.dumps(value if changed is None else changed).encode()

    return run


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def renamed(program: Any, new: str) -> Any:
    """The first node's name, wherever it stands, is another."""
    old = graph(program)["nodes"][0]["outputs"][0]["as_tensor"]["name"]
    return json.loads(json.dumps(program).replace(json.dumps(old), json.dumps(new)))


def payload(config: Any, **fields: Any) -> None:
    next(iter(config["config"].values())).update(fields)


def size(program: Any, text: str) -> None:
    entry = next(iter(graph(program)["tensor_values"].values()))
    entry["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}


def signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def tree(program: Any, key: str, spec: Any) -> None:
    signature(program)[key] = json.dumps([1, spec])


def pickled_samples(parts: Parts, canary: Path) -> None:
    parts[SAMPLES] = saved(canary)


def pickled_weight(parts: Parts, canary: Path) -> None:
    edited(WEIGHTS, lambda config: payload(config, use_pickle=True))(parts, canary)
    parts["data/weights/weight_0"] = saved(canary)


def legacy_weights(parts: Parts, canary: Path) -> None:
    parts["data/weights/model.pt"] = saved(canary)


def custom_object(parts: Parts, canary: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edited(CONSTANTS, lambda config: config["config"].update(evil=entry))(parts, canary)
    parts["data/constants/opaque_obj_0"] = pickle.dumps(Payload(canary))


def of_the_old_format(parts: Parts, canary: Path) -> None:
    program = parts[MODEL]
    parts.clear()
    parts |= {"version": b"8.14", "serialized_exported_program.json": program}
    parts |= {f"serialized_{name}.pt": saved(canary) for name in ("state_dict", "constants", "example_inputs")}


def compiled(parts: Parts, canary: Path) -> None:
    parts["data/aotinductor/model/evil.so"] = b"\x7fELF"


def sized(config: Any) -> None:
    entry = next(iter(config["config"].values()))
    entry["tensor_meta"]["sizes"] = [{"as_int": 2**40}, {"as_int": 2**20}]


def emptied(parts: Parts, canary: Path) -> None:
    edited(WEIGHTS, sized)(parts, canary)
    parts["data/weights/weight_0"] = b""


def strides_of_0(config: Any, size: int = 4096) -> None:
    for entry in config["config"].values():
        sizes = [{"as_int": size}] * len(entry["tensor_meta"]["sizes"])
        entry["tensor_meta"].update(sizes=sizes, strides=[{"as_int": 0}] * len(sizes))


def calls(program: Any, target: str, **arguments: Any) -> None:
    """The first node is a call of this op, on the input."""
    given = graph(program)["inputs"][-1]
    inputs = [{"name": "self", "arg": given, "kind": 1}]
    inputs += [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
    graph(program)["nodes"][0].update(target=target, inputs=inputs)


CODE = "__import__('pathlib').Path({!r}).touch()"
"""Python that writes a file; the name is put in by `hostile`."""
LEAF = {"type": None, "context": None, "children_spec": []}


def called(key: str) -> Any:
    """A tree of one argument and one keyword."""
    kwargs = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [LEAF]}
    args = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    return {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}


LARGE: dict[str, dict[str, Any]] = {
    "arange.default": {"end": {"as_float": 2.0**40}},
    "arange.start_step": {"start": {"as_int": 0}, "end": {"as_int": 1}, "step": {"as_float": 2.0**-40}},
    "eye.default": {"n": {"as_int": 2**20}},
    "tril_indices.default": {"row": {"as_int": 2**20}, "col": {"as_int": 2**20}},
    "hann_window.default": {"window_length": {"as_int": 2**40}},
    "one_hot.default": {"num_classes": {"as_int": 2**40}},
    "constant_pad_nd.default": {"pad": {"as_ints": [0, 2**40]}},
}
"""Ops that make tensors of 2**40 entries and more of small numbers."""


def hostile(code: str) -> dict[str, Callable[[Parts, Path], None]]:
    """Archives that run `code`, or would do other harm, by name."""
    factory = {"default_factory_module": "this", "default_factory_name": "c", "dict_context": []}
    member = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "a"})
    on_model: dict[str, Callable[[Any], Any]] = {
        "a size that is code": lambda program: size(program, code),
        "a size without end": lambda program: size(program, "9**9**9**9"),
        "a tower of small exponents": lambda program: size(program, "((((9**60)**60)**60)**60)**60"),
        "a tower between functions": lambda program: size(program, "Pow(Max(Pow(Max(9**60, 1), 60), 1), 60)"),
        "a guard that is code": lambda program: program.update(guards_code=[code]),
        "a guard that asks for more": lambda program: program.update(guards_code=["L['x'].__class__ == 3"]),
        "a target that loads": lambda program: graph(program)["nodes"][0].update(target="torch.hub.load"),
        "a target that opens a library": lambda program: graph(program)["nodes"][0].update(
            target="torch.ops.load_library"
        ),
        "a target that reads a file": lambda program: graph(program)["nodes"][0].update(
            target="torch.ops.aten.from_file.default"
        ),
        "a target that writes a file": lambda program: calls(
            program, "torch.ops.aten.save.default", filename={"as_string": "ran"}
        ),
        "a target that prints": lambda program: calls(program, "torch.ops.aten._print.default", s={"as_string": "x"}),
        "a target that sets the generator": lambda program: calls(
            program, "torch.ops.aten.manual_seed.default", seed={"as_int": 1}
        ),
        "a target that exchanges memory": lambda program: calls(program, "torch.ops.aten.set_.source_Storage"),
        "a constant of 2**40 entries": lambda program: calls(
            program, "torch.ops.aten.new_zeros.default", size={"as_ints": [2**20, 2**20]}
        ),
        "an expansion to 2**40 entries": lambda program: calls(
            program, "torch.ops.aten.repeat.default", repeats={"as_sym_ints": [{"as_int": 2**20}, {"as_int": 2**20}]}
        ),
        **{
            f"{op} of 2**40 entries": partial(calls, target=f"torch.ops.aten.{op}", **arguments)
            for op, arguments in LARGE.items()
        },
        "a node named as code": lambda program: renamed(program, f"x = {code}; y"),
        "a node named as torch's": lambda program: renamed(program, "torch.load"),
        "an argument named as code": lambda program: signature(program).update(forward_arg_names=[f"x={code}"]),
        "a keyword named as code": lambda program: tree(program, "in_spec", called(f"x={code}")),
        "a tree that imports": lambda program: tree(
            program, "in_spec", {"type": "collections.defaultdict", "context": factory, "children_spec": []}
        ),
        "a tree with a member of an enum": lambda program: tree(
            program, "out_spec", {"type": "builtins.dict", "context": member, "children_spec": [LEAF]}
        ),
        "a parameter of a class": lambda program: json.loads(
            json.dumps(program).replace('"parameter_name": "0.weight"', '"parameter_name": "__class__.forward"')
        ),
        "a custom object": lambda program: graph(program).update(
            custom_obj_values={"x": {"name": "x", "class_fqn": "__torch__.x"}}
        ),
    }
    return {
        "pickled example inputs": pickled_samples,
        "a pickled weight": pickled_weight,
        "weights of the old format": legacy_weights,
        "an opaque object": custom_object,
        "the old format": of_the_old_format,
        "compiled code": compiled,
        "an empty weight of 2**60 entries": emptied,
        "weights by strides of 0": edited(WEIGHTS, strides_of_0),
    } | {name: edited(MODEL, change) for name, change in on_model.items()}


def parts_of(path: Path) -> Parts:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def packed(path: Path, parts: Parts, top: str = "model/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(f"{top}{name}", data)
    return path


def main(folder: Path) -> dict[str, Any]:
    whole = folder / "whole.pt2"
    torch.export.save(torch.export.export(mlp(), (inputs(2, 5),)), whole)
    told: dict[str, Any] = {"whole": type(open_model(whole)).__name__}
    ran = folder / "ran"
    parts = parts_of(whole)
    pickled_samples(parts, ran)
    torch.export.load(packed(folder / "control.pt2", parts))
    told["torch itself runs it"] = ran.exists()
    ran.unlink(missing_ok=True)
    open_model(packed(folder / "again.pt2", parts))  # what Python imports for a zip of its own
    seen: list[str] = []
    on = [False]
    runs = ("import", "pickle.", "marshal.", "subprocess.", "os.system", "socket.", "ctypes.dlopen")
    sys.addaudithook(
        lambda event, args: seen.append(f"{event} {args[:1]!r:.60}") if on[0] and event.startswith(runs) else None
    )
    for name, change in hostile(CODE.format(str(ran))).items():
        parts = parts_of(whole)
        change(parts, ran)
        path = packed(folder / "hostile.pt2", parts, "" if name == "the old format" else "model/")
        seen.clear()
        on[0] = True
        try:
            came = type(open_model(path)).__name__
        except lx.CaptureError as fault:
            came = f"refused: {str(fault).replace(str(path), 'PATH')}"
        finally:
            on[0] = False
        told[name] = {"came": came, "ran": ran.exists(), "seen": seen[:3]}
        ran.unlink(missing_ok=True)
    return told


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
