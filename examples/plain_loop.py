"""Adapt EfficientNet-Lite0 to handwritten digits in a plain training loop.

Takes less than a minute on two cores. Run it from a clone, with the extras `vision` and `demo`.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize

import lorasc_fx as lx
from experiments.data import digits
from experiments.models import efficientnet


def main(steps: int = 40, stages: int = 3) -> float:
    pixels, labels = digits()
    images = resize(pixels.expand(-1, 3, -1, -1), [64, 64]).float() / 127.5 - 1
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(efficientnet().state_dict())
    model.reset_classifier(10)
    model.eval()  # batch norm keeps its pretrained statistics

    spec = lx.CascadeSpec(
        targets=("*.conv_pw.weight", "*.conv_pwl.weight", "conv_head.weight"),  # all 1x1 convs
        train=("classifier.*",),
        rank=8,
        lora_alpha=8,
        pace=0.7,
        noise=lx.Noise(0.1),
    )
    model = lx.adapt(model, args=(images[:32],), spec=spec)
    print(model)

    optimizer = torch.optim.AdamW(model.param_groups(lr=2e-3))
    for stage in model.stages(stages, optimizer):
        for step in range(steps):
            index = torch.randint(1300, (32,), generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(model(images[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"stage {stage.index}: loss {loss.item():.3f}")

    model = model.release()  # the same timm model, with the slow weights folded in
    with torch.no_grad():
        accuracy: float = (model(images[1300:]).argmax(-1) == labels[1300:]).float().mean().item()
    print(f"accuracy of the released model: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
