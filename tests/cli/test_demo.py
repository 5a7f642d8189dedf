"""The sentences of `make demo`."""

from __future__ import annotations

import json

from experiments.sentences import KNOWN, NEW, examples, share_right


def test_a_sentence_holds_what_its_answer_says() -> None:
    made = examples((*KNOWN, *NEW), 40, seed=1)
    assert made == examples((*KNOWN, *NEW), 40, seed=1)
    assert made != examples((*KNOWN, *NEW), 40, seed=2)
    for each in made:
        assert all(str(value) in each.sentence for value in json.loads(each.answer).values())


def test_an_answer_is_right_if_it_is_exactly_the_json() -> None:
    chosen = examples(NEW, 4, seed=0)
    answers = [each.answer for each in chosen]
    assert share_right(answers, chosen) == 1.0
    assert share_right([answers[0], "{}", f"{answers[2]} ", answers[3]], chosen) == 0.5
