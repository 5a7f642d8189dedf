"""Language models: the three forms of data, the loss on the completion, generated answers, and the files of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lorasc_fx.cli import load, main
from tests.cli.test_train import losses, results, same, weights

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")  # peft's


def answers(run: str, prompts: str, capsys: Capture) -> list[str]:
    capsys.readouterr()
    assert main(["predict", run, prompts, "--max-new-tokens", "8"]) == 0
    return [json.loads(line)["completion"].strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", ["chat", "pairs", "plain"])
def test_a_model_learns_to_count(language: Path, capsys: Capture, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = f"runs/{kind}"
    assert main(["train", "language.toml", f"data.path={kind}.jsonl", f"output={run}"]) == 0
    assert "validation_loss" in capsys.readouterr().out
    Path("asked.txt").write_text("count from one\ncount from four\n")
    assert answers(run, "asked.txt", capsys) == ["two three four five", "five six seven eight"]
    assert answers(run, f"{kind}.jsonl", capsys)[1].startswith("three four" if kind != "plain" else "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    cascade = load(run).eval()
    batch = cascade.preprocessing(["count from two", "from three"])
    assert batch["attention_mask"][1, 0] == 0  # padded on the left, for generate
    assert tokenizer.decode(batch["input_ids"][0]).endswith("<s> assistant") == (kind == "chat")
    with torch.no_grad(), cascade.weights("slow"):
        assert torch.equal(model(**batch).logits, cascade(**batch).logits)


@pytest.mark.parametrize("kind", ["chat", "pairs", "plain"])
def test_the_loss_is_that_of_the_completion(language: Path, kind: str) -> None:
    """With a rate of almost 0, the loss of the test examples is the base's, computed here token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = json.loads(Path(f"{kind}.jsonl").read_text().splitlines()[0])
    Path("one.jsonl").write_text((json.dumps(row) + "\n") * 3)
    sizes = ["data.path=one.jsonl", "data.train=1", "data.validation=1", "data.test=1"]
    assert main(["train", "language.toml", *sizes, "train.learning_rate=1e-30", "train.max_steps=2"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("llama").eval(), AutoTokenizer.from_pretrained("llama")
    start, end = "count from one", "two three four five"
    text = {"chat": f"<s> user {start} </s> <s> assistant {end} </s>"}.get(kind, f"{start} {end} </s>")
    prompt = {"chat": f"<s> user {start} </s> <s> assistant", "pairs": start, "plain": ""}[kind]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    skipped = max(1, len(prompt.split()))  # the first token is never predicted
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, skipped - 1 : -1]
    loss = F.cross_entropy(logits, ids[0, skipped:]).item()
    assert results("runs/language")["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_stop_packing_and_checkpointing(language: Path, capsys: Capture) -> None:
    """A finished run is not trained again; packing and activation checkpointing are off unless `[train]` has them."""
    short = ["train", "language.toml", "train.max_steps=6"]
    assert main(short) == 0
    before, trained = losses("runs/language"), weights("runs/language")
    assert main([*short, "--resume"]) == 0
    assert losses("runs/language") == before
    assert same(weights("runs/language"), trained)
    assert main([*short, "output=checked", "train.gradient_checkpointing=true"]) == 0
    assert losses("checked") == pytest.approx(before, rel=1e-5)
    assert main([*short, "output=packed", "train.packing=true", "train.packing_strategy='wrapped'"]) == 0
    assert losses("packed").keys() != before.keys() or [*losses("packed").values()] != [*before.values()]


def test_files_of_a_language_model(language: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["train", "language.toml", "train.max_steps=6"]) == 0
    assert main(["export", "runs/language", "--to", "peft", "--output", "adapter"]) == 0
    adapter = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["base_model_name_or_path"]) == ("CAUSAL_LM", "llama")
    assert main(["fold", "runs/language", "--base", "llama", "--output", "folded"]) == 0
    expected = AutoModelForCausalLM.from_pretrained("runs/language").eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        logits = expected(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained("folded").eval()(input_ids=ids).logits, logits)
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("llama"), "adapter").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_mistakes_with_language_models(language: Path, fails: Callable[..., None], capsys: Capture) -> None:
    train = ["train", "language.toml"]
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "count"}]}\n' * 9)
    fails([*train, "data.path=asked.jsonl"], "example 1 does not end with a message of the role 'assistant'")
    Path("other.csv").write_text("question,answer\na,b\n")
    fails([*train, "data.path=other.csv"], "the columns are question, answer; a language model needs messages")
    fails([*train, "train.lerning_rate=3"], "SFTConfig.__init__() got an unexpected keyword argument 'lerning_rate'")
    fails([*train, "data.max_length=6"], "have no completion within 6 tokens (data.max_length); give")
    shutil.copytree("llama", "plain")
    Path("plain/chat_template.jinja").unlink()
    fails([*train, "model.path=plain"], "Cannot use chat template functions because tokenizer.chat_template is not set")
    given = ["train.chat_template_path=llama/chat_template.jinja", "train.max_steps=2", "output=templated"]
    assert main([*train, "model.path=plain", *given]) == 0
