"""A tiny image classifier, text classifier and language model, with a configuration for each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from lorasc_fx.cli import main
from tests.integrations.kit import tokenizer
from tests.kit import tiny

logging.get_verbosity()  # makes its handler, which would otherwise write to the closed stream of the first test

IMAGES = """
model.path = "resnet"
data = { path = "digits.parquet", train = 64, validation = 32, test = 100 }
stages = { count = 3, warmup = 1 }
compare = { seeds = [0, 1], lrs = [0.01] }

[spec]
targets = ["*embedder.conv*", "*.shortcut.conv*"]
train = ["classifier.*"]
rank = 2
noise = { strength = 0.1 }

[train]
max_steps = 12
per_device_train_batch_size = 8
learning_rate = 0.01
logging_steps = 1
use_cpu = true
disable_tqdm = true
"""

TEXTS = """
model.path = "bert"
data = { path = "said.csv", train = 40, validation = 8, test = 12 }
stages = { count = 2, floor = 1.0 }
spec = { targets = ["linear"], train = ["head.*"], pace = 1.0, rank = 4 }
train = { max_steps = 60, per_device_train_batch_size = 8, learning_rate = 0.02, use_cpu = true, disable_tqdm = true }
"""

LANGUAGE = """
model.path = "llama"
data = { path = "chat.jsonl", test = 6 }
stages = { count = 2, warmup = 1 }
spec = { targets = ["linear"], pace = 1.0, rank = 8 }

[train]
num_train_epochs = 12
per_device_train_batch_size = 8
learning_rate = 0.02
logging_steps = 1
use_cpu = true
disable_tqdm = true
"""

TEMPLATE = (
    "{% for message in messages %}<s> {{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image classifier in `resnet`, `digits.parquet`, and `tiny.toml`."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder, data = tmp_path_factory.mktemp("digits"), load_digits()
    images = [Image.fromarray((image * 15.9).astype("uint8")) for image in data.images[:300]]
    table = datasets.Dataset.from_dict({"image": images, "label": data.target[:300].tolist()})
    table.to_parquet(folder / "digits.parquet")
    torch.manual_seed(0)
    sizes = {"embedding_size": 6, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 5}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(folder / "resnet")
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder / "resnet")
    (folder / "tiny.toml").write_text(IMAGES)
    return folder


@pytest.fixture
def workspace(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a working folder with the files of `digits`."""
    import datasets

    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def texts(workspace: Path) -> Path:
    """Return a working folder with an encoder in `bert`, `said.csv`, and `texts.toml`."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "dull", "a", "film"]
    (workspace / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    tiny.bert("Model", vocab_size=len(words), initializer_range=0.3, **tiny.QUIET).save_pretrained("bert")
    BertTokenizer("vocab.txt", model_max_length=32).save_pretrained("bert")
    rows = "".join(f"a {word} film,{mood}\n" for word, mood in (("fine", "glad"), ("dull", "sad")) * 30)
    (workspace / "said.csv").write_text("text,label\n" + rows)
    (workspace / "texts.toml").write_text(TEXTS)
    return workspace


@pytest.fixture
def language(workspace: Path) -> Path:
    """Return a working folder with a language model in `llama`, `language.toml`, and data of all three kinds."""
    words = ["user", "assistant", "count", "from", *NUMBERS]
    tokenizer(words, chat_template=TEMPLATE).save_pretrained("llama")
    torch.manual_seed(0)
    tiny.llama(vocab_size=len(words) + 3, hidden_size=32, intermediate_size=48).save_pretrained("llama")
    rows: dict[str, list[object]] = {"chat": [], "pairs": [], "plain": []}
    for number in range(60):
        start = number % 6
        prompt, completion = f"count from {NUMBERS[start]}", " ".join(NUMBERS[start + 1 : start + 5])
        user, assistant = ({"role": role, "content": text} for role, text in
                           (("user", prompt), ("assistant", completion)))  # fmt: skip
        rows["chat"].append({"messages": [user, assistant]})
        rows["pairs"].append({"prompt": prompt, "completion": f" {completion}"})
        rows["plain"].append({"text": f"{prompt} {completion}"})
    for name, lines in rows.items():
        (workspace / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workspace / "language.toml").write_text(LANGUAGE)
    return workspace


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Return a function that runs a command, and asserts that it prints one message and exits with code 2."""

    def run(arguments: list[str], message: str) -> None:
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert message in " ".join((said.err + said.out).replace("│", " ").split())
        assert "Traceback" not in said.err + said.out

    return run


def run_alone(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process, with this checkout importable."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
