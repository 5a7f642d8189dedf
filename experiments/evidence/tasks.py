"""The tasks of the protocol: texts for SmolLM2-135M-Instruct, and images for EfficientNet-Lite0.

Only the last layers are trained, so what the frozen layers below them compute is computed once and cached: the inputs
of a task are their outputs.
"""

from __future__ import annotations

import copy
import fcntl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.data import corpus, garments, imdb, mnist5k
from experiments.models import LastBlocks, efficientnet, feature_maps, smollm2
from experiments.sentences import TRAIN_TEMPLATES, examples

__all__ = ["IMAGES", "TASKS", "Part", "Task", "general", "measure", "tail"]

FOLDER = Path("runs/evidence")
LAYERS = 6
"""Number of trained layers, of 30."""
VALIDATION, TEST, POOL = 60, 100, 1600
"""Number of examples. Training sets are drawn from the pool."""
IGNORED = -100
"""Label of a position after the end of an answer."""
TEXT_TOKENS, WINDOW = 24, 48
"""Tokens of a text that is classified, and of a window of general text."""


@dataclass(frozen=True)
class Part:
    """Examples: inputs [examples, ...], and labels [examples] or [examples, places]."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> Part:
        """Return the examples at these positions."""
        return Part(tuple(value[index] for value in self.inputs), self.labels[index])

    def and_(self, other: Part) -> Part:
        """Return the examples of both. Axes after the first are padded: inputs with 0, labels with IGNORED."""
        pairs = zip(self.inputs, other.inputs, strict=True)
        return Part(tuple(_joined(*pair, 0) for pair in pairs), _joined(self.labels, other.labels, IGNORED))


def _joined(one: Tensor, other: Tensor, value: int) -> Tensor:
    shape = [max(sizes) for sizes in zip(one.shape[1:], other.shape[1:], strict=True)]
    joined = one.new_full((len(one) + len(other), *shape), value)
    for start, tensor in ((0, one), (len(one), other)):
        joined[(slice(start, start + len(tensor)), *map(slice, tensor.shape[1:]))] = tensor
    return joined


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        name: in the protocol.
        model: returns the trained part with its pretrained weights.
        pool, validation, test: the examples.
        train: globs on the parameters that are trained in full beside the branches.
        exclude: globs on weights that are never changed.
    """

    name: str
    model: Callable[[], nn.Module]
    pool: Part
    validation: Part
    test: Part
    train: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@torch.no_grad()
def measure(model: nn.Module, part: Part) -> dict[str, float]:
    """Return the share of examples all of whose labels are the most likely ones, and the mean loss of a label.

    Greedy decoding gives exactly the answer if every token of it is the most likely one after the correct tokens before
    it, so that this accuracy is exact match without a generation.
    """
    right, loss, count = 0, 0.0, 0
    for start in range(0, len(part), 32):
        batch = part.at(torch.arange(start, min(start + 32, len(part))))
        logits, labels = model(*batch.inputs), batch.labels
        correct = (logits.argmax(-1) == labels) | (labels == IGNORED)
        right += int(correct.flatten(1).all(-1).sum()) if labels.dim() > 1 else int(correct.sum())
        loss += F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return {"accuracy": right / len(part), "loss": loss / count}


def cached(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors that are computed once. Another process waits for the one that computes them."""
    path = FOLDER / "inputs" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not path.exists():
            scratch = path.with_suffix(".part")
            save_file({key: value.contiguous().clone() for key, value in compute().items()}, scratch)
            scratch.replace(path)
    return load_file(path)


# ---- texts ---------------------------------------------------------------------------------------------------------


class Tail(nn.Module):
    """The last layers of a causal language model of the Llama family, its norm and its head.

    Args:
        model: a LlamaForCausalLM. Its modules are used, not copied.
        layers: number of layers.
    """

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[-layers:])
        self.rotary, self.norm, self.head = model.model.rotary_emb, model.model.norm, model.lm_head

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Return logits [batch, places, vocabulary] at positions [batch, places] of states [batch, tokens, width]."""
        hidden = _through(self.layers, self.rotary, hidden)
        index = places.long().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits: Tensor = self.head(self.norm(hidden.gather(1, index)))
        return logits


def _through(layers: Any, rotary: nn.Module, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    embeddings = rotary(hidden, positions)
    for layer in layers:  # without a mask, attention is causal; examples are padded on the right
        hidden = layer(hidden, position_ids=positions, position_embeddings=embeddings)
    return hidden


@torch.no_grad()
def part_of(model: Any, layers: int, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Part:
    """Return prompts and answers (tokens) as a part: states below the last layers, and positions whose next tokens are
    the labels.
    """
    length, longest = max(len(p) + len(a) - 1 for p, a in rows), max(len(answer) for _, answer in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    places = torch.zeros(len(rows), longest, dtype=torch.int32)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        places[row, : len(answer)] = torch.arange(len(answer)) + len(prompt) - 1
        labels[row, : len(answer)] = torch.tensor(answer)
    inner = model.model
    batches = [_through(inner.layers[:-layers], inner.rotary_emb, inner.embed_tokens(b)) for b in tokens.split(32)]
    return Part((torch.cat(batches), places), labels)


def tail() -> nn.Module:
    return copy.deepcopy(Tail(smollm2()[0], LAYERS)).requires_grad_(True)


Texts = list[tuple[str, str]]
"""Texts and answers."""


def _extraction() -> Texts:
    sentences = examples(TRAIN_TEMPLATES, POOL + VALIDATION + TEST, 0)
    return [(example.sentence, example.answer) for example in sentences]


_SOURCES: dict[str, tuple[str, Callable[[], Texts], int | None]] = {
    "extract": ("Extract name, age, city and job as JSON:", _extraction, None),
    "r8": (
        "Answer with the topic of this report:",
        corpus("reuters-r8-train.tab", "Category", "Text"),
        TEXT_TOKENS,
    ),
    "newsgroups": (
        "Answer with the newsgroup of this message:",
        corpus("20newsgroups-train.tab", "Category", "Text"),
        TEXT_TOKENS,
    ),
    "tweets": (
        "Answer with the author of this tweet:",
        corpus("election-tweets-2016.tab", "Author", "Content"),
        TEXT_TOKENS,
    ),
}
"""By task: the instruction before each text, a reader, and the number of tokens of a text that are used."""


@cache
def _text_task(name: str) -> Task:
    ask, read, limit = _SOURCES[name]

    def compute() -> dict[str, Tensor]:
        model, tokenizer = smollm2()

        def ids(text: str) -> list[int]:
            return list(tokenizer(text).input_ids)

        before, after = ids(f"<|im_start|>user\n{ask}"), ids("<|im_end|>\n<|im_start|>assistant\n")
        rows = [
            ([*before, *ids(f" {text}")[:limit], *after], ids(f"{answer}<|im_end|>"))
            for text, answer in read()[: POOL + VALIDATION + TEST]
        ]
        part = part_of(model, LAYERS, rows)
        return {"hidden": part.inputs[0], "places": part.inputs[1], "labels": part.labels}

    kept = cached(name, compute)
    return _split(name, tail, Part((kept["hidden"], kept["places"]), kept["labels"]), exclude=("head.*",))


def _split(name: str, model: Callable[[], nn.Module], part: Part, **options: Any) -> Task:
    validation, test, pool = torch.arange(len(part)).tensor_split((VALIDATION, VALIDATION + TEST))
    return Task(name, model, part.at(pool), part.at(validation), part.at(test), **options)


@cache
def general() -> Part:
    """Return windows of film reviews and tales, every token of which is predicted: what the model could do before."""

    def compute() -> dict[str, Tensor]:
        model, tokenizer = smollm2()
        tales = [text for text, _ in corpus("grimm-tales.tab", "ATU Topic", "Content")()]
        rows = []
        for texts in (sorted(tales), imdb()[0]):
            long = [ids for text in texts if len(ids := tokenizer(text[:1000]).input_ids) > WINDOW]
            rows += [(tokens[:1], tokens[1 : WINDOW + 1]) for tokens in long[:8]]
        part = part_of(model, LAYERS, rows)
        return {"hidden": part.inputs[0], "places": part.inputs[1], "labels": part.labels}

    kept = cached("general", compute)
    return Part((kept["hidden"], kept["places"]), kept["labels"])


# ---- images --------------------------------------------------------------------------------------------------------


def _last_blocks() -> nn.Module:
    torch.manual_seed(0)
    return LastBlocks(copy.deepcopy(efficientnet())).requires_grad_(True)


@cache
def _image_task(name: str) -> Task:
    def compute() -> dict[str, Tensor]:
        if name == "digits":
            pixels, labels = mnist5k()
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: POOL + VALIDATION + TEST]
            return {"maps": feature_maps(pixels[order].float() / 255), "labels": labels[order]}
        images, classes = garments()
        return {"maps": feature_maps(images), "labels": classes}

    kept = cached(name, compute)
    return _split(name, _last_blocks, Part((kept["maps"],), kept["labels"]), train=("head.*",))


IMAGES = ("digits", "garments")
TASKS: dict[str, Callable[[], Task]] = {
    **{name: lambda name=name: _text_task(name) for name in _SOURCES},
    **{name: lambda name=name: _image_task(name) for name in IMAGES},
}
"""By name in the protocol. A task is built when it is asked for."""
