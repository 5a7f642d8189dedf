"""Small models and data for the training loops of other libraries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import lorasc_fx as lx
from tests.kit import tiny
from tests.kit.state import branches_of, weight_state


class Net(nn.Module):
    """A plain module that a Trainer accepts: it returns a loss if it gets labels."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.dropout(torch.tanh(self.first(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def net(dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(5)
    return Net(dropout).to(dtype)


def rows(count: int = 20, dtype: torch.dtype = torch.float32, **more: Any) -> list[dict[str, Any]]:
    """Return rows of data, with columns that the model does not use."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(count, 6, generator=generator, dtype=dtype)
    labels = torch.randint(4, (count,), generator=generator)
    return [{"x": x[index], "labels": labels[index], "row": index, **more} for index in range(count)]


def adapted(spec: lx.CascadeSpec, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> lx.Cascade:
    x = torch.zeros(3, 6, dtype=dtype)
    kwargs = {"labels": torch.zeros(3, dtype=torch.long)}
    return lx.adapt(net(dropout, dtype), args=(x,), kwargs=kwargs, spec=spec)


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return tiny.llama(**{**sizes, "use_cache": False, **more}).double()


def texts(count: int = 8, length: int = 9) -> list[dict[str, Tensor]]:
    """Return rows of tokens, some of them padded. The labels of padding are -100."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for index in range(count):
        ids = torch.randint(3, 40, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        mask[length - index % 3 :] = 0
        ids = ids * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)})
    return rows


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    plain = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 0.02, "report_to": [],
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "num_train_epochs": 2,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**plain, **more})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values_of(cascade: lx.Cascade, view: str = "slow") -> dict[str, Tensor]:
    """Compute a cascade's weights by the formula, in fp64: W0 + S, or for "fast" W0 + S + s B A of the branch."""
    values = {}
    for weight, branch in branches_of(cascade).items():
        state = weight_state(cascade, weight)
        value = state.base.double().clone()
        if state.is_dense:  # experts that outgrew their weight
            value += state.dense_slow.double().view_as(value)
        for coefficient, expert in zip(state.slow, state.experts, strict=True):
            value += coefficient * expert.b.double() @ expert.a.double()
        if view == "fast":
            value += branch.scale * branch.lora_B.detach().double() @ branch.lora_A.detach().double()
        values[weight] = value
    return values


def with_weights(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Return a plain copy of a model with these weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lx.errors.LorascWarning)  # the copied numbers are replaced at once
        plain = copy.deepcopy(model)
    plain.load_state_dict({name: value.clone() for name, value in values.items()}, strict=False)
    return plain.eval()


WORDS = [f"w{number}" for number in range(37)]


def tokenizer(words: Sequence[str] = WORDS, **more: Any) -> Any:
    """Build a tokenizer for these words, because nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", *words))}
    table = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=table, **special, **more)
