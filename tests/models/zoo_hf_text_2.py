"""Text models of transformers: the decoders."""

from __future__ import annotations

from tests.models.entry import Entry
from tests.models.zoo_hf_text_kit import text

_GATED = {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 32}

DECODERS: tuple[Entry, ...] = (
    text("gpt2", "GPT2LMHeadModel", attn_implementation="eager", n_positions=16),
    text(
        "gpt_neo",
        "GPTNeoForCausalLM",
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=16,
    ),
    text("gptj", "GPTJForCausalLM", n_positions=16, rotary_dim=4),
    text("gpt_neox", "GPTNeoXForCausalLM", intermediate_size=40, max_position_embeddings=16),
    text("opt", "OPTForCausalLM", ffn_dim=40, word_embed_proj_dim=16, max_position_embeddings=16),
    text("bloom", "BloomForCausalLM"),
    text("falcon", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    text("llama", "LlamaForCausalLM", **_GATED),
    text("mistral", "MistralForCausalLM", **_GATED, attn_implementation="eager", sliding_window=6, head_dim=8),
    text("gemma", "GemmaForCausalLM", **_GATED, head_dim=8),
    text("gemma2", "Gemma2ForCausalLM", **_GATED, head_dim=8, sliding_window=6),
    text("gemma3", "Gemma3ForCausalLM", **_GATED, head_dim=8, sliding_window=6),
    text("qwen2", "Qwen2ForSequenceClassification", **_GATED),
    text("qwen3", "Qwen3ForCausalLM", **_GATED, head_dim=8),
    text("phi", "PhiForCausalLM", **_GATED),
    text("phi3", "Phi3ForCausalLM", **_GATED, extra={"attention_mask": None}),
    text("stablelm", "StableLmForCausalLM", **_GATED),
    text("olmo", "OlmoForCausalLM", **_GATED),
    text("olmo2", "Olmo2ForCausalLM", **_GATED),
    text("cohere", "CohereForCausalLM", **_GATED),
    text("codegen", "CodeGenForCausalLM", n_positions=16, n_ctx=16, rotary_dim=4),
    text("ctrl", "CTRLLMHeadModel", dff=40, n_positions=16),
    text("mpt", "MptForCausalLM", max_seq_len=16, expansion_ratio=2),
    text("persimmon", "PersimmonForCausalLM", intermediate_size=40, max_position_embeddings=32),
    text("biogpt", "BioGptForCausalLM", intermediate_size=40, max_position_embeddings=16),
    text("starcoder2", "Starcoder2ForCausalLM", **_GATED),
    text("granite", "GraniteForCausalLM", **_GATED, attention_multiplier=0.3),
)
