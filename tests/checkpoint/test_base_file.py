"""base="file" and base=PATH: W0 is mapped from a safetensors file, and everything else equals base="memory"."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from tests.errors.models import Late, inputs, mlp, step
from tests.errors.state import of_slow, unchanged
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.seams import SEAMS, seam
from tests.kit.state import is_released, weight_states

X = inputs(2, 5)
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1))
SITES = ("0.weight", "2.weight", "3.weight")
MAPS = Path("/proc/self/smaps")


def mappings(path: Path) -> list[tuple[int, int, int]]:
    """Return start, end and private kB (written or copied pages) of the mappings of a file or of a folder's files."""
    if not MAPS.exists():
        pytest.skip("no /proc to see mappings in")
    found = []
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text()):
        if str(path) in part.splitlines()[0]:
            start, end = (int(each, 16) for each in part.split(" ", 1)[0].split("-"))
            own = re.search(r"Anonymous:\s+(\d+) kB", part)
            assert own is not None
            found.append((start, end, int(own.group(1))))
    return found


def assert_mapped(cascade: lx.Cascade, path: Path) -> None:
    """Assert that every W0 lies in a mapping of the files, and that no page was copied."""
    spans = mappings(path)
    for name, state in weight_states(cascade).items():
        address = state.base.data_ptr()
        assert [own for start, end, own in spans if start <= address < end] == [0], name


def written(path: Path, model: nn.Module, **other: torch.Tensor | None) -> Path:
    """Write a model's parameters as safetensors. `other` replaces some (`__` for a dot) or, with None, removes them."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    for key, value in other.items():
        name = key.replace("__", ".")
        tensors = {key: tensor for key, tensor in tensors.items() if key != name} | (
            {} if value is None else {name: value}
        )
    save_file(tensors, path)
    return path


def of_a_run(base: Any, model: nn.Module) -> tuple[list[torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """Return the losses of three stages, the slow state after them, and the released weights."""
    cascade = lx.adapt(model, (X,), spec=SPEC, base=base)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    losses = [step(cascade, optimizer) for _ in cascade.stages(3, optimizer)]
    slow = of_slow(cascade)
    return losses, slow, cascade.release().state_dict()


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    path = written(tmp_path / "any name.safetensors", mlp())
    before = path.read_bytes()
    ours, theirs = of_a_run(path, mlp()), of_a_run("memory", mlp())
    assert ours[:2] == theirs[:2]
    assert ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(ours[2][name], value) for name, value in theirs[2].items())
    assert path.read_bytes() == before


def test_w0_is_the_files_pages_until_the_release(tmp_path: Path) -> None:
    """W0 is mapped during adapt, stages and weights. After the release nothing is, even if the cascade still exists."""
    path = written(tmp_path / "base.safetensors", mlp())
    cascade = lx.adapt(mlp(), (X,), spec=SPEC, base=str(path))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    assert set(weight_states(cascade)) == set(SITES)
    assert_mapped(cascade, path)
    for _ in cascade.stages(2, optimizer):
        step(cascade, optimizer)
        with cascade.weights("base"):
            assert all(torch.equal(a, b) for a, b in zip(cascade.model.parameters(), mlp().parameters(), strict=True))
    assert_mapped(cascade, path)
    cascade.release()
    gc.collect()
    assert not mappings(path)
    assert is_released(cascade)


def raises_midway(cascade: lx.Cascade) -> None:
    """Run out of memory in a transition, after one weight was written."""
    real, count = seam("redraw"), iter(range(99))

    def failing(*args: Any, **options: Any) -> None:
        if next(count) == 1:
            raise MemoryError("no more")
        real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*SEAMS["redraw"], failing)
        with pytest.raises(MemoryError, match=r"^no more$"):
            cascade.transition(None)


def inside(cascade: lx.Cascade) -> None:
    """Place other weights temporarily."""
    with cascade.weights("fast"):
        assert not torch.equal(cascade.model[0].weight, mlp()[0].weight)


def in_new_memory(cascade: lx.Cascade) -> None:
    """Move the weights, like `to(device)` or another library."""
    for parameter in cascade.model.parameters():
        parameter.data = parameter.data.clone()


WRITES: dict[str, Callable[[lx.Cascade], object]] = {
    "transition": lambda cascade: cascade.transition(None),
    "a transition that fails": raises_midway,
    "weights": inside,
    "memory": in_new_memory,
    "cast": lambda cascade: cascade.to(torch.float64),
}


@pytest.mark.parametrize("write", WRITES)
def test_w0_is_the_weights_own_memory_until_something_is_written(write: str) -> None:
    """It is copied at that moment and not earlier, with unchanged values."""
    first = dict(mlp().named_parameters())
    spec = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5)
    cascade = lx.adapt(mlp(), (X,), spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    step(cascade, optimizer)
    parameters = dict(cascade.model.named_parameters())
    for name, state in weight_states(cascade).items():
        assert state.base.data_ptr() == parameters[name].data_ptr(), name
    WRITES[write](cascade)
    base = {name: state.base for name, state in weight_states(cascade).items()}
    assert base.keys() == set(SITES)
    if write == "a transition that fails":  # which has written one, and was about to write another
        assert sum(base[name].data_ptr() != parameters[name].data_ptr() for name in SITES) == 2
    else:
        assert all(base[name].data_ptr() != parameters[name].data_ptr() for name in SITES)
    cascade.transition(None)
    assert all(torch.equal(base[name], first[name]) for name in SITES)
    deltas = {}
    for name, state in weight_states(cascade).items():
        pairs = zip(state.slow, state.experts, strict=True)
        deltas[name] = torch.zeros(first[name].shape, dtype=torch.float64)
        for coefficient, expert in pairs:
            deltas[name] += coefficient * expert.b.double() @ expert.a.double()
        if state.dense_slow is not None:
            deltas[name] += state.dense_slow
        assert deltas[name].any()
    released = dict(cascade.release().named_parameters())
    for name in SITES:
        exact = first[name].double() + deltas[name]
        torch.testing.assert_close(released[name].double(), exact, rtol=1e-6, atol=1e-7)


class Halves(nn.Linear):
    """Halves its weight at each call, without changing the version counter."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.weight.data.mul_(0.5)
        return super().forward(input)


def test_a_weight_that_forward_writes_is_not_mapped(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Halves(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    cascade = lx.adapt(model, (X[0].float(),), spec=lx.CascadeSpec(rank=2), base=written(tmp_path / "base.st", model))
    assert [(each.weight, each.reason.value) for each in cascade.refusals] == [("0.weight", "written-by-forward")]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_shards_and_prefixes_of_transformers(tmp_path: Path) -> None:
    """`file` is the folder that the model names: of a model with or without a head, with one file or several."""
    transformers = pytest.importorskip("transformers")
    config = tiny.bert().config
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 30, (2, 6))}
    spec = lx.CascadeSpec(targets=("*.query", "*layer.*.dense", "*word_embeddings"), rank=2)
    kinds = (transformers.BertModel, transformers.BertForMaskedLM)
    for saved, size, other in (
        (kinds[0], "50GB", kinds[1]), (kinds[1], "4KB", transformers.BertForSequenceClassification)
    ):  # fmt: skip
        folder = tmp_path / saved.__name__
        saved(config).save_pretrained(folder, max_shard_size=size)
        assert len(list(folder.glob("*.safetensors"))) == 1 or size != "50GB"
        for loaded in (kinds[0], other):
            model = loaded.from_pretrained(folder).eval()
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            cascade = lx.adapt(model, kwargs=ids, spec=spec, base="file")
            assert sum("query" in name or "embeddings" in name for name in weight_states(cascade)) == 2
            assert_mapped(cascade, folder)
            for name, state in weight_states(cascade).items():
                assert torch.equal(state.base, before[name])
            cascade.release()


def one_bit(value: torch.Tensor) -> torch.Tensor:
    changed = value.detach().clone()
    changed.view(torch.int32)[1, 2] ^= 1
    return changed


def zeros(sign: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = sign * 0.0
    return model


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "missing": (mlp, lambda: {"2__weight": None}, ("base-differs", "2.weight", "3.weight", "0.weight")),
    "shape": (
        mlp,
        lambda: {"2__weight": torch.zeros(7, 6)},
        ("base-differs", "2.weight", "[7, 6] float32", "[6, 7] float32"),
    ),
    "dtype": (
        mlp,
        lambda: {"3__weight": mlp()[3].weight.detach().bfloat16()},
        ("base-differs", "3.weight", "[2, 6] bfloat16", "[2, 6] float32"),
    ),
    "one bit": (mlp, lambda: {"3__weight": one_bit(mlp()[3].weight)}, ("base-differs", "3.weight")),
    "sign of a zero": (
        lambda: zeros(1.0),
        lambda: {"2__weight": zeros(-1.0)[2].weight.detach()},
        ("base-differs", "2.weight"),
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_another_base_is_refused(fault: str, tmp_path: Path) -> None:
    """The error names weight and file. Model, flags and generators are unchanged, and base="memory" works."""
    build, other, sentence = WRONG[fault]
    model = build()
    path = written(tmp_path / "base.safetensors", model, **other())
    with unchanged(model), raises(lx.CheckpointError, *sentence, path):
        lx.adapt(model, (X,), spec=SPEC, base=path)
    assert lx.adapt(model, (X,), spec=SPEC).sites


def test_only_adapted_weights_are_needed(tmp_path: Path) -> None:
    """The file needs neither a new head that is trained in full, nor an excluded layer."""
    path = written(tmp_path / "base.safetensors", mlp(), **{"3__weight": None, "3__bias": None, "2__weight": None})
    spec = lx.CascadeSpec(rank=2, train=("3.*",), exclude=("2",))
    cascade = lx.adapt(mlp(), (X,), spec=spec, base=path)
    assert [site.weight for site in cascade.sites] == ["0.weight"]
    assert_mapped(cascade, path)


def named(folder: str) -> nn.Module:
    model = mlp()
    model.name_or_path = folder
    return model


# fmt: off
AMBIGUOUS = [
    (mlp, "file", lx.SpecError, ("no-base", "Sequential")),
    (lambda: named("org/model"), "file", lx.SpecError, ("no-base", "Sequential", "org/model")),
    (mlp, 3, lx.SpecError, ("invalid-value", "base", "3")),
    (mlp, "nowhere", lx.CheckpointError, ("no-base", "nowhere")),
]
# fmt: on


@pytest.mark.parametrize(("build", "base", "error", "sentence"), AMBIGUOUS)
def test_an_invalid_base(build: Any, base: Any, error: Any, sentence: tuple[str, ...]) -> None:
    model = build()
    with unchanged(model), raises(error, *sentence):
        lx.adapt(model, (X,), spec=SPEC, base=base)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("model.safetensors", "no tensors", ("unreadable-file", "model.safetensors")),
        ("model.safetensors.index.json", "{", ("unreadable-file", "index.json")),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone"}}', ("unreadable-file", "gone")),
    ],
)
def test_damaged_files(name: str, text: str, sentence: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    model = mlp()
    with unchanged(model), raises(lx.CheckpointError, *sentence):
        lx.adapt(model, (X,), spec=SPEC, base=tmp_path)


def test_a_site_of_a_later_call(tmp_path: Path) -> None:
    index = {"weight_map": {}}
    for part in ("first", "second"):
        tensors = {name: value for name, value in Late().state_dict().items() if name.startswith(part)}
        save_file(tensors, tmp_path / f"{part}.safetensors")
        index["weight_map"] |= dict.fromkeys(tensors, f"{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    cascade = lx.adapt(Late().eval(), (X,), spec=SPEC, base=tmp_path)
    assert [site.weight for site in cascade.sites] == ["first.weight"]
    cascade.train()
    cascade(X)
    assert [site.weight for site in cascade.sites] == ["first.weight", "second.weight"]
    assert_mapped(cascade, tmp_path)
    assert torch.equal(cascade.release().second.weight, Late().second.weight)


def test_tied_and_untied_names_are_one_tensor_of_the_file(tmp_path: Path) -> None:
    """The file has one of a parameter's names. A copy made by `untie` is compared with the same tensor."""

    def build() -> nn.Module:
        torch.manual_seed(4)
        model = nn.ModuleDict({"table": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
        model["head"].weight = model["table"].weight
        model.forward = lambda ids: model["head"](model["table"](ids))
        return model

    path = tmp_path / "base.safetensors"
    save_file({"head.weight": build()["head"].weight.detach()}, path)
    ids = torch.randint(0, 9, (2, 3))
    for untie, count in (((), 1), (("head.weight",), 2)):
        spec = lx.CascadeSpec(targets=("linear", "embedding"), rank=2, untie=untie)
        cascade = lx.adapt(build(), (ids,), spec=spec, base=path)
        assert len(cascade.sites) == count
        assert_mapped(cascade, path)


def test_a_file_that_is_written_to_is_noticed(tmp_path: Path) -> None:
    """A replaced or deleted file is still mapped. If its bytes change, it is no longer W0."""
    path = written(tmp_path / "base.safetensors", mlp())
    cascade = lx.adapt(mlp(), (X,), spec=SPEC, base=path)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    shutil.copy(path, tmp_path / "other")
    (tmp_path / "other").rename(path)
    step(cascade, optimizer)
    cascade.transition(optimizer)
    path.unlink()
    step(cascade, optimizer)
    cascade.transition(optimizer)
    cascade.release()

    for size in (1, 0):  # of the same size, with its mtime put back, as by cp -p or rsync --inplace -t
        path = written(tmp_path / "again.safetensors", mlp())
        cascade = lx.adapt(mlp(), (X,), spec=SPEC, base=path)
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
        step(cascade, optimizer)
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4 + size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with unchanged(cascade, optimizer), raises(lx.StateError, "weights-changed-outside", "transition", path):
            cascade.transition(optimizer)


def test_load_takes_w0_from_the_file_too(tmp_path: Path) -> None:
    path = written(tmp_path / "base.safetensors", mlp())
    cascade = lx.adapt(mlp(), (X,), spec=SPEC, base=path)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for _ in range(2):
        step(cascade, optimizer)
        cascade.transition(optimizer)
    lx.save(cascade, tmp_path / "run", optimizer=optimizer)
    again = lx.load(tmp_path / "run", mlp(), (X,), base=path)
    assert_mapped(again, path)
    assert of_slow(again) == of_slow(cascade)
    other = mlp()
    tensors = load_file(path)
    save_file(tensors | {"0.weight": one_bit(tensors["0.weight"])}, tmp_path / "wrong.safetensors")
    with unchanged(other), raises(lx.CheckpointError, "base-differs", "wrong.safetensors"):
        lx.load(tmp_path / "run", other, (X,), base=tmp_path / "wrong.safetensors")
