"""Train a YOLO in stages of one epoch with a custom trainer of ultralytics, on tiny images of colored squares.

Takes about a minute on a CPU. Needs ultralytics (last run with 8.4.190). Nothing is downloaded: the model is built
from its yaml.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import lorasc_fx as lx


class CascadeWrapper(nn.Module):
    """The model that the trainer calls. It runs images through the cascade. `module` is the plain model, as in DDP."""

    def __init__(self, cascade: lx.Cascade) -> None:
        super().__init__()
        self.module: Any = cascade.model
        self.cascade = cascade

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.module.loss(batch, self.cascade(batch["img"]))


class CascadeTrainer(DetectionTrainer):
    """Trains a cascade. Checkpoints are plain models with the slow weights. To resume, use lx.save and lx.load."""

    def build_optimizer(self, model: Any, **_: Any) -> torch.optim.Optimizer:
        images = torch.zeros(2, 3, self.args.imgsz, self.args.imgsz, device=self.device)
        spec = lx.CascadeSpec(rank=4, pace=0.8, noise=lx.Noise(0.02))
        self.cascade = lx.adapt(model.train(), args=(images,), spec=spec)
        self.model = CascadeWrapper(self.cascade)
        return torch.optim.AdamW(self.cascade.param_groups(lr=self.args.lr0))

    def _setup_train(self) -> None:
        super()._setup_train()
        self.ema.enabled = False  # the moving average would include the noise of the frozen weights

    def validate(self) -> Any:
        self.cascade.transition(self.optimizer)
        with self.cascade.weights("slow"):
            self.ema.ema.load_state_dict(self.cascade.model.state_dict())  # ultralytics validates and saves this model
        return super().validate()


def squares(folder: Path, count: int = 8, size: int = 64) -> Path:
    """Write a data set of images with one red or green square each, and return the path of its yaml."""
    source = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for number in range(count):
            (folder / "images" / part).mkdir(parents=True, exist_ok=True)
            (folder / "labels" / part).mkdir(parents=True, exist_ok=True)
            x, y = torch.randint(0, size // 2, (2,), generator=source).tolist()
            image = Image.new("RGB", (size, size), "gray")
            image.paste(("red", "green")[number % 2], (x, y, x + size // 2, y + size // 2))
            image.save(folder / "images" / part / f"{number}.png")
            center = [(corner + size // 4) / size for corner in (x, y)]
            (folder / "labels" / part / f"{number}.txt").write_text(f"{number % 2} {center[0]} {center[1]} 0.5 0.5\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
    return data


def main(folder: str, epochs: int = 3) -> tuple[lx.Cascade, YOLO]:
    options = {
        "data": str(squares(Path(folder) / "data")), "epochs": epochs, "imgsz": 64, "batch": 4, "nbs": 4, "lr0": 5e-3,
        "device": "cpu", "workers": 0, "plots": False, "amp": False, "project": folder, "name": "run",
        "warmup_epochs": 0, "verbose": False,
    }  # fmt: skip
    model = YOLO("yolov8n.yaml", verbose=False)
    model.train(trainer=CascadeTrainer, **options)
    cascade = model.trainer.cascade
    print(f"{cascade.stage - 1} stages; mAP50 of the slow weights: {model.trainer.metrics['metrics/mAP50(B)']:.3f}")
    return cascade, YOLO(Path(folder) / "run" / "weights" / "last.pt")  # a plain model


if __name__ == "__main__":
    main(*sys.argv[1:] or [tempfile.mkdtemp()])
