"""Adapters of an exported base: their files, and exchanges without lorasc_fx by torch, onnxruntime and AOTInductor."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from tests.contract.test_folded_alone import run_alone
from tests.errors.state import unchanged
from tests.export.cases import CASES, SLOW_CASES, Exported, llama, tensor_of, texts
from tests.kit.compare import assert_same
from tests.kit.errors import raises
from tests.kit.models import Breaking, randomize
from tests.peft.models import BUILD, cascade_of, made, merged, trained_by_peft

RANK = 6
SPECS: tuple[dict[str, Any], ...] = ({}, {"rank": 3, "pace": 0.25}, {"rank": 1, "placement": "merged"})
"""The three runs. The first one is exported as the base."""
LLAMA = {"llama": Exported(lambda: llama(tie_word_embeddings=True, use_cache=False), texts)}
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "llama"))]


def runs_of(case: Exported) -> list[lx.Cascade]:
    """Return three runs with different ranks and two experts each: of an ended and of the running stage."""
    args, kwargs = case.inputs(3)
    runs = []
    for number, options in enumerate(SPECS):
        spec = replace(lx.CascadeSpec(rank=2, pace=0.5), **options)
        runs.append(lx.adapt(case.build().eval(), args, kwargs, spec=spec))
        for seed in (1, 2):
            randomize(runs[-1], 10 * number + seed, size=0.2)
            if seed == 1:
                runs[-1].transition(None)
    return runs


def make(case: Exported, folder: Path) -> list[lx.Cascade]:
    """Write base, adapters, and folded exports, with calls of two sizes."""
    runs = runs_of(case)
    before = {name: value.clone() for name, value in runs[0].state_dict().items()}
    lx.export.pt2(runs[0], folder / "base.pt2", adapter_rank=RANK)
    lx.export.onnx(runs[0], folder / "base.onnx", adapter_rank=RANK)
    for index, run in enumerate(runs):
        for ending in ("safetensors", "onnx_adapter"):
            written = lx.export.adapter(run, folder / f"{index}.{ending}", max_rank=RANK, base=runs[0])
            assert not written.cut
        lx.export.pt2(run, folder / f"folded{index}.pt2")
    assert_same(dict(runs[0].state_dict()), before)
    plain = lx.adapt(case.build().eval(), *case.inputs(3), spec=lx.CascadeSpec(rank=1))
    lx.export.pt2(plain, folder / "plain.pt2")
    lx.export.onnx(plain, folder / "plain.onnx")
    torch.save([case.inputs(batch) for batch in (2, 5)], folder / "calls.pt")
    return runs


START = """
from pathlib import Path
import transformers.modeling_outputs  # whose classes torch.export.load wants to know
from safetensors.torch import load_file

folder = Path(sys.argv[1])
calls = torch.load(folder / "calls.pt", weights_only=True)

def first(output):
    return output["logits"] if isinstance(output, dict) else output

def assert_close(found, expected):
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), (found - expected).abs().max()

folded = [torch.export.load(folder / f"folded{index}.pt2").module() for index in range(3)]
adapters = [load_file(folder / f"{index}.safetensors") for index in range(3)]
none = {name: torch.zeros_like(value) for name, value in adapters[0].items()}
plain = torch.export.load(folder / "plain.pt2").module()

def assert_exchanges(base, exact):
    with torch.no_grad():
        for args, kwargs in calls:
            without = first(plain(*args, **kwargs))
            for _ in range(2):
                for adapter, model in zip(adapters, folded):
                    expected = first(model(*args, **kwargs))
                    assert (expected - without).abs().max() > 1e-2 * without.abs().max()
                    assert_close(first(base(*args, **kwargs, **adapter)), expected)
                found = first(base(*args, **kwargs, **none))
                assert torch.equal(found, without) if exact else True
                assert_close(found, without)
"""

IN_TORCH = """
assert_exchanges(torch.export.load(folder / "base.pt2").module(), True)
assert "lorasc_fx" not in sys.modules
print("alone")
"""

IN_ONNX = """
import onnx, onnxruntime

def session(name):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])

base, plain_onnx = session("base.onnx"), session("plain.onnx")
names = [each.name for each in plain_onnx.get_inputs()]
assert [each.name for each in base.get_inputs()] == names
assert {each.name for each in base.get_overridable_initializers()} == adapters[0].keys()
for args, kwargs in calls:
    given = {name: value.numpy() for name, value in zip(names, (*args, *kwargs.values()))}
    without = plain_onnx.run(None, given)[0]
    for _ in range(2):
        for index, model in enumerate(folded):
            active, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
            active.Load(str(folder / f"{index}.onnx_adapter"))
            options.add_active_adapter(active)
            expected = first(model(*args, **kwargs)).detach()
            assert_close(torch.from_numpy(base.run(None, given, options)[0]), expected)
            fed = {name: value.numpy() for name, value in adapters[index].items()}
            assert_close(torch.from_numpy(base.run(None, given | fed)[0]), expected)
        found = base.run(None, given)[0]
        # torch.onnx folds a norm into the convolution before it, and not where the branch is in between.
        norms = any(each.op_type == "BatchNormalization" for each in onnx.load(folder / "base.onnx").graph.node)
        assert norms or (found == without).all()
        assert_close(torch.from_numpy(found), torch.from_numpy(without))
assert "lorasc_fx" not in sys.modules
print("alone")
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EVERY)
def test_adapters_are_exchanged_without_lorasc_fx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    case = (CASES | SLOW_CASES | LLAMA)[name]
    make(case, tmp_path)
    run_alone(tmp_path, START + IN_TORCH, START + IN_ONNX)


COMPILE = """
from torch._inductor import aoti_compile_and_package

aoti_compile_and_package(torch.export.load(folder / "base.pt2"), package_path=str(folder / "compiled.pt2"))
"""

IN_AOTI = """
from torch._inductor import aoti_load_package

assert_exchanges(aoti_load_package(str(folder / "compiled.pt2")), False)
print("alone")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_adapters_are_exchanged_in_a_compiled_package(tmp_path: Path) -> None:
    make(CASES["stated"], tmp_path)
    run_alone(tmp_path, START + COMPILE, START + IN_AOTI)


def test_the_signature_and_the_content_of_the_file(tmp_path: Path) -> None:
    """The adapter follows the model's own arguments. The example and the weights contain no data of a run."""
    case = CASES["stated"]
    run = runs_of(case)[0]
    lx.export.adapter(run, tmp_path / "a.safetensors", max_rank=RANK)
    program = lx.export.program(run, adapter_rank=RANK)
    args, kwargs = program.example_inputs
    adapter = load_file(tmp_path / "a.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in kwargs.items()} == {
        name: (value.shape, value.dtype) for name, value in adapter.items()
    }
    assert not any(value.any() for value in (*args, *kwargs.values()))
    assert list(program.graph_signature.user_inputs) == ["x", *kwargs]
    assert [name.rpartition("_lora_a")[0] for name in kwargs if "lora_a" in name] == [
        site.weight.replace(".", "_") for site in run.sites
    ]
    base = case.build().state_dict()
    assert all(torch.equal(value, base[name]) for name, value in program.state_dict.items())
    with pytest.raises(ValueError, match="stem_weight_lora_a"):
        program.module()(*case.inputs(2)[0])


def test_errors_of_exports_with_adapter_inputs(tmp_path: Path) -> None:
    case, out = CASES["stated"], tmp_path / "base.pt2"
    run = lx.adapt(case.build().eval(), *case.inputs(3), spec=lx.CascadeSpec(rank=2))
    for options, code, name in (
        ({"adapter_rank": 0}, "invalid-value", "adapter_rank is 0"),
        ({"adapter_rank": 4, "folded": False}, "conflicting-options", "folded"),
        ({"adapter_rank": 4, "view": "averaged"}, "conflicting-options", "view"),
    ):
        for write in (lx.export.pt2, lx.export.program):
            target = () if write is lx.export.program else (out,)
            with unchanged(run), raises(lx.SpecError, code, "export.p", name):
                write(run, *target, **options)  # type: ignore[operator]
    x = torch.randn(2, 3)
    broken = lx.adapt(Breaking(3), (x,), spec=lx.CascadeSpec(rank=1), frontend="eager")
    with raises(lx.CaptureError, "no-graph"):
        lx.export.pt2(broken, out, adapter_rank=4)
    hira = lx.adapt(nn.Linear(3, 4), (x,), spec=lx.CascadeSpec(adapter="hira", rank=1))  # with factors of LoRA's shapes
    with raises(lx.SpecError, "not-exportable", "adapter='hira'", "adapter='lora'"):
        lx.export.pt2(hira, out, adapter_rank=4)

    class InTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.aux(x) if self.training else self.fc(x)

    unused = lx.adapt(InTraining(), (x,), spec=lx.CascadeSpec(rank=1))
    with raises(lx.CaptureError, "not-exportable", "aux_weight_", "uses all sites"):
        lx.export.pt2(unused, out, adapter_rank=4)
    assert not out.exists()


def test_the_base_of_a_run_with_kept_noise_is_w0() -> None:
    """Independent of the current values of the parameters."""
    case = CASES["stated"]
    (x,), _ = case.inputs(3)
    noise = lx.Noise(0.2, keep=True)
    run = lx.adapt(case.build().train(), (x,), spec=lx.CascadeSpec(rank=2, noise=noise, train=("head.bias",)))
    randomize(run)
    run.transition(None)
    program = lx.export.program(run, adapter_rank=3)
    output = tensor_of(program.module()(x, **program.example_inputs[1]))
    assert torch.equal(output, case.build().eval()(x))


Tensors = dict[str, torch.Tensor]


def stem(weight: str) -> str:
    name = weight.replace(".", "_").lower()
    return f"_{name}" if name[0] in "0123456789" else name


def assert_holds(tensors: Tensors, sites: tuple[lx.Site, ...], name: str, folded: Tensors, rank: int) -> None:
    """Assert that the tensors of all sites are there, padded to the rank, and W0 + B A equals the folded weight."""
    names = [f"{stem(site.weight)}_{field}" for site in sites for field in ("lora_a", "lora_b", "scale")]
    assert sorted(tensors) == sorted(names)
    base = made(BUILD[name]).state_dict()
    for site in sites:
        a, b, scale = (tensors[f"{stem(site.weight)}_{field}"] for field in ("lora_a", "lora_b", "scale"))
        assert a.dtype == b.dtype == scale.dtype == torch.float64
        assert (a.shape[-2], b.shape[-1], tuple(scale.shape), scale.item()) == (rank, rank, (), 1)
        delta = (b @ a).mT if site.layout == "in_out" else b @ a
        total = base[site.weight] + delta.reshape(site.shape)
        torch.testing.assert_close(total, folded[site.weight], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["suffixes", "words", "convs", "mixture"])
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


def test_an_onnx_adapter_has_the_factors_without_the_scales(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    cascade, files = cascade_of("suffixes"), [tmp_path / f"a.{ending}" for ending in ("safetensors", "onnx_adapter")]
    for file in files:
        lx.export.adapter(cascade, file, max_rank=9)
    expected = {name: value for name, value in load_file(files[0]).items() if not name.endswith("_scale")}
    factors = onnxruntime.AdapterFormat.read_adapter(str(files[1])).get_parameters()
    assert factors.keys() == expected.keys()
    assert all((factors[name].numpy() == value.numpy()).all() for name, value in expected.items())


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


def normed() -> nn.Module:
    """A model with BatchNorm, whose statistics change in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(fc=nn.Linear(6, 8), norm=nn.BatchNorm1d(8), head=nn.Linear(8, 2)))


@pytest.mark.parametrize("trains", [True, False])
def test_changed_statistics_are_refused(trains: bool, tmp_path: Path) -> None:
    """Factors do not contain them, so the base with the adapter would compute something else than the run."""
    x = torch.randn(5, 6)
    run = lx.adapt(normed().train(trains), (x,), spec=lx.CascadeSpec(("linear",), rank=2))
    run(x)
    randomize(run)
    run.transition(None)
    lx.save(run, tmp_path / "run")
    resumed = lx.load(tmp_path / "run", normed(), (x,))
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
                lx.export.program(cascade, adapter_rank=4)
        else:
            program = lx.export.program(cascade, adapter_rank=4)
            output = program.module()(values, **program.example_inputs[1])
            assert torch.equal(output, normed().to(values.dtype).eval()(values))


def test_weights_with_the_same_input_names_are_refused() -> None:
    model = nn.Sequential()
    model.add_module("a_b", nn.Linear(6, 6))
    model.add_module("a", nn.ModuleDict({"b": nn.Linear(6, 6)}))
    model.forward = lambda x: model.a["b"](model.a_b(x))
    run = lx.adapt(model, (torch.randn(3, 6),), spec=lx.CascadeSpec(rank=2))
    with raises(lx.CaptureError, "not-exportable", "a_b_weight_"):
        lx.export.program(run, adapter_rank=4)


def test_wrong_arguments(tmp_path: Path) -> None:
    cascade = cascade_of("suffixes", stages=1)
    with raises(lx.SpecError, "invalid-value", "export.adapter", "a.bin", ".safetensors"):
        lx.export.adapter(cascade, tmp_path / "a.bin", max_rank=0)
    for rank in (0, 2.0):
        with raises(lx.SpecError, "invalid-value", "export.adapter", "max_rank", rank):
            lx.export.adapter(cascade, tmp_path / "a.safetensors", max_rank=rank)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
