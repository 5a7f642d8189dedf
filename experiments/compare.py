"""`python -m experiments.compare [CONFIG.toml]`: compare methods, then check the folded weights in a new process.

The comparison is `lorasc-fx compare experiments/compare.toml`. It saves the folded weights of LoRASC. A new process
without the cascade loads them as an encoder of transformers. It must predict the same class for every test example.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel

from experiments import data
from experiments.models import minilm
from lorasc_fx.cli.compare import compare, planned
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.train import CONFIG
from lorasc_fx.errors import LorascError

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    path = Path(arguments[0]) if arguments else HERE / "compare.toml"
    try:
        model = f"model.path={minilm()}"
        config = load_config(path, [model])
        texts, labels = data.rotten_tomatoes()
        Path(config.data.path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": list(texts), "label": list(labels)}).to_parquet(config.data.path)
        folder = Path(config.output)
        if folder.exists():
            print(f"{folder} exists: its finished runs are reused (delete the folder to train them again).")
        code = compare(path, (model,))
    except LorascError as fault:
        print(f"compare: {fault}", file=sys.stderr)
        return 2
    if code:
        return code
    run = next(run for run in planned(config) if run.method == "lorasc")
    weights = folder / "weights" / run.name
    print(f"\nLoRASC's folded weights: {weights}. A new process loads them into the original class:", flush=True)
    files = [file.resolve() for file in (folder / CONFIG, weights, folder / "results" / f"{run.name}.json")]
    command = [sys.executable, "-m", "experiments.compare", "--prove", *map(str, files)]
    code = subprocess.run(command, check=False, cwd=HERE.parent).returncode
    print(f"{time.monotonic() - start:.0f} s in total. docs/evidence.md has nine tasks of this kind with ten seeds.")
    print("There, a mean of the weights at the ends of stages, as here, was less accurate than LoRA.")
    return code


@torch.no_grad()
def prove(config_file: str, weights: str, result: str) -> int:
    """Load folded weights into the original class and compare all predictions. Return 1 if any of them differs.

    Only the data loading comes from lorasc_fx. The encoder is built by transformers.
    """
    task = Task(load_config(Path(config_file)))
    saved = json.loads(Path(result).read_text(encoding="utf-8"))
    encoder, rows = AutoModel.from_pretrained(weights).eval(), task.data["test"]
    head = load_file(Path(weights) / "model.safetensors")
    predicted: list[int] = []
    for first in range(0, len(rows), 64):
        batch = task.collate(rows.select(range(first, min(first + 64, len(rows)))))
        del batch["labels"]
        mask = batch["attention_mask"][..., None]
        mean = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        predicted += (mean @ head["head.weight"].T + head["head.bias"]).argmax(-1).tolist()
    equal = sum(found == expected for found, expected in zip(predicted, saved["predicted"], strict=True))
    print(f"  {equal} of {len(predicted)} predictions are the same")
    return int(equal < len(predicted))


if __name__ == "__main__":
    sys.exit(prove(*sys.argv[2:5]) if sys.argv[1:2] == ["--prove"] else main(sys.argv[1:]))
