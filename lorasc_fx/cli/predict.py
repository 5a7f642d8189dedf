"""`lorasc-fx predict`: classifies images or texts, or generates texts, with the folded weights of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from tyro.conf import Positional

from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import INPUT, LABEL, read_examples, read_table
from lorasc_fx.cli.models import reading
from lorasc_fx.cli.run_folder import TASK
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.train import task_of
from lorasc_fx.cli.trainer import logits_of
from lorasc_fx.errors import SpecError, StateError

BATCH = 32


@torch.no_grad()
def predict(
    run: Positional[Path],
    data: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    max_new_tokens: int = 128,
) -> int:
    """Print the class and probability of each image or text, or the text that a language model generates.

    Args:
        run: folder of a run that has ended.
        data: the inputs, named like data.name: text:FILE with one text per line, imagefolder:DIR, csv:FILE, ...
        overrides: keys of the run's configuration with other values, such as data.text_column=review.
        max_new_tokens: maximum length of a generated text.
    """
    config, _ = task_of(run, overrides)
    task, model = _trained(run, config)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if task.kind == "language":
        _generate(task, model, data, max_new_tokens)
    else:
        _classify(task, model, data)
    return 0


def _trained(run: Path, config: Config) -> tuple[Task, nn.Module]:
    """Return the task and the model of a run that has ended, with its folded weights."""
    if not any(run.glob("*.safetensors")):
        raise StateError(
            f"{run} has not ended: finish it with lorasc-fx train {run}/config.toml --resume", code="stage-not-ended"
        )
    is_folder = config.model.name.startswith("hf:")
    source = replace(config.model, name=f"hf:{run}" if is_folder else config.model.name, weights="")
    task = Task.read(replace(config, model=source), run / TASK)
    model = task.source.build(task.classes)
    if not is_folder:
        with reading(str(run)):
            from safetensors.torch import load_file

            model.load_state_dict(load_file(run / "model.safetensors"))
    return task, model


def _prompt(row: Mapping[str, Any], text_column: str, data: str) -> Any:
    """Return what a language model continues: messages without a last answer, or a text."""
    if "messages" in row:
        answered = row["messages"][-1]["role"] == "assistant"
        return row["messages"][:-1] if answered else row["messages"]
    for name in ("prompt", text_column, "text"):
        if name in row:
            return row[name]
    raise SpecError(f"{data}: the columns are {', '.join(row)}; give messages, prompt or {text_column}")


def _classify(task: Task, model: nn.Module, data: str) -> None:
    """Print name, class and probability of each input, and the accuracy to standard error."""
    table = read_examples(task.config.data, task.kind, data, labelled=False)
    names = [f"{data}:{number}" for number in range(1, len(table) + 1)]
    if task.kind == "image":
        stored = table.cast_column(INPUT, datasets.Image(decode=False))[INPUT]
        names = [each["path"] or name for each, name in zip(stored, names, strict=True)]
    predicted = []
    for start in range(0, len(table), BATCH):
        batch = _on_device(task(table[start : start + BATCH][INPUT]), model)
        for share in logits_of(model(**batch)).float().softmax(-1):
            predicted.append(task.classes[int(share.argmax())])
            print(f"{names[len(predicted) - 1]}\t{predicted[-1]}\t{share.max():.4f}")
    if LABEL in table.column_names:
        classes = getattr(table.features[LABEL], "names", None)
        labels = [classes[label] if classes else str(label) for label in table[LABEL]]
        right = [found == label for found, label in zip(predicted, labels, strict=True) if label in task.classes]
        if right:
            accuracy = sum(right) / len(right)
            print(f"accuracy {accuracy:.3f}: {sum(right)} of {len(right)} labelled examples", file=sys.stderr)


def _generate(task: Task, model: Any, data: str, max_new_tokens: int) -> None:
    """Print each prompt with its completion, as a line of JSON. Generation is greedy."""
    questions = [_prompt(row, task.config.data.text_column, data) for row in read_table(data)]
    for start in range(0, len(questions), BATCH):
        prompts = questions[start : start + BATCH]
        batch = _on_device(task(prompts), model)
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = task.processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))


def _on_device(batch: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
