"""Checkpoints that nobody here has written: mutation number N of a folder, the same for everybody.

Three kinds: bytes (what a disk or a copy does; digests catch it), and manifests and tensors that were changed and
signed anew, as whoever means harm would do.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

MANIFEST, TENSORS = "manifest.json", "state.safetensors"
NAMES = (
    "..",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "x" * 5000,
    "__class__",
    "__reduce__",
    "",
    "os.system",
    "\ud800",
)
DEEP = "deep nesting"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, -2.5, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64,
    10**400, float("nan"), float("inf"), "", "linear", "1", *NAMES, [], {}, [[]], [None], {"a": 1}, [1, 2, 3],
    list(range(600)), {"__class__": "os.system"}, DEEP,
)  # fmt: skip


def mutated(index: int, files: dict[str, bytes], other: dict[str, bytes], folder: Path) -> str:
    """Write mutation `index` of a version's files as the only version in `folder`; returns what was done."""
    rng = random.Random(index)
    path = folder / "version-00000001"
    path.mkdir(parents=True)
    kind = rng.choice((of_bytes, of_manifest, of_manifest, of_manifest, of_tensors, of_tensors, of_header))
    return f"{kind.__name__}: {kind(rng, files, other, path)}"


def put(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).write_bytes(data)


def signed(manifest: Any, tensors: bytes) -> bytes:
    """The text of a manifest with right digests of tensors and of itself, as far as it can have one."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("files"), dict) and TENSORS in manifest["files"]:
            manifest["files"][TENSORS] = hashlib.sha256(tensors).hexdigest()
        if "digest" in manifest:
            rest = {key: value for key, value in manifest.items() if key != "digest"}
            manifest["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def forge(version: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest of a version, and sign it anew as a forger would."""
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))


def forge_tensors(version: Path, change: Callable[[Any], object]) -> None:
    """The same with the tensors of a version."""
    tensors = load((version / TENSORS).read_bytes())
    change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)


# ---- bytes and files


def of_bytes(rng: random.Random, files: dict[str, bytes], other: dict[str, bytes], path: Path) -> str:
    name = rng.choice((MANIFEST, TENSORS))
    data = bytearray(files[name])
    place, length = rng.randrange(len(data)), rng.randrange(1, 64)
    how = rng.choice(("flip", "cut", "longer", "zero", "moved", "doubled", "other's piece", "gone"))
    if how == "flip":
        for _ in range(rng.choice((1, 1, 1, 5))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "longer":
        data += rng.randbytes(length)
    elif how == "zero":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif how == "moved":
        data[place : place + length] = bytes(reversed(data[place : place + length]))
    elif how == "doubled":
        data[place:place] = data[place : place + length]
    elif how == "gone":
        del data[place : place + length]
    else:
        data[place : place + length] = other[name][place : place + length]
    put(path, {**files, name: bytes(data)})
    return f"{name}: {how} at {place}, {length}"


# ---- a manifest that was changed and signed anew


def of_manifest(rng: random.Random, files: dict[str, bytes], other: dict[str, bytes], path: Path) -> str:
    manifest = json.loads(files[MANIFEST])
    done = [changed(rng, manifest, json.loads(other[MANIFEST])) for _ in range(rng.choice((1, 1, 1, 2)))]
    put(path, {TENSORS: files[TENSORS], MANIFEST: signed(manifest, files[TENSORS])})
    return "; ".join(done)


def changed(rng: random.Random, manifest: dict[str, Any], other: dict[str, Any]) -> str:
    """Change one place of a tree of JSON; the way there is told."""
    holder: Any = manifest
    way: list[Any] = []
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        way.append(key)
        inside = holder[key]
        if not isinstance(inside, (dict, list)) or not inside or rng.random() < 0.15:
            break
        holder = inside
    told = ".".join(map(str, way))[:80]
    how = rng.choice(
        ("value", "value", "value", "gone", "more", "name", "exchanged", "as text", "in a list", "number", "other's")
    )
    if how == "gone":
        del holder[key]
    elif how == "more" and isinstance(holder, dict):
        holder[rng.choice((*NAMES, "optimizer", "load_state_dict", "step", "get_last_lr"))] = rng.choice(VALUES)
    elif how == "more":
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice((inside, *VALUES))))
    elif how == "name" and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    elif how == "exchanged" and len(keys) > 1:
        mate = rng.choice(keys)
        holder[key], holder[mate] = holder[mate], holder[key]
    elif how == "as text":
        holder[key] = json.dumps(inside)
    elif how == "in a list":
        holder[key] = [inside]
    elif how == "number" and isinstance(inside, (int, float)):
        holder[key] = rng.choice((inside + 1, inside - 1, -inside, inside * 2, inside * 10**9, inside + 0.5))
    elif how == "other's" and key in other and len(way) == 1:
        holder[key] = other[key]
    else:
        how = "value"
        holder[key] = rng.choice(VALUES)
    return f"{told}: {how}"


# ---- tensors that were changed and signed anew


def of_tensors(rng: random.Random, files: dict[str, bytes], other: dict[str, bytes], path: Path) -> str:
    tensors = load(files[TENSORS])
    done = [rng.choice(TENSOR_CHANGES)(rng, tensors) for _ in range(rng.choice((1, 1, 1, 2)))]
    data = save(tensors)
    put(path, {TENSORS: data, MANIFEST: signed(json.loads(files[MANIFEST]), data)})
    return "; ".join(done)


def gone(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def renamed(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    odd = rng.choice([each for each in NAMES if "\ud800" not in each])
    tensors[rng.choice((odd, f"{name}/{odd}", name.replace("/", "/../"), f"optimizer/{odd}"))] = tensors.pop(name)


def more(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[
        rng.choice((f"{name}.more", "optimizer/99/exp_avg", "optimizer/0/more", "dense/body.weight/start", "x"))
    ] = torch.ones(2, 3)


def reshaped(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    value = tensors[name]
    shapes = (
        value.shape[::-1],
        (value.numel(),),
        (1, *value.shape),
        (*value.shape, 1),
        (value.numel(), 0)[: value.dim() + 1],
    )
    shape = rng.choice(shapes)
    tensors[name] = (
        value.reshape(shape) if torch.Size(shape).numel() == value.numel() else torch.empty(shape, dtype=value.dtype)
    )


def resized(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    shape = [max(size + rng.choice((-1, 0, 1, 3)), 0) for size in tensors[name].shape] or [2]
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)


def recast(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.bool,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.complex64,
    )
    tensors[name] = tensors[name].to(rng.choice(kinds))


def not_finite(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    if tensors[name].is_floating_point() and tensors[name].numel():
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(
            (float("nan"), float("inf"), -float("inf"))
        )


def other_numbers(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    data = tensors[name].reshape(-1).view(torch.uint8)
    if data.numel():
        data[rng.randrange(data.numel())] ^= 1 << rng.randrange(8)


def exchanged(rng: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    mate = rng.choice(list(tensors))
    tensors[name], tensors[mate] = tensors[mate].clone(), tensors[name].clone()


def told(change: Callable[..., None]) -> Callable[[random.Random, dict[str, torch.Tensor]], str]:
    def run(rng: random.Random, tensors: dict[str, torch.Tensor]) -> str:
        name = rng.choice(sorted(tensors))
        change(rng, tensors, name)
        return f"{name}: {change.__name__}"

    return run


TENSOR_CHANGES = [
    told(each) for each in (gone, renamed, more, reshaped, resized, recast, not_finite, other_numbers, exchanged)
]


def of_header(rng: random.Random, files: dict[str, bytes], other: dict[str, bytes], path: Path) -> str:
    """The header of the tensors, edited as text that no library would write."""
    data = files[TENSORS]
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([each for each in header if each != "__metadata__"])
    entry = header[name]
    how = rng.choice(("length", "shape", "offsets", "dtype", "twice", "deep", "garbage", "metadata", "body", "field"))
    text = None
    if how == "length":
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
        data = struct.pack("<Q", length) + data[8:]
    elif how == "shape":
        entry["shape"] = rng.choice(
            ([2**40], [2**63], [2**32, 2**32], [-1], [0], [0, 2**62], [1.5], ["1"], [[]], None, [1] * 5000, 3)
        )
    elif how == "offsets":
        a, b = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [b, a],
                [a, b + 1],
                [a + 1, b],
                [0, len(body)],
                [a, 2**63],
                [-1, b],
                [2**64, 2**64],
                [a],
                [],
                [0.5, 1],
                None,
                [a, a],
            )
        )
    elif how == "dtype":
        entry["dtype"] = rng.choice(
            ("F8_E8M0", "F4", "F6_E2M3", "U64", "X", "", 3, None, "object", "F32" * 1000, "C64", "I16")
        )
    elif how == "twice":
        text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}' + "}"
    elif how == "deep":
        text = json.dumps(header)[:-1] + ', "deep": ' + "[" * 50_000 + "]" * 50_000 + "}"
    elif how == "garbage":
        text = rng.choice(("", "[]", "null", "{", "{}", " " * 100, '{"a": {}}', '"' + "x" * 1000 + '"'))
    elif how == "metadata":
        header["__metadata__"] = rng.choice(({"format": "pt"}, {"__class__": "os.system"}, {"a": 1}, [], None, "x"))
    elif how == "field":
        entry[rng.choice(("shape", "dtype", "data_offsets"))] = rng.choice(VALUES[:20])
    else:
        body = rng.choice((b"", body[:-1], body + b"\0", body * 2))
    if how != "length":
        encoded = (json.dumps(header) if text is None else text).encode()
        data = struct.pack("<Q", len(encoded)) + encoded + body
    put(path, {TENSORS: data, MANIFEST: signed(json.loads(files[MANIFEST]), data)})
    return f"{name}: {how}"
