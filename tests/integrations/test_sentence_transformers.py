"""A cascade of a SentenceTransformer in its trainer: trained in stages, saved, resumed and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasc_fx as lx
from tests.integrations.kit import WORDS, losses, tokenizer
from tests.kit import tiny
from tests.kit.errors import raises

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a SentenceTransformer without dropout, and return its folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tiny.bert("Model", hidden_size=24, **tiny.QUIET).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[transformer, Pooling(24)], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def read(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu")


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 37, (3 + number % 4,), generator=generator).tolist() for number in range(count)]
    return [" ".join(WORDS[index] for index in row) for row in rows]


def adapted(model: Any, spec: lx.CascadeSpec) -> lx.Cascade:
    features = dict(model.preprocess(sentences(2, 7)))
    return lx.adapt(model, args=(features,), spec=spec, frontend="eager")  # which is where auto ends


def trainer_of(model: Any, folder: Path, *callbacks: Any, **more: Any) -> Any:
    from datasets import Dataset

    arguments = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.02, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", **more,
    }  # fmt: skip
    data = Dataset.from_dict({"anchor": sentences(16, 1), "positive": sentences(16, 2)})
    scores = [0.1, 0.9, 0.4, 0.7, 0.2, 0.5]
    return SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data, eval_dataset=data.select(range(4)), callbacks=list(callbacks),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=EmbeddingSimilarityEvaluator(sentences(6, 3), sentences(6, 4), scores),
    )  # fmt: skip


def callback_of(cascade: lx.Cascade, **how: Any) -> Any:
    return lx.integrations.transformers.CascadeCallback(cascade, **how)


def test_stages_evaluation_and_the_saved_model(base: Path, tmp_path: Path) -> None:
    """Evaluations and evaluators use the slow weights. The saved model has them, and a checkpoint resumes."""
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(0.3), targets=("linear",))
    cascade = adapted(read(base), spec)
    more = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = trainer_of(cascade, tmp_path, callback_of(cascade), **more)
    trainer.train()
    assert cascade.stage == 3
    evaluated = trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    saved = read(tmp_path / "final")
    state = cascade.folded_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.state_dict().items())
    plain = trainer_of(saved, tmp_path / "plain").evaluate()
    for metric in ("eval_loss", "eval_pearson_cosine", "eval_spearman_cosine"):
        assert evaluated[metric] == pytest.approx(plain[metric], abs=1e-5)

    resumed = adapted(read(base), spec)
    again = trainer_of(resumed, tmp_path, callback_of(resumed), **more)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(trainer)
    assert all(torch.equal(value, state[name]) for name, value in resumed.folded_state_dict().items())
    assert "lorasc_fx.manifest" in load_file(tmp_path / "checkpoint-8" / "model.safetensors")


def test_the_best_model_is_loaded_or_its_damage_raises(base: Path, tmp_path: Path) -> None:
    """The trainer's own loader would only log an error and continue with the last model."""
    more = {
        "save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "num_train_epochs": 3,
    }  # fmt: skip
    cascade = adapted(read(base), lx.CascadeSpec(rank=2, targets=("linear",)))
    trainer = trainer_of(cascade, tmp_path / "run", callback_of(cascade), **more)
    trainer.train()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert measured[-1] < max(measured) - 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(measured), abs=1e-6)

    best = Path(trainer.state.best_model_checkpoint) / "model.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    with raises(lx.CheckpointError, "invalid-checkpoint", "load_state_dict"):
        trainer._load_best_model()
