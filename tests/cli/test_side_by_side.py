"""`make compare` runs, and its check of the folded weights detects a difference."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tomli_w
from safetensors.torch import load_file, save_file

from experiments.sentences import TEST_TEMPLATES, TRAIN_TEMPLATES, accuracy, examples
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.data import short_name

ROOT = Path(__file__).resolve().parents[2]


def small(config: dict[str, dict[str, object]], folder: Path, **tables: dict[str, object]) -> Path:
    path = folder / "small.toml"
    changed = {name: {**config[name], **values} for name, values in tables.items()}
    path.write_text(tomli_w.dumps({**config, **changed}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("compare.toml", {"train": 64, "validation": 32, "test": 100, "shift_test": 20, "max_length": 16}),
        ("compare_images.toml", {"train": 64, "validation": 32, "test": 200, "shift_test": 50, "image_size": 32}),
    ],
)
def test_the_comparison(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    data: dict[str, object],
) -> None:
    import tomllib

    from experiments.compare import main, prove

    monkeypatch.chdir(tmp_path)
    whole = tomllib.loads((ROOT / "experiments" / name).read_text())
    path = small(whole, tmp_path, data=data, train={"steps": 6, "stages": 2, "batch_size": 8}, compare={"seeds": [0]})
    assert main([str(path)]) == 0
    said = capfd.readouterr().out
    counts = re.findall(r"(\S+): (\d+) of (\d+) predictions are the same", said)
    assert {part for part, _, _ in counts} == {"test", *map(short_name, load_config(path).data.shifts)}
    assert all(same == all_of for _, same, all_of in counts)
    assert "Difference to lora in percentage points" in said

    cells = tmp_path / whole["output"] / "results"
    (weights,) = cells.glob("*.safetensors")
    tensors = load_file(weights)
    head = next(each for each in tensors if each.endswith(("classifier.weight", "head.weight")))
    tensors[head] = -tensors[head]
    save_file(tensors, weights)
    assert prove(str(path), str(weights), str(weights.with_suffix(".json"))) == 1
    assert json.loads(weights.with_suffix(".json").read_text())["method"] == "lorasc"


@pytest.mark.parametrize("name", ["compare.toml", "compare_images.toml"])
def test_the_configurations_are_read(name: str) -> None:
    config = load_config(ROOT / "experiments" / name)
    assert config.compare.keep_weights == ("lorasc",)
    assert config.data.shifts


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
