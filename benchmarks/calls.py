"""How many exports a series of calls costs: `python -m benchmarks.calls` prints a table for docs/costs.md.

The models are narrow, so that nearly all of the time is that of captures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import lorasc_fx as lx
import lorasc_fx.integrations.transformers
from lorasc_fx.capture import forget

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
EXPORTS: list[object] = []
"""The sizes that are dynamic, of each export since it was last cleared."""


def text(model: nn.Module, rows: int, length: int, labels: bool) -> dict[str, torch.Tensor]:
    """Return a batch of token ids, with labels for each row or token."""
    ids = torch.randint(0, 100, (rows, length))
    classes = ids if "CausalLM" in type(model).__name__ else torch.zeros(rows, dtype=torch.long)
    return {"input_ids": ids, **({"labels": classes} if labels else {})}


def images(model: nn.Module, rows: int, length: int, labels: bool) -> dict[str, torch.Tensor]:
    """Return a batch of images, with labels for each."""
    pixels = torch.randn(rows, 3, 32, 32)
    return {"pixel_values": pixels, **({"labels": torch.zeros(rows, dtype=torch.long)} if labels else {})}


def calls(build: Callable[[], nn.Module], batch: Callable[..., dict[str, Any]]) -> Iterator[str]:
    """Adapt a model in eval mode, call it in several ways, and yield the name of each call after it."""
    model = build().eval()
    cascade = lx.adapt(model, (), batch(model, 2, 16, True))
    yield "adapt, with labels"
    cascade(**batch(model, 2, 16, False))
    yield "no labels"
    cascade(**batch(model, 2, 16, True), return_dict=True)
    yield "return_dict=True"
    cascade.train()(**batch(model, 2, 16, True))
    yield "train mode"
    cascade(**batch(model, 8, 20, True))
    yield "another size"
    cascade(**batch(model, 3, 20, True))
    yield "last batch"
    with torch.no_grad():
        cascade.eval()(**batch(model, 8, 20, True))
        yield "evaluate"
        cascade(**batch(model, 3, 20, True))
    yield "its last batch"


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate rows of tokens, padded to the longest row."""
    return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}


def trainer(
    build: Callable[[], nn.Module], batch: Callable[..., dict[str, Any]], lengths: Sequence[int]
) -> Iterator[str]:
    """As `calls`, in a Trainer of transformers: batches of 8 rows of these lengths, and `generate`."""
    model: Any = build().eval()
    rows = [{name: value[0] for name, value in batch(model, 1, length, True).items()} for length in lengths]
    cascade = lx.adapt(model, (), batch(model, 2, 16, True))
    yield "adapt, with labels"
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        arguments = transformers.TrainingArguments(folder, num_train_epochs=1, **options)
        callback = lx.integrations.transformers.CascadeCallback(cascade)
        data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": padded}
        run = transformers.Trainer(cascade, arguments, callbacks=[callback], **data)
        run.train()
        yield "train"
        run.evaluate()
        yield "evaluate"
    cascade.eval().generate(torch.randint(0, 100, (2, 4)), max_new_tokens=4, pad_token_id=0)
    yield "generate"


def row(title: str, steps: Iterator[str]) -> str:
    """Return the lines of a table: exports and CPU seconds, of all steps and of each."""
    forget()
    cells, total, begun = list[str](), 0, time.process_time()
    start = begun
    EXPORTS.clear()
    for name in steps:
        seconds = time.process_time() - start
        cells.append(f"{name}: {len(EXPORTS)}, {seconds:.1f} s")
        total += len(EXPORTS)
        EXPORTS.clear()
        start = time.process_time()
    return f"| {title} | {total} | {start - begun:.1f} | {'; '.join(cells)} |"


def main() -> None:
    """Print the table."""
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        EXPORTS.append(kwargs.get("dynamic_shapes"))
        return export(*args, **kwargs)

    torch.export.export = counted
    lx.adapt(nn.Sequential(nn.Linear(2, 2)), (torch.randn(3, 2),))  # imports, and what is done once in a process
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bert = partial(transformers.BertForSequenceClassification, transformers.BertConfig(**SIZES, vocab_size=100))
    vision = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    vit = partial(transformers.ViTForImageClassification, vision)
    llama = partial(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, vocab_size=100))
    print("| model | exports | CPU seconds | of each call |\n| --- | --- | --- | --- |")
    print(row("BERT", calls(bert, text)), row("ViT", calls(vit, images)), row("Llama", calls(llama, text)), sep="\n")
    print(row("Trainer, Llama", trainer(llama, text, [16] * 19)))
    print(row("Trainer, Llama, lengths of 5 to 68", trainer(llama, text, range(5, 69))))


if __name__ == "__main__":
    main()
