"""Damaged checkpoints: one CheckpointError with the file and the reason, and an unchanged model.

A row is an edit of a version, and the code and the names of the error. Edits of a version whose digests are correct
again are drawn at random: a load refuses them, or restores what the file says.
"""

from __future__ import annotations

import collections
import copy
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import lorasc_fx as lx
from lorasc_fx.checkpoint.content import random_state
from lorasc_fx.errors import LorascWarning
from tests.errors.models import inputs
from tests.errors.state import assert_same, of, unchanged
from tests.kit.errors import raises
from tests.kit.models import loss_of, train
from tests.kit.seams import SEAMS
from tests.kit.state import stored_values, weight_states

MANIFEST, TENSORS = "manifest.json", "state.safetensors"
X = inputs(3, 5)
SPEC = lx.CascadeSpec(train=("head.*",), rank=1, restart="fast", noise=lx.Noise(0.2, keep=True))


def small() -> Any:
    """A model with two sites (one keeps experts, one collapses), buffers, and a head that is trained in full."""
    torch.manual_seed(3)
    body, mid, head = nn.Linear(5, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)
    layers = {"body": body, "act": nn.Tanh(), "norm": nn.BatchNorm1d(4), "mid": mid, "last": nn.Tanh(), "head": head}
    return nn.Sequential(collections.OrderedDict(layers))


def optimizers(cascade: lx.Cascade) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def written(folder: Path, stages: int, spec: lx.CascadeSpec = SPEC) -> dict[str, bytes]:
    """Return the files of a version after some stages, with a running stage."""
    cascade = lx.adapt(small(), args=(X,), spec=spec)
    optimizer, scheduler = optimizers(cascade)
    for stage in range(stages + 1):
        train(cascade, optimizer, [X])
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
    """Return the text of a manifest with correct digests of its tensors and of itself, if it has digests."""
    if isinstance(manifest, dict):
        if isinstance(manifest.get("files"), dict) and TENSORS in manifest["files"]:
            manifest["files"][TENSORS] = hashlib.sha256(tensors).hexdigest()
        if "digest" in manifest:
            unsigned = {key: value for key, value in manifest.items() if key != "digest"}
            manifest["digest"] = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest).encode()


def forge(version: Path, change: Callable[[Any], Any]) -> Any:
    """Edit the manifest of a version, update its digests, and return what the edit returns."""
    manifest = json.loads((version / MANIFEST).read_bytes())
    result = change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))
    return result


def forge_tensors(version: Path, change: Callable[[Any], Any]) -> Any:
    """Edit the tensors of a version, update its digests, and return what the edit returns."""
    tensors = load((version / TENSORS).read_bytes())
    result = change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)
    return result


Edit = Callable[[Any], Any]

SPECS = {
    "plain": SPEC,
    "average": replace(SPEC, average=True, noise=lx.Noise()),
    "pissa": replace(SPEC, start="pissa"),
    "dora": replace(SPEC, adapter="dora", restart="slow", noise=lx.Noise(0.2)),
}
"""Of each a version: two stages ended, one under way, a dense delta of `mid`, experts of `body`, a trained head."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    return functools.cache(lambda kind: written(tmp_path_factory.mktemp("written"), 2, SPECS[kind]))


@pytest.fixture
def write_version(files: Callable[[str], dict[str, bytes]], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a version of a kind, to be damaged."""

    def make(kind: str) -> Path:
        path = tmp_path / "version-00000001"
        path.mkdir()
        put(path, files(kind))
        return path

    return make


@pytest.fixture
def version(write_version: Callable[[str], Path]) -> Path:
    return write_version("plain")


def refuse(version: Path, expected: tuple[object, ...], model: nn.Module | None = None) -> None:
    """Assert that loading raises this code, with the path of the version and these names."""
    code, *names = expected
    model = small() if model is None else model
    again = copy.deepcopy(model)
    with unchanged(model), raises(lx.CheckpointError, str(code), version, *names):
        lx.load(version.parent, model, args=(X,))
    with raises(lx.CheckpointError, str(code), version, *names):  # without inputs, by its first call at the latest
        lx.load(version.parent, again)(X)


def resumed(version: Path) -> tuple[lx.Cascade, torch.optim.Optimizer, Any]:
    cascade = lx.load(version.parent, small(), args=(X,))
    return cascade, *optimizers(cascade)


@pytest.mark.parametrize("kind", SPECS)
def test_an_undamaged_copy_loads(kind: str, write_version: Callable[[str], Path]) -> None:
    version = write_version(kind)
    forge(version, lambda manifest: None)
    forge_tensors(version, lambda tensors: None)
    cascade = lx.load(version.parent, small(), args=(X,))
    assert cascade.stage == 3
    assert any(state.is_dense for state in weight_states(cascade).values())
    assert kind == "pissa" or any(state.experts for state in weight_states(cascade).values())


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


FILES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    **{
        f"{name}, {what}": (instead(name, put_there), ("unreadable-file", name))
        for name in (MANIFEST, TENSORS)
        for what, put_there in (("missing", lambda path: None), ("a folder", os.mkdir))
    },
    **{f"tensors, cut at {share}": (cut(TENSORS, share), DIGEST) for share in (0.0, 0.9)},
    **{f"manifest, cut at {share}": (cut(MANIFEST, share), UNREADABLE) for share in (0.0, 0.9)},
    **{f"a bit at {share}": (flip(share, 6), DIGEST) for share in (0.0, 0.01, 0.99)},
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
            lx.load(path, small(), args=(X,))
    (folder / ".writing-abc").mkdir()
    (folder / "version-x").mkdir()
    (folder / "version-00000003").write_text("not a folder")
    with raises(lx.CheckpointError, "no-checkpoint", folder):
        lx.load(folder, small(), args=(X,))


def test_what_can_be_done_about_damage(version: Path, files: Callable[[str], dict[str, bytes]]) -> None:
    """If there is an earlier version, the advice in the error works."""
    later = version.with_name("version-00000012")
    later.mkdir()
    put(later, {**files("plain"), TENSORS: b""})
    refuse(later, (*DIGEST, "version-00000012", "version-00000001"))
    shutil.rmtree(later)
    assert lx.load(version.parent, small(), args=(X,)).stage == 3


def test_a_file_that_is_written_to_while_it_is_read(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and tensors come from the same bytes: changes of the file after the digest are never read."""

    def late(data: bytes) -> dict[str, torch.Tensor]:
        (version / TENSORS).write_bytes(b"something else")
        return load(data)

    monkeypatch.setattr(*SEAMS["read tensors"], late)
    assert lx.load(version.parent, small(), args=(X,)).stage == 3


def filled(name: str, value: float) -> Edit:
    return lambda tensors: tensors[name].fill_(value)


# ---- the manifest


def content(change: Edit) -> Edit:
    return lambda manifest: change(manifest["content"])


EDITED: dict[str, Edit] = {
    "stage": content(lambda edited: edited["plan"].update(stage=9)),
    "another digest": lambda edited: edited.update(digest="0" * 64),
    "no digest": lambda edited: edited.pop("digest"),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_manifest(name: str, version: Path) -> None:
    """The digest was not updated."""
    manifest = json.loads((version / MANIFEST).read_text())
    EDITED[name](manifest)
    (version / MANIFEST).write_text(json.dumps(manifest))
    refuse(version, ("invalid-checkpoint", MANIFEST, "digest"))


# ---- edits of a version whose digests are correct again


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested lists and tables."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def edit_of_manifest(rng: random.Random, manifest: Any) -> str:
    """Delete a random value of a manifest, or replace it, and return a description of the edit."""
    path = rng.choice([path for path in places(manifest) if path[0] not in ("digest", "files")])
    owner = functools.reduce(lambda inner, key: inner[key], path[:-1], manifest)
    if rng.random() < 0.3:
        del owner[path[-1]]
        return f"{path} deleted"
    values = (None, True, -1, 0.5, 7, 2**70, "x", [], {}, {"$tensor": "x"}, {"$float": "nan"}, {"$tuple": [1]})
    owner[path[-1]] = rng.choice(values)
    return f"{path} = {owner[path[-1]]}"


def edit_of_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> str:
    """Remove, rename, add or change a random tensor, and return a description of the edit."""
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    changed = {
        "removed": None,
        "flattened": value.reshape(-1),
        "longer": torch.cat([value.reshape(-1)] * 2),
        "ones": torch.ones_like(value),
        "nan": value.double() * float("nan"),
        "int": value.to(torch.int32),
        "double": value.double(),
        "renamed": value,
    }
    kind = rng.choice(list(changed))
    if (new := changed[kind]) is not None:
        tensors[f"{name}x" if kind == "renamed" else name] = new
    return f"{name} {kind}"


@pytest.mark.parametrize("part", ["manifest", "tensors"])
@pytest.mark.parametrize("kind", SPECS)
def test_an_edit_is_refused_or_restored(
    kind: str, part: str, files: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    """A signed edit of one value is a CheckpointError that changes nothing, or the run resumes with what the file says.

    What the resumed run saves again equals the edited version, or the original one if the edit has no effect.
    """
    rng, version = random.Random(f"{kind} {part}"), tmp_path / "run" / "version-00000001"
    version.mkdir(parents=True)
    put(version, files(kind))
    original, outcomes = stored_values(version.parent), collections.Counter[str]()
    for _ in range(30 if part == "manifest" else 20):
        put(version, files(kind))
        if part == "manifest":
            edit = forge(version, functools.partial(edit_of_manifest, rng))
        else:
            edit = forge_tensors(version, functools.partial(edit_of_tensors, rng))
        again = saved_again(version, tmp_path / "again")
        outcomes["refused" if again is None else "resumed"] += 1
        assert again in (None, original) or again == stored_values(version.parent), edit
    assert min(outcomes["refused"], outcomes["resumed"]) > 3, outcomes


def told(fault: lx.CheckpointError, version: Path) -> None:
    assert str(version) in str(fault)


def saved_again(version: Path, folder: Path) -> Any:
    """Load, resume and save a version, and return what was saved. None after an error, which must change nothing."""
    things: tuple[Any, ...] = (small(),)
    before = of(*things)
    try:
        cascade = lx.load(version.parent, *things)
        optimizer, scheduler = optimizers(cascade)
        things = (cascade, optimizer)
        before = of(*things)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LorascWarning)  # of versions
            extra = cascade.resume(optimizer, scheduler)
    except lx.CheckpointError as fault:
        assert_same(of(*things), before)
        return told(fault, version)
    lx.save(cascade, folder, optimizer=optimizer, scheduler=scheduler, extra=extra)
    return stored_values(folder)


def optimizer_group(manifest: Any) -> Any:
    return manifest["content"]["optimizers"][0]["state"]["param_groups"][0]


UP, A = "branch/body.weight/lora_B", "slow/body.weight/experts/0/a"
SIGNED: dict[str, tuple[Callable[[Path, Edit], Any], Edit, tuple[object, ...]]] = {
    "another format": (forge, lambda edited: edited.update(format=1), ("format-not-supported", 1)),
    "a rank beyond memory": (
        forge,
        content(lambda edited: edited["plan"]["sites"][0]["options"].update(rank=2**30)),
        ("invalid-checkpoint", "branch/body.weight/lora_A", (1, 5), (2**30, 5)),
    ),
    "an unknown front end": (
        forge, content(lambda edited: edited.update(frontend="scripted")), ("unknown-name", "scripted")
    ),
    "a branch with nan": (forge_tensors, filled(UP, float("nan")), ("sites-differ", "branch of body.weight")),
    "an expert with inf": (forge_tensors, filled(A, float("inf")), ("non-finite", "body.weight")),
    "a branch of another shape": (
        forge_tensors, lambda edited: edited.update({UP: torch.zeros(2, 9)}), ("invalid-checkpoint", UP, (2, 9), (4, 1))
    ),
    "other ties": (
        forge,
        content(lambda edited: edited["plan"]["sites"][0].update(aliases=["head.tied"])),
        ("sites-differ", "body.weight", "head.tied", MANIFEST),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
def test_a_signed_edit(name: str, version: Path) -> None:
    """The error says which value is wrong."""
    forging, edit, expected = SIGNED[name]
    forging(version, edit)
    refuse(version, expected)


BASES: list[tuple[Edit, str]] = [
    (lambda model: model.norm.weight[0].add_(1e-6), "differs in norm.weight"),
    (lambda model: model.half(), "differs in body.weight, body.bias, norm.weight and 4 more"),
    (lambda model: setattr(model, "body", nn.Linear(5, 6)), "differs in body.weight, body.bias"),
    (lambda model: delattr(model, "norm"), "lacks norm.weight, norm.bias"),
    (lambda model: setattr(model, "tail", nn.Linear(4, 2)), "also has tail.weight, tail.bias"),
    (
        lambda model: [delattr(model, name) for name in ("body", "norm", "mid", "head")],
        "lacks body.weight, body.bias, norm.weight and 4 more",
    ),
]


@pytest.mark.parametrize(("change", "difference"), BASES, ids=[difference for _, difference in BASES])
def test_another_base(change: Edit, difference: str, version: Path) -> None:
    model = small()
    with torch.no_grad():
        change(model)
    refuse(version, ("base-differs", difference), model)


# ---- resume

MOMENT = "optimizers/0/state/state/0/exp_avg"
RESUMES: dict[str, tuple[Callable[[Path, Edit], Any], Edit, tuple[object, ...]]] = {
    "another order of parameters": (
        forge, lambda edited: optimizer_group(edited).update(params=[1, 0]), ("optimizer-differs", "parameter groups")
    ),
    "a moment of another shape": (
        forge_tensors, lambda edited: edited.update({MOMENT: torch.ones(3)}), ("optimizer-differs", "exp_avg", (3,))
    ),
    "a gradient of another shape": (
        forge_tensors,
        lambda edited: edited.update({"gradient/model.head.bias": torch.ones(3)}),
        ("optimizer-differs", "size"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMES)
def test_a_resume(name: str, version: Path) -> None:
    forging, edit, expected = RESUMES[name]
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


def test_an_optimizer_without_the_branches(version: Path) -> None:
    cascade, *_ = resumed(version)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with unchanged(cascade, optimizer), raises(lx.StateError, "optimizer-lacks-parameters"):
        cascade.resume(optimizer)


@pytest.mark.parametrize("absent", ["optimizer", "scheduler"])
def test_saved_without(absent: str, tmp_path: Path) -> None:
    cascade = lx.adapt(small(), args=(X,), spec=SPEC)
    version = lx.save(cascade, tmp_path, optimizer=None if absent == "optimizer" else optimizers(cascade)[0])
    cascade, optimizer, scheduler = resumed(version)
    refuse_resume(version, ("not-available", absent), cascade, optimizer, scheduler if absent == "scheduler" else None)


def test_a_random_state(version: Path) -> None:
    """numpy would read at the position without a check."""
    name, key, _, *remaining = json.loads(bytes(random_state()["numpy"].tolist()))
    state = torch.tensor(list(json.dumps([name, key, 10**6, *remaining]).encode()), dtype=torch.uint8)
    forge_tensors(version, lambda tensors: tensors.update({"rng/0/numpy": state}))
    refuse_resume(version, ("optimizer-differs", "rng/numpy", "position"), *resumed(version))


def test_an_interrupted_resume_changes_nothing(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt its last step, when optimizer, gradients, scheduler and the other generators are already restored."""
    cascade, optimizer, scheduler = resumed(version)
    schedule = json.dumps(scheduler.state_dict())
    set_rng_state = torch.set_rng_state
    calls = []

    def interrupted(state: torch.Tensor) -> None:
        calls.append(state)
        set_rng_state(state)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with unchanged(cascade, optimizer), pytest.raises(KeyboardInterrupt):
        cascade.resume(optimizer, scheduler)
    assert json.dumps(scheduler.state_dict()) == schedule
    assert len(calls) == 2


# ---- nothing is run from a file


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record audit events of code execution. An audit hook cannot be removed, so it is switched off."""
    seen: list[str] = []
    on = [True]
    watched = ("pickle.", "marshal.", "subprocess.", "socket.")
    sys.addaudithook(lambda event, _: seen.append(event) if on[0] and event.startswith(watched) else None)
    yield seen
    on[0] = False


def test_loading_unpickles_nothing(version: Path, audited: list[str]) -> None:
    cascade, optimizer, scheduler = resumed(version)
    cascade.resume(optimizer, scheduler)
    assert not audited
