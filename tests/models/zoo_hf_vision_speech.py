"""Transformers' speech and audio models, small by configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.models.entry import Entry
from tests.models.zoo_hf_vision_build import given, model, real, whole

# Layers of which training drops some, and masked time spans and features in training.
_WAVES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [8, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 7,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.3,
    "mask_time_length": 2,
    "mask_feature_prob": 0.2,
    "mask_feature_length": 3,
    "layerdrop": 0.3,
    "vocab_size": 12,
    "ctc_zero_infinity": True,
}
_said = given({"labels": whole(12, 2, 4, low=1)}, input_values=real(2, 400))
_classed = given({"labels": whole(3, 2)}, input_values=real(2, 400))
_CTC: dict[str, Any] = {"tolerance": 1e-6, "because": "the CTC loss is computed in fp32"}
_SEQUENCE: dict[str, Any] = {
    "use_cache": False,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _with_codes(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder whose codebooks hold what training would have put there; they start as zeros."""

    def built() -> nn.Module:
        made = build()
        for name, buffer in made.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
        return made

    return built


SPEECH: tuple[Entry, ...] = (
    Entry("hf_wav2vec2", "modeling_wav2vec2", model("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAVES), _said, **_CTC),
    Entry(
        "hf_hubert",
        "modeling_hubert",
        model("HubertForCTC", "HubertConfig", do_stable_layer_norm=True, feat_extract_norm="layer", **_WAVES),
        _said,
        **_CTC,
    ),
    Entry(
        "hf_wavlm",
        "modeling_wavlm",
        model(
            "WavLMForSequenceClassification",
            "WavLMConfig",
            num_labels=3,
            num_buckets=8,
            max_bucket_distance=16,
            mask_feature_min_masks=0,
            classifier_proj_size=16,
            use_weighted_layer_sum=True,
            **(_WAVES | {"layerdrop": 0.0}),
        ),
        _classed,
    ),
    Entry("hf_sew", "modeling_sew", model("SEWForCTC", "SEWConfig", squeeze_factor=2, **_WAVES), _said, **_CTC),
    Entry(
        "hf_unispeech",
        "modeling_unispeech",
        model("UniSpeechForSequenceClassification", "UniSpeechConfig", num_labels=3, classifier_proj_size=16, **_WAVES),
        _classed,
    ),
    Entry(
        "hf_whisper",
        "modeling_whisper",
        model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=10,
            encoder_layerdrop=0.3,
            dropout=0.1,
            apply_spec_augment=True,
            mask_time_length=2,
            mask_feature_prob=0.2,
            mask_feature_length=2,
            **_SEQUENCE,
        ),
        given(
            {"labels": whole(30, 2, 6, low=3)}, input_features=real(2, 8, 24), decoder_input_ids=whole(30, 2, 6, low=3)
        ),
    ),
    Entry(
        "hf_speech_to_text",
        "modeling_speech_to_text",
        model(
            "Speech2TextForConditionalGeneration",
            "Speech2TextConfig",
            input_feat_per_channel=8,
            max_source_positions=40,
            max_target_positions=20,
            conv_channels=16,
            **_SEQUENCE,
        ),
        given(
            {"labels": whole(30, 2, 6, low=3)}, input_features=real(2, 24, 8), decoder_input_ids=whole(30, 2, 6, low=3)
        ),
    ),
    Entry(
        "hf_ast",
        "modeling_audio_spectrogram_transformer",
        model(
            "ASTForAudioClassification",
            "ASTConfig",
            num_labels=3,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            patch_size=4,
            frequency_stride=3,
            time_stride=3,
            max_length=24,
            num_mel_bins=12,
            hidden_dropout_prob=0.1,
        ),
        given({"labels": whole(3, 2)}, input_values=real(2, 24, 12)),
    ),
    Entry(
        "hf_encodec",
        "modeling_encodec",
        _with_codes(
            model(
                "EncodecModel",
                "EncodecConfig",
                hidden_size=16,
                num_filters=4,
                upsampling_ratios=[4, 2],
                codebook_size=16,
                kernel_size=5,
                last_kernel_size=5,
                num_lstm_layers=1,
                target_bandwidths=[12.0],
                sampling_rate=24000,
            )
        ),
        given(input_values=real(2, 1, 200)),
        unused={"encoder.*": "the decoder reads whole numbers, the nearest codes: no gradient passes"},
    ),
    Entry(
        "hf_speecht5",
        "modeling_speecht5",
        model(
            "SpeechT5ForSpeechToText",
            "SpeechT5Config",
            hidden_size=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=30,
            encoder_max_relative_position=8,
            max_speech_positions=60,
            max_text_positions=20,
            encoder_layerdrop=0.3,
            use_cache=False,
            **{key: _WAVES[key] for key in _WAVES if key.startswith(("conv", "num_conv", "mask"))},
        ),
        given({"labels": whole(30, 2, 6, low=3)}, input_values=real(2, 400), decoder_input_ids=whole(30, 2, 6, low=3)),
    ),
)
