"""The custom trainer of the example, in which ultralytics trains a YOLO in stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorasc_fx as lx
from tests.kit.state import branches_of

pytest.importorskip(
    "ultralytics", reason="not in the extra `test`; docs/loops.md tells with which version this was run"
)

from ultralytics.nn.tasks import DetectionModel

from examples.ultralytics_trainer import CascadeTrainer, CascadeWrapper, main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def test_a_yolo_is_trained_in_stages_and_saved_with_the_slow_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[int, list[float]] = {}
    validated = []

    class Trainer(CascadeTrainer):  # type: ignore[misc]
        def optimizer_step(self) -> None:
            losses.setdefault(self.cascade.stage, []).append(float(self.loss))
            super().optimizer_step()

        def validate(self) -> object:
            found = super().validate()
            validated.append({name: value.clone() for name, value in self.ema.ema.state_dict().items()})
            return found

    monkeypatch.setattr("examples.ultralytics_trainer.CascadeTrainer", Trainer)
    cascade, saved = main(str(tmp_path), epochs=2)
    assert list(losses) == [1, 2]
    assert cascade.stage == 3
    slow = cascade.folded_state_dict()
    assert slow.keys() == validated[1].keys()
    assert all(torch.equal(value, slow[name]) for name, value in validated[1].items())
    still = [site.weight for site in cascade.sites if torch.equal(slow[site.weight], validated[0][site.weight])]
    assert all(name.startswith("model.22.cv2.") for name in still)  # boxes of sizes that no square has
    state = saved.model.state_dict()
    for site in cascade.sites:
        assert torch.equal(state[site.weight].float(), slow[site.weight].half().float()), site.weight


def test_images_of_a_batch_go_through_the_cascade_and_an_average_is_refused() -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False).train()
    model.args = type("Args", (), {"box": 7.5, "cls": 0.5, "dfl": 1.5})()
    batch = {
        "img": torch.rand(2, 3, 64, 64), "batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.tensor([[0.0], [1.0]]),
        "bboxes": torch.full((2, 4), 0.5),
    }  # fmt: skip
    expected = model.loss(batch)[0].sum()
    expected.backward()
    reached = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    model.zero_grad()
    cascade = lx.adapt(model, args=(torch.zeros(2, 3, 64, 64),), spec=lx.CascadeSpec(rank=2))
    wrapper = CascadeWrapper(cascade)
    loss = wrapper(batch)[0].sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    found = {name for name, branch in branches_of(cascade).items() if branch.lora_B.grad.any()}
    assert found == reached & branches_of(cascade).keys()
    assert len(found) > 50
