"""`python -m experiments.compare [CONFIG.toml]`: compare methods, then check the folded weights in a new process.

The comparison is `lorasc-fx compare experiments/compare.toml`. It saves the folded weights of LoRASC. A new process
without the cascade loads them with timm, or as an encoder of transformers. It must predict the same class for every
test example.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasc_fx.cli.compare import compare, planned
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.task import Task
from lorasc_fx.errors import LorascError

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    path = Path(arguments[0]) if arguments else HERE / "compare.toml"
    try:
        config = load_config(path)
        folder = Path(config.output)
        if folder.exists():
            print(f"{folder} exists: its finished runs are reused (delete the folder to train them again).")
        code = compare(path)
    except LorascError as fault:
        print(f"compare: {fault}", file=sys.stderr)
        return 2
    if code:
        return code
    run = next(run for run in planned(config) if run.method == "lorasc")
    weights = folder / "weights" / run.name
    print(f"\nLoRASC's folded weights: {weights}. A new process loads them into the original class:", flush=True)
    files = [file.resolve() for file in (path, weights, folder / "results" / f"{run.name}.json")]
    command = [sys.executable, "-m", "experiments.compare", "--prove", *map(str, files)]
    code = subprocess.run(command, check=False, cwd=HERE.parent).returncode
    print(f"{time.monotonic() - start:.0f} s in total. docs/evidence.md has nine tasks, with ten seeds each.")
    return code


@torch.no_grad()
def prove(config_file: str, weights: str, result: str) -> int:
    """Load folded weights into the original class and compare all predictions. Return 1 if any of them differs.

    Only the data loading comes from lorasc_fx. The model is built by timm or transformers.
    """
    task = Task(load_config(Path(config_file)))
    model = original(task.config.model.name, Path(weights), len(task.classes))
    saved = json.loads(Path(result).read_text(encoding="utf-8"))
    all_equal = True
    for part, expected in saved["predicted"].items():
        rows = task.data[part]
        predicted = []
        for first in range(0, len(rows), 64):
            batch = task.collate(rows.select(range(first, min(first + 64, len(rows)))))
            del batch["labels"]
            predicted += model(**batch).argmax(-1).tolist()
        equal = sum(found == wanted for found, wanted in zip(predicted, expected, strict=True))
        all_equal = all_equal and equal == len(expected)
        print(f"  {part}: {equal} of {len(expected)} predictions are the same")
    return 0 if all_equal else 1


def original(name: str, weights: Path, classes: int) -> Callable[..., Tensor]:
    """Return the model of its own library, with these weights in eval mode."""
    values = load_file(weights / "model.safetensors")
    if name.startswith("timm:"):
        import timm

        model: torch.nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=classes)
        model.load_state_dict(values, strict=True)
        found: Callable[[Tensor], Tensor] = model.eval()
        return lambda **batch: found(*batch.values())
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(weights).eval()

    def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (hidden * mask).sum(1) / mask.sum(1) @ values["head.weight"].T + values["head.bias"]

    return logits


if __name__ == "__main__":
    sys.exit(prove(*sys.argv[2:5]) if sys.argv[1:2] == ["--prove"] else main(sys.argv[1:]))
