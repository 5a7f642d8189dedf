"""Text models of transformers: mixtures of experts, state spaces and recurrent mixers."""

from __future__ import annotations

from tests.models.entry import Entry
from tests.models.zoo_hf_text_kit import text

# the default, grouped_mm, has no fp64
_BATCHED = {"experts_implementation": "batched_mm"}
_LOOP = {"experts_implementation": "eager"}
_GATED = {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 32}
_FEW = {**_GATED, **_BATCHED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_BATCHED,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "num_key_value_heads": 4,
}
_DBRX = {"d_model": 32, "hidden_size": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 100}

EXPERTS: tuple[Entry, ...] = (
    text("mixtral", "MixtralForCausalLM", **_GATED, **_BATCHED, num_local_experts=4),
    text(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        **{**_FEW, **_LOOP, "num_experts": 2, "num_experts_per_tok": 1},
        num_hidden_layers=1,
        length=8,
        shared_expert_intermediate_size=24,
    ),
    text("qwen3_moe", "Qwen3MoeForCausalLM", **_FEW, head_dim=8, mlp_only_layers=[0]),
    text(
        "gpt_oss",
        "GptOssForCausalLM",
        **_GATED,
        **_BATCHED,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=6,
    ),
    text("deepseek_v2", "DeepseekV2ForCausalLM", **_LATENT),
    text("deepseek_v3", "DeepseekV3ForCausalLM", **_LATENT, n_group=2, topk_group=1),
    text("olmoe", "OlmoeForCausalLM", **_FEW),
    text("granitemoe", "GraniteMoeForCausalLM", **_GATED, **_BATCHED, num_local_experts=4),
    text("phimoe", "PhimoeForCausalLM", **_GATED, **_BATCHED, num_local_experts=4, router_jitter_noise=5.0),
    text(
        "dbrx",
        "DbrxForCausalLM",
        small=_DBRX,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32},
    ),
    text(
        "jamba",
        "JambaForCausalLM",
        use_cache=False,
        length=8,
        **_GATED,
        **_BATCHED,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    text("mamba", "MambaForCausalLM", use_cache=False, length=8, num_hidden_layers=1, state_size=4, time_step_rank=4),
    text(
        "mamba2",
        "Mamba2ForCausalLM",
        use_cache=False,
        length=8,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        n_groups=2,
        state_size=4,
        chunk_size=4,
    ),
    text(
        "falcon_mamba",
        "FalconMambaForCausalLM",
        use_cache=False,
        length=8,
        num_hidden_layers=1,
        state_size=4,
        time_step_rank=4,
    ),
    text(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        intermediate_size=80,
        block_types=["recurrent", "attention"],
        attention_window_size=6,
        num_key_value_heads=1,
    ),
    text(
        "zamba",
        "ZambaForCausalLM",
        use_cache=False,
        length=6,
        intermediate_size=40,
        num_key_value_heads=4,
        num_hidden_layers=3,
        layers_block_type=["hybrid", "mamba", "hybrid"],
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    text(
        "bamba",
        "BambaForCausalLM",
        use_cache=False,
        length=8,
        **_GATED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
)
