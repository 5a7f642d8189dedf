"""Text models of transformers, small by configuration: decoders, mixtures and mixers, translators, encoders."""

from __future__ import annotations

import torch

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.zoo_hf import text

_GATED = {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 32}

# fmt: off
DECODERS: tuple[Entry, ...] = (
    text("gpt2", "GPT2LMHeadModel", attn_implementation="eager", n_positions=16),
    text("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=16),
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


# The default, grouped_mm, does not support fp64.
_BATCHED = {"experts_implementation": "batched_mm"}
_LOOP = {"experts_implementation": "eager"}
_FEW = {**_GATED, **_BATCHED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {**_BATCHED, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "intermediate_size": 40, "max_position_embeddings": 32, "num_key_value_heads": 4}
_DBRX = {"d_model": 32, "hidden_size": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 100}

EXPERTS: tuple[Entry, ...] = (
    text("mixtral", "MixtralForCausalLM", **_GATED, **_BATCHED, num_local_experts=4),
    text("qwen2_moe", "Qwen2MoeForCausalLM", **{**_FEW, **_LOOP, "num_experts": 2, "num_experts_per_tok": 1},
        num_hidden_layers=1, length=8, shared_expert_intermediate_size=24),
    text("qwen3_moe", "Qwen3MoeForCausalLM", **_FEW, head_dim=8, mlp_only_layers=[0]),
    text("gpt_oss", "GptOssForCausalLM", **_GATED, **_BATCHED, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        sliding_window=6),
    text("deepseek_v2", "DeepseekV2ForCausalLM", **_LATENT),
    text("deepseek_v3", "DeepseekV3ForCausalLM", **_LATENT, n_group=2, topk_group=1),
    text("olmoe", "OlmoeForCausalLM", **_FEW),
    text("granitemoe", "GraniteMoeForCausalLM", **_GATED, **_BATCHED, num_local_experts=4),
    text("phimoe", "PhimoeForCausalLM", **_GATED, **_BATCHED, num_local_experts=4, router_jitter_noise=5.0),
    text("dbrx", "DbrxForCausalLM", small=_DBRX, max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32}),
    text("jamba", "JambaForCausalLM", use_cache=False, length=8, **_GATED, **_BATCHED, num_experts=2,
        num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False),
    text("mamba", "MambaForCausalLM", use_cache=False, length=8, num_hidden_layers=1, state_size=4, time_step_rank=4),
    text("mamba2", "Mamba2ForCausalLM", use_cache=False, length=8, num_hidden_layers=1, num_heads=4, head_dim=16,
        n_groups=2, state_size=4, chunk_size=4),
    text("falcon_mamba", "FalconMambaForCausalLM", use_cache=False, length=8, num_hidden_layers=1, state_size=4,
        time_step_rank=4),
    text("recurrent_gemma", "RecurrentGemmaForCausalLM", intermediate_size=80, block_types=["recurrent", "attention"],
        attention_window_size=6, num_key_value_heads=1),
    text("zamba", "ZambaForCausalLM", use_cache=False, length=6, intermediate_size=40, num_key_value_heads=4,
        num_hidden_layers=3, layers_block_type=["hybrid", "mamba", "hybrid"], mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False),
    text("bamba", "BambaForCausalLM", use_cache=False, length=8, **_GATED, attn_layer_indices=[1], mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=4, mamba_chunk_size=4),
)


_T5 = {"use_cache": False, "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0}
_BART = {"use_cache": False, "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_ONE = {"encoder_layers": 1, "decoder_layers": 1}

TRANSLATORS: tuple[Entry, ...] = (
    text("t5", "T5ForConditionalGeneration", small=_T5),
    text("mt5", "MT5ForConditionalGeneration", small=_T5),
    text("umt5", "UMT5ForConditionalGeneration", small=_T5),
    text("longt5", "LongT5ForConditionalGeneration", small={**_T5, "num_layers": 1},
        encoder_attention_type="transient-global", local_radius=3, global_block_size=4),
    text("bart", "BartForConditionalGeneration", small=_BART),
    text("mbart", "MBartForConditionalGeneration", small=_BART, scale_embedding=True),
    text("pegasus", "PegasusForConditionalGeneration", small=_BART),
    text("pegasus_x", "PegasusXForConditionalGeneration", small={**_BART, **_ONE}, num_global_tokens=2, block_size=4),
    text("led", "LEDForConditionalGeneration", small={**_BART, **_ONE}, extra={"attention_mask": None},
        attention_window=4, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32),
    text("marian", "MarianMTModel", small=_BART),
    text("blenderbot", "BlenderbotForConditionalGeneration", small=_BART),
    text("m2m_100", "M2M100ForConditionalGeneration", length=8, small={**_BART, **_ONE}, encoder_layerdrop=0.2,
        decoder_layerdrop=0.2),
    text("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", small=_BART, attention_type="original_full"),
)


_WIDE = {"intermediate_size": 40}
_NO_POOLER = {"*.pooler.*": "the head for masked words does not read the pooler, which runs all the same"}

HF_TEXT: tuple[Entry, ...] = (
    text("bert", "BertForMaskedLM", **_WIDE),
    text("roberta", "RobertaForSequenceClassification", **_WIDE, max_position_embeddings=20),
    text("albert", "AlbertForMaskedLM", **_WIDE, embedding_size=16),
    text("electra", "ElectraForTokenClassification", **_WIDE, embedding_size=16),
    text("deberta", "DebertaForMaskedLM", **_WIDE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    text("deberta_v2", "DebertaV2ForSequenceClassification", **_WIDE, num_hidden_layers=1, relative_attention=True,
        pos_att_type=["c2p", "p2c"]),
    text("mpnet", "MPNetForMaskedLM", **_WIDE),
    text("distilbert", "DistilBertForQuestionAnswering", hidden_dim=40),
    text("convbert", "ConvBertForMaskedLM", **_WIDE, embedding_size=16, conv_kernel_size=3),
    text("squeezebert", "SqueezeBertForSequenceClassification", **_WIDE, embedding_size=32),
    text("mobilebert", "MobileBertForMaskedLM", **_WIDE, embedding_size=16, intra_bottleneck_size=16,
        num_feedforward_networks=2),
    text("nystromformer", "NystromformerForMaskedLM", **_WIDE, num_landmarks=12, segment_means_seq_len=12,
        conv_kernel_size=5),
    text("fnet", "FNetForMaskedLM", **_WIDE, extra={"attention_mask": None}, unused=_NO_POOLER),
    text("roformer", "RoFormerForMaskedLM", **_WIDE, embedding_size=16),
    text("longformer", "LongformerForMaskedLM", **_WIDE, length=8, num_hidden_layers=1, attention_window=4,
        max_position_embeddings=20,
        extra={"attention_mask": None, "global_attention_mask": torch.tensor([[1] + [0] * 7] * 2)}),
    text("big_bird", "BigBirdForMaskedLM", **_WIDE, length=16, attention_type="block_sparse", block_size=2,
        num_random_blocks=1, unused=_NO_POOLER, num_hidden_layers=1, max_position_embeddings=16),
    text("modernbert", "ModernBertForMaskedLM", **_WIDE, cls_token_id=1, sep_token_id=2),
    text("funnel", "FunnelForMaskedLM", small={}, vocab_size=100, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8,
        d_inner=40, num_decoder_layers=1),
    text("xlnet", "XLNetLMHeadModel", small={}, vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=40),
    text("xlm", "XLMWithLMHeadModel", small={}, vocab_size=100, emb_dim=32, n_layers=2, n_heads=4, pad_token_id=0),
    text("rembert", "RemBertForMaskedLM", **_WIDE, input_embedding_size=16, output_embedding_size=24),
    text("ibert", "IBertForMaskedLM", **_WIDE, num_hidden_layers=1, max_position_embeddings=20),
    text("luke", "LukeForMaskedLM", **_WIDE, max_position_embeddings=20, entity_vocab_size=10, entity_emb_size=16,
        unused=_NO_POOLER, extra={"entity_ids": torch.tensor([[1, 2], [3, 0]]),
        "entity_attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "entity_position_ids": torch.tensor([[[1, 2, -1], [4, -1, -1]], [[0, -1, -1], [-1, -1, -1]]])}),
    text("yoso", "YosoForMaskedLM", **_WIDE, use_expectation=True),
    *DECODERS,
    *EXPERTS,
    *TRANSLATORS,
)
# fmt: on
