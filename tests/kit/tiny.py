"""Models of transformers in little, with random weights; `more` goes to the configuration."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
"""As the configurations of Llama, BERT and Mixtral call them."""


def llama(**more: Any) -> Any:
    """A language model with one head of keys and values for two of queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **special, "num_key_value_heads": 1, **more}))


def bert(kind: str = "ForSequenceClassification", **more: Any) -> Any:
    """One of BERT's classes, by what comes after `Bert`, of three classes."""
    import transformers

    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**{**SIZES, "num_labels": 3, **more}))


QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""For BERT: no dropout."""


def gpt2(kind: str = "LMHeadModel", **more: Any) -> Any:
    """One of GPT-2's classes, by what comes after `GPT2`, without dropout."""
    import transformers

    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 12, "n_layer": 1, "n_head": 2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return getattr(transformers, f"GPT2{kind}")(transformers.GPT2Config(**{**sizes, **quiet, **more}))
