"""Hand-written records of a run with many sites and stages, for which a report must be readable."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lorasc_fx.cli.config import Config, DataConfig, ModelConfig, TrainConfig
from lorasc_fx.cli.run_folder import RunFolder

STAGES, STEPS = 5, 100


def write_long_run(path: Path, sites: int = 60) -> Path:
    """Write a run with 5 stages of 100 steps and this many sites. The last site has an unusual name."""
    folder = RunFolder(path)
    config = Config(
        model=ModelConfig("timm:vit_small"), data=DataConfig("rotten-tomatoes"), train=TrainConfig(stages=5)
    )
    folder.begin(config)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = [f"encoder.blocks.{number // 4}.{kinds[number % 4]}.weight" for number in range(sites - 1)]
    names.append("odd.<b>&.weight")
    about = {
        "model": "VisionTransformer", "frontend": "export", "parameters": 21_900_000, "trainable": 1_400_000,
        "unreached": ["head_dist.weight"], "refused_frontends": [],
        "sites": [
            {"weight": name, "kind": "linear", "shape": [1536, 384], "rank": 8, "scale": 2.0,
             "placement": "merged" if number % 3 else "beside", "parameters": 15_360}
            for number, name in enumerate(names)
        ],
        "refusals": [
            {"weight": f"encoder.blocks.{number}.norm1.weight", "node": "", "reason": "not-targeted",
             "sentence": "matches no target of the spec"}
            for number in range(20)
        ],
    }  # fmt: skip
    folder.cascade.write_text(json.dumps(about))
    for step in range(10, STAGES * STEPS + 1, 10):
        stage = (step - 1) // STEPS + 1
        loss = 0.3 + 2 * math.exp(-step / 120) + 0.15 * math.sin(step) + 0.4 * math.exp(-((step - 1) % STEPS) / 10)
        folder.log(step=step, stage=stage, loss=loss, lr=1e-3, seconds=0.05 * step)
        if step % STEPS == 0:
            fast = 0.5 + 0.09 * stage
            folder.log(step=step, stage=stage, validation_fast=fast, validation_loss_fast=1.2 / stage)
            folder.log(step=step, stage=stage, validation=fast - 0.08 / stage, validation_loss=1.5 / stage)
            with folder.experts.open("a", encoding="utf-8") as file:
                for number, name in enumerate(names):
                    norm = (1 + 0.5 * math.sin(number)) / stage
                    rank = 4 + 3 * math.cos(number * stage)
                    file.write(json.dumps({"stage": stage, "site": name, "norm": norm, "effective_rank": rank}) + "\n")
    folder.log(event="result", test=0.912, **{"rotten-tomatoes-shifted": 0.734})
    return path
