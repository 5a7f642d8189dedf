"""Single forgeries, each with its sentence: what the many mutations count, told here one by one."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import lorasc_fx as lx
from tests.damage.mutations import DEEP, MANIFEST, TENSORS, put, signed
from tests.damage.runner import Small, X, optimizers, written
from tests.errors.state import unchanged
from tests.kit.seams import SEAMS
from tests.kit.state import LONGEST

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(tmp_path_factory.mktemp("written"), 2)


@pytest.fixture
def version(files: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "version-00000001"
    path.mkdir()
    put(path, files)
    return path


def forge(version: Path, change: Change) -> None:
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))


def forge_tensors(version: Path, change: Change) -> None:
    tensors = load((version / TENSORS).read_bytes())
    change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)


def refuse(version: Path, sentence: str) -> None:
    model = Small()
    with unchanged(model), pytest.raises(lx.CheckpointError, match="^" + re.escape(f"{version}{sentence}")):
        lx.load(version.parent, model, args=(X,))


# ---- files


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_what_is_no_plain_file(version: Path, name: str, tmp_path: Path) -> None:
    path = version / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refuse(version, f"/{name}: is a link; a checkpoint holds its files itself")
    path.unlink()
    os.mkfifo(path)
    refuse(version, f"/{name}: is no plain file; a folder, a pipe or a device is not read")
    path.unlink()
    path.mkdir()
    refuse(version, f"/{name}: is no plain file; a folder, a pipe or a device is not read")


def test_a_file_too_many(version: Path) -> None:
    (version / "state.pkl").write_bytes(b"")
    refuse(version, ": holds state.pkl, which is no part of a checkpoint; take it away")


def test_what_can_be_done_about_damage(version: Path, files: dict[str, bytes]) -> None:
    """Where a version stands before, it can be gone back to: what the sentence says then works."""
    (version / TENSORS).write_bytes(b"")
    damage = f"/{TENSORS}: differs from its digest in {MANIFEST}; the file is damaged; "
    refuse(version, f"{damage}no version before it is here: start anew, and keep several (save(keep=N))")
    put(version, files)
    later = version.with_name("version-00000012")
    later.mkdir()
    put(later, {**files, TENSORS: b""})
    refuse(later, f"{damage}take version-00000012 away, and version-00000001 is loaded")
    shutil.rmtree(later)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


def test_a_file_that_memory_does_not_hold(version: Path) -> None:
    """Of holes, smaller than the machine's memory and larger than what this process may have."""
    os.truncate(version / TENSORS, 1 << 31)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        refuse(version, f"/{TENSORS}: has {1 << 31} bytes, for which there is no memory; free some, or take a larger")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_files_without_end(version: Path) -> None:
    """Of holes, so that only a reader who believes the size would need the room."""
    os.truncate(version / TENSORS, 1 << 43)
    refuse(version, f"/{TENSORS}: has {1 << 43} bytes, this machine has memory for ")
    os.truncate(version / MANIFEST, LONGEST + 1)
    refuse(version, f"/{MANIFEST}: has {LONGEST + 1} bytes, such a file has {LONGEST} at most")


def test_a_file_that_is_written_to_while_it_is_read(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and tensors come from the same bytes: what stands in the file after the digest is never seen."""

    def late(data: bytes) -> dict[str, torch.Tensor]:
        (version / TENSORS).write_bytes(b"something else")
        return load(data)

    monkeypatch.setattr(*SEAMS["read tensors"], late)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


# ---- the manifest

MANIFESTS: dict[str, tuple[Change, str]] = {
    "nesting": (lambda each: each["extra"].update(x=DEEP), f"/{MANIFEST}: cannot be read: it is nested too deeply"),
    "nan": (lambda each: each["extra"].update(x=float("nan")), f"/{MANIFEST}: cannot be read: NaN is no number that"),
    "a file outside": (
        lambda each: each["files"].update({"../../etc/passwd": "0" * 64}),
        f"/{MANIFEST}: 'files' names ../../etc/passwd, a checkpoint has {TENSORS} only",
    ),
    "a digest": (lambda each: each["base"].update(x=3), f"/{MANIFEST}: 'base': x has 3, which is no digest"),
    "a name that a terminal obeys": (
        lambda each: each["base"].update({"\x1b[2J": 3}),
        f"/{MANIFEST}: 'base': '\\x1b[2J' has 3, which is no digest",
    ),
    "a long name": (lambda each: each["base"].update({"x" * 5000: 3}), f"/{MANIFEST}: 'base': {'x' * 80}... (5000"),
    "rank": (
        lambda each: each["plan"]["sites"][0].update(rank=2**30),
        f": 'branch/body.weight/lora_A' is (1, 5), the plan says ({2**30}, 5)",
    ),
    "no sites": (
        lambda each: each["plan"].update(sites=[]),
        ": holds 'branch/",
    ),
    "a huge number": (
        lambda each: each["plan"]["spec"].update(pace=10**400),
        f"/{MANIFEST}: this is not a plan: OverflowError: ",
    ),
    "coefficients": (
        lambda each: each["slow"]["body.weight"].update(slow=[10**400, 0]),
        f"/{MANIFEST}: 'slow': body.weight has coefficients that are no finite numbers",
    ),
    "stages": (
        lambda each: each["slow"]["body.weight"].update(stages=[1, 99]),
        f"/{MANIFEST}: 'slow': body.weight has experts of stages that were not",
    ),
    "python's generator": (
        lambda each: each["rng"]["python"][1].__setitem__(-1, 700),
        f"/{MANIFEST}: 'rng': is no state of Python's random generator: ",
    ),
    "numpy's generator": (
        lambda each: each["rng"]["numpy"]["state"].update(pos=10**6),
        f"/{MANIFEST}: 'rng': is no state of numpy's random generator",
    ),
    "a note of a place": (
        lambda each: each["outside"].append({"place": ["base", "x"], "number": "inf"}),
        f"/{MANIFEST}: 'outside': ",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest(version: Path, name: str) -> None:
    change, sentence = MANIFESTS[name]
    forge(version, change)
    refuse(version, sentence)


def test_a_branch_larger_than_anything(version: Path) -> None:
    """A weight that the plan leaves out, and a spec that would give it a branch: refused before that is made."""

    def without_a_site(manifest: Any) -> None:
        manifest["plan"]["spec"]["rank"] = 2**31 - 1
        manifest["plan"]["sites"].pop()

    forge(version, without_a_site)
    forge_tensors(version, lambda each: [each.pop(f"branch/mid.weight/{name}") for name in ("lora_A", "lora_B")])
    refuse(version, f"/{MANIFEST}: its spec asks for rank {2**31 - 1}, which makes a branch of ")


def test_a_plan_of_another_shape(version: Path) -> None:
    """With factors that fit it, as only the model tells: W0 is not in a checkpoint."""
    forge(version, lambda each: each["plan"]["sites"][0].update(shape=[4, 6]))
    forge_tensors(version, lambda each: each.update({"branch/body.weight/lora_A": torch.ones(1, 6)}))
    refuse(version, f"/{MANIFEST}: its plan has body.weight of shape (4, 6), the model (4, 5); no version before it")


def test_a_plan_of_other_ties(version: Path) -> None:
    forge(version, lambda each: each["plan"]["sites"][0].update(aliases=["head.tied"]))
    refuse(
        version,
        f"/{MANIFEST}: its plan has body.weight tied to head.tied, the model to nothing; build the model as it was",
    )


def test_a_plan_of_a_weight_that_is_no_matrix(version: Path) -> None:
    forge(version, lambda each: each["plan"]["sites"][0].update(weight="body.bias"))

    def moved(tensors: Any) -> None:
        for name in ("lora_A", "lora_B"):
            tensors[f"branch/body.bias/{name}"] = tensors.pop(f"branch/body.weight/{name}")

    forge_tensors(version, moved)
    refuse(version, f"/{MANIFEST}: its plan has a site body.bias, which the model has not; build the model as it was")


def test_values_that_no_plan_has(version: Path) -> None:
    """Noise of a negative strength: a manifest's fields are right, what they make is not."""
    forge(version, lambda each: each["slow"]["body.weight"]["kept"][0]["noise"].update(strength=-1))
    refuse(version, ": is not what a checkpoint of this plan holds: SpecError: ")


# ---- tensors

TENSOR: dict[str, tuple[Change, str]] = {
    "nan in a branch": (
        lambda each: each["branch/body.weight/lora_B"].fill_(float("nan")),
        ": 'branch/body.weight/lora_B' holds inf or nan, which no fold takes",
    ),
    "inf in an expert": (
        lambda each: each["expert/body.weight/0/a"].fill_(float("inf")),
        ": 'expert/body.weight/0/a' holds inf or nan, which no fold takes",
    ),
    "a start without an end": (
        lambda each: each.pop("dense/mid.weight/slow"),
        ": has no tensor 'dense/mid.weight/slow', which what is dense beside it needs; no version before it is here",
    ),
    "whole numbers": (
        lambda each: each.update({"branch/body.weight/lora_B": torch.ones(4, 1, dtype=torch.int32)}),
        ": 'branch/body.weight/lora_B' holds torch.int32, not torch.float32",
    ),
    "one too many": (
        lambda each: each.update({"../../x": torch.ones(1)}),
        ": holds '../../x', which this plan has no place for",
    ),
    "a generator too many": (
        lambda each: each.update({"rng/other": torch.ones(1)}),
        ": holds 'rng/other', which is no random generator",
    ),
}


@pytest.mark.parametrize("name", TENSOR)
def test_a_tensor(version: Path, name: str) -> None:
    change, sentence = TENSOR[name]
    forge_tensors(version, change)
    refuse(version, sentence)


def test_a_branch_that_the_next_fold_leaves_out_may_hold_nan(version: Path) -> None:
    forge(version, lambda each: each["plan"]["spec"].update(on_nonfinite="skip"))
    forge_tensors(version, lambda each: each["branch/body.weight/lora_B"].fill_(float("nan")))
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


# ---- resume


def scheduler_has(**more: Any) -> Change:
    return lambda each: each["scheduler"]["state"].update(more)


SAME = "; build optimizer and scheduler the same way"
RESUMES: dict[str, tuple[Change, str]] = {
    "a scheduler's method": (
        scheduler_has(get_last_lr="x"),
        f": scheduler has 'get_last_lr', unlike the one that is to take it{SAME}",
    ),
    "less of a scheduler": (
        lambda each: each["scheduler"]["state"].pop("gamma"),
        f": scheduler has no 'gamma', unlike the one that is to take it{SAME}",
    ),
    "a scheduler's text": (scheduler_has(gamma="0.5"), f": scheduler.gamma is '0.5', where float is expected{SAME}"),
    "too few rates": (scheduler_has(base_lrs=[0.1]), ": scheduler.base_lrs has 1 entries, 3 are expected"),
    "a rate": (
        lambda each: each["optimizer"]["groups"][0].update(lr=None),
        f": optimizer: lr is None, where float is expected{SAME}",
    ),
    "a rate that is no number": (
        lambda each: (
            each["optimizer"]["groups"][0].update(lr=None),
            each["outside"].append({"place": ["optimizer", "groups", 0, "lr"], "number": "nan"}),
        ),
        f": optimizer.param_groups[0].lr holds NaN{SAME}",
    ),
    "a rate below 0": (
        lambda each: each["optimizer"]["groups"][1].update(lr=-0.1),
        f": optimizer.param_groups[1].lr is below 0{SAME}",
    ),
    "a decay below 0": (
        lambda each: each["optimizer"]["groups"][0].update(weight_decay=-1),
        f": optimizer.param_groups[0].weight_decay is below 0{SAME}",
    ),
    "an infinite eps": (
        lambda each: (
            each["optimizer"]["groups"][0].update(eps=None),
            each["outside"].append({"place": ["optimizer", "groups", 0, "eps"], "number": "inf"}),
        ),
        f": optimizer.param_groups[0].eps is infinite{SAME}",
    ),
    "a share above 1": (
        lambda each: each["optimizer"]["groups"][0].update(betas=[0.9, 1.5]),
        f": optimizer.param_groups[0].betas[1] is above 1{SAME}",
    ),
    "a scheduler's rate below 0": (
        scheduler_has(base_lrs=[0.1, 0.1, -0.1]),
        f": scheduler.base_lrs[2] is below 0{SAME}",
    ),
    "a scheduler's count below 0": (scheduler_has(_step_count=-4), f": scheduler._step_count is below 0{SAME}"),
    "no rate": (lambda each: each["optimizer"]["groups"][0].pop("lr"), ": optimizer: a group has no 'lr'"),
    "other parameters": (
        lambda each: each["optimizer"]["groups"][0].update(params=[1, 0]),
        ": the optimizer has other groups than the saved one; build it the same way",
    ),
    "a place that is taken": (
        lambda each: each["outside"].append({"place": ["extra", "epoch"], "number": "inf"}),
        ": tensors and numbers outside of JSON have no place in it: ValueError: ",
    ),
}
STATES: dict[str, tuple[Change, str]] = {
    "a moment that is no number": (
        lambda each: each["optimizer/0/exp_avg"].fill_(float("nan")),
        f": optimizer.state.0.exp_avg holds NaN{SAME}",
    ),
    "an infinite first moment": (
        lambda each: each["optimizer/0/exp_avg"].fill_(float("inf")),
        f": optimizer.state.0.exp_avg is infinite{SAME}",
    ),
    "a second moment below 0": (
        lambda each: each["optimizer/0/exp_avg_sq"].view(-1)[1:2].fill_(-1e-9),
        f": optimizer.state.0.exp_avg_sq is below 0{SAME}",
    ),
    "a count below 0": (
        lambda each: each["optimizer/0/step"].fill_(-1),
        f": optimizer.state.0.step is below 0{SAME}",
    ),
    "a count of 8 bits below 0": (
        lambda each: each.update({"optimizer/0/step": torch.tensor(-1.0).to(torch.float8_e4m3fn)}),
        f": optimizer.state.0.step is below 0{SAME}",
    ),
    "a complex second moment": (
        lambda each: each.update({"optimizer/0/exp_avg_sq": each["optimizer/0/exp_avg_sq"].to(torch.complex64)}),
        f": optimizer.state.0.exp_avg_sq holds complex numbers{SAME}",
    ),
    "half a state": (lambda each: each.pop("optimizer/0/step"), ": optimizer: step is there for some parameters"),
    "another shape": (
        lambda each: each.update({"optimizer/0/exp_avg": torch.ones(3)}),
        ": optimizer: exp_avg of parameter 0 is (3,), the parameter (",
    ),
    "a parameter too many": (
        lambda each: each.update({"optimizer/99/step": torch.ones(())}),
        ": optimizer/99/step is no state of one of 6 parameters",
    ),
    "a gradient of nothing": (
        lambda each: each.update({"gradient/x": torch.ones(3)}),
        ": 'gradient/x' is of no parameter that is trained",
    ),
    "a gradient of another shape": (
        lambda each: each.update({"gradient/model.head.bias": torch.ones(3)}),
        ": 'gradient/model.head.bias' is (3,) torch.float32, its parameter (2,) torch.float32; it is not of this run",
    ),
    "a tensor of no place": (
        lambda each: each.update({"outside/9": torch.ones(3)}),
        ": holds 'outside/9', which has no place in it",
    ),
}


@pytest.mark.parametrize("name", [*RESUMES, *STATES])
def test_a_resume(version: Path, name: str) -> None:
    forging, (change, sentence) = (forge, RESUMES[name]) if name in RESUMES else (forge_tensors, STATES[name])
    forging(version, change)
    cascade = lx.load(version.parent, Small(), args=(X,))
    optimizer, scheduler = optimizers(cascade)
    before = dict(vars(scheduler))
    pattern = "^" + re.escape(f"{version}{sentence}")
    with unchanged(cascade, optimizer), pytest.raises(lx.CheckpointError, match=pattern):
        cascade.resume(optimizer, scheduler)
    assert vars(scheduler) == before


def test_an_optimizer_that_does_not_take_its_state(version: Path) -> None:
    """A hook of torch, by which a library refuses what it is given."""
    cascade = lx.load(version.parent, Small(), args=(X,))
    optimizer, scheduler = optimizers(cascade)

    def refusing(*_: object) -> None:
        raise ValueError("of an older kind")

    optimizer.register_load_state_dict_pre_hook(refusing)
    sentence = (
        f"{version}: its state was not taken: of an older kind; build optimizer and scheduler the same way, or go on "
        "without them"
    )
    before = dict(vars(scheduler))
    with unchanged(cascade, optimizer), pytest.raises(lx.CheckpointError, match=f"^{re.escape(sentence)}$"):
        cascade.resume(optimizer, scheduler)
    assert vars(scheduler) == before


def test_a_resume_that_is_interrupted_gives_all_back(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its last step, when optimizer, gradients, scheduler and the other generators have been written."""
    cascade = lx.load(version.parent, Small(), args=(X,))
    optimizer, scheduler = optimizers(cascade)
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


def test_a_base_that_is_no_plain_file(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x"}}')
    os.mkfifo(tmp_path / "x")
    with pytest.raises(lx.CheckpointError, match=re.escape(f"base: {tmp_path / 'x'} cannot be read: it is no plain")):
        lx.adapt(Small(), args=(X,), base=tmp_path)
    for name in ("..", "../x", "/etc/passwd", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(lx.CheckpointError, match="cannot be read as an index of safetensors: "):
            lx.adapt(Small(), args=(X,), base=tmp_path)
