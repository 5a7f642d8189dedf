"""Damaged checkpoints: one CheckpointError with the file and the reason, and an unchanged model.

A row is an edit of a version, and the code and the names of the error.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import lorasc_fx as lx
from lorasc_fx.checkpoint import training_state
from tests.errors.models import inputs
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import loss_of
from tests.kit.seams import SEAMS
from tests.kit.state import MAX_MANIFEST_BYTES, read, weight_states

MANIFEST, TENSORS = "manifest.json", "state.safetensors"
DEEP = "deep nesting"
"""A placeholder in a manifest that is written as 100,000 nested lists."""
X = inputs(3, 5)
SPEC = lx.CascadeSpec(train=("head.*",), rank=1, restart="fast", noise=lx.Noise(0.2, keep=True))


class Small(nn.Module):
    """A model with two sites (one keeps experts, one collapses), buffers, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.mid, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.norm(torch.tanh(self.body(x))))))


def optimizers(cascade: lx.Cascade) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def written(folder: Path, stages: int, spec: lx.CascadeSpec = SPEC) -> dict[str, bytes]:
    """Return the files of a version after some stages, with a running stage."""
    cascade = lx.adapt(Small(), args=(X,), spec=spec)
    optimizer, scheduler = optimizers(cascade)
    for stage in range(stages + 1):
        loss_of(cascade(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if stage < stages:
            cascade.transition(optimizer)
            scheduler.step()
    loss_of(cascade(X)).backward()  # gradients that wait
    extra = {"losses": [0.5, float("inf")], "epoch": 3, "name": "run", "order": torch.arange(3)}
    path = lx.save(cascade, folder, optimizer=optimizer, scheduler=scheduler, extra=extra)
    return {name: (path / name).read_bytes() for name in (MANIFEST, TENSORS)}


def put(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).write_bytes(data)


def signed(manifest: Any, tensors: bytes) -> bytes:
    """Return the text of a manifest with correct digests of its tensors and of itself, as far as possible."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("files"), dict) and TENSORS in manifest["files"]:
            manifest["files"][TENSORS] = hashlib.sha256(tensors).hexdigest()
        if "digest" in manifest:
            rest = {key: value for key, value in manifest.items() if key != "digest"}
            manifest["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def forge(version: Path, change: Callable[[Any], object]) -> None:
    """Edit the manifest of a version, and update its digests."""
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))


def forge_tensors(version: Path, change: Callable[[Any], object]) -> None:
    """Edit the tensors of a version, and update its digests."""
    tensors = load((version / TENSORS).read_bytes())
    change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)


Edit = Callable[[Any], Any]

SPECS = {
    "plain": SPEC,
    "average": replace(
        SPEC, average="ema", ranks=(1, 1), train_rules=(lx.TrainRule("head.bias", lr=0.1, slow=True),), noise=lx.Noise()
    ),
    "pissa": replace(SPEC, start="pissa"),
    "dora": replace(SPEC, adapter="dora", restart="slow", noise=lx.Noise(0.2)),
}
"""Of each a version: two stages ended, one under way, a dense delta of `mid`, experts of `body`, a trained head."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    return functools.cache(lambda kind: written(tmp_path_factory.mktemp("written"), 2, SPECS[kind]))


@pytest.fixture
def made(files: Callable[[str], dict[str, bytes]], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a version of a kind, to be damaged."""

    def make(kind: str) -> Path:
        path = tmp_path / "version-00000001"
        path.mkdir()
        put(path, files(kind))
        return path

    return make


@pytest.fixture
def version(made: Callable[[str], Path]) -> Path:
    return made("plain")


def refuse(version: Path, expected: tuple[object, ...], model: nn.Module | None = None) -> None:
    """Assert that loading raises this code, with the path of the version and these names."""
    code, *names = expected
    model = Small() if model is None else model
    again = copy.deepcopy(model)
    with unchanged(model), raises(lx.CheckpointError, str(code), version, *names):
        lx.load(version.parent, model, args=(X,))
    with raises(lx.CheckpointError, str(code), version, *names):  # without inputs, by its first call at the latest
        lx.load(version.parent, again)(X)


def resumed(version: Path) -> tuple[lx.Cascade, torch.optim.Optimizer, Any]:
    cascade = lx.load(version.parent, Small(), args=(X,))
    return cascade, *optimizers(cascade)


@pytest.mark.parametrize("kind", SPECS)
def test_an_undamaged_copy_loads(kind: str, made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge(version, lambda manifest: None)
    forge_tensors(version, lambda tensors: None)
    cascade = lx.load(version.parent, Small(), args=(X,))
    assert cascade.stage == 3
    assert any(state.is_dense for state in weight_states(cascade).values())
    assert kind == "pissa" or any(state.experts for state in weight_states(cascade).values())
    manifest = json.loads((version / MANIFEST).read_text())
    if kind == "average":
        assert (manifest["averaged"], manifest["trained"]) == (2, {"head.weight": None, "head.bias": 0})
        for view in ("slow", "averaged"):
            with cascade.weights(view):
                assert cascade(X).isfinite().all()
        return
    assert "averaged" not in manifest  # options that were not given are not told of
    assert all("average" not in state for state in manifest["slow"].values())


# ---- files

DIGEST = ("invalid-checkpoint", TENSORS, MANIFEST)
UNREADABLE = ("unreadable-file", MANIFEST)


def bytes_of(name: str, change: Callable[[bytearray], Any]) -> Edit:
    def edit(version: Path) -> None:
        data = bytearray((version / name).read_bytes())
        change(data)
        (version / name).write_bytes(data)

    return edit


def cut(name: str, share: float) -> Edit:
    return bytes_of(name, lambda data: data.__delitem__(slice(int(share * len(data)), None)))


def flip(share: float, bit: int) -> Edit:
    return bytes_of(TENSORS, lambda data: data.__setitem__(at := int(share * len(data)), data[at] ^ 1 << bit))


def instead(name: str, put_there: Callable[[Path], Any]) -> Edit:
    """Replace a file by something else."""

    def edit(version: Path) -> None:
        (version / name).rename(version.parent / "elsewhere")
        put_there(version / name)

    return edit


def with_digest(content: bytes) -> Edit:
    def edit(version: Path) -> None:
        (version / TENSORS).write_bytes(content)
        forge(version, lambda manifest: None)

    return edit


def without_end(name: str, size: int) -> Edit:
    """Make a file sparse, so that only a reader that trusts the size needs the memory."""
    return lambda version: os.truncate(version / name, size)


LINK = NO_FILE = ("unreadable-file",)
FILES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    **{
        f"{name}, {what}": (instead(name, put_there), (*code, name))
        for name in (MANIFEST, TENSORS)
        for what, put_there, code in (
            ("missing", lambda path: None, ("unreadable-file",)),
            ("a link", lambda path: path.symlink_to(path.parents[1] / "elsewhere"), LINK),
            ("a pipe", os.mkfifo, NO_FILE),
            ("a folder", os.mkdir, NO_FILE),
        )
    },
    **{f"tensors, cut at {share}": (cut(TENSORS, share), DIGEST) for share in (0.0, 0.3, 0.9, 0.999)},
    **{f"manifest, cut at {share}": (cut(MANIFEST, share), UNREADABLE) for share in (0.0, 0.3, 0.9, 0.999)},
    **{
        f"bit {bit} at {share}": (flip(share, bit), DIGEST)
        for share in (0.0, 0.001, 0.01, 0.2, 0.5, 0.8, 0.99)
        for bit in (0, 6)
    },
    **{
        f"no safetensors, {content!r}": (with_digest(content), ("unreadable-file", TENSORS))
        for content in (b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x00{}")
    },
    **{
        f"manifest of {text}": (instead(MANIFEST, functools.partial(Path.write_text, data=text)),
                                ("format-not-supported", MANIFEST, found))
        for text, found in (("[]", "'list'"), ("null", "'NoneType'"), ("{}", "None"), ('"x"', "'str'"))
    },
    "a longer file": (bytes_of(TENSORS, lambda data: data.append(0)), DIGEST),
    "a file too many": (
        lambda version: (version / "state.pkl").write_bytes(b""),
        ("invalid-checkpoint", "state.pkl"),
    ),
    "tensors without end": (
        without_end(TENSORS, 1 << 43), ("invalid-checkpoint", TENSORS, f"{1 << 43}")
    ),
    "manifest without end": (
        without_end(MANIFEST, MAX_MANIFEST_BYTES + 1),
        ("invalid-checkpoint", MANIFEST, f"{MAX_MANIFEST_BYTES + 1}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, version: Path) -> None:
    edit, expected = FILES[name]
    edit(version)
    refuse(version, expected)


def test_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "absent", tmp_path / "file", folder):
        with raises(lx.CheckpointError, "no-checkpoint", path):
            lx.load(path, Small(), args=(X,))
    (folder / ".writing-abc").mkdir()
    (folder / "version-x").mkdir()
    (folder / "version-00000003").write_text("not a folder")
    with raises(lx.CheckpointError, "no-checkpoint", folder):
        lx.load(folder, Small(), args=(X,))


def test_a_flipped_bit_anywhere_in_the_manifest(version: Path) -> None:
    path = version / MANIFEST
    data = path.read_bytes()
    original = json.loads(data)
    for place in range(0, len(data), 211):
        for bit in (0, 3, 7):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            try:
                same = json.loads(broken) == original  # white space for other white space
            except ValueError:
                same = False
            if not same:
                with pytest.raises(lx.CheckpointError) as caught:
                    lx.load(version.parent, Small(), args=(X,))
                assert str(caught.value).startswith(str(path))


def test_the_tensors_of_another_version(version: Path, tmp_path: Path) -> None:
    put(version, {TENSORS: written(tmp_path / "other", 1)[TENSORS]})
    refuse(version, DIGEST)


def test_what_can_be_done_about_damage(version: Path, files: Callable[[str], dict[str, bytes]]) -> None:
    """If there is an earlier version, the advice in the error works."""
    later = version.with_name("version-00000012")
    later.mkdir()
    put(later, {**files("plain"), TENSORS: b""})
    refuse(later, (*DIGEST, "version-00000012", "version-00000001"))
    shutil.rmtree(later)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


def test_a_file_that_memory_does_not_hold(version: Path) -> None:
    """A sparse file, smaller than the machine's memory and larger than this process may allocate."""
    os.truncate(version / TENSORS, 1 << 31)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        refuse(version, ("unreadable-file", TENSORS, 1 << 31))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_file_that_is_written_to_while_it_is_read(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and tensors come from the same bytes: changes of the file after the digest are never read."""

    def late(data: bytes) -> dict[str, torch.Tensor]:
        (version / TENSORS).write_bytes(b"something else")
        return load(data)

    monkeypatch.setattr(*SEAMS["read tensors"], late)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


# ---- the manifest


def site(**fields: Any) -> Edit:
    return lambda manifest: manifest["plan"]["sites"][0].update(fields)


def options(**fields: Any) -> Edit:
    return lambda manifest: manifest["plan"]["sites"][0]["options"].update(fields)


def slow(**fields: Any) -> Edit:
    return lambda manifest: manifest["slow"]["body.weight"].update(fields)


def expert(**fields: Any) -> Edit:
    return lambda manifest: manifest["slow"]["body.weight"]["experts"][0].update(fields)


def of(**fields: Any) -> Edit:
    return lambda manifest: manifest.update(fields)


EDITED: dict[str, Edit] = {
    "stage": lambda each: each["plan"].update(stage=9),
    "pace": lambda each: each["plan"]["spec"].update(pace=0.9),
    "coefficients": slow(slow=[1.0]),
    "base": lambda each: each["base"].update({"body.weight": "0" * 64}),
    "idle": of(idle=True),
    "a field more": of(more=1),
    "another digest": of(digest="0" * 64),
    "no digest": lambda each: each.pop("digest"),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_manifest(name: str, version: Path) -> None:
    """The digest was not updated."""
    manifest = json.loads((version / MANIFEST).read_text())
    EDITED[name](manifest)
    (version / MANIFEST).write_text(json.dumps(manifest))
    refuse(version, ("invalid-checkpoint", MANIFEST, "digest"))


def test_another_layout_of_the_manifest_is_not_damage(version: Path) -> None:
    (version / MANIFEST).write_text(json.dumps(json.loads((version / MANIFEST).read_text()), indent=7))
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


KEYS = ("plan", "files", "base", "frontend", "slow", "trained", "idle", "rng", "extra")
MANIFESTS: dict[str, list[tuple[Edit, tuple[object, ...]]]] = {
    "plain": [
        *((of(format=found), ("format-not-supported", found)) for found in (3, 0, "1", None, 1.5)),
        *((functools.partial(lambda key, each: each.pop(key), key), ("invalid-checkpoint", key)) for key in KEYS),
        (of(files=[]), ("invalid-checkpoint", "files")),
        (lambda each: each["files"].update({"../../etc/passwd": "0" * 64}), ("invalid-checkpoint", "../../etc/passwd")),
        (of(base=["body.weight"]), ("invalid-checkpoint", "base")),
        (lambda each: each["base"].update(x=3), ("invalid-checkpoint", "base")),
        (lambda each: each["base"].update({"\x1b[2J": 3}), ("invalid-checkpoint", "base", "\\x1b[2J")),
        (lambda each: each["base"].update({"x" * 5000: 3}), ("invalid-checkpoint", "base")),
        (lambda each: each["extra"].update(x=DEEP), ("unreadable-file",)),
        (lambda each: each["extra"].update(x=float("nan")), ("unreadable-file", "NaN")),
        (
            lambda each: each["tensor_references"].append({"path": ["base", "x"], "number": "inf"}),
            ("invalid-checkpoint", "tensor_references"),
        ),
        (lambda each: each["rng"]["python"][1].__setitem__(-1, 700), ("invalid-checkpoint", "rng", "Python")),
        (lambda each: each["rng"]["python"].__setitem__(0, 2), ("invalid-checkpoint", "rng", "Python")),
        (lambda each: each["base"].update({"x" * 2000: 1}), ("invalid-checkpoint", "base", "... (2002 characters)")),
        (lambda each: each["rng"]["numpy"]["state"].update(pos=10**6), ("invalid-checkpoint", "rng", "numpy")),
        (of(plan={"format": 3}), ("format-not-supported", "plan", "3")),
        (lambda each: each["plan"]["spec"].update(pace=10**400), ("invalid-checkpoint", "plan.spec.pace is")),
        (options(rank="two"), ("invalid-checkpoint", "rank", "two")),
        (of(slow=[]), ("invalid-checkpoint", "slow")),
        (lambda each: each["slow"].update({"head.weight": {}}), ("invalid-checkpoint", "slow", "head.weight")),
        (slow(slow=[10**400, 0]), ("invalid-checkpoint", "body.weight.slow[0]")),
        (slow(slow=[2**53 + 1, 0]), ("invalid-checkpoint", "body.weight.slow[0]", 2**53 + 1)),
        (slow(start=["x", "y"]), ("invalid-checkpoint", "body.weight.start[0] is 'x'")),
        (slow(slow=[0.5]), ("invalid-checkpoint", "body.weight", "2 experts, 1 slow, 2 start")),
        (expert(stage="one"), ("invalid-checkpoint", "body.weight", "stage", "one")),
        (expert(tensors=["b"]), ("invalid-checkpoint", "body.weight", "tensors", ["b"])),
        (expert(tensors=["b", "a", "c"]), ("invalid-checkpoint", "body.weight", "tensors", "c")),
        (expert(more=1), ("invalid-checkpoint", "body.weight", "more")),
        (slow(experts=[]), ("invalid-checkpoint", "body.weight", "0 experts, 2 slow, 2 start")),
        (slow(noises=[3]), ("invalid-checkpoint", "body.weight.noises[0] is 3")),
        (
            lambda each: each["slow"]["body.weight"]["noises"][0].pop("noise"),
            ("invalid-checkpoint", "body.weight.noises[0].noise is missing"),
        ),
        (of(trained=["head.weight"]), ("invalid-checkpoint", "trained", "table")),
    ],
    "average": [
        (of(averaged=-1), ("invalid-checkpoint", "averaged")),
        (of(averaged=True), ("invalid-checkpoint", "averaged")),
        (of(trained={"head.bias": True}), ("invalid-checkpoint", "trained", "head.bias is True")),
        (slow(average=[1.0]), ("invalid-checkpoint", "body.weight", "1 average")),
        (slow(average=["1", 1.0]), ("invalid-checkpoint", "body.weight.average[0] is '1'")),
        (slow(average=None), ("invalid-checkpoint", "body.weight")),
        (options(rank=2), ("invalid-checkpoint", "ranks", "stage 3")),
        (options(train_A=1), ("invalid-checkpoint", "train_A")),
        (options(ranks=[2, 0]), ("invalid-checkpoint", "ranks[1] is 0")),
    ],
}


def rows(table: dict[str, list[tuple[Edit, tuple[object, ...]]]]) -> list[Any]:
    return [pytest.param(kind, *row, id=f"{kind}: {row[1]}") for kind in table for row in table[kind]]


@pytest.mark.parametrize(("kind", "edit", "expected"), rows(MANIFESTS))
def test_a_forged_manifest(kind: str, edit: Edit, expected: tuple[object, ...], made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge(version, edit)
    refuse(version, (*expected, MANIFEST))


# ---- manifest and tensors against each other, and against the model

HELD = {
    "branch/body.weight/lora_A": (1, 5),
    "branch/mid.weight/lora_B": (3, 1),
    "expert/body.weight/0/a": (1, 5),
    "value/head.weight": (2, 3),
    "dense/head.weight/slow": (2, 3),
    "buffer/norm.running_mean": (4,),
    "dense/mid.weight/slow": (3, 4),
}


def tensor(name: str, value: Any) -> Edit:
    return lambda tensors: tensors.update({name: value})


def gone(*names: str) -> Edit:
    return lambda tensors: [tensors.pop(name) for name in names]


def filled(name: str, value: float) -> Edit:
    return lambda tensors: tensors[name].fill_(value)


UP, A, W0 = "branch/body.weight/lora_B", "expert/body.weight/0/a", "base/head.bias"
TENSOR: dict[str, list[tuple[Edit, tuple[object, ...]]]] = {
    "plain": [
        *(
            (tensor(name, torch.zeros(shape)), ("invalid-checkpoint", name, shape, f"{HELD[name]}"))
            for name in HELD
            for shape in ((2, 9), ())
            if name[:6] not in ("buffer", "expert")  # forward may have assigned a buffer of any shape
        ),
        *(  # an expert's own rank is what its tensors say
            (tensor(A, torch.zeros(shape)), ("invalid-checkpoint", A, shape, fits))
            for shape, fits in (((2, 9), (2, 5)), ((), (0, 5)))
        ),
        (tensor("rng/torch", torch.zeros(2, 9)), ("invalid-checkpoint", "rng/torch")),
        (tensor("rng/other", torch.ones(1)), ("invalid-checkpoint", "rng/other")),
        (tensor("../../x", torch.ones(1)), ("invalid-checkpoint", "../../x")),
        (tensor(UP, torch.ones(4, 1, dtype=torch.int32)), ("invalid-checkpoint", UP, "torch.int32", "torch.float32")),
        (filled(UP, float("nan")), ("non-finite", UP)),
        (filled(A, float("inf")), ("non-finite", A)),
        (gone("dense/mid.weight/slow"), ("invalid-checkpoint", "dense/mid.weight/slow")),
        (filled("buffer/norm.running_mean", float("nan")), ("non-finite", "buffer/norm.running_mean")),
        (filled(W0, 0.5), ("invalid-checkpoint", W0, "fingerprint")),
        (lambda tensors: tensors.update({W0: tensors[W0].half()}), ("invalid-checkpoint", W0, "fingerprint")),
        (tensor("base/tail.bias", torch.ones(2)), ("invalid-checkpoint", "base/tail.bias")),
        (gone(W0), ("invalid-checkpoint", W0)),
    ],
    "average": [
        (
            tensor("dense/head.bias/average", torch.zeros(4)),
            ("invalid-checkpoint", "dense/head.bias/average", (4,), (2,)),
        ),
        (tensor("dense/body.weight/average", torch.zeros(4, 5)), ("invalid-checkpoint", "dense/body.weight/slow")),
        (filled("dense/mid.weight/average", float("nan")), ("non-finite", "dense/mid.weight/average")),
    ],
}


@pytest.mark.parametrize(("kind", "change", "expected"), rows(TENSOR))
def test_a_forged_tensor(kind: str, change: Edit, expected: tuple[object, ...], made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge_tensors(version, change)
    refuse(version, expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("plain", name) for name in (*HELD, "rng/torch") if name != "dense/mid.weight/slow"),
        ("pissa", "initial/body.weight/b"),
        ("dora", "initial/body.weight/magnitude"),
        ("dora", "expert/body.weight/0/row_scale"),
        ("dora", "branch/body.weight/lora_magnitude_vector"),
    ],
)
def test_a_missing_tensor(kind: str, name: str, made: Callable[[str], Path]) -> None:
    """A weight may lack a dense delta only if none of its views has one."""
    version = made(kind)
    forge_tensors(version, gone(name))
    refuse(version, ("invalid-checkpoint", name))


DISAGREE: list[tuple[Edit, tuple[object, ...]]] = [
    (options(rank=2), ("invalid-checkpoint", "branch/body.weight/lora_A", (1, 5), (2, 5))),
    (options(rank=2**30), ("invalid-checkpoint", "branch/body.weight/lora_A", (1, 5), (2**30, 5))),
    (site(shape=[5, 4]), ("invalid-checkpoint", "branch/body.weight/lora_A", (1, 5), (1, 4))),
    (site(weight="body.wieght"), ("invalid-checkpoint", "branch/body.weight/lora_A")),
    (lambda each: each["plan"].update(sites=[]), ("invalid-checkpoint", "'branch/")),
    (lambda each: each["plan"]["sites"][-1].update(kind="conv"), ("sites-differ", "mid.weight", "linear", "conv")),
    (lambda each: each["plan"]["spec"].update(targets=["cnov"]), ("sites-differ", "cnov")),
    (lambda each: each["slow"].pop("body.weight"), ("invalid-checkpoint", "body.weight")),
    (
        lambda each: each["slow"]["body.weight"]["noises"][0]["noise"].update(strength=-1),
        ("invalid-checkpoint", "noise.strength is -1"),
    ),
    (of(frontend="scripted"), ("unknown-name", "scripted")),
    (
        of(inputs={"tuple": [{"tuple": [{"tensor": [-1], "dtype": "float32"}]}, {"dict": {}}]}),
        (
            "invalid-checkpoint",
            "inputs",
        ),
    ),
    (of(inputs={"dict": {}}), ("invalid-checkpoint", "inputs")),
]


@pytest.mark.parametrize(("edit", "expected"), DISAGREE, ids=[str(row[1]) for row in DISAGREE])
def test_a_manifest_that_contradicts_itself(edit: Edit, expected: tuple[object, ...], version: Path) -> None:
    """Each field alone is valid."""
    forge(version, edit)
    refuse(version, expected)


def test_a_buffer_of_another_shape(version: Path) -> None:
    """Forward may have assigned a buffer of any shape."""
    forge_tensors(version, tensor("buffer/norm.running_mean", torch.zeros(2, 9)))
    model = Small()
    lx.load(version.parent, model, args=(X,))
    assert torch.equal(model.norm.running_mean, torch.zeros(2, 9))


def test_a_branch_that_the_next_fold_leaves_out_may_hold_nan(version: Path) -> None:
    forge(version, lambda each: each["plan"]["spec"].update(on_nonfinite="skip"))
    forge_tensors(version, filled("branch/body.weight/lora_B", float("nan")))
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


def without_mid(manifest: Any) -> None:
    manifest["plan"]["spec"]["rank"] = 2**31 - 1
    manifest["plan"]["sites"].pop()


def branch_of_bias(tensors: Any) -> None:
    for factor in ("lora_A", "lora_B"):
        tensors[f"branch/body.bias/{factor}"] = tensors.pop(f"branch/body.weight/{factor}")


PLANS: dict[str, tuple[Edit, Edit, tuple[object, ...]]] = {
    "a branch larger than anything": (  # which the plan leaves out: refused before it is made
        without_mid,
        gone(*(f"branch/mid.weight/{factor}" for factor in ("lora_A", "lora_B"))),
        ("sites-differ", f"{2**31 - 1}"),
    ),
    "another shape": (  # with factors that fit it, as only the model tells: W0 is not in a checkpoint
        site(shape=[4, 6]),
        tensor("branch/body.weight/lora_A", torch.ones(1, 6)),
        ("sites-differ", "body.weight", (4, 6), (4, 5)),
    ),
    "other ties": (site(aliases=["head.tied"]), lambda each: None, ("sites-differ", "body.weight", "head.tied")),
    "a weight that is no matrix": (site(weight="body.bias"), branch_of_bias, ("sites-differ", "body.bias")),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_another_model(name: str, version: Path) -> None:
    edit, change, expected = PLANS[name]
    forge(version, edit)
    forge_tensors(version, change)
    refuse(version, (*expected, MANIFEST))


BASES: list[tuple[Edit, str]] = [
    (lambda model: model.norm.weight[0].add_(1e-6), "differs in norm.weight"),
    (lambda model: model.body.weight.add_(1), "differs in body.weight"),
    (lambda model: model.norm.bias.add_(1), "differs in norm.bias"),
    (lambda model: model.half(), "differs in body.weight, body.bias, norm.weight and 4 more"),
    (lambda model: setattr(model, "body", nn.Linear(5, 6)), "differs in body.weight, body.bias"),
    (lambda model: delattr(model, "norm"), "lacks norm.weight, norm.bias"),
    (lambda model: setattr(model, "tail", nn.Linear(4, 2)), "also has tail.weight, tail.bias"),
    (
        lambda model: [delattr(model, name) for name in ("body", "norm", "mid", "head")],
        "lacks body.weight, body.bias, norm.weight and 4 more",
    ),
]


@pytest.mark.parametrize(("change", "what"), BASES, ids=[what for _, what in BASES])
def test_another_base(change: Edit, what: str, version: Path) -> None:
    model = Small()
    with torch.no_grad():
        change(model)
    refuse(version, ("base-differs", what), model)


def test_a_model_that_is_adapted(version: Path) -> None:
    cascade = lx.load(version.parent, Small(), args=(X,))
    for model in (cascade.model, cascade):
        with unchanged(cascade), raises(lx.StateError, "already-adapted"):
            lx.load(version.parent, model, args=(X,))


def test_inputs_that_the_model_refuses(version: Path) -> None:
    model = Small()
    with unchanged(model), raises(lx.CaptureError, "model-refuses-inputs", "Small"):
        lx.load(version.parent, model, args=(inputs(3, 4),))


# ---- resume


def scheduler_has(**more: Any) -> Edit:
    return lambda manifest: manifest["scheduler"]["state"].update(more)


def group(index: int, **fields: Any) -> Edit:
    return lambda manifest: manifest["optimizer"]["groups"][index].update(fields)


def outside(number: str, *path: Any) -> Edit:
    """Insert a number that JSON does not have."""

    def edit(manifest: Any) -> None:
        holder = functools.reduce(lambda held, key: held[key], path[:-1], manifest)
        holder[path[-1]] = None
        manifest["tensor_references"].append({"path": [*path], "number": number})

    return edit


GROUP = ("optimizer", "groups", 0)
MOMENT, SQUARE = (f"optimizer/0/{name}" for name in ("exp_avg", "exp_avg_sq"))
RESUMES: list[tuple[Edit, tuple[object, ...]]] = [
    (scheduler_has(base_lrs=[0.1]), ("optimizer-differs", "scheduler.base_lrs")),
    (outside("nan", *GROUP, "lr"), ("optimizer-differs", "optimizer.param_groups[0].lr")),
    (group(0, params=[1, 0]), ("optimizer-differs",)),
    (
        lambda each: each["tensor_references"].append({"path": ["extra", "epoch"], "number": "inf"}),
        ("invalid-checkpoint", "['extra', 'epoch']"),
    ),
]
STATES: list[tuple[Edit, tuple[object, ...]]] = [
    (filled(MOMENT, float("nan")), ("optimizer-differs", "optimizer.state.0.exp_avg", "NaN")),
    (filled(SQUARE, float("nan")), ("optimizer-differs", "optimizer.state.0.exp_avg_sq", "NaN")),
    (tensor(MOMENT, torch.ones(3)), ("optimizer-differs", "exp_avg", (3,))),
    (tensor("optimizer/99/step", torch.ones(())), ("optimizer-differs", "optimizer/99/step")),
    (tensor("gradient/x", torch.ones(3)), ("invalid-checkpoint", "gradient/x")),
    (
        tensor("gradient/model.head.bias", torch.ones(3)),
        ("invalid-checkpoint", "gradient/model.head.bias", "torch.float32"),
    ),
    (tensor("reference/9", torch.ones(3)), ("invalid-checkpoint", "reference/9")),
]
FORGED_RESUMES = [*((forge, *row) for row in RESUMES), *((forge_tensors, *row) for row in STATES)]


@pytest.mark.parametrize(("forging", "edit", "expected"), FORGED_RESUMES, ids=[str(row[2]) for row in FORGED_RESUMES])
def test_a_resume(
    forging: Callable[[Path, Edit], None], edit: Edit, expected: tuple[object, ...], version: Path
) -> None:
    forging(version, edit)
    refuse_resume(version, expected, *resumed(version))


def refuse_resume(
    version: Path, expected: tuple[object, ...], cascade: lx.Cascade, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    code, *names = expected
    before = dict(vars(scheduler)) if scheduler is not None else None
    with unchanged(cascade, optimizer), raises(lx.CheckpointError, str(code), version, *names):
        cascade.resume(optimizer, scheduler)
    assert scheduler is None or vars(scheduler) == before


OTHERS: dict[str, tuple[Callable[[lx.Cascade], tuple[torch.optim.Optimizer, Any]], tuple[object, ...]]] = {
    "another optimizer": (
        lambda cascade: (torch.optim.SGD(cascade.param_groups(lr=0.1), lr=0.1), None),
        ("optimizer-differs", "AdamW", "SGD"),
    ),
    "other groups": (
        lambda cascade: (torch.optim.AdamW(joined(cascade.param_groups(lr=0.1))), None),
        ("optimizer-differs", "optimizer"),
    ),
    "another scheduler": (
        lambda cascade: (opt := optimizers(cascade)[0], torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)),
        ("optimizer-differs", "StepLR", "ExponentialLR"),
    ),
}


def joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**groups[0], "params": groups[0]["params"] + groups[1]["params"]}, *groups[2:]]


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_or_scheduler(name: str, version: Path) -> None:
    cascade = lx.load(version.parent, Small(), args=(X,))
    make, expected = OTHERS[name]
    refuse_resume(version, expected, cascade, *make(cascade))


def test_an_optimizer_without_the_branches(version: Path) -> None:
    cascade, *_ = resumed(version)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with unchanged(cascade, optimizer), raises(lx.StateError, "optimizer-lacks-parameters"):
        cascade.resume(optimizer)


@pytest.mark.parametrize("what", ["optimizer", "scheduler"])
def test_saved_without(what: str, tmp_path: Path) -> None:
    cascade = lx.adapt(Small(), args=(X,), spec=SPEC)
    version = lx.save(cascade, tmp_path, optimizer=None if what == "optimizer" else optimizers(cascade)[0])
    cascade, optimizer, scheduler = resumed(version)
    refuse_resume(version, ("not-available", what), cascade, optimizer, scheduler if what == "scheduler" else None)


def test_another_bit_generator_of_numpy_is_not_saved(tmp_path: Path) -> None:
    cascade = lx.adapt(Small(), args=(X,), spec=SPEC)
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        version = lx.save(cascade, tmp_path)
    finally:
        np.random.set_bit_generator(before)
    assert "numpy" not in json.loads((version / MANIFEST).read_text())["rng"]
    lx.load(tmp_path, Small(), args=(X,))


def test_a_random_state_of_a_rank(tmp_path: Path) -> None:
    """It is stored as bytes, which the schema of the manifest does not cover."""
    state = json.loads(bytes(training_state.random_bytes().tolist()))
    state["meta"]["numpy"]["state"]["pos"] = 10**6
    stream = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    cascade = lx.adapt(Small(), args=(X,), spec=SPEC)
    version = lx.save(cascade, tmp_path, optimizer=optimizers(cascade)[0], extra={training_state.RANKS: [stream]})
    cascade, optimizer, _ = resumed(version)
    refuse_resume(version, ("optimizer-differs", "numpy.state.pos", 10**6), cascade, optimizer, None)


def test_an_optimizer_that_does_not_take_its_state(version: Path) -> None:
    """A hook of torch with which a library rejects a state."""
    cascade, optimizer, scheduler = resumed(version)

    def refusing(*_: object) -> None:
        raise ValueError("of an older kind")

    optimizer.register_load_state_dict_pre_hook(refusing)
    refuse_resume(version, ("optimizer-differs", "of an older kind"), cascade, optimizer, scheduler)


def test_an_interrupted_resume_changes_nothing(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt its last step, when optimizer, gradients, scheduler and the other generators are already restored."""
    cascade, optimizer, scheduler = resumed(version)
    schedule = json.dumps(scheduler.state_dict())
    given = torch.set_rng_state
    calls = []

    def interrupted(state: torch.Tensor) -> None:
        calls.append(state)
        given(state)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with unchanged(cascade, optimizer), pytest.raises(KeyboardInterrupt):
        cascade.resume(optimizer, scheduler)
    assert json.dumps(scheduler.state_dict()) == schedule
    assert len(calls) == 2


# ---- a base in files


def test_a_base_that_is_not_a_regular_file(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x"}}')
    os.mkfifo(tmp_path / "x")
    with raises(lx.CheckpointError, "unreadable-file", tmp_path / "x"):
        lx.adapt(Small(), args=(X,), base=tmp_path)
    for name in ("..", "../x", "/etc/passwd", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with raises(lx.CheckpointError, "unreadable-file"):
            lx.adapt(Small(), args=(X,), base=tmp_path)


# ---- nothing is run from a file


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record audit events of code execution. An audit hook cannot be removed, so it is switched off."""
    seen: list[str] = []
    on = [True]
    watched = (
        "pickle.",
        "marshal.",
        "exec",
        "compile",
        "import",
        "subprocess.",
        "os.system",
        "socket.",
        "ctypes.dlopen",
    )
    sys.addaudithook(lambda event, _: seen.append(event) if on[0] and event.startswith(watched) else None)
    yield seen
    on[0] = False


def test_reading_runs_nothing(version: Path, audited: list[str]) -> None:
    read(version.parent)
    assert not audited


def test_loading_unpickles_nothing(version: Path, audited: list[str]) -> None:
    cascade, optimizer, scheduler = resumed(version)
    cascade.resume(optimizer, scheduler)
    assert not [event for event in audited if event.startswith(("pickle.", "marshal.", "subprocess.", "socket."))]
