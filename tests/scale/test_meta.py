"""A model on the meta device is adapted without memory, and then gets its numbers as if it had been loaded before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorasc_fx as lx
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.state import maps_a_file

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def llama(tied: bool = False) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.llama(**sizes, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=tied)


def image_net() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5)


class Mlp(nn.Module):
    """Names, shapes and no square matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how its files come to be.

    Args:
        build: makes it, with random numbers or on the meta device.
        kwargs: of a call.
        shards: most bytes of a file that transformers writes; empty for one file of ours.
        train: what is trained in full.
    """

    build: Callable[[], nn.Module]
    kwargs: dict[str, Tensor]
    shards: str = ""
    train: tuple[str, ...] = ("*norm*",)

    def loaded(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.uniform_(0.5, 1.5)
        return model

    def on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build().eval()

    def files(self, folder: Path) -> Path:
        """Write the files of the loaded model."""
        model: Any = self.loaded()
        if self.shards:
            model.save_pretrained(folder, max_shard_size=self.shards)
            return folder
        save_file(model.state_dict(), folder / "net.safetensors")
        return folder / "net.safetensors"

    def lost_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that no file keeps, of a model that was built with numbers."""
        model = self.loaded()
        kept = model.state_dict()
        return {name: value for name, value in model.named_buffers() if name not in kept}


CASES = {
    "llama in shards": Case(llama, {"input_ids": IDS}, "20KB"),
    "tied llama in one file": Case(lambda: llama(tied=True), {"input_ids": IDS}, "5GB"),
    "timm": Case(image_net, {"x": IMAGES}, train=("*.bn?.*",)),
}


SPEC = lx.CascadeSpec(rank=2, lora_alpha=4, pace=0.5, noise=lx.Noise(0.2), train=("*norm*",))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
MLP = Case(Mlp, {"x": X})


def trained(cascade: lx.Cascade, case: Case) -> list[Tensor]:
    """Train two stages, and return every output on the way and every weight at the end."""
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))
    seen = []
    for _ in cascade.stages(2, optimizer):
        for _ in range(2):
            output = cascade(**case.kwargs)
            logits = getattr(output, "logits", output)
            seen.append(logits.detach().clone())
            logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, *cascade.release().state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_as_if_the_model_had_been_loaded_before(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    files, spec = case.files(tmp_path), replace(SPEC, train=case.train)
    if case.shards == "20KB":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    on_meta = case.on_meta()
    assert {each.device.type for each in on_meta.parameters()} == {"meta"}
    there = lx.adapt(on_meta, kwargs=case.kwargs, spec=spec)
    assert lx.materialize(there, files, buffers=case.lost_buffers()) is there
    here = lx.adapt(case.loaded(), kwargs=case.kwargs, spec=spec)

    assert there.plan == here.plan
    assert there.refusals == here.refusals
    assert str(there) == str(here)
    own, other = dict(there.named_parameters()), dict(here.named_parameters())
    assert list(own) == list(other)
    assert all(torch.equal(own[each], other[each]) for each in own)
    assert there.model is on_meta
    for one, two in zip(trained(there, case), trained(here, case), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, adapter="dora")], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["memory", "file"])
def test_a_small_net(base: str, spec: lx.CascadeSpec, tmp_path: Path) -> None:
    files = MLP.files(tmp_path)
    there = lx.materialize(lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=spec, base=base), files)
    here = lx.adapt(MLP.loaded(), kwargs=MLP.kwargs, spec=spec)
    assert there.plan == here.plan
    assert maps_a_file(there) or base == "memory"
    for one, two in zip(trained(there, MLP), trained(here, MLP), strict=True):
        assert torch.equal(one, two)
    assert all(each.requires_grad for each in there.model.parameters())


class Allocated(TorchDispatchMode):
    """Sums the bytes of every new tensor with memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(made):
            if type(each) in (Tensor, nn.Parameter) and not each.is_meta and each.layout is torch.strided:
                storage = each.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known.add(storage.data_ptr())
                    self.bytes += storage.nbytes()
        return made


def test_adapt_allocates_nothing_of_the_base() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3000, 5000), nn.Tanh(), nn.Linear(5000, 4000), nn.Tanh(), nn.Linear(4000, 10))
    base = sum(each.numel() * 4 for each in model.parameters())
    assert base > 140e6
    with Allocated() as counted:
        cascade = lx.adapt(model, args=(torch.randn(2, 3000),), spec=lx.CascadeSpec(rank=4, noise=lx.Noise(0.1)))
    branches = sum(each.numel() * 4 for each in cascade.branches.parameters())
    assert 0 < counted.bytes < branches + 2e5
    with Allocated() as counted:
        torch.empty(10, 10)
    assert counted.bytes == 400


@pytest.mark.parametrize(
    ("call", "does"),
    [
        ("forward", lambda cascade, folder: cascade(**MLP.kwargs)),
        ("param_groups", lambda cascade, folder: cascade.param_groups(lr=0.1)),
        ("transition", lambda cascade, folder: cascade.transition(None)),
        ("release", lambda cascade, folder: (cascade.release(), folder)),
        ("weights", lambda cascade, folder: cascade.weights("slow").__enter__()),
        ("folded_state_dict", lambda cascade, folder: cascade.folded_state_dict()),
        ("to", lambda cascade, folder: cascade.double()),
        ("save", lx.save),
    ],
)
def test_it_does_nothing_before(call: str, does: Any, tmp_path: Path) -> None:
    cascade = lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=SPEC)
    with raises(lx.StateError, "meta-model", call):
        does(cascade, tmp_path / "run")
    assert cascade.eval() is cascade


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """Write the files of the net with some tensors changed, or left out."""
    path = MLP.files(folder)
    held = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in held.items() if value is not None}, path)
    return path


@contextlib.contextmanager
def still_on_meta(cascade: lx.Cascade) -> Iterator[None]:
    """Whatever raises, the cascade is as it was, and gets its numbers from the right files after that."""
    before, objects = dict(vars(cascade)), list(cascade.model.parameters())
    yield
    assert dict(vars(cascade)) == before
    assert all(one is two for one, two in zip(cascade.model.parameters(), objects, strict=True))
    assert all(each.is_meta for each in objects)


def test_files_of_another_model(tmp_path: Path) -> None:
    cascade = lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=SPEC)
    path = changed(tmp_path, up__weight=torch.ones(6, 10), down__bias=None, head__weight=torch.ones(2, 2))
    with still_on_meta(cascade), raises(lx.CheckpointError, "base-differs", path, "down.bias", "head.weight"):
        lx.materialize(cascade, path)
    lx.materialize(cascade, changed(tmp_path))
    assert torch.isfinite(cascade(**MLP.kwargs)).all()


class Rotated(Mlp):
    """With a table that no file keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.table)


def test_buffers_that_no_file_keeps(tmp_path: Path) -> None:
    case = Case(Rotated, {"x": X})
    path, cascade = case.files(tmp_path), lx.adapt(case.on_meta(), kwargs=case.kwargs, spec=SPEC)
    with still_on_meta(cascade), raises(lx.CheckpointError, "base-differs", path):
        lx.materialize(cascade, path)
    for name, value, said in (
        ("tabel", torch.ones(6), ("unknown-name", "tabel", "table")),
        ("table", torch.ones(5), ("invalid-value", "table", "[5]", "[6]")),
        ("table", torch.ones(6, device="meta"), ("invalid-value", "table")),
        ("up.bias", torch.ones(10), ("unknown-name", "up.bias", "table", "norm.running_mean")),
    ):
        with still_on_meta(cascade), raises(lx.SpecError, *said):
            lx.materialize(cascade, path, buffers={name: value})
    lx.materialize(cascade, path, buffers={"table": torch.arange(6.0)})
    expected = lx.adapt(case.loaded(), kwargs=case.kwargs, spec=SPEC)
    assert torch.equal(cascade(x=X), expected(x=X))


def test_a_buffer_that_was_built_with_numbers_stays(tmp_path: Path) -> None:
    """As accelerate's init_empty_weights builds a model."""
    case = Case(Rotated, {"x": X})
    model = case.loaded()
    for module in model.modules():
        for leaf, value in module._parameters.items():
            module._parameters[leaf] = nn.Parameter(value.to("meta"))
        for leaf, value in module._buffers.items():
            module._buffers[leaf] = torch.zeros_like(value) if leaf == "running_mean" else value
    cascade = lx.materialize(lx.adapt(model, kwargs=case.kwargs, spec=SPEC), case.files(tmp_path))
    assert torch.equal(cascade(x=X), lx.adapt(case.loaded(), kwargs=case.kwargs, spec=SPEC)(x=X))
    assert not torch.equal(model.norm.running_mean, torch.zeros(10))


def test_names_with_a_prefix_and_other_dtypes(tmp_path: Path) -> None:
    path = MLP.files(tmp_path)
    save_file({f"net.{name}": value.double() for name, value in load_file(path).items()}, path)
    cascade = lx.materialize(lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=SPEC), path)
    assert torch.equal(cascade(x=X), lx.adapt(MLP.loaded(), kwargs=MLP.kwargs, spec=SPEC)(x=X))


@pytest.mark.slow
def test_a_tie_that_the_files_do_not_have(tmp_path: Path) -> None:
    case = CASES["tied llama in one file"]
    folder = case.files(tmp_path)
    path = folder / "model.safetensors"
    held = load_file(path)
    assert "lm_head.weight" not in held
    cascade = lx.adapt(case.on_meta(), kwargs=case.kwargs, spec=lx.CascadeSpec(targets=("*mlp*",)))
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"] + 1}, path)
    with still_on_meta(cascade), raises(lx.CheckpointError, "tied-weights-differ", "lm_head.weight"):
        lx.materialize(cascade, folder, buffers=case.lost_buffers())


@pytest.mark.slow
def test_a_tie_that_the_spec_breaks(tmp_path: Path) -> None:
    case = CASES["tied llama in one file"]
    spec = lx.CascadeSpec(targets=("lm_head",), untie=("lm_head.weight",), rank=2, noise=lx.Noise(0.1))
    cascade = lx.adapt(case.on_meta(), kwargs=case.kwargs, spec=spec)
    lx.materialize(cascade, case.files(tmp_path), buffers=case.lost_buffers())
    expected = lx.adapt(case.loaded(), kwargs=case.kwargs, spec=spec)
    assert [site.weight for site in cascade.sites] == ["lm_head.weight"]
    for one, two in zip(cascade.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_devices(tmp_path: Path) -> None:
    path, cascade = MLP.files(tmp_path), lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=SPEC)
    for device in ("gpu9", "meta"):
        with still_on_meta(cascade), raises(lx.SpecError, "invalid-value", "device", device):
            lx.materialize(cascade, path, device=device)
    lx.materialize(cascade, path, device="cpu")
    with raises(lx.StateError, "not-available"):
        lx.materialize(cascade, path)


class Looks(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.up.weight.sum().item() > 0 else x


class Keeps(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(6)


def test_models_that_need_their_numbers() -> None:
    with raises(lx.CaptureError, "model-refuses-inputs", "Looks", "GuardOnDataDependentSymNode", "meta device"):
        lx.adapt(Case(Looks, {}).on_meta(), args=(X,))
    with raises(lx.CaptureError, "meta-model", "factor"):
        lx.adapt(Case(Keeps, {}).on_meta(), args=(X,))
    with raises(lx.CaptureError, "not-captured", "eager: ", "meta device"):
        lx.adapt(MLP.on_meta(), args=(X,), frontend="eager")


def test_a_fault_on_the_way_puts_all_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = lx.adapt(MLP.on_meta(), kwargs=MLP.kwargs, spec=SPEC)
    forward = Mlp.forward

    def broken(self: Mlp, x: Tensor) -> Tensor:
        raise ValueError("no")

    with still_on_meta(cascade), monkeypatch.context() as patched:
        patched.setattr(Mlp, "forward", broken)
        with raises(lx.CaptureError, "model-refuses-inputs", "Mlp", "ValueError"):
            lx.materialize(cascade, MLP.files(tmp_path))
    assert Mlp.forward is forward
    lx.materialize(cascade, MLP.files(tmp_path))
    assert torch.equal(cascade(x=X), lx.adapt(MLP.loaded(), kwargs=MLP.kwargs, spec=SPEC)(x=X))
