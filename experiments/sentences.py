"""The task of `make demo`: sentences from templates, and the JSON that a language model has to answer with."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["KNOWN", "NEW", "Example", "Texts", "examples", "share_right"]

PROMPT = "<|im_start|>user\nExtract name, age, city and job as JSON: {}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
FIRST = "Anna Boris Carla David Elif Farid Greta Hugo Ines Jonas Kemal Laura Mira Nils Olga Pavel Rosa Sven Tara"
LAST = "Adler Brandt Costa Demir Eriksen Fischer Garcia Hansen Ivanov Jansen Keller Lopez Meyer Novak Olsen"
CITIES = "Hamburg Lisbon Oslo Vienna Prague Madrid Athens Dublin Warsaw Zagreb Riga Turin Lyon Ghent Bergen"
JOBS = "nurse baker teacher pilot lawyer farmer dentist plumber painter chemist singer driver editor judge"
KNOWN = (
    "{name}, {age}, works as a {job} in {city}.",
    "{name} is a {age} year old {job} from {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "The {job} {name} turned {age} last week in {city}.",
    "Meet {name}: {age} years old, {job}, living in {city}.",
    "At {age}, {name} moved to {city} and became a {job}.",
)
"""Templates to train on."""
NEW = (
    "My neighbour {name} is {age} and has been a {job} here in {city} for years.",
    "{city} has a new {job}: {name}, who is {age}.",
    '"I am {age} and a {job}," says {name} from {city}.',
    "A {job} by trade, {name} ({age}) calls {city} home.",
)
"""Templates to test on, which the training does not contain."""


@dataclass(frozen=True)
class Example:
    """A sentence and the JSON that is asked for."""

    sentence: str
    answer: str


def examples(templates: Sequence[str], count: int, seed: int) -> list[Example]:
    """Return random examples of these templates in turn."""
    source, made = random.Random(seed), []
    for number in range(count):
        person: dict[str, Any] = {
            "name": f"{source.choice(FIRST.split())} {source.choice(LAST.split())}",
            "age": source.randint(19, 78),
            "city": source.choice(CITIES.split()),
            "job": source.choice(JOBS.split()),
        }
        made.append(Example(templates[number % len(templates)].format(**person), json.dumps(person)))
    return made


def share_right(answers: Sequence[str], chosen: Sequence[Example]) -> float:
    """Return the share of answers that are exactly the JSON that is asked for."""
    return sum(answer == each.answer for answer, each in zip(answers, chosen, strict=True)) / len(chosen)


class Texts:
    """Turns examples into tokens, and tokens into answers.

    Args:
        tokenizer: of transformers. It pads on the left.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.padding_side = "left"

    def batch(self, chosen: Sequence[Example], length: int = 0) -> dict[str, torch.Tensor]:
        """Return ids of prompts and answers, [batch, tokens], of at least this length. Labels are -100 on prompts."""
        prompts = [self.tokenizer(PROMPT.format(each.sentence)).input_ids for each in chosen]
        answers = [self.tokenizer(each.answer + END).input_ids for each in chosen]
        length = max(length, *(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)))
        ids = torch.full((len(chosen), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            labels[row, length - len(answer) :] = torch.tensor(answer)
            mask[row, length - len(prompt) - len(answer) :] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def prompts(self, chosen: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tokens of prompts, [batch, tokens], for `generate`."""
        sentences = [PROMPT.format(each.sentence) for each in chosen]
        return dict(self.tokenizer(sentences, return_tensors="pt", padding=True))

    def answers(self, tokens: torch.Tensor) -> list[str]:
        """Return generated tokens as text."""
        return [answer.strip() for answer in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
