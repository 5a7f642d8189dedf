"""Exports of folded graphs: plain GraphModules, .pt2 and ONNX files that compute the same as the released model."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  # that a folded graph pickles is what is tested
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.export.cases import CASES, SLOW_CASES, Exported, tensor_of, trained_cascade
from tests.kit.errors import raises
from tests.kit.models import Breaking

FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
# torch's own, of a copy of any exported graph
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=EVERY)
def case(request: pytest.FixtureRequest) -> Exported:
    return (CASES | SLOW_CASES)[request.param]


@pytest.fixture(scope="module")
def cascade(case: Exported) -> lx.Cascade:
    """One cascade for all tests of a case, because exports do not change it."""
    return trained_cascade(case)


def released(cascade: lx.Cascade) -> nn.Module:
    """Return the released model of a copy of the cascade."""
    model = copy.deepcopy(cascade.model)
    model.load_state_dict(cascade.folded_state_dict(), strict=True)
    return model.eval()


def assert_close(output: Any, expected: Any) -> None:
    """Assert equality within 1e-5 of the scale of the expected values."""
    output, right = torch.as_tensor(output), tensor_of(expected).detach()
    assert output.shape == right.shape
    assert right.std() > 1e-3
    assert (output - right).abs().max() <= 1e-5 * right.abs().max()


def test_a_folded_graph_is_the_captured_one(case: Exported, cascade: lx.Cascade) -> None:
    """Compare names, operations, arguments and metadata of the nodes. The graph can be printed, pickled and copied."""
    args, kwargs = case.inputs(3)
    plain = lx.adapt(case.build().eval(), args, kwargs, spec=lx.CascadeSpec(rank=1)).folded_graph()
    cascade.eval()
    graph = cascade.folded_graph(args, kwargs)
    assert type(graph).__mro__[1] is fx.GraphModule
    assert isinstance(plain, fx.GraphModule)
    assert isinstance(graph, fx.GraphModule)
    captured = torch.export.export(
        released(cascade), args, kwargs, strict=False,
        dynamic_shapes=(*({0: torch.export.Dim.AUTO} for _ in args), *(FREE for _ in kwargs)),
    ).module()  # fmt: skip
    names = {node.name for node in captured.graph.nodes}
    calls = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    assert len([name for name in calls if name in names]) > 0.9 * len(calls)
    assert [(node.name, node.op, str(node.target)) for node in graph.graph.nodes] == [
        (node.name, node.op, str(node.target)) for node in plain.graph.nodes
    ]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert "nn_module_stack" in node.meta or "stack_trace" in node.meta, node
    printed = graph.print_readable(print_output=False)
    assert "torch.ops.aten" in printed
    assert "lora" not in printed
    assert "branches" not in printed
    expected = released(cascade)(*args, **kwargs)
    for copied in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):  # noqa: S301
        assert_close(tensor_of(copied(*args, **kwargs)).detach(), expected)


def test_pt2_is_the_eval_graph_of_any_batch(case: Exported, cascade: lx.Cascade, tmp_path: Path) -> None:
    cascade.train()
    next(cascade.model.children()).eval()
    with unchanged(cascade.model, cascade.branches):
        path = lx.export.pt2(cascade, tmp_path / "model.pt2")
    assert path == tmp_path / "model.pt2"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    program, model = torch.export.load(path), released(cascade)
    assert {name for name, _ in model.named_parameters()} <= set(program.state_dict) <= set(model.state_dict())
    for batch in (2, 5):
        args, kwargs = case.inputs(batch)
        with torch.no_grad():
            assert_close(tensor_of(program.module()(*args, **kwargs)), model(*args, **kwargs))
    inputs = torch.utils._pytree.tree_leaves(program.example_inputs)
    assert inputs
    assert not any(leaf.any() for leaf in inputs)  # the file has no data of the run


def test_unfolded_it_is_the_running_cascade(case: Exported, cascade: lx.Cascade, tmp_path: Path) -> None:
    """It contains the noise of the stage and its branches as plain operations."""
    path = lx.export.pt2(cascade, tmp_path / "running.pt2", folded=False)
    program = torch.export.load(path)
    assert any(name.endswith("lora_A") for name in program.state_dict)
    cascade.eval()
    for batch in (2, 5):
        args, kwargs = case.inputs(batch)
        assert_close(tensor_of(program.module()(*args, **kwargs)).detach(), cascade(*args, **kwargs))
        folded = tensor_of(released(cascade)(*args, **kwargs))
        assert (folded - tensor_of(cascade(*args, **kwargs))).abs().max() > 1e-3 * folded.abs().max()


def kinds(path: Path) -> Counter[str]:
    """Count the nodes of each kind in an ONNX file, including functions."""
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return Counter(node.op_type for graph in (model.graph, *model.functions) for node in graph.node)


def run(path: Path, args: Any, kwargs: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    assert len(names) == len(tensors)
    return session.run(None, {name: value.numpy() for name, value in zip(names, tensors, strict=True)})[0]


def own_export(model: nn.Module, path: Path, args: Any, kwargs: Any) -> Counter[str]:
    """Count the nodes of torch's own export of an eager model."""
    shapes: Any = (*({0: torch.export.Dim.AUTO} for _ in args), *(FREE for _ in kwargs))
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    return kinds(path)


def test_onnx_is_the_released_model_of_any_batch(case: Exported, cascade: lx.Cascade, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = lx.export.onnx(cascade, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    model = released(cascade)
    for batch in (2, 5):
        args, kwargs = case.inputs(batch)
        assert_close(run(path, args, kwargs), model(*args, **kwargs))
    base = own_export(case.build().eval(), tmp_path / "base.onnx", *case.inputs(3))
    assert kinds(path) == base


@pytest.mark.slow
def test_onnx_of_a_running_cascade(case: Exported, cascade: lx.Cascade, tmp_path: Path) -> None:
    """With `export.onnx`, and with torch.onnx.export of the cascade: the graph has no custom functions."""
    pytest.importorskip("onnxruntime")
    path = lx.export.onnx(cascade, tmp_path / "running.onnx", folded=False)
    cascade.eval()
    for batch in (2, 5):
        args, kwargs = case.inputs(batch)
        assert_close(run(path, args, kwargs), cascade(*args, **kwargs))
    import onnx

    by_torch = tmp_path / "by_torch.onnx"
    shapes: Any = (*({0: torch.export.Dim.AUTO} for _ in args), *(FREE for _ in kwargs))
    args, kwargs = case.inputs(3)
    torch.onnx.export(cascade, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False).save(by_torch)
    args, kwargs = case.inputs(4)
    assert_close(run(by_torch, args, kwargs), cascade(*args, **kwargs))
    for file in (path, by_torch):
        model = onnx.load(file)
        assert not model.functions
        assert {node.domain for node in model.graph.node} <= {""}


@pytest.mark.slow
def test_onnx_with_large_weights_has_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    case = CASES["stated"]
    cascade = trained_cascade(case)
    path = lx.export.onnx(cascade, tmp_path / "deep" / "model.onnx")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    args, kwargs = case.inputs(4)
    assert_close(run(path, args, kwargs), released(cascade)(*args, **kwargs))


def test_errors_of_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["stated"]
    cascade = trained_cascade(case)
    with raises(lx.SpecError, "invalid-value", "model.bin", "pt2"):
        lx.export.pt2(cascade, tmp_path / "model.bin")
    with raises(lx.SpecError, "invalid-value", "model.pt2"):
        lx.export.onnx(cascade, tmp_path / "model.pt2")
    (tmp_path / "in").write_text("")
    with raises(lx.export.ExportError, "write-failed", "in/model.pt2"):
        lx.export.pt2(cascade, tmp_path / "in" / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with raises(lx.errors.MissingExtra, "missing-extra"):
        lx.export.onnx(cascade, tmp_path / "model.onnx")
    x = torch.randn(2, 3)
    broken = lx.adapt(Breaking(3), (x,), spec=lx.CascadeSpec(rank=1), frontend="eager")
    for folded in (True, False):
        with raises(lx.CaptureError, "no-graph"):
            lx.export.pt2(broken, tmp_path / "model.pt2", folded=folded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@fx.wrap
def sign_of_the_sum(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


class Leaf(nn.Linear):
    """A model that reads a tensor's value inside a function that symbolic tracing does not enter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sign_of_the_sum(super().forward(x))


def test_a_graph_that_torch_cannot_export(tmp_path: Path) -> None:
    leaf = lx.adapt(fx.symbolic_trace(nn.Sequential(Leaf(3, 4))), (torch.randn(2, 3),), spec=lx.CascadeSpec(rank=1))
    with raises(lx.CaptureError, "not-exportable", "export.pt2", "Could"):
        lx.export.pt2(leaf, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_graph_for_given_inputs(tmp_path: Path) -> None:
    cascade, larger = trained_cascade(CASES["stated"]), torch.randn(2, 3, 12, 12)
    program = torch.export.load(lx.export.pt2(cascade, tmp_path / "larger.pt2", (larger,)))
    assert_close(program.module()(larger).detach(), released(cascade)(larger))
