"""Folded weights as files: in the layout of the base, of a cascade or of its checkpoint alone, and without a base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cli import main
from tests.export.cases import llama
from tests.kit.errors import raises
from tests.kit.models import batches, mlp, randomize, train
from tests.kit.seams import SEAMS
from tests.kit.state import trained_in_full

IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(4))


def data(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a file, and its header under the name of none."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    table.pop("__metadata__", None)
    return {"": raw[:start]} | {
        name: raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]] for name, entry in table.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def llama_base(folder: Path, tied: bool) -> Path:
    """A model of transformers in bf16, in several shards, and what may lie beside its weights."""
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (folder / ".cache").mkdir()
    return folder


def trained(model: nn.Module, *, train: tuple[str, ...] = (), **kwargs: Any) -> lx.Cascade:
    """One stage folded, one that has trained."""
    spec = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), train=train, targets=("*.self_attn.*", "*embed*"))
    cascade = lx.adapt(model, kwargs={"input_ids": IDS, "use_cache": False}, spec=spec, **kwargs)
    for seed in (1, 2):
        randomize(cascade, seed, size=0.2)
        with torch.no_grad():
            for name, parameter in trained_in_full(cascade).items():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        if seed == 1:
            cascade.transition(None)
    return cascade


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fold_keeps_the_layout_of_the_base(tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files, index, headers and order; unchanged tensors are the same bytes; transformers reads it."""
    base = llama_base(tmp_path / "base", tied)
    before = contents_of_shards(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    cascade = trained(model, train=("model.norm.weight",))
    lx.save(cascade, tmp_path / "checkpoint")
    out, by_function = tmp_path / "out" / "folded", tmp_path / "other"
    assert main(["fold", str(tmp_path / "checkpoint"), "--base", str(base), "--output", str(out)]) == 0
    assert f"{out}: slow weights of {tmp_path}/checkpoint/version-00000001, in the layout of" in capsys.readouterr().out
    assert lx.export.safetensors(cascade, by_function, base=base) == by_function

    assert {path.name for path in out.iterdir()} == {p.name for p in base.iterdir()} - {"pytorch_model.bin", ".cache"}
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    for name in ("model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    folded = cascade.folded_state_dict()
    changed = {site.weight for site in cascade.sites} | {"model.norm.weight"}
    assert len(changed) == 10
    for shard in shards:
        written, was = data(out / shard), data(base / shard)
        assert list(written) == list(was)
        assert written[""] == was[""]
        for name, value in load_file(out / shard).items():
            assert (written[name] != was[name]) == (name in changed), name
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, folded[name])
    assert contents(by_function) == contents(out)
    assert contents_of_shards(base) == before

    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    released = cascade.release()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, released(input_ids=IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def contents_of_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


X = batches(1, 6, 5)[0]


def small(dtype: torch.dtype = torch.float64, **options: Any) -> lx.Cascade:
    spec = lx.CascadeSpec(**({"rank": 1, "pace": 0.5} | options))
    return lx.adapt(mlp().to(dtype), (X.to(dtype),), spec=spec)


def stepped(cascade: lx.Cascade, stages: int, running: bool) -> lx.Cascade:
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for stage in range(stages + running):
        train(cascade, optimizer, [X.to(next(cascade.parameters()).dtype)])
        if stage < stages:
            cascade.transition(optimizer)
    if running:
        randomize(cascade, 3)
        with torch.no_grad():
            for parameter in trained_in_full(cascade).values():
                parameter.mul_(1.5)
    return cascade


KEPT = lx.Noise(0.1, keep=True)
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"restart": "fast"},
    "noise": {"noise": lx.Noise(0.1, where="all")},
    "kept noise": {"noise": KEPT},
    "kept everywhere": {"noise": lx.Noise(0.1, keep=True, where="all"), "exclude": ("2.weight",), "targets": ("0.*",)},
    "trained": {"train": ("*.bias",), "targets": ("linear",)},
    "trained, not slowly": {"train": ("*.bias",), "slow_train": False},
    "collapsed": {"rank": 3},
    "pissa": {"start": "pissa", "noise": KEPT},
    "pissa, fast": {"start": "pissa", "restart": "fast"},
    "dora": {"adapter": "dora", "noise": lx.Noise(0.2)},
}


@pytest.mark.parametrize("when", ["first stage", "ended", "running", "idle"])
@pytest.mark.parametrize("options", SPECS.values(), ids=SPECS)
def test_the_fold_of_a_checkpoint_is_that_of_its_cascade(tmp_path: Path, options: dict[str, Any], when: str) -> None:
    """Bit for bit, without a model: experts, dense deltas, kept noise, parameters trained in full, a running stage."""
    base = tmp_path / "base.safetensors"
    save_file(mlp().state_dict(), base)
    cascade = stepped(small(**options), 0 if when == "first stage" else 2, when in ("first stage", "running"))
    if when == "idle":
        list(cascade.stages(1, torch.optim.SGD(cascade.param_groups(lr=0.1))))
    lx.save(cascade, tmp_path / "checkpoint")
    out = tmp_path / "out.safetensors"
    assert main(["fold", str(tmp_path / "checkpoint"), "--base", str(base), "--output", str(out)]) == 0
    folded, expected = load_file(out), cascade.folded_state_dict()
    assert folded.keys() == expected.keys()
    assert all(torch.equal(folded[name], expected[name]) for name in expected)
    assert not torch.equal(folded["0.weight"], mlp()[0].weight)
    again = lx.export.safetensors(cascade, tmp_path / "again.safetensors", base=base)
    assert again.read_bytes() == out.read_bytes()


class Norms(nn.Module):
    """A tied head and buffers that move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.table = nn.Embedding(9, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids)))


def test_tied_weights_other_names_and_buffers(tmp_path: Path) -> None:
    """A tied weight under both names, or under the other one; a name that the model does not know is copied."""
    plain = {name: value.clone() for name, value in Norms().state_dict().items()}
    cascade = lx.adapt(Norms().train(), (torch.arange(9),), spec=lx.CascadeSpec(targets=("embedding",), rank=1))
    randomize(cascade)
    cascade(torch.arange(9))
    lx.save(cascade, tmp_path / "checkpoint")
    folded = cascade.folded_state_dict()
    assert not torch.equal(folded["norm.running_mean"], plain["norm.running_mean"])
    for left_out in ({}, {"head.weight"}, {"table.weight"}):
        tensors = {name: value for name, value in plain.items() if name not in left_out}
        save_file(tensors, tmp_path / "base.safetensors")
        written = fold(tmp_path, "base.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], folded[name]) for name in written)
    save_file({"table.weight": plain["table.weight"], "old.tokens": torch.ones(5)}, tmp_path / "base.safetensors")
    written = fold(tmp_path, "base.safetensors")
    assert torch.equal(written["table.weight"], folded["table.weight"])
    assert torch.equal(written["old.tokens"], torch.ones(5))


def fold(folder: Path, base: str, checkpoint: str = "checkpoint") -> dict[str, torch.Tensor]:
    out = folder / "folded.safetensors"
    assert main(["fold", str(folder / checkpoint), "--base", str(folder / base), "--output", str(out)]) == 0
    tensors: dict[str, torch.Tensor] = load_file(out)
    return tensors


@pytest.mark.parametrize(("narrow", "model_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_base_narrower_than_the_model(tmp_path: Path, narrow: torch.dtype, model_dtype: torch.dtype) -> None:
    """Adapted in fp32, from files in bf16: W0 has the files' numbers, and the fold is rounded once to their dtype."""
    torch.manual_seed(3)
    model = mlp().to(narrow).to(model_dtype)
    save_file({name: value.to(narrow) for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    cascade = lx.adapt(model, (X.to(model_dtype),), spec=lx.CascadeSpec(rank=1, pace=0.5, train=("0.bias",)))
    stepped(cascade, 2, running=True)
    lx.save(cascade, tmp_path / "checkpoint")
    written, expected = fold(tmp_path, "base.safetensors"), cascade.folded_state_dict()
    for name, value in expected.items():
        assert written[name].dtype == narrow
        assert torch.equal(written[name], value.to(narrow))
    assert torch.equal(written["4.bias"].to(model_dtype), model[4].bias)
    assert not torch.equal(written["2.weight"].to(model_dtype), expected["2.weight"])


def test_what_cannot_be_folded_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is left behind."""
    state = mlp().state_dict()
    save_file(state, tmp_path / "base.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    cascade = stepped(small(train=("0.bias",)), 1, running=True)
    lx.save(cascade, tmp_path / "checkpoint")
    bent = {**state, "2.weight": state["2.weight"] * 2}
    cases: dict[str, tuple[dict[str, torch.Tensor] | None, str, str]] = {
        "another base": (bent, "out", "the values of 2.weight in {}/given.safetensors differ from the 2.weight that"),
        "a weight is missing": (
            {name: value for name, value in state.items() if name != "4.weight"}, "out",
            "given.safetensors has no 4.weight with the values that it had before",
        ),
        "no tensor is named": (
            {f"{name}x": value for name, value in state.items()}, "out", "given.safetensors has no ",
        ),
        "the place is taken": (state, "full", "full is not a file; give another path"),
        "the place is the base": (state, "given.safetensors", "safetensors is the base, which is not overwritten"),
        "no base": (None, "out", "given.safetensors is not a safetensors file, nor a folder with model.safetensors"),
    }  # fmt: skip
    for case, (tensors, out, message) in cases.items():
        file = tmp_path / "given.safetensors"
        file.unlink(missing_ok=True)
        if tensors is not None:
            save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        before = sorted(path.name for path in tmp_path.rglob("*"))
        arguments = ["fold", str(tmp_path / "checkpoint"), "--base", str(file), "--output", str(tmp_path / out)]
        assert main(arguments) == 2, case
        assert message.format(tmp_path) in capsys.readouterr().err, case
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}{}{}{}")
    assert main(arguments) == 2
    assert "given.safetensors: cannot be read: " in capsys.readouterr().err
    index = tmp_path / "full" / "model.safetensors.index.json"
    for text in (None, "{", '{"weight_map": {"a": "../x"}}'):
        if text is not None:
            index.write_text(text)
        with raises(lx.CheckpointError, "no-base" if text is None else "unreadable-file", "full"):
            lx.export.safetensors(cascade, tmp_path / "out", base=tmp_path / "full")


def test_a_new_head_and_names_with_a_prefix_in_a_folder(tmp_path: Path) -> None:
    """The head, which the files lack, is added to the last file and to the index."""
    folder, index = tmp_path / "base", "model.safetensors.index.json"
    folder.mkdir()
    state = {f"net.{name}": value for name, value in mlp().state_dict().items() if not name.startswith("4")}
    files = {name: f"{name[4]}.safetensors" for name in state}
    for file in sorted({*files.values()}):
        save_file({name: value for name, value in state.items() if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"kept": 1}, "weight_map": files}))
    cascade = stepped(small(targets=("0", "2"), train=("4",)), 1, running=True)
    lx.export.safetensors(cascade, tmp_path / "out", base=folder)
    folded, out = cascade.folded_state_dict(), tmp_path / "out"
    expected = {name if name[0] == "4" else f"net.{name}": value for name, value in folded.items()}
    written = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    written_index = json.loads((out / index).read_text())
    assert written_index["weight_map"] == files | dict.fromkeys(("4.weight", "4.bias"), "2.safetensors")
    assert written_index["metadata"] == {"kept": 1, "total_size": sum(value.nbytes for value in expected.values())}


def test_a_dtype_that_no_file_holds(tmp_path: Path) -> None:
    model = mlp()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    cascade = lx.adapt(model, (X,), spec=lx.CascadeSpec(rank=1))
    with raises(lx.StateError, "not-serializable", "phase", "torch.complex128"):
        lx.export.safetensors(cascade, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_fold_that_fails_on_its_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(mlp().state_dict(), tmp_path / "base.safetensors")
    cascade = stepped(small(), 1, running=False)
    for fault, raised in ((OSError(28, "No space left"), lx.export.ExportError), (MemoryError(), MemoryError)):
        with monkeypatch.context() as patched:
            patched.setattr(*SEAMS["write a tensor"], lambda *_, fault=fault: (_ for _ in ()).throw(fault))
            with pytest.raises(raised):
                lx.export.safetensors(cascade, tmp_path / "out.safetensors", base=tmp_path / "base.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_without_a_base(tmp_path: Path) -> None:
    """One file, a folder with one, a folder with shards and their index: the model's own names, in its dtype."""
    cascade = stepped(small(torch.float32), 1, running=True)
    expected = cascade.folded_state_dict()
    file = lx.export.safetensors(cascade, tmp_path / "a.safetensors")
    folder = lx.export.safetensors(cascade, tmp_path / "b")
    parts = lx.export.safetensors(cascade, tmp_path / "c", max_shard_bytes=200)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    save_file(expected, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert data(file) == data(tmp_path / "theirs.safetensors")
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    merged = {}
    for path in parts.glob("*.safetensors"):
        tensors = load_file(path)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == path.name}
        merged |= tensors
    for state in (merged, load_file(file)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        mlp().float().load_state_dict(state, strict=True)


# ---- one file in memory at a time


FOLD = """
import json, sys
from pathlib import Path
from lorasc_fx.cli import main

def peak():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

import torch, lorasc_fx.cli.export
loaded = peak()
code = main(["fold", sys.argv[2], "--base", sys.argv[1], "--output", sys.argv[3]])
Path(sys.argv[4]).write_text(json.dumps({"code": code, "bytes": peak() - loaded}))
"""
WIDTH, FILES = 4096, 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of a process")
def test_one_file_of_a_large_model_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """0.27 GB in eight files: without the memory of the imports, the peak is one mapped file and its new tensors."""
    base, checkpoint, out, report = (tmp_path / name for name in ("base", "checkpoint", "out", "told.json"))
    base.mkdir()
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(FILES)))
    files = {}
    for layer in range(FILES):
        weight = torch.randn(64, WIDTH).div(64).bfloat16().repeat(WIDTH // 64, 1)
        tensors = {f"{layer}.weight": weight, f"{layer}.bias": torch.full((WIDTH,), float(layer)).bfloat16()}
        files |= dict.fromkeys(tensors, f"model-{layer + 1:05d}-of-{FILES:05d}.safetensors")
        save_file(tensors, base / files[f"{layer}.weight"], metadata={"format": "pt"})
        model.load_state_dict(tensors, strict=False, assign=True)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    spec = lx.CascadeSpec(rank=2, placement="beside", targets=tuple(f"{layer}.weight" for layer in range(0, FILES, 2)))
    cascade = lx.adapt(model, (torch.randn(2, WIDTH).bfloat16(),), spec=spec)
    randomize(cascade)
    lx.save(cascade, checkpoint)
    command = [sys.executable, "-c", FOLD, *map(str, (base, checkpoint, out, report))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(report.read_text())
    assert measured["code"] == 0, done.stderr
    sizes = [[path.stat().st_size for path in sorted(folder.glob("*.safetensors"))] for folder in (base, out)]
    assert sizes[0] == sizes[1]
    assert measured["bytes"] < 4 * sizes[0][0]  # half of the model
