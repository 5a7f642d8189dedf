"""The task of `make demo`: sentences from templates, and the JSON that the language model should answer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PROMPT = "<|im_start|>user\nExtract name, age, city and job as JSON: {}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
FIRST = "Anna Boris Carla David Elif Farid Greta Hugo Ines Jonas Kemal Laura Mira Nils Olga Pavel Rosa Sven Tara"
LAST = "Adler Brandt Costa Demir Eriksen Fischer Garcia Hansen Ivanov Jansen Keller Lopez Meyer Novak Olsen"
CITIES = "Hamburg Lisbon Oslo Vienna Prague Madrid Athens Dublin Warsaw Zagreb Riga Turin Lyon Ghent Bergen"
JOBS = "nurse baker teacher pilot lawyer farmer dentist plumber painter chemist singer driver editor judge"
TRAIN_TEMPLATES = (
    "{name}, {age}, works as {a} {job} in {city}.",
    "{name} is a {age} year old {job} from {city}.",
    "In {city} lives {name}, {a} {job} aged {age}.",
    "The {job} {name} turned {age} last week in {city}.",
    "Meet {name}: {age} years old, {job}, living in {city}.",
    "At {age}, {name} moved to {city} and became {a} {job}.",
)
"""Templates of the training sentences. `{a}` is the article of the job."""
TEST_TEMPLATES = (
    "My neighbour {name} is {age} and has been {a} {job} here in {city} for years.",
    "{city} has a new {job}: {name}, who is {age}.",
    '"I am {age} and {a} {job}," says {name} from {city}.',
    "{A} {job} by trade, {name} ({age}) calls {city} home.",
)
"""Templates of the test sentences. The training sentences do not use them."""


@dataclass(frozen=True)
class Example:
    """A sentence and the expected JSON."""

    sentence: str
    answer: str


def examples(templates: Sequence[str], count: int, seed: int) -> list[Example]:
    """Return random examples that use the templates in turn."""
    source, result = random.Random(seed), []
    for number in range(count):
        person: dict[str, Any] = {
            "name": f"{source.choice(FIRST.split())} {source.choice(LAST.split())}",
            "age": source.randint(19, 78),
            "city": source.choice(CITIES.split()),
            "job": source.choice(JOBS.split()),
        }
        article = "an" if person["job"][0] in "aeiou" else "a"
        sentence = templates[number % len(templates)].format(**person, a=article, A=article.capitalize())
        result.append(Example(sentence, json.dumps(person)))
    return result


class Texts:
    """Converts examples to tokens, and tokens to answers.

    Args:
        tokenizer: a tokenizer of transformers. It is set to pad on the left.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.padding_side = "left"

    def batch(self, batch: Sequence[Example], length: int = 0) -> dict[str, torch.Tensor]:
        """Return {`input_ids`, `attention_mask`, `labels`: [batch, tokens]} of prompts followed by their answers.

        They are padded on the left to `length` or more. The labels of prompt and padding tokens are -100.
        """
        prompts = [self.tokenizer(PROMPT.format(example.sentence)).input_ids for example in batch]
        answers = [self.tokenizer(example.answer + END).input_ids for example in batch]
        length = max(length, *(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)))
        ids = torch.full((len(batch), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            labels[row, length - len(answer) :] = torch.tensor(answer)
            mask[row, length - len(prompt) - len(answer) :] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def prompts(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the arguments of `generate` for the prompts: {name: tensor [batch, tokens]}."""
        sentences = [PROMPT.format(example.sentence) for example in batch]
        return dict(self.tokenizer(sentences, return_tensors="pt", padding=True))

    def answers(self, tokens: torch.Tensor) -> list[str]:
        """Decode generated tokens."""
        return [answer.strip() for answer in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
