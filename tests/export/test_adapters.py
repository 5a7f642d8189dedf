"""`lx.export.adapter`: files with one run each, whose tensors have the names of an exported base's inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.peft.adapters import cascade_of, merged, trained_by_peft
from tests.peft.models import BUILD, made

Tensors = dict[str, torch.Tensor]


def stem(weight: str) -> str:
    name = weight.replace(".", "_").lower()
    return f"_{name}" if name[0] in "0123456789" else name


def assert_holds(tensors: Tensors, sites: tuple[lx.Site, ...], name: str, folded: Tensors, rank: int) -> None:
    """Assert that the tensors of all sites are there, padded to the rank, and W0 + B A equals the folded weight."""
    names = [f"{stem(site.weight)}_{each}" for site in sites for each in ("lora_a", "lora_b", "scale")]
    assert sorted(tensors) == sorted(names)
    base = made(BUILD[name]).state_dict()
    for site in sites:
        a, b, scale = (tensors[f"{stem(site.weight)}_{each}"] for each in ("lora_a", "lora_b", "scale"))
        assert a.dtype == b.dtype == scale.dtype == torch.float64
        assert (a.shape[-2], b.shape[-1], tuple(scale.shape), scale.item()) == (rank, rank, (), 1)
        total = base[site.weight] + (b @ a).view(base[site.weight].shape)
        torch.testing.assert_close(total, folded[site.weight], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["suffixes", "convs"])
def test_a_cascade_and_a_checkpoint(name: str, tmp_path: Path) -> None:
    cascade = cascade_of(name, stages=2, running=False)
    lx.save(cascade, tmp_path / "run")
    with unchanged(cascade):
        written = lx.export.adapter(cascade, tmp_path / "a.safetensors", max_rank=9)
    assert written == lx.export.AdapterFile(tmp_path / "a.safetensors", {})
    assert_holds(load_file(written.path), cascade.sites, name, cascade.folded_state_dict(), 9)
    lx.export.adapter(tmp_path / "run", tmp_path / "b.safetensors", max_rank=9)
    assert_holds(load_file(tmp_path / "b.safetensors"), cascade.sites, name, cascade.folded_state_dict(), 9)
    with safe_open(written.path, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "max_rank": "9"}


def test_the_sites_of_the_exported_cascade(tmp_path: Path) -> None:
    """A run with fewer sites, a checkpoint in the middle of a stage, and an adapter of peft."""
    host, few = cascade_of("suffixes", stages=1), cascade_of("suffixes", targets=("lin", "1.lin"), pace=0.25)
    lx.save(few, tmp_path / "few")
    theirs = trained_by_peft("suffixes", tmp_path / "peft", target_modules=["other"])
    expected = {"few": few.folded_state_dict(), "peft": merged(theirs).state_dict()}
    for name, folded in expected.items():
        with unchanged(host):
            lx.export.adapter(tmp_path / name, tmp_path / "a.safetensors", max_rank=5, base=host)
        assert_holds(load_file(tmp_path / "a.safetensors"), host.sites, "suffixes", folded, 5)
    with raises(lx.SpecError, "sites-differ", "export.adapter", "1.other.weight"):
        lx.export.adapter(tmp_path / "peft", tmp_path / "b.safetensors", max_rank=5, base=few)
    with raises(lx.StateError, "stage-not-ended", "few"):
        lx.export.adapter(tmp_path / "few", tmp_path / "b.safetensors", max_rank=5)
    with raises(lx.CheckpointError, "base-differs", "export.adapter", "the run, a cascade"):
        lx.export.adapter(cascade_of("words"), tmp_path / "b.safetensors", max_rank=5, base=host)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_smaller_rank_has_its_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lorasc_fx")
    cascade = cascade_of("suffixes", stages=3)
    cut = lx.export.adapter(cascade, tmp_path / "a.safetensors", max_rank=4).cut
    assert cut == lx.export.peft(cascade, tmp_path / "peft", max_rank=4).cut
    assert "1.lin.weight" in cut
    assert f"1.lin.weight: rank 6 to 4, error {cut['1.lin.weight'].error:.3g} of" in caplog.text


def test_a_file_of_onnxruntime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    cascade = lx.adapt(made(BUILD["suffixes"]).float(), (torch.randn(3, 6),), spec=lx.CascadeSpec(rank=2))
    randomize(cascade)
    for ending in ("safetensors", "onnx_adapter"):
        lx.export.adapter(cascade, tmp_path / f"a.{ending}", max_rank=4)
    file = runtime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    found = {name: value.numpy() for name, value in file.get_parameters().items()}
    expected = {name: value for name, value in load_file(tmp_path / "a.safetensors").items() if value.dim()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float32
        assert torch.equal(torch.from_numpy(found[name].copy()), value)
    assert runtime.LoraAdapter().Load(str(tmp_path / "a.onnx_adapter")) is None


class Normed(nn.Module):
    """A model with BatchNorm, whose statistics change in train mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.fc(x)))


@pytest.mark.parametrize("trains", [True, False])
def test_changed_statistics_are_refused(trains: bool, tmp_path: Path) -> None:
    """Factors do not contain them, so the base with the adapter would compute something else than the run."""
    x = torch.randn(5, 6)
    run = lx.adapt(Normed().train(trains), (x,), spec=lx.CascadeSpec(("linear",), rank=2))
    run(x)
    randomize(run)
    run.transition(None)
    lx.save(run, tmp_path / "run")
    resumed = lx.load(tmp_path / "run", Normed(), (x,))
    lx.save(resumed, tmp_path / "resumed")
    run.double()  # a cast does not count as a change
    for source in (run, tmp_path / "run", resumed, tmp_path / "resumed"):
        out = tmp_path / "a.safetensors"
        if trains:
            with raises(lx.SpecError, "method-not-supported", "norm.running_mean", "has changed this buffer"):
                lx.export.adapter(source, out, max_rank=4)
        else:
            lx.export.adapter(source, out, max_rank=4)
    for cascade, values in ((run, x.double()), (resumed, x)):
        if trains:
            with raises(lx.SpecError, "not-exportable", "export.program", "norm.running_mean", "Train in eval mode"):
                lx.export.program(cascade, adapters="inputs", max_rank=4)
        else:
            program = lx.export.program(cascade, adapters="inputs", max_rank=4)
            found = program.module()(values, **program.example_inputs[1])
            assert torch.equal(found, Normed().to(values.dtype).eval()(values))


def test_weights_with_the_same_input_names_are_refused(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self, other: str) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(6, 6)})
            self.add_module(other, nn.Linear(6, 6))
            self.other = other

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule(self.other)(self.a["b"](x))

    for other in ("a_b", "A_b"):
        run = lx.adapt(Doubled(other), (torch.randn(3, 6),), spec=lx.CascadeSpec(rank=2))
        names = ("a.b.weight", f"{other}.weight", "a_b_weight_lora_a")
        with raises(lx.SpecError, "not-exportable", *names):
            lx.export.adapter(run, tmp_path / "a.safetensors", max_rank=4)
        with raises(lx.SpecError, "not-exportable", *names):
            lx.export.program(run, adapters="inputs", max_rank=4)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=1)
    with raises(lx.SpecError, "invalid-value", "export.adapter", "a.bin", ".safetensors"):
        lx.export.adapter(cascade, tmp_path / "a.bin", max_rank=0)
    with raises(lx.SpecError, "invalid-value", "export.adapter", "a.bin", ".safetensors"):
        lx.export.adapter(cascade, tmp_path / "a.bin")  # the ending is named before the missing rank
    for rank in (0, 2.0, None):
        with raises(lx.SpecError, "invalid-value", "export.adapter", "max_rank", rank):
            lx.export.adapter(cascade, tmp_path / "a.safetensors", max_rank=rank)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
