"""A checkpoint that is not what was written: one CheckpointError with the file and the reason; the model as it was.

A row is an edit of a version and the message that follows the version's path; `...` stands for the rest of a message.
The many mutations of `tests/damage` count what is told here one by one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import lorasc_fx as lx
from tests.damage.mutations import DEEP, MANIFEST, TENSORS, put, signed
from tests.damage.runner import SPEC, Small, X, optimizers, written
from tests.errors.models import exactly, inputs
from tests.errors.state import unchanged
from tests.kit.seams import SEAMS
from tests.kit.state import LONGEST, read, weight_states

Edit = Callable[[Any], Any]

SPECS = {
    "plain": SPEC,
    "average": replace(
        SPEC, average="ema", ranks=(1, 1), train_rules=(lx.TrainRule("head.bias", lr=0.1, slow=True),), noise=lx.Noise()
    ),
    "pissa": replace(SPEC, start="pissa"),
    "dora": replace(SPEC, use_dora=True, restart="slow", noise=lx.Noise(0.2)),
}
"""Of each a version: two stages ended, one under way, a dense delta of `mid`, experts of `body`, a trained head."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    return functools.cache(lambda kind: written(tmp_path_factory.mktemp("written"), 2, SPECS[kind]))


@pytest.fixture
def made(files: Callable[[str], dict[str, bytes]], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a version of a kind, to be damaged."""

    def make(kind: str) -> Path:
        path = tmp_path / "version-00000001"
        path.mkdir()
        put(path, files(kind))
        return path

    return make


@pytest.fixture
def version(made: Callable[[str], Path]) -> Path:
    return made("plain")


def forge(version: Path, change: Edit) -> None:
    """Change the manifest, and sign it anew as a forger would."""
    manifest = json.loads((version / MANIFEST).read_bytes())
    change(manifest)
    (version / MANIFEST).write_bytes(signed(manifest, (version / TENSORS).read_bytes()))


def forge_tensors(version: Path, change: Edit) -> None:
    tensors = load((version / TENSORS).read_bytes())
    change(tensors)
    (version / TENSORS).write_bytes(save(tensors))
    forge(version, lambda manifest: None)


def message(version: Path, sentence: str) -> str:
    """The pattern of a message; a sentence that ends with `...` is its beginning."""
    whole = f"{version}{sentence}"
    return "^" + re.escape(whole[:-3]) if sentence.endswith("...") else exactly(whole)


def refuse(version: Path, sentence: str, model: nn.Module | None = None) -> None:
    model = Small() if model is None else model
    with unchanged(model), pytest.raises(lx.CheckpointError, match=message(version, sentence)):
        lx.load(version.parent, model, args=(X,))


def resumed(version: Path) -> tuple[lx.Cascade, torch.optim.Optimizer, Any]:
    cascade = lx.load(version.parent, Small(), args=(X,))
    return cascade, *optimizers(cascade)


@pytest.mark.parametrize("kind", SPECS)
def test_the_copy_is_whole(kind: str, made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge(version, lambda manifest: None)
    forge_tensors(version, lambda tensors: None)
    cascade = lx.load(version.parent, Small(), args=(X,))
    assert cascade.stage == 3
    assert any(state.is_dense for state in weight_states(cascade).values())
    assert kind == "pissa" or any(state.experts for state in weight_states(cascade).values())
    manifest = json.loads((version / MANIFEST).read_text())
    if kind == "average":
        assert (manifest["averaged"], manifest["rules"]) == (2, {"head.bias": 0})
        for which in ("slow", "averaged"):
            with cascade.weights(which):
                assert cascade(X).isfinite().all()
        return
    assert not {"averaged", "rules"} & set(manifest)  # options that were not given are not told of
    assert all("average" not in state for state in manifest["slow"].values())
    assert all("ranks" not in site and "train_A" not in site for site in manifest["plan"]["sites"])


# ---- files

ALONE = "; no version before it is here: start anew, and keep several (save(keep=N))"
DIGEST = f"/{TENSORS}: differs from its digest in {MANIFEST}; the file is damaged{ALONE}"
UNREADABLE = f"/{MANIFEST}: cannot be read: ..."
NOTHING = ": no checkpoint in this folder; give the one that save was given"
FORMAT = "this version reads format 1; load it by the lorasc-fx that wrote it"


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
    """Take a file away, and put something else in its place."""

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
    """Of holes, so that only a reader who believes the size would need the room."""
    return lambda version: os.truncate(version / name, size)


LINK = "is a link; a checkpoint holds its files itself..."
NO_FILE = "is no plain file; a folder, a pipe or a device is not read..."
FILES: dict[str, tuple[Edit, str]] = {
    **{
        f"{name}, {what}": (instead(name, put_there), f"/{name}: {sentence}")
        for name in (MANIFEST, TENSORS)
        for what, put_there, sentence in (
            ("missing", lambda path: None, f"cannot be read: No such file or directory{ALONE}"),
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
        f"no safetensors, {content!r}": (with_digest(content), f"/{TENSORS}: cannot be read: ...")
        for content in (b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x00{}")
    },
    **{
        f"manifest of {text}": (instead(MANIFEST, functools.partial(Path.write_text, data=text)),
                                f"/{MANIFEST}: format {found}; {FORMAT}")
        for text, found in (("[]", "'list'"), ("null", "'NoneType'"), ("{}", "None"), ('"x"', "'str'"))
    },
    "a longer file": (bytes_of(TENSORS, lambda data: data.append(0)), DIGEST),
    "a file too many": (
        lambda version: (version / "state.pkl").write_bytes(b""),
        ": holds state.pkl, which is no part of a checkpoint; take it away...",
    ),
    "tensors without end": (
        without_end(TENSORS, 1 << 43), f"/{TENSORS}: has {1 << 43} bytes, this machine has memory for ..."
    ),
    "manifest without end": (
        without_end(MANIFEST, LONGEST + 1),
        f"/{MANIFEST}: has {LONGEST + 1} bytes, such a file has {LONGEST} at most...",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, version: Path) -> None:
    edit, sentence = FILES[name]
    edit(version)
    refuse(version, sentence)


def test_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "absent", tmp_path / "file", folder):
        with pytest.raises(lx.CheckpointError, match=exactly(f"{path}{NOTHING}")):
            lx.load(path, Small(), args=(X,))
    (folder / ".writing-abc").mkdir()
    (folder / "version-x").mkdir()
    (folder / "version-00000003").write_text("not a folder")
    with pytest.raises(lx.CheckpointError, match=exactly(f"{folder}{NOTHING}")):
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
                refuse(version, f"/{MANIFEST}: ...")


def test_the_tensors_of_another_version(version: Path, tmp_path: Path) -> None:
    put(version, {TENSORS: written(tmp_path / "other", 1)[TENSORS]})
    refuse(version, DIGEST)


def test_what_can_be_done_about_damage(version: Path, files: Callable[[str], dict[str, bytes]]) -> None:
    """Where a version stands before, it can be gone back to: what the sentence says then works."""
    later = version.with_name("version-00000012")
    later.mkdir()
    put(later, {**files("plain"), TENSORS: b""})
    refuse(later, DIGEST.replace(ALONE, "; take version-00000012 away, and version-00000001 is loaded"))
    shutil.rmtree(later)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


def test_a_file_that_memory_does_not_hold(version: Path) -> None:
    """Of holes, smaller than the machine's memory and larger than what this process may have."""
    os.truncate(version / TENSORS, 1 << 31)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        refuse(
            version, f"/{TENSORS}: has {1 << 31} bytes, for which there is no memory; free some, or take a larger..."
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_file_that_is_written_to_while_it_is_read(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and tensors come from the same bytes: what stands in the file after the digest is never seen."""

    def late(data: bytes) -> dict[str, torch.Tensor]:
        (version / TENSORS).write_bytes(b"something else")
        return load(data)

    monkeypatch.setattr(*SEAMS["read tensors"], late)
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


# ---- the manifest


def site(**fields: Any) -> Edit:
    return lambda manifest: manifest["plan"]["sites"][0].update(fields)


def slow(**fields: Any) -> Edit:
    return lambda manifest: manifest["slow"]["body.weight"].update(fields)


def of(**fields: Any) -> Edit:
    return lambda manifest: manifest.update(fields)


EDITED: dict[str, Edit] = {
    "stage": lambda each: each["plan"].update(stage=9),
    "pace": lambda each: each["plan"]["spec"].update(pace=0.9),
    "coefficients": slow(slow=[1.0]),
    "base": lambda each: each["base"].update({"body.weight": "0" * 64}),
    "parked": of(parked=True),
    "a field more": of(more=1),
    "another digest": of(digest="0" * 64),
    "no digest": lambda each: each.pop("digest"),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_manifest(name: str, version: Path) -> None:
    """Not signed anew."""
    manifest = json.loads((version / MANIFEST).read_text())
    EDITED[name](manifest)
    (version / MANIFEST).write_text(json.dumps(manifest))
    refuse(version, f"/{MANIFEST}: differs from its own digest; the file is damaged, or was edited{ALONE}")


def test_another_layout_of_the_manifest_is_not_damage(version: Path) -> None:
    (version / MANIFEST).write_text(json.dumps(json.loads((version / MANIFEST).read_text()), indent=7))
    assert lx.load(version.parent, Small(), args=(X,)).stage == 3


PLAN, RNG, BODY = "this is not a plan: ", "'rng': is no state of", "'slow': body.weight"
FOREIGN_FILE = f"'files' names ../../etc/passwd, a checkpoint has {TENSORS} only..."
NEEDS = f"needs stages, slow, start, kept, past, and nothing else{ALONE}"
NOISE = f"keeps noise that needs noise, seed, stage, amplitude, and nothing else{ALONE}"
ONE_OF_EACH = "there is one of each for every expert..."
NO_RULE = "which is no rule of the spec's..."
STAGES = "which this plan's stages cannot have made..."
KEYS = ("plan", "files", "base", "frontend", "slow", "trained", "parked", "rng", "extra")
MANIFESTS: dict[str, list[tuple[Edit, str]]] = {
    "plain": [
        *((of(format=found), f"format {found!r}; {FORMAT}") for found in (2, 0, "1", None, 1.5)),
        *((functools.partial(lambda key, each: each.pop(key), key), f"has no {key!r}{ALONE}") for key in KEYS),
        (of(files=[]), f"'files' is list, not a table of digests{ALONE}"),
        (lambda each: each["files"].update({"../../etc/passwd": "0" * 64}), FOREIGN_FILE),
        (of(base=["body.weight"]), f"'base' is list, not a table of digests{ALONE}"),
        (lambda each: each["base"].update(x=3), "'base': x has 3, which is no digest..."),
        (lambda each: each["base"].update({"\x1b[2J": 3}), "'base': '\\x1b[2J' has 3, which is no digest..."),
        (lambda each: each["base"].update({"x" * 5000: 3}), f"'base': {'x' * 80}... (5000..."),
        (lambda each: each["extra"].update(x=DEEP), "cannot be read: it is nested too deeply..."),
        (lambda each: each["extra"].update(x=float("nan")), "cannot be read: NaN is no number that..."),
        (lambda each: each["outside"].append({"place": ["base", "x"], "number": "inf"}), "'outside': ..."),
        (lambda each: each["rng"]["python"][1].__setitem__(-1, 700), f"{RNG} Python's random generator: ..."),
        (lambda each: each["rng"]["numpy"]["state"].update(pos=10**6), f"{RNG} numpy's random generator..."),
        (of(plan={"format": 3}), "plan has format 3, this version reads 2; read it by the lorasc-fx that wrote it"),
        (lambda each: each["plan"]["spec"].update(pace=10**400), f"{PLAN}OverflowError: ..."),
        (site(rank="two"), f"{PLAN}ValueError: rank is 'two', not an integer of 1 or more"),
        (of(slow=[]), f"'slow' is list, not a table of slow states{ALONE}"),
        (lambda each: each["slow"].update({"head.weight": {}}), f"'slow': head.weight {NEEDS}"),
        (slow(slow=[10**400, 0]), f"{BODY} has coefficients that are no finite numbers..."),
        (slow(start=["x", "y"]), f"{BODY} has coefficients that are no finite numbers{ALONE}"),
        (slow(slow=[0.5]), f"{BODY} has 2 stages, 1 slow, 2 start; {ONE_OF_EACH}"),
        (slow(stages=[1, 99]), f"{BODY} has experts of stages that were not..."),
        (slow(stages=[1, 2, 3]), f"{BODY} has 3 stages, 2 slow, 2 start; {ONE_OF_EACH}"),
        (slow(stages=["one", "two"]), f"{BODY} has experts of stages that were not: ['one', 'two']{ALONE}"),
        (slow(kept=[3]), f"{BODY} {NOISE}"),
        (lambda each: each["slow"]["body.weight"]["kept"][0].pop("noise"), f"{BODY} {NOISE}"),
        (of(trained=["head.weight"]), f"'past': head.bias is not trained in full{ALONE}"),
        (of(averaged=1), f"'averaged' is 1, {STAGES}"),
        (of(rules={"head.bias": 0}), f"'rules': head.bias has 0, {NO_RULE}"),
        (slow(average=[1.0, 1.0]), "'slow' holds an average, and the spec keeps none..."),
    ],
    "average": [
        (of(averaged=3), f"'averaged' is 3, {STAGES}"),
        (of(averaged=-1), f"'averaged' is -1, {STAGES}"),
        (of(averaged=True), "'averaged' is bool, not a number of stages..."),
        (of(rules={"head.bias": 1}), f"'rules': head.bias has 1, {NO_RULE}"),
        (of(rules={"x": 0}), f"'rules': x has 0, {NO_RULE}"),
        (slow(average=[1.0]), f"{BODY} has 2 stages, 2 slow, 2 start, 1 average; {ONE_OF_EACH}"),
        (slow(average=["1", 1.0]), f"{BODY} has coefficients that are no finite numbers..."),
        (slow(average=None), f"{BODY} holds what is no list..."),
        (site(rank=2), f"{PLAN}ValueError: a site has another rank than its ranks say for stage 3..."),
        (site(train_A=1), f"{PLAN}ValueError: train_A is 1, not true or false..."),
        (site(ranks=[2, 0]), f"{PLAN}ValueError: rank is 0, not an integer of 1 or more..."),
    ],
    "dora": [
        (slow(turns=turns), f"{BODY} scaled its rows in stages that were not...")
        for turns in ([[7, 0]], [[1, 3]], [[1]], [["1", 0]])
    ],
}


def rows(table: dict[str, list[tuple[Edit, str]]]) -> list[Any]:
    return [pytest.param(kind, *row, id=f"{kind}: {row[1][:60]}") for kind in table for row in table[kind]]


@pytest.mark.parametrize(("kind", "edit", "sentence"), rows(MANIFESTS))
def test_a_manifest(kind: str, edit: Edit, sentence: str, made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge(version, edit)
    refuse(version, f"/{MANIFEST}: {sentence}")


# ---- manifest and tensors against each other, and against the model

HELD = {
    "branch/body.weight/lora_A": (1, 5),
    "branch/mid.weight/lora_B": (3, 1),
    "expert/body.weight/0/a": (1, 5),
    "trained/head.weight/slow": (2, 3),
    "buffer/norm.running_mean": (4,),
    "dense/mid.weight/slow": (3, 4),
}


def tensor(name: str, value: Any) -> Edit:
    return lambda tensors: tensors.update({name: value})


def gone(*names: str) -> Edit:
    return lambda tensors: [tensors.pop(name) for name in names]


def filled(name: str, value: float) -> Edit:
    return lambda tensors: tensors[name].fill_(value)


UP, A = "branch/body.weight/lora_B", "expert/body.weight/0/a"
INF = "holds inf or nan, which no fold takes..."
NOT_WHOLE = "which what is dense beside it needs..."
TENSOR: dict[str, list[tuple[Edit, str]]] = {
    "plain": [
        *(
            (tensor(name, torch.zeros(shape)), f"{name!r} is {shape}, the plan says {HELD[name]}{ALONE}")
            for name in HELD
            for shape in ((2, 9), ())
            if name[:6] not in ("buffer", "expert")  # forward may have assigned a buffer of any shape
        ),
        *(  # an expert's own rank is what its tensors say
            (tensor(A, torch.zeros(shape)), f"{A!r} is {shape}, the plan says {fits}{ALONE}")
            for shape, fits in (((2, 9), (2, 5)), ((), (0, 5)))
        ),
        (tensor("rng/torch", torch.zeros(2, 9)), f"'rng/torch' is no state of torch's random generator{ALONE}"),
        (tensor("rng/other", torch.ones(1)), "holds 'rng/other', which is no random generator..."),
        (tensor("../../x", torch.ones(1)), "holds '../../x', which this plan has no place for..."),
        (tensor(UP, torch.ones(4, 1, dtype=torch.int32)), f"'{UP}' holds torch.int32, not torch.float32..."),
        (filled(UP, float("nan")), f"'{UP}' {INF}"),
        (filled(A, float("inf")), f"'{A}' {INF}"),
        (gone("dense/mid.weight/slow"), f"has no tensor 'dense/mid.weight/slow', {NOT_WHOLE}"),
    ],
    "average": [
        (
            tensor("trained/head.bias/average", torch.zeros(4)),
            "'trained/head.bias/average' is (4,), the plan says (2,)...",
        ),
        (
            tensor("dense/body.weight/average", torch.zeros(4, 5)),
            f"has no tensor 'dense/body.weight/slow', {NOT_WHOLE}",
        ),
        (filled("dense/mid.weight/average", float("nan")), f"'dense/mid.weight/average' {INF}"),
    ],
}


@pytest.mark.parametrize(("kind", "change", "sentence"), rows(TENSOR))
def test_a_tensor(kind: str, change: Edit, sentence: str, made: Callable[[str], Path]) -> None:
    version = made(kind)
    forge_tensors(version, change)
    refuse(version, f": {sentence}")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("plain", name) for name in (*HELD, "rng/torch") if not name.startswith("dense/")),
        ("pissa", "began/body.weight/b"),
        ("dora", "began/body.weight/m"),
        ("dora", "turn/body.weight/0"),
        ("dora", "branch/body.weight/lora_magnitude_vector"),
    ],
)
def test_a_missing_tensor(kind: str, name: str, made: Callable[[str], Path]) -> None:
    """A weight without a dense delta simply has none, if none of its views has one."""
    version = made(kind)
    forge_tensors(version, gone(name))
    refuse(version, f": has no tensor {name!r}{ALONE}")


DISAGREE: list[tuple[Edit, str]] = [
    (site(rank=2), "'branch/body.weight/lora_A' is (1, 5), the plan says (2, 5)..."),
    (site(rank=2**30), f"'branch/body.weight/lora_A' is (1, 5), the plan says ({2**30}, 5)..."),
    (site(shape=[5, 4]), f"'branch/body.weight/lora_A' is (1, 5), the plan says (1, 4){ALONE}"),
    (site(weight="body.wieght"), f"holds 'branch/body.weight/lora_A', of which the plan has no site{ALONE}"),
    (lambda each: each["plan"].update(sites=[]), "holds 'branch/..."),
    (
        lambda each: each["plan"]["sites"][-1].update(kind="conv"),
        "its plan does not fit this model: after match-sites, the graph does not agree with its plan:\n"
        "  node mid is a linear, but mid.weight is planned as a conv...",
    ),
    (
        lambda each: each["plan"]["spec"].update(targets=["cnov"]),
        "its plan does not fit this model: targets: 'cnov' matches no weight; nearest: ...",
    ),
    (
        lambda each: each["slow"].pop("body.weight"),
        f"the slow state and the plan disagree about body.weight{ALONE}",
    ),
    (
        lambda each: each["slow"]["body.weight"]["kept"][0]["noise"].update(strength=-1),
        "is not what a checkpoint of this plan holds: SpecError: ...",
    ),
    (of(frontend="scripted"), "was made by the front end 'scripted'; known: auto, export, dynamo, symbolic, pieces"),
]


@pytest.mark.parametrize(("edit", "sentence"), DISAGREE, ids=[sentence[:60] for _, sentence in DISAGREE])
def test_a_manifest_that_disagrees(edit: Edit, sentence: str, version: Path) -> None:
    """Each of its fields is right in itself."""
    forge(version, edit)
    refuse(version, f": {sentence}")


def test_a_buffer_of_another_shape(version: Path) -> None:
    """Forward may have assigned one of any shape."""
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


PLANS: dict[str, tuple[Edit, Edit, str]] = {
    "a branch larger than anything": (  # which the plan leaves out: refused before it is made
        without_mid,
        gone(*(f"branch/mid.weight/{factor}" for factor in ("lora_A", "lora_B"))),
        f": its spec asks for rank {2**31 - 1}, which makes a branch of ...",
    ),
    "another shape": (  # with factors that fit it, as only the model tells: W0 is not in a checkpoint
        site(shape=[4, 6]),
        tensor("branch/body.weight/lora_A", torch.ones(1, 6)),
        ": its plan has body.weight of shape (4, 6), the model (4, 5); no version before it...",
    ),
    "other ties": (
        site(aliases=["head.tied"]),
        lambda each: None,
        ": its plan has body.weight tied to head.tied, the model to nothing; build the model as it was...",
    ),
    "a weight that is no matrix": (
        site(weight="body.bias"),
        branch_of_bias,
        ": its plan has a site body.bias, which the model has not; build the model as it was...",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_another_model(name: str, version: Path) -> None:
    edit, change, sentence = PLANS[name]
    forge(version, edit)
    forge_tensors(version, change)
    refuse(version, f"/{MANIFEST}{sentence}")


BASES: list[tuple[Edit, str]] = [
    (lambda model: model.norm.weight[0].add_(1e-6), "differs in norm.weight"),
    (lambda model: model.body.weight.add_(1), "differs in body.weight"),
    (lambda model: model.head.bias.neg_(), "differs in head.bias"),
    (lambda model: model.half(), "differs in body.weight, body.bias, norm.weight and 4 more"),
    (lambda model: setattr(model, "body", nn.Linear(5, 6)), "differs in body.weight, body.bias"),
    (lambda model: delattr(model, "norm"), "lacks norm.weight, norm.bias"),
    (lambda model: setattr(model, "tail", nn.Linear(4, 2)), "has besides tail.weight, tail.bias"),
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
    refuse(version, f": this is another base: the model {what}; load onto the weights that were adapted", model)


def test_a_model_that_is_adapted(version: Path) -> None:
    cascade = lx.load(version.parent, Small(), args=(X,))
    for model in (cascade.model, cascade):
        with unchanged(cascade), pytest.raises(lx.StateError, match=r"^this model is (adapted already|a cascade)"):
            lx.load(version.parent, model, args=(X,))


def test_inputs_that_the_model_refuses(version: Path) -> None:
    model = Small()
    with unchanged(model), pytest.raises(lx.CaptureError, match=r"^Small itself refuses the example inputs: "):
        lx.load(version.parent, model, args=(inputs(3, 4),))


# ---- resume


def scheduler_has(**more: Any) -> Edit:
    return lambda manifest: manifest["scheduler"]["state"].update(more)


def group(index: int, **fields: Any) -> Edit:
    return lambda manifest: manifest["optimizer"]["groups"][index].update(fields)


def outside(number: str, *place: Any) -> Edit:
    """Note a number that JSON has none of."""

    def edit(manifest: Any) -> None:
        holder = functools.reduce(lambda held, key: held[key], place[:-1], manifest)
        holder[place[-1]] = None
        manifest["outside"].append({"place": [*place], "number": number})

    return edit


SAME = "; build optimizer and scheduler the same way..."
UNLIKE = f"unlike the one that is to take it{SAME}"
GROUP = ("optimizer", "groups", 0)
MOMENT, SQUARE, COUNT = (f"optimizer/0/{name}" for name in ("exp_avg", "exp_avg_sq", "step"))
RESUMES: list[tuple[Edit, str]] = [
    (scheduler_has(get_last_lr="x"), f"scheduler has 'get_last_lr', {UNLIKE}"),
    (lambda each: each["scheduler"]["state"].pop("gamma"), f"scheduler has no 'gamma', {UNLIKE}"),
    (scheduler_has(gamma="0.5"), f"scheduler.gamma is '0.5', where float is expected{SAME}"),
    (scheduler_has(base_lrs=[0.1]), "scheduler.base_lrs has 1 entries, 3 are expected..."),
    (scheduler_has(base_lrs=[0.1, 0.1, -0.1]), f"scheduler.base_lrs[2] is below 0{SAME}"),
    (scheduler_has(_step_count=-4), f"scheduler._step_count is below 0{SAME}"),
    (group(0, lr=None), f"optimizer: lr is None, where float is expected{SAME}"),
    (outside("nan", *GROUP, "lr"), f"optimizer.param_groups[0].lr holds NaN{SAME}"),
    (outside("inf", *GROUP, "eps"), f"optimizer.param_groups[0].eps is infinite{SAME}"),
    (group(1, lr=-0.1), f"optimizer.param_groups[1].lr is below 0{SAME}"),
    (group(0, weight_decay=-1), f"optimizer.param_groups[0].weight_decay is below 0{SAME}"),
    (group(0, betas=[0.9, 1.5]), f"optimizer.param_groups[0].betas[1] is above 1{SAME}"),
    (lambda each: each["optimizer"]["groups"][0].pop("lr"), "optimizer: a group has no 'lr'..."),
    (group(0, params=[1, 0]), "the optimizer has other groups than the saved one; build it the same way..."),
    (
        lambda each: each["outside"].append({"place": ["extra", "epoch"], "number": "inf"}),
        "tensors and numbers outside of JSON have no place in it: ValueError: ...",
    ),
]
STATES: list[tuple[Edit, str]] = [
    (filled(MOMENT, float("nan")), f"optimizer.state.0.exp_avg holds NaN{SAME}"),
    (filled(MOMENT, float("inf")), f"optimizer.state.0.exp_avg is infinite{SAME}"),
    (lambda each: each[SQUARE].view(-1)[1:2].fill_(-1e-9), f"optimizer.state.0.exp_avg_sq is below 0{SAME}"),
    (filled(COUNT, -1), f"optimizer.state.0.step is below 0{SAME}"),
    (tensor(COUNT, torch.tensor(-1.0).to(torch.float8_e4m3fn)), f"optimizer.state.0.step is below 0{SAME}"),
    (
        lambda each: each.update({SQUARE: each[SQUARE].to(torch.complex64)}),
        f"optimizer.state.0.exp_avg_sq holds complex numbers{SAME}",
    ),
    (gone(COUNT), "optimizer: step is there for some parameters..."),
    (tensor(MOMENT, torch.ones(3)), "optimizer: exp_avg of parameter 0 is (3,), the parameter (..."),
    (tensor("optimizer/99/step", torch.ones(())), "optimizer/99/step is no state of one of 6 parameters..."),
    (tensor("gradient/x", torch.ones(3)), "'gradient/x' is of no parameter that is trained..."),
    (
        tensor("gradient/model.head.bias", torch.ones(3)),
        "'gradient/model.head.bias' is (3,) torch.float32, its parameter (2,) torch.float32; it is not of this run...",
    ),
    (tensor("outside/9", torch.ones(3)), "holds 'outside/9', which has no place in it..."),
]
FORGED_RESUMES = [*((forge, *row) for row in RESUMES), *((forge_tensors, *row) for row in STATES)]


@pytest.mark.parametrize(("forging", "edit", "sentence"), FORGED_RESUMES, ids=[row[2][:60] for row in FORGED_RESUMES])
def test_a_resume(forging: Callable[[Path, Edit], None], edit: Edit, sentence: str, version: Path) -> None:
    forging(version, edit)
    refuse_resume(version, f": {sentence}", *resumed(version))


def refuse_resume(
    version: Path, sentence: str, cascade: lx.Cascade, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    before = dict(vars(scheduler)) if scheduler is not None else None
    with unchanged(cascade, optimizer), pytest.raises(lx.CheckpointError, match=message(version, sentence)):
        cascade.resume(optimizer, scheduler)
    assert scheduler is None or vars(scheduler) == before


OTHERS: dict[str, tuple[Callable[[lx.Cascade], tuple[torch.optim.Optimizer, Any]], str]] = {
    "another optimizer": (
        lambda cascade: (torch.optim.SGD(cascade.param_groups(lr=0.1), lr=0.1), None),
        "holds the state of AdamW, the optimizer is SGD; give one of the kind that was saved",
    ),
    "other groups": (
        lambda cascade: (torch.optim.AdamW(joined(cascade.param_groups(lr=0.1))), None),
        "the optimizer has other groups than the saved one; build it the same way",
    ),
    "another scheduler": (
        lambda cascade: (opt := optimizers(cascade)[0], torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)),
        "holds the state of StepLR, the scheduler is ExponentialLR; give one of the kind that was saved",
    ),
}


def joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**groups[0], "params": groups[0]["params"] + groups[1]["params"]}, *groups[2:]]


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_or_scheduler(name: str, version: Path) -> None:
    cascade = lx.load(version.parent, Small(), args=(X,))
    make, sentence = OTHERS[name]
    refuse_resume(version, f": {sentence}", cascade, *make(cascade))


def test_an_optimizer_without_the_branches(version: Path) -> None:
    cascade, *_ = resumed(version)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with unchanged(cascade, optimizer), pytest.raises(lx.StateError, match=r"^the optimizer does not hold branches\."):
        cascade.resume(optimizer)


@pytest.mark.parametrize("what", ["optimizer", "scheduler"])
def test_saved_without(what: str, tmp_path: Path) -> None:
    cascade = lx.adapt(Small(), args=(X,), spec=SPEC, frontend="symbolic")
    version = lx.save(cascade, tmp_path, optimizer=None if what == "optimizer" else optimizers(cascade)[0])
    cascade, optimizer, scheduler = resumed(version)
    sentence = f": holds no {what}; it was saved without one: resume without it"
    refuse_resume(version, sentence, cascade, optimizer, scheduler if what == "scheduler" else None)


def test_an_optimizer_that_does_not_take_its_state(version: Path) -> None:
    """A hook of torch, by which a library refuses what it is given."""
    cascade, optimizer, scheduler = resumed(version)

    def refusing(*_: object) -> None:
        raise ValueError("of an older kind")

    optimizer.register_load_state_dict_pre_hook(refusing)
    sentence = (
        ": its state was not taken: of an older kind; build optimizer and scheduler the same way, or go on without"
    )
    refuse_resume(version, f"{sentence} them", cascade, optimizer, scheduler)


def test_a_resume_that_is_interrupted_gives_all_back(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its last step, when optimizer, gradients, scheduler and the other generators have been written."""
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
    cascade, optimizer, scheduler = resumed(version)
    cascade.resume(optimizer, scheduler)
    assert not [event for event in audited if event.startswith(("pickle.", "marshal.", "subprocess.", "socket."))]
