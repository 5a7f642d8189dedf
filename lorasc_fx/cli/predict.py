"""`lorasc-fx predict`: classifies images or texts, or generates texts, with the folded weights of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from tyro.conf import Positional

from lorasc_fx.cli.data import INPUT, read_inputs, read_table
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.train import TASK, Overrides, task_of
from lorasc_fx.errors import SpecError

BATCH = 32


@torch.no_grad()
def predict(
    run: Positional[Path], data: Positional[str], overrides: Overrides = (), /, max_new_tokens: int = 128
) -> int:
    """Print the class and probability of each image or text, or the text that a language model generates.

    Args:
        run: folder of a run that has ended.
        data: path of the inputs, such as a `.txt` file with one text per line, a table, or a folder of images.
        overrides: keys of the run's configuration with other values, such as data.text_column=review.
        max_new_tokens: maximum length of a generated text.
    """
    config, _ = task_of(run, overrides)
    task = Task.read(replace(config, model=replace(config.model, path=str(run))), run / TASK)
    model = task.model().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if task.kind == "language":
        _generate(task, model, data, max_new_tokens)
    else:
        _classify(task, model, data)
    return 0


def _prompt(row: Mapping[str, Any], text_column: str, data: str) -> Any:
    """Return the prompt in a row: a text, or messages without the final answer."""
    if "messages" in row:
        answered = row["messages"][-1]["role"] == "assistant"
        return row["messages"][:-1] if answered else row["messages"]
    for name in ("prompt", text_column, "text"):
        if name in row:
            return row[name]
    raise SpecError(f"{data}: the columns are {', '.join(row)}; give messages, prompt or {text_column}")


def _classify(task: Task, model: Any, data: str) -> None:
    """Print the name of each input, its most likely class, and the probability of that class."""
    table = read_inputs(task.config.data, task.kind, data)
    names = [f"{data}:{number}" for number in range(1, len(table) + 1)]
    if task.kind == "image":
        stored = table.cast_column(INPUT, datasets.Image(decode=False))[INPUT]
        names = [image["path"] or name for image, name in zip(stored, names, strict=True)]
    for start in range(0, len(table), BATCH):
        batch = {name: value.to(model.device) for name, value in task(table[start : start + BATCH][INPUT]).items()}
        for number, share in enumerate(model(**batch).logits.float().softmax(-1), start=start):
            print(f"{names[number]}\t{task.classes[int(share.argmax())]}\t{share.max():.4f}")


def _generate(task: Task, model: Any, data: str, max_new_tokens: int) -> None:
    """Print each prompt with its completion, as a line of JSON. Generation is greedy."""
    questions = [_prompt(row, task.config.data.text_column, data) for row in read_table(data)]
    for start in range(0, len(questions), BATCH):
        prompts = questions[start : start + BATCH]
        batch = {name: value.to(model.device) for name, value in task(prompts).items()}
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = task.processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
