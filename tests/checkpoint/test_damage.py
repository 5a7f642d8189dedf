"""A checkpoint that is not what was written: one CheckpointError with the file and the reason; the model as it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from tests.checkpoint.runs import Run
from tests.errors.models import Net, exactly, inputs
from tests.errors.state import unchanged
from tests.kit.state import read, weight_states

X = inputs(5, 3, 4, 4)
SPEC = lx.CascadeSpec(
    targets=("conv", "body"), train=("head.*",), rank=1, restart="fast", noise=lx.Noise(0.2, keep=True)
)
DAMAGED = "; the file is damaged"
EDITED = "differs from its own digest; the file is damaged, or was edited"
ALONE = "; no version before it is here: start anew, and keep several (save(keep=N))"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one version: two stages ended, one under way, a dense delta among the experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    going = Run(SPEC, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)).started()
    for event in ("step", "fold", "step", "fold", "step"):
        getattr(going, event)()
    going.save(folder)
    return folder


@pytest.fixture
def version(written: Path, tmp_path: Path) -> Path:
    """A copy of that version, to be damaged."""
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy" / "version-00000001"


def prepared() -> nn.Module:
    model = Net()
    model.mix.weight.requires_grad_(False)
    model.norm.eval()
    return model


def refuse(version: Path, sentence: str, model: nn.Module | None = None, whole: bool = True) -> None:
    model = prepared() if model is None else model
    pattern = exactly(sentence) if whole else "^" + re.escape(sentence)
    with unchanged(model), pytest.raises(lx.CheckpointError, match=pattern):
        lx.load(version.parent, model, args=(X,))


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as whoever forges it would write it, digest and all."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "digest": digest})


def forge(version: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    change(manifest)
    (version / "manifest.json").write_text(sealed(manifest))


def forge_tensors(version: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = version / "state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    forge(version, lambda manifest: manifest["files"].update({path.name: digest}))


def test_the_copy_is_whole(version: Path) -> None:
    forge(version, lambda manifest: None)
    forge_tensors(version, lambda tensors: None)
    cascade = lx.load(version.parent, prepared(), args=(X,))
    assert cascade.stage == 3
    assert any(state.is_dense for state in weight_states(cascade).values())
    assert any(state.experts for state in weight_states(cascade).values())


# ---- files


@pytest.mark.parametrize("name", ["absent", "file"])
def test_nothing_to_load(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / name
    refuse(folder / "step", f"{folder}: no checkpoint in this folder; give the one that save was given")


def test_an_empty_folder_and_one_of_other_things(tmp_path: Path) -> None:
    refuse(tmp_path / "step", f"{tmp_path}: no checkpoint in this folder; give the one that save was given")
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / "version-x").mkdir()
    (tmp_path / "version-00000003").write_text("not a folder")
    refuse(tmp_path / "step", f"{tmp_path}: no checkpoint in this folder; give the one that save was given")


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_missing_file(version: Path, name: str) -> None:
    (version / name).unlink()
    refuse(version, f"{version / name}: cannot be read: No such file or directory{ALONE}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(version: Path, share: float) -> None:
    manifest, tensors = version / "manifest.json", version / "state.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: int(share * len(whole))])
    refuse(version, f"{tensors}: differs from its digest in manifest.json{DAMAGED}{ALONE}")
    text = manifest.read_text()
    manifest.write_text(text[: int(share * len(text))])
    refuse(version, f"{manifest}: cannot be read: ", whole=False)


def test_a_longer_file(version: Path) -> None:
    path = version / "state.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refuse(version, f"{path}: differs from its digest in manifest.json{DAMAGED}{ALONE}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("bit", [0, 6])
def test_a_flipped_bit_in_the_tensors(version: Path, share: float, bit: int) -> None:
    path = version / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1 << bit
    path.write_bytes(data)
    refuse(version, f"{path}: differs from its digest in manifest.json{DAMAGED}{ALONE}")


def test_a_flipped_bit_anywhere_in_the_manifest(version: Path) -> None:
    path = version / "manifest.json"
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
                refuse(version, f"{path}: ", whole=False)


def test_the_tensors_of_another_version(version: Path, tmp_path: Path) -> None:
    going = Run(SPEC).started()
    going.step()
    other = going.save(tmp_path / "other")
    shutil.copy(other / "state.safetensors", version)
    refuse(version, f"{version / 'state.safetensors'}: differs from its digest in manifest.json{DAMAGED}{ALONE}")


def test_no_safetensors_behind_a_right_digest(version: Path) -> None:
    path = version / "state.safetensors"
    for content in (b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x00{}"):
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        forge(version, lambda manifest, digest=digest: manifest["files"].update({"state.safetensors": digest}))
        refuse(version, f"{path}: cannot be read: ", whole=False)


# ---- the manifest


@pytest.mark.parametrize("found", [2, 0, "1", None, 1.5])
def test_another_format(version: Path, found: Any) -> None:
    forge(version, lambda manifest: manifest.update(format=found))
    sentence = f"format {found!r}; this version reads format 1; load it by the lorasc-fx that wrote it"
    refuse(version, f"{version / 'manifest.json'}: {sentence}")


@pytest.mark.parametrize(
    ("text", "found"), [("[]", "'list'"), ("null", "'NoneType'"), ("{}", "None"), ('"x"', "'str'")]
)
def test_a_manifest_of_another_kind(version: Path, text: str, found: str) -> None:
    path = version / "manifest.json"
    path.write_text(text)
    refuse(version, f"{path}: format {found}; this version reads format 1; load it by the lorasc-fx that wrote it")


def test_an_edited_manifest(version: Path) -> None:
    path = version / "manifest.json"
    manifest = json.loads(path.read_text())
    edits: list[Callable[[dict[str, Any]], Any]] = [
        lambda each: each["plan"].update(stage=9),
        lambda each: each["plan"]["spec"].update(pace=0.9),
        lambda each: each["slow"]["conv.weight"].update(slow=[1.0]),
        lambda each: each["base"].update({"conv.weight": "0" * 64}),
        lambda each: each.update(parked=True),
        lambda each: each.update(more=1),
        lambda each: each.update(digest="0" * 64),
        lambda each: each.pop("digest"),
    ]
    for edit in edits:
        changed = json.loads(json.dumps(manifest))
        edit(changed)
        path.write_text(json.dumps(changed))
        refuse(version, f"{path}: {EDITED}{ALONE}")
    path.write_text(json.dumps(manifest))  # the same content in another layout is not damage
    assert lx.load(version.parent, prepared(), args=(X,)).stage == 3


@pytest.mark.parametrize("key", ["plan", "files", "base", "frontend", "slow", "trained", "parked", "rng", "extra"])
def test_a_manifest_without(version: Path, key: str) -> None:
    forge(version, lambda manifest: manifest.pop(key))
    refuse(version, f"{version / 'manifest.json'}: has no {key!r}{ALONE}")


def test_a_plan_that_is_none(version: Path) -> None:
    path = version / "manifest.json"
    forge(version, lambda manifest: manifest["plan"]["sites"][0].update(rank="two"))
    refuse(version, f"{path}: this is not a plan: ValueError: rank is 'two', not an integer of 1 or more")
    forge(version, lambda manifest: manifest.update(plan={"format": 3}))
    refuse(version, f"{path}: plan has format 3, this version reads 2; read it by the lorasc-fx that wrote it")


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rank": lambda each: each["plan"]["sites"][0].update(rank=2),
    "shape": lambda each: each["plan"]["sites"][0].update(shape=[6, 3, 3, 4]),
    "weight": lambda each: each["plan"]["sites"][0].update(weight="conv.wieght"),
    "kind": lambda each: each["plan"]["sites"][-1].update(kind="conv"),
    "files": lambda each: each.update(files=[]),
    "base": lambda each: each.update(base=["conv.weight"]),
    "targets": lambda each: each["plan"]["spec"].update(targets=["cnov"]),
    "format of the noise": lambda each: each["slow"]["conv.weight"]["kept"][0].pop("noise"),
    "slow of a list": lambda each: each.update(slow=[]),
    "slow of another": lambda each: each["slow"].update({"head.weight": {}}),
    "slow without": lambda each: each["slow"].pop("conv.weight"),
    "stages": lambda each: each["slow"]["conv.weight"].update(stages=[1, 2, 3]),
    "stages of text": lambda each: each["slow"]["conv.weight"].update(stages=["one", "two"]),
    "coefficients": lambda each: each["slow"]["conv.weight"].update(slow=[0.5]),
    "coefficients of text": lambda each: each["slow"]["conv.weight"].update(start=["x", "y"]),
    "noise": lambda each: each["slow"]["conv.weight"]["kept"][0]["noise"].update(strength=-1),
    "noise of a number": lambda each: each["slow"]["conv.weight"].update(kept=[3]),
    "trained": lambda each: each.update(trained=["head.weight"]),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest(version: Path, name: str) -> None:
    forge(version, FORGED[name])
    refuse(version, f"{version}", whole=False)


def test_a_front_end_that_this_version_does_not_have(version: Path) -> None:
    forge(version, lambda manifest: manifest.update(frontend="scripted"))
    known = "auto, export, dynamo, symbolic, pieces"
    refuse(version, f"{version}: was made by the front end 'scripted'; known: {known}")


# ---- tensors against the plan


def tensor_named(version: Path, what: str) -> str:
    return next(name for name in load_file(version / "state.safetensors") if name.startswith(what))


@pytest.mark.parametrize(
    "what",
    ["branch/conv", "branch/body", "expert/conv", "trained/head.weight", "buffer/norm.running", "dense/", "rng/"],
)
def test_a_tensor_that_is_missing_or_of_another_shape(version: Path, what: str) -> None:
    name = tensor_named(version, what)
    if what != "dense/":  # without it a weight simply has no dense delta
        forge_tensors(version, lambda tensors: tensors.pop(name))
        refuse(version, f"{version}: has no tensor {name!r}{ALONE}")
    if what == "rng/":
        forge_tensors(version, lambda tensors: tensors.update({name: torch.zeros(2, 9)}))
        refuse(version, f"{version}: 'rng/torch' is no state of torch's random generator{ALONE}")
        return
    forge_tensors(version, lambda tensors: tensors.update({name: torch.zeros(2, 9)}))
    if what.startswith("buffer/"):  # forward may have assigned one of any shape
        model = prepared()
        lx.load(version.parent, model, args=(X,))
        assert torch.equal(model.get_buffer(name.removeprefix("buffer/")), torch.zeros(2, 9))
        return
    refuse(version, f"{version}: {name!r} is (2, 9), the plan says (", whole=False)
    forge_tensors(version, lambda tensors: tensors.update({name: torch.zeros(())}))
    refuse(version, f"{version}", whole=False)


# ---- another base


def other(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = prepared()
    with torch.no_grad():
        change(model)
    return model


def another(version: Path, what: str) -> str:
    return f"{version}: this is another base: the model {what}; load onto the weights that were adapted"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: model.mix.weight[0, 0, 0, 0].add_(1e-6), "differs in mix.weight"),
        (lambda model: model.conv.weight.add_(1), "differs in conv.weight"),
        (lambda model: model.head.bias.neg_(), "differs in head.bias"),
        (lambda model: model.half(), "differs in conv.weight, conv.bias, norm.weight and 7 more"),
        (lambda model: setattr(model, "body", nn.Linear(6, 8)), "differs in body.weight, body.bias"),
        (lambda model: delattr(model, "mix"), "lacks mix.weight, mix.bias"),
        (lambda model: setattr(model, "tail", nn.Linear(4, 2)), "has besides tail.weight, tail.bias"),
    ],
)
def test_another_base(version: Path, change: Callable[[nn.Module], Any], what: str) -> None:
    refuse(version, another(version, what), other(change))


def test_another_model(version: Path) -> None:
    names = "conv.weight, conv.bias, norm.weight and 7 more"
    refuse(version, another(version, f"lacks {names}"), nn.Sequential(nn.Linear(3, 2)))


def test_a_model_that_is_adapted(version: Path) -> None:
    cascade = lx.load(version.parent, prepared(), args=(X,))
    for model in (cascade.model, cascade):
        with unchanged(cascade), pytest.raises(lx.StateError, match=r"^this model is (adapted already|a cascade)"):
            lx.load(version.parent, model, args=(X,))


def test_inputs_that_the_model_refuses(version: Path) -> None:
    model = prepared()
    with unchanged(model), pytest.raises(lx.CaptureError, match=r"^Net itself refuses the example inputs: "):
        lx.load(version.parent, model, args=(inputs(5, 4, 4, 4),))


# ---- resume


def resumed(version: Path) -> tuple[lx.Cascade, torch.optim.Optimizer]:
    cascade = lx.load(version.parent, Net(), args=(X,))
    return cascade, torch.optim.AdamW(cascade.param_groups(lr=0.02))


def test_another_optimizer_or_scheduler(version: Path) -> None:
    cascade, optimizer = resumed(version)
    groups = cascade.param_groups(lr=0.1)
    schedulers = torch.optim.lr_scheduler
    parts = [{**groups[0], "params": groups[0]["params"] + groups[1]["params"]}, *groups[2:]]
    cases: list[tuple[torch.optim.Optimizer, Any, str]] = [
        (
            torch.optim.SGD(groups, lr=0.1),
            None,
            "holds the state of AdamW, the optimizer is SGD; give one of the kind that was saved",
        ),
        (
            torch.optim.AdamW(parts),
            None,
            "the optimizer has other groups than the saved one; build it the same way",
        ),
        (
            optimizer,
            schedulers.ExponentialLR(optimizer, 0.9),
            "holds the state of StepLR, the scheduler is ExponentialLR; give one of the kind that was saved",
        ),
    ]
    for given, scheduler, sentence in cases:
        before = dict(vars(scheduler)) if scheduler else None
        with unchanged(cascade, given), pytest.raises(lx.CheckpointError, match=exactly(f"{version}: {sentence}")):
            cascade.resume(given, scheduler)
        assert before is None or dict(vars(scheduler)) == before


def test_an_optimizer_without_the_branches(version: Path) -> None:
    cascade, _ = resumed(version)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with unchanged(cascade, optimizer), pytest.raises(lx.StateError, match=r"^the optimizer does not hold branches\."):
        cascade.resume(optimizer)


@pytest.mark.parametrize("what", ["optimizer", "scheduler"])
def test_saved_without(version: Path, what: str, tmp_path: Path) -> None:
    going = Run(SPEC).started()
    lx.save(going.cascade, tmp_path / "bare", optimizer=None if what == "optimizer" else going.optimizer)
    cascade, optimizer = resumed(tmp_path / "bare" / "version-00000001")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2) if what == "scheduler" else None
    sentence = f"{tmp_path / 'bare' / 'version-00000001'}: holds no {what}; it was saved without one: resume without it"
    with unchanged(cascade, optimizer), pytest.raises(lx.CheckpointError, match=exactly(sentence)):
        cascade.resume(optimizer, scheduler)


# ---- nothing is run from a file


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Events that would mean that a file is run; a hook cannot be taken away again, so it is switched off."""
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
    cascade, optimizer = resumed(version)
    cascade.resume(optimizer)
    assert not [event for event in audited if event.startswith(("pickle.", "marshal.", "subprocess.", "socket."))]
