"""Text models of transformers: encoders with decoders."""

from __future__ import annotations

from tests.models.entry import Entry
from tests.models.zoo_hf_text_kit import text

_T5 = {
    "use_cache": False,
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "use_cache": False,
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_ONE = {"encoder_layers": 1, "decoder_layers": 1}

TRANSLATORS: tuple[Entry, ...] = (
    text("t5", "T5ForConditionalGeneration", small=_T5),
    text("mt5", "MT5ForConditionalGeneration", small=_T5),
    text("umt5", "UMT5ForConditionalGeneration", small=_T5),
    text(
        "longt5",
        "LongT5ForConditionalGeneration",
        small={**_T5, "num_layers": 1},
        encoder_attention_type="transient-global",
        local_radius=3,
        global_block_size=4,
    ),
    text("bart", "BartForConditionalGeneration", small=_BART),
    text("mbart", "MBartForConditionalGeneration", small=_BART, scale_embedding=True),
    text("pegasus", "PegasusForConditionalGeneration", small=_BART),
    text("pegasus_x", "PegasusXForConditionalGeneration", small={**_BART, **_ONE}, num_global_tokens=2, block_size=4),
    text(
        "led",
        "LEDForConditionalGeneration",
        small={**_BART, **_ONE},
        extra={"attention_mask": None},
        attention_window=4,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    ),
    text("marian", "MarianMTModel", small=_BART),
    text("blenderbot", "BlenderbotForConditionalGeneration", small=_BART),
    text(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        length=8,
        small={**_BART, **_ONE},
        encoder_layerdrop=0.2,
        decoder_layerdrop=0.2,
    ),
    text("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", small=_BART, attention_type="original_full"),
)
