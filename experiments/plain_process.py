"""The last step of `make demo`: load the trained weights with transformers and peft, without lorasc_fx.

`python experiments/plain_process.py FOLDER GGUF` prints how many answers have the same tokens as the answers in FOLDER.
"""

from __future__ import annotations

import sys
import warnings

sys.modules["lorasc_fx"] = None  # type: ignore[assignment]  # importing it raises an error

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402


def main(folder: Path, gguf: Path) -> int:
    disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft uses the old name
    expected = load_file(folder / "answers.safetensors")
    prompts = {name: expected[name] for name in ("input_ids", "attention_mask")}
    base = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    models = {
        "transformers loads demo/model": AutoModelForCausalLM.from_pretrained(folder / "model"),
        "peft loads demo/adapter": PeftModel.from_pretrained(base, folder / "adapter"),
    }
    status = 0
    for title, model in models.items():
        tokens = model.eval().generate(**prompts, max_new_tokens=expected["answers"].shape[1], do_sample=False)
        answers = tokens[:, prompts["input_ids"].shape[1] :]
        same = 0
        if answers.shape == expected["answers"].shape:
            same = int((answers == expected["answers"]).all(1).sum())
        print(f"  {title}: the same tokens for {same} of {len(expected['answers'])} sentences", flush=True)
        status |= same < len(expected["answers"])
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
