"""The sentences of `make demo`."""

from __future__ import annotations

import json
import re

from experiments.sentences import TEST_TEMPLATES, TRAIN_TEMPLATES, accuracy, examples

TEMPLATES = (*TRAIN_TEMPLATES, *TEST_TEMPLATES)


def test_a_sentence_contains_the_values_of_its_answer() -> None:
    generated = examples(TEMPLATES, 40, seed=1)
    assert generated == examples(TEMPLATES, 40, seed=1)
    assert generated != examples(TEMPLATES, 40, seed=2)
    for example in generated:
        assert all(str(value) in example.sentence for value in json.loads(example.answer).values())


def test_the_article_fits_the_job() -> None:
    sentences = [example.sentence for example in examples(TEMPLATES, 400, seed=0)]
    assert any("an editor" in sentence for sentence in sentences)
    assert any(sentence.startswith("An editor by trade") for sentence in sentences)
    assert not any(re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence) for sentence in sentences)


def test_an_answer_is_correct_only_if_it_equals_the_json() -> None:
    expected = examples(TEST_TEMPLATES, 4, seed=0)
    answers = [example.answer for example in expected]
    assert accuracy(answers, expected) == 1.0
    assert accuracy([answers[0], "{}", f"{answers[2]} ", answers[3]], expected) == 0.5
