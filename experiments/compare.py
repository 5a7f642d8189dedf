"""`python -m experiments.compare [CONFIG.toml]`: `lorasc-fx compare experiments/compare.toml` on film reviews."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from datasets import Dataset

from experiments import data
from experiments.models import minilm
from lorasc_fx.cli.compare import compare
from lorasc_fx.cli.config import load_config
from lorasc_fx.errors import LorascError


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    path = Path(arguments[0]) if arguments else Path(__file__).with_name("compare.toml")
    try:
        model = f"model.path={minilm()}"
        texts, labels = data.rotten_tomatoes()
        table = Path(load_config(path, [model]).data.path)
        table.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": list(texts), "label": list(labels)}).to_parquet(table)
        code = compare(path, (model,))
    except LorascError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(f"{time.monotonic() - start:.0f} s in total. docs/evidence.md has nine tasks of this kind with ten seeds.")
    print("In them, restarts from the fast weights with a mean over stages, as here, were less accurate than LoRA.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
