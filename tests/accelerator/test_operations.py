"""All that can be done with a cascade on a device: whole runs, each call in a third stage, and programs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from tests.accelerator.kit import DEVICE, OTHER, Side, assert_same, compare, tensors, two_devices

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": lx.Noise(0.1)},
    "noise that stays": {"noise": lx.Noise(0.1, keep=True, distribution="normal")},
    "dora": {"adapter": "dora"},
    "pissa": {"start": "pissa"},
    "pairs": {"restart_factors": "none"},
    "rows": {"rules": (lx.Rule("*", tokens=(0, 2)),)},
    "average": {"average": True, "restart": "fast"},
    "train": {"train": ("*.bias",)},
    "kept": {"optimizer_state": "kept"},
}
OTHERS = [name for name in METHODS if name not in ("lora", "dora")]
SPECS |= {name: {"adapter": name, "noise": lx.Noise(0.1)} for name in OTHERS}


# Refused on every device: experts that outgrow two token types, DoRA on embeddings and transposed convolutions.
# peft has no kept noise, no grouped convolution and no attention, and warns of tied weights.
EXCLUDED = {"bert": ("*token_type*",)}
EXCLUDED_BY_DORA = {
    "bert": ("*embeddings*",),
    "conv": ("up.weight",),
    "llama": ("*embed_tokens*",),
    "tied": ("table.*",),
}
TRAINED = {"llama": ("*layernorm.weight",), "tied": ("mix.weight",)}
"""What `train` names in models without biases."""
NOT_BY_PEFT = {"noise that stays", "conv", "attention", "tied", "rows", *OTHERS}


def spec_of(spec: str, name: str = "mlp") -> lx.CascadeSpec:
    excluded = (EXCLUDED_BY_DORA if spec == "dora" else EXCLUDED).get(name, ())
    more = {"train": TRAINED[name]} if spec == "train" and name in TRAINED else {}
    return lx.CascadeSpec(**{"rank": 2, "exclude": excluded, **SPECS[spec], **more})


PLACES = ("cpu", DEVICE)


def middle(side: Side) -> None:
    for _ in range(2):
        side.transition()
    side.step(2)
    side.show("state", tensors(side.cascade))


def earlier(side: Side) -> int:
    """Return a stage whose experts are stored. Experts of twice the rank outgrow these weights in stage 1."""
    twice = side.spec.start != "lora" or side.spec.restart_factors == "none"
    return 1 if not twice and side.spec.adapter in ("lora", "dora") else 2


def parameters(side: Side) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in side.cascade.named_parameters()}


def weights(side: Side) -> None:
    before = parameters(side)
    for view in side.cascade.views:
        with side.cascade.weights(view), torch.no_grad():
            side.show(f"weights({view!r})", side.call())
    with side.cascade.weights(stage=earlier(side)), torch.no_grad():
        side.show("weights(stage=...)", side.call())
    after = parameters(side)
    assert all(torch.equal(before[name], after[name]) for name in before), "the running weights are back"


def methods(side: Side) -> None:
    if side.name == "llama":
        side.show("generate", side.cascade.generate(**side.kwargs, max_new_tokens=3, do_sample=False))


def folded(side: Side) -> None:
    side.show("folded_state_dict", side.cascade.folded_state_dict())
    with torch.no_grad():
        side.show("folded_graph", side.call(side.cascade.folded_graph()))
    lx.export.safetensors(side.cascade, side.folder / "folded.safetensors")
    side.show("export.safetensors", load_file(side.folder / "folded.safetensors"))


def adapter(side: Side) -> None:
    lx.export.peft(side.cascade, side.folder / "peft")
    side.show("export.peft", load_file(side.folder / "peft" / "adapter_model.safetensors"))
    twin = side.twin()
    side.show("from_peft", tensors(lx.from_peft(side.folder / "peft", *twin.inputs)))


def graphs(side: Side) -> None:
    import onnxruntime

    with torch.no_grad():
        side.show("export.program", side.call(lx.export.program(side.cascade).module()))
        side.show(
            "export.pt2", side.call(torch.export.load(lx.export.pt2(side.cascade, side.folder / "a.pt2")).module())
        )
    session = onnxruntime.InferenceSession(lx.export.onnx(side.cascade, side.folder / "a.onnx"))
    inputs = [value.cpu().numpy() for value in (*side.args, *side.kwargs.values()) if isinstance(value, torch.Tensor)]
    names = [value.name for value in session.get_inputs()]
    side.show(
        "export.onnx", [torch.from_numpy(value) for value in session.run(None, dict(zip(names, inputs, strict=True)))]
    )


def checkpoint(side: Side) -> None:
    lx.save(side.cascade, side.folder / "run", optimizer=side.optimizer)
    side.step()
    for device in PLACES:
        twin = side.twin(device)
        twin.adopt(lx.load(side.folder / "run", *twin.inputs)).resume(twin.optimizer)
        twin.step()
        assert_same(tensors(twin.cascade), tensors(side.cascade), "a loaded run goes on as the saved one: ")
        twin.transition()
        side.show("loaded, next stage", tensors(twin.cascade))


def state_dict(side: Side) -> None:
    file = io.BytesIO()
    torch.save(side.cascade.state_dict(), file)
    tables = [side.cascade.state_dict()]
    for device in PLACES:
        file.seek(0)
        tables.append(torch.load(file, map_location=device, weights_only=True))  # noqa: TID251 - as trainers do
    for device in PLACES:
        twin = side.twin(device, adapted=True)
        for table in tables:
            twin.adopt(twin.cascade).load_state_dict(table)
            twin.step()
            side.show("next step", tensors(twin.cascade))
    for _, shown in side.shown:
        assert_same(side.shown[0][1], shown, "from each source and in each place: ")


def places(side: Side) -> None:
    home = str(side.device)
    for device in ("cpu", OTHER, home) if home != "cpu" else ("cpu",) * 3:
        side.to(device)
        assert side.is_at_home()
        side.transition()
        side.step()
        side.show("moved", tensors(side.cascade))


def runs(side: Side) -> None:
    lx.save(side.cascade, side.folder / "saved")
    for device in PLACES:
        second_run = side.twin(device, adapted=True)
        second_run.labels = second_run.labels.flip(0)
        second_run.transition()
        if side.spec.adapter == "dora":
            continue  # sums are refused
        twin = side.twin(device)
        merged = lx.merge([side.cascade, second_run.cascade, side.folder / "saved"], *twin.inputs)
        side.show("merge", tensors(merged))


def rewind(side: Side) -> None:
    side.cascade.rewind(earlier(side), side.optimizer)
    side.step()
    side.show("rewound", tensors(side.cascade))
    side.transition()
    side.show("next stage", tensors(side.cascade))


def release(side: Side) -> None:
    side.show("released", tensors(side.cascade.release()))


OPERATIONS = (middle, weights, methods, folded, adapter, state_dict, checkpoint, runs, rewind, release)

QUICK = ("dora", "kept")
NAMES = ("conv", "llama", "attention", "tied", "bert")
ROWS = [
    *(pytest.param("mlp", spec, marks=() if spec in QUICK else pytest.mark.slow) for spec in SPECS),
    # Each model by two specifications, and each specification by one model at least.
    *(
        pytest.param(NAMES[index % len(NAMES)], spec, marks=pytest.mark.slow)
        for index, spec in enumerate([*(spec for spec in SPECS if spec not in OTHERS), "plain"])
    ),
]


@pytest.mark.filterwarnings("ignore:merge. 2 buffers differ:lorasc_fx.errors.LorascWarning")
@pytest.mark.parametrize(("name", "spec"), ROWS)
def test_in_the_middle_of_a_stage(name: str, spec: str, tmp_path: Path) -> None:
    operations = [call for call in OPERATIONS if call is not adapter or not {name, spec} & NOT_BY_PEFT]
    compare(name, spec_of(spec, name), *operations, folder=tmp_path)


@two_devices
@pytest.mark.parametrize("spec", ["plain", pytest.param("noise", marks=pytest.mark.slow), "dora", "train"])
def test_moves(spec: str) -> None:
    compare("mlp", spec_of(spec), middle, places)


def test_exported_graphs(tmp_path: Path) -> None:
    compare("mlp", lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)), middle, graphs, folder=tmp_path)
