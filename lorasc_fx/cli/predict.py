"""`lorasc-fx predict`: classifies images or texts, or generates texts, with the folded weights of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tyro.conf import Positional

from lorasc_fx.cli.config import Config
from lorasc_fx.cli.data import INPUT, LABEL, TABLES, read_examples, read_table
from lorasc_fx.cli.models import load_file, reading
from lorasc_fx.cli.run_folder import TASK
from lorasc_fx.cli.task import Batch, Task
from lorasc_fx.cli.train import task_of
from lorasc_fx.cli.trainer import logits_of
from lorasc_fx.errors import SpecError, StateError
from lorasc_fx.util.extras import module_of

BATCH = 32
Row = Mapping[str, Any]


def predict(
    run: Positional[Path],
    inputs: Positional[Path],
    /,
    text_column: str = "",
    label_column: str = "",
    max_new_tokens: int = 128,
) -> int:
    """Print the class and probability of each image or text, or the text that a language model generates.

    Args:
        run: folder of a run that has ended.
        inputs: an image or a folder of images, a file with one text per line, or a table of texts.
        text_column: column of the table with the text. The default is that of the run.
        label_column: column of the table with the class, for the accuracy. The default is that of the run.
        max_new_tokens: maximum length of a generated text.
    """
    config, _ = task_of(run)
    data = replace(
        config.data,
        text_column=text_column or config.data.text_column,
        label_column=label_column or config.data.label_column,
    )
    task, model = _trained(run, replace(config, data=data))
    rows = _rows(task, inputs)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if task.kind == "language":
        _generate(task, model, rows, max_new_tokens)
    else:
        _classify(task, model, rows, str(inputs))
    return 0


def _trained(run: Path, config: Config) -> tuple[Task, nn.Module]:
    """Return the task and the model of a run that has ended, with its folded weights."""
    if not any(run.glob("*.safetensors")):
        raise StateError(
            f"{run} has not ended: finish it with lorasc-fx train {run}/config.toml --resume", code="stage-not-ended"
        )
    if config.model.name.startswith("hf:"):
        config = replace(config, model=replace(config.model, name=f"hf:{run}", weights=""))
        task = Task.read(config, run / TASK)
        return task, task.source.build(task.classes)
    task = Task.read(replace(config, model=replace(config.model, weights="")), run / TASK)
    model = task.source.build(task.classes)
    with reading(str(run)):
        model.load_state_dict(load_file(run / "model.safetensors"))
    return task, model


def _rows(task: Task, path: Path) -> Sequence[Row]:
    """Return the inputs in a file or a folder, with the names of their classes if those are known."""
    kind = TABLES.get(path.suffix.lower())
    if kind is None and task.kind == "image":
        return _images(task, path)
    if kind is None:
        with reading(str(path)):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [{INPUT: line} for line in (lines if lines[-1] else lines[:-1])]
    config = task.config.data
    if task.kind == "language":
        return [{INPUT: _prompt(row, config.text_column, path)} for row in read_table(f"{kind}:{path}")]
    table = read_examples(config, task.kind, f"{kind}:{path}", labelled=False)
    names = getattr(table.features.get(LABEL), "names", None)
    return [row | ({LABEL: names[row[LABEL]]} if names else {}) for row in table]


def _images(task: Task, path: Path) -> Sequence[Row]:
    """Return the image at a path, or those in a folder. If all folders are named like classes, they are the labels."""
    files = [path]
    if path.is_dir():
        endings = module_of("vision", "torchvision.datasets.folder").IMG_EXTENSIONS
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
    if not files:
        raise SpecError(f"{path} contains no images; give an image, or a folder of images", code="invalid-data")
    labelled = all(file.parent.name in task.classes for file in files)
    return [{INPUT: file, "name": file} | ({LABEL: file.parent.name} if labelled else {}) for file in files]


def _prompt(row: Row, text_column: str, path: Path) -> Any:
    """Return what a language model continues: messages without a last answer, or a text."""
    if "messages" in row:
        answered = row["messages"][-1]["role"] == "assistant"
        return row["messages"][:-1] if answered else row["messages"]
    for name in ("prompt", text_column):
        if name in row:
            return row[name]
    raise SpecError(f"{path}: the columns are {', '.join(row)}; give messages, prompt or {text_column}")


@torch.no_grad()
def _classify(task: Task, model: nn.Module, rows: Sequence[Row], source: str) -> None:
    """Print name, class and probability of each input, and the accuracy to standard error."""
    right = known = 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        shares = logits_of(model(**_on_device(task([row[INPUT] for row in part]), model))).float().softmax(-1)
        for number, (row, share) in enumerate(zip(part, shares, strict=True), start=start + 1):
            predicted = task.classes[int(share.argmax())]
            print(f"{row.get('name', f'{source}:{number}')}\t{predicted}\t{share.max():.4f}")
            if row.get(LABEL) not in (None, ""):
                known, right = known + 1, right + (str(row[LABEL]) == predicted)
    if known:
        print(f"accuracy {right / known:.3f}: {right} of {known} labelled examples", file=sys.stderr)


@torch.no_grad()
def _generate(task: Task, model: Any, rows: Sequence[Row], max_new_tokens: int) -> None:
    """Print each prompt with its completion, as a line of JSON. Generation is greedy."""
    for start in range(0, len(rows), BATCH):
        prompts = [row[INPUT] for row in rows[start : start + BATCH]]
        batch = _on_device(task(prompts), model)
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = task.processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))


def _on_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
