"""Adapters of one exported base are exchanged without lorasc_fx: by torch, onnxruntime and AOTInductor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorasc_fx as lx
from tests.contract.test_folded_alone import run_alone
from tests.errors.state import unchanged
from tests.export.cases import CASES, SLOW_CASES, Exported, llama, tensor_of, texts
from tests.kit import tiny
from tests.kit.errors import raises
from tests.kit.models import Breaking, randomize

RANK = 6
SPECS: tuple[dict[str, Any], ...] = ({}, {"rank": 3, "pace": 0.25}, {"rank": 1, "placement": "merged"})
"""The three runs. The first one is exported as the base."""
MORE = {
    "llama": Exported(lambda: llama(tie_word_embeddings=True, use_cache=False), texts),
    "gpt2": Exported(lambda: seeded(lambda: tiny.gpt2(use_cache=False)).eval(), texts),
}
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW_CASES, *MORE))]


def seeded(build: Any) -> Any:
    torch.manual_seed(55)
    return build()


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
    lx.export.pt2(runs[0], folder / "base.pt2", adapters="inputs", max_rank=RANK)
    lx.export.onnx(runs[0], folder / "base.onnx", adapters="inputs", max_rank=RANK)
    for index, run in enumerate(runs):
        for ending in ("safetensors", "onnx_adapter"):
            written = lx.export.adapter(run, folder / f"{index}.{ending}", max_rank=RANK, base=runs[0])
            assert not written.cut
        lx.export.pt2(run, folder / f"folded{index}.pt2")
    after = runs[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
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
    case = (CASES | SLOW_CASES | MORE)[name]
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
@pytest.mark.parametrize("name", ["stated", "bert"])
def test_adapters_are_exchanged_in_a_compiled_package(name: str, tmp_path: Path) -> None:
    make((CASES | SLOW_CASES)[name], tmp_path)
    run_alone(tmp_path, START + COMPILE, START + IN_AOTI)


def test_the_signature_and_the_content_of_the_file(tmp_path: Path) -> None:
    """The adapter follows the model's own arguments. The example and the weights contain nothing of a run."""
    case = CASES["stated"]
    run = runs_of(case)[0]
    lx.export.adapter(run, tmp_path / "a.safetensors", max_rank=RANK)
    program = lx.export.program(run, adapters="inputs", max_rank=RANK)
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
        ({"adapters": "input", "max_rank": 4}, "invalid-value", "'input'"),
        ({"adapters": "inputs"}, "invalid-value", "max_rank is None"),
        ({"adapters": "inputs", "max_rank": 0}, "invalid-value", "max_rank is 0"),
        ({"max_rank": 4}, "conflicting-options", "Give adapters='inputs' too, or remove max_rank"),
        ({"adapters": "inputs", "max_rank": 4, "folded": False}, "conflicting-options", "folded"),
        ({"adapters": "inputs", "max_rank": 4, "view": "averaged"}, "conflicting-options", "view"),
    ):
        for write in (lx.export.pt2, lx.export.program):
            target = () if write is lx.export.program else (out,)
            with unchanged(run), raises(lx.SpecError, code, "export.p", name):
                write(run, *target, **options)  # type: ignore[operator]
    x = torch.randn(2, 3)
    broken = lx.adapt(Breaking(3), (x,), spec=lx.CascadeSpec(rank=1), frontend="graph-breaks")
    with raises(lx.CaptureError, "no-whole-graph"):
        lx.export.pt2(broken, out, adapters="inputs", max_rank=4)
    hira = lx.adapt(
        nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3, spec=lx.CascadeSpec(adapter="hira", rank=1)
    )
    with raises(lx.CaptureError, "not-exportable", "in_proj_weight_lora_a", "adapter='lora'"):
        lx.export.pt2(hira, out, adapters="inputs", max_rank=4)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, fc_weight_scale: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * fc_weight_scale

    named = lx.adapt(Named(), (x, torch.ones(())), spec=lx.CascadeSpec(rank=1))
    with raises(lx.SpecError, "not-exportable", "fc_weight_scale is an argument of the model", "Rename"):
        lx.export.pt2(named, out, adapters="inputs", max_rank=4)
    assert not out.exists()


def test_the_base_of_a_run_with_kept_noise_is_w0() -> None:
    """Independent of the current values of the parameters."""
    case = CASES["stated"]
    (x,), _ = case.inputs(3)
    noise = lx.Noise(0.2, keep=True)
    run = lx.adapt(case.build().train(), (x,), spec=lx.CascadeSpec(rank=2, noise=noise, train=("head.bias",)))
    randomize(run)
    run.transition(None)
    program = lx.export.program(run, adapters="inputs", max_rank=3)
    found = tensor_of(program.module()(x, **program.example_inputs[1]))
    assert torch.equal(found, case.build().eval()(x))
