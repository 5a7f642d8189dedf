"""Transformers' models of speech and audio, of images with text, and of time series, small by configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.zoo_hf import IDS, fixed, given, hf, model, real, whole
from benchmarks.coverage.zoo_hf_vision import DROPPED, PLAIN

# Training drops some layers, and masks time spans and features.
# fmt: off
_WAVES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [8, 16], "conv_stride": [5, 4], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 7,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.3, "mask_time_length": 2, "mask_feature_prob": 0.2,
    "mask_feature_length": 3, "layerdrop": 0.3, "vocab_size": 12, "ctc_zero_infinity": True}
_said = given({"labels": whole(12, 2, 4, low=1)}, input_values=real(2, 400))
_classed = given({"labels": whole(3, 2)}, input_values=real(2, 400))
_CTC: dict[str, Any] = {"tolerance": 1e-6}  # the CTC loss is computed in fp32
_SEQUENCE: dict[str, Any] = {"use_cache": False, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# fmt: on


def _with_codes(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder with random codebooks, because untrained ones are zeros."""

    def built() -> nn.Module:
        model = build()
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
        return model

    return built


# fmt: off
SPEECH: tuple[Entry, ...] = (
    hf("wav2vec2", "Wav2Vec2ForCTC", _said, **_WAVES, **_CTC),
    hf("hubert", "HubertForCTC", _said, do_stable_layer_norm=True, feat_extract_norm="layer", **_WAVES, **_CTC),
    hf("wavlm", "WavLMForSequenceClassification", _classed, num_labels=3, num_buckets=8, max_bucket_distance=16,
        mask_feature_min_masks=0, classifier_proj_size=16, use_weighted_layer_sum=True, **_WAVES | {"layerdrop": 0.0}),
    hf("sew", "SEWForCTC", _said, squeeze_factor=2, **_WAVES, **_CTC),
    hf("unispeech", "UniSpeechForSequenceClassification", _classed, num_labels=3, classifier_proj_size=16, **_WAVES),
    hf("whisper", "WhisperForConditionalGeneration", given({"labels": whole(30, 2, 6, low=3)}, input_features=real(2, 8,
        24), decoder_input_ids=whole(30, 2, 6, low=3)), num_mel_bins=8, max_source_positions=12,
        max_target_positions=10, encoder_layerdrop=0.3, dropout=0.1, apply_spec_augment=True, mask_time_length=2,
        mask_feature_prob=0.2, mask_feature_length=2, **_SEQUENCE),
    hf("speech_to_text", "Speech2TextForConditionalGeneration", given({"labels": whole(30, 2, 6, low=3)},
        input_features=real(2, 24, 8), decoder_input_ids=whole(30, 2, 6, low=3)), input_feat_per_channel=8,
        max_source_positions=40, max_target_positions=20, conv_channels=16, **_SEQUENCE),
    hf("ast", "ASTForAudioClassification", given({"labels": whole(3, 2)}, input_values=real(2, 24, 12)),
        source="modeling_audio_spectrogram_transformer", num_labels=3, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, patch_size=4, frequency_stride=3, time_stride=3, max_length=24,
        num_mel_bins=12, hidden_dropout_prob=0.1),
    Entry("hf_encodec", "modeling_encodec", _with_codes(model("EncodecModel", hidden_size=16, num_filters=4,
        upsampling_ratios=[4, 2], codebook_size=16, kernel_size=5, last_kernel_size=5, num_lstm_layers=1,
        target_bandwidths=[12.0], sampling_rate=24000)), given(input_values=real(2, 1, 200)),
        unused={"encoder.*": "the decoder reads whole numbers, the nearest codes: no gradient passes"}),
    hf("speecht5", "SpeechT5ForSpeechToText",
        given({"labels": whole(30, 2, 6, low=3)}, input_values=real(2, 400), decoder_input_ids=whole(30, 2, 6, low=3)),
        hidden_size=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=30, encoder_max_relative_position=8, max_speech_positions=60,
        max_text_positions=20, encoder_layerdrop=0.3, use_cache=False,
        **{key: _WAVES[key] for key in _WAVES if key.startswith(("conv", "num_conv", "mask"))}),
)


_TEXT: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 24}
_SMALL: dict[str, Any] = {"initializer_range": 0.02}
_LOSS: dict[str, Any] = {"tolerance": 1e-6}  # the loss of a language model is computed in fp32
_pair = given({"return_loss": fixed(True)}, input_ids=whole(40, 2, 6, low=3),
    attention_mask=fixed([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]), pixel_values=real(2, 3, 32, 32))
# Sixteen placeholder tokens for the patches of an image.
_PLACES = [39] * 16
# fmt: on


def _told() -> torch.Tensor:
    """Return the tokens of two texts, each around an image."""
    return torch.cat([torch.randint(3, 30, (2, 2)), torch.tensor([_PLACES, _PLACES]), torch.randint(3, 30, (2, 4))], 1)


def _corners() -> torch.Tensor:
    """Return two documents' word boxes, by their corners."""
    low = torch.randint(0, 20, (2, 6, 2))
    return torch.cat([low, low + torch.randint(1, 20, (2, 6, 2))], 2)


# fmt: off
TEXT: tuple[Entry, ...] = (
    hf("clip", "CLIPModel", _pair, projection_dim=16, text_config=_TEXT | IDS, vision_config=PLAIN),
    hf("siglip", "SiglipModel", _pair, text_config=_TEXT | IDS, vision_config=PLAIN),
    hf("chinese_clip", "ChineseCLIPModel", _pair, projection_dim=16, text_config=_TEXT | {"pad_token_id": 0},
        vision_config=PLAIN),
    hf("altclip", "AltCLIPModel", _pair, projection_dim=16,
        text_config=_TEXT | {"project_dim": 24, "pad_token_id": 1, "initializer_factor": 1.0}, vision_config=PLAIN),
    hf("groupvit", "GroupViTModel", _pair, projection_dim=16, projection_intermediate_dim=24, text_config=_TEXT | IDS,
        vision_config=PLAIN | {"depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [4, 2, 0],
        "num_output_groups": [4, 2, 2]}),
    hf("owlvit", "OwlViTForObjectDetection", given(input_ids=whole(40, 4, 6, low=3), pixel_values=real(2, 3, 32, 32)),
        projection_dim=32, text_config=_TEXT | IDS, vision_config=PLAIN,
        unused={"owlvit.visual_projection.weight": "detection does not return how whole images and texts match"}),
    hf("blip", "BlipForConditionalGeneration",
        given({"labels": whole(40, 2, 6, low=3)}, input_ids=whole(40, 2, 6, low=3), pixel_values=real(2, 3, 32, 32)),
        projection_dim=16, image_text_hidden_size=16,
        text_config=_TEXT | IDS | {"encoder_hidden_size": 32, "projection_dim": 16, "hidden_dropout_prob": 0.1},
        vision_config=PLAIN | _SMALL, **_LOSS),
    hf("llava", "LlavaForConditionalGeneration",
        given({"labels": whole(30, 2, 22, low=3)}, input_ids=_told, pixel_values=real(2, 3, 32, 32)),
        image_token_index=39, image_seq_length=16,
        text_config=_TEXT | {"model_type": "llama", "num_key_value_heads": 2, "attention_dropout": 0.1},
        vision_config=PLAIN | {"model_type": "clip_vision_model"}, **_LOSS),
    hf("qwen2_vl", "Qwen2VLForConditionalGeneration", given({"labels": whole(30, 2, 22, low=3)}, input_ids=_told,
        mm_token_type_ids=fixed([[0] * 2 + [1] * 16 + [0] * 4] * 2), pixel_values=real(32, 96),
        image_grid_thw=fixed([[1, 4, 4], [1, 4, 4]])), image_token_id=39, video_token_id=38, vision_start_token_id=37,
        vision_end_token_id=36, text_config=_TEXT | {"num_hidden_layers": 1, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rope_parameters": {"type": "default", "mrope_section": [2, 1, 1],
        "rope_theta": 10000.0}}, vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
        "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 1}, **_LOSS),
    hf("vilt", "ViltForQuestionAnswering", given({"labels": lambda: torch.rand(2, 3, dtype=torch.float64)},
        input_ids=whole(40, 2, 6), pixel_values=real(2, 3, 32, 32)), vocab_size=40, max_position_embeddings=24,
        num_labels=3, **PLAIN, **DROPPED),
    hf("flava", "FlavaModel", given(input_ids=whole(40, 2, 6), pixel_values=real(2, 3, 32, 32)), hidden_size=32,
        projection_dim=16, image_config=PLAIN, text_config=_TEXT,
        multimodal_config={key: PLAIN[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size")}),
    hf("layoutlm", "LayoutLMForSequenceClassification",
        given({"labels": whole(3, 2)}, input_ids=whole(40, 2, 6), bbox=_corners), max_2d_position_embeddings=50,
        num_labels=3, **_TEXT, **DROPPED),
    hf("perceiver", "PerceiverForImageClassificationLearned", given({"labels": whole(3, 2)}, inputs=real(2, 3, 6, 6)),
        num_labels=3, num_latents=6, d_latents=16, d_model=512, num_blocks=2, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=1, image_size=6),
)


_SERIES: dict[str, Any] = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3],
    "num_time_features": 2, "num_static_categorical_features": 1, "cardinality": [5], "embedding_dimension": [3],
    "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3}
_past = given(past_values=real(2, 11), past_time_features=real(2, 11, 2),
    past_observed_mask=fixed([[True] * 11, [False] * 2 + [True] * 9]), static_categorical_features=whole(5, 2, 1),
    future_values=real(2, 4), future_time_features=real(2, 4, 2))

SERIES: tuple[Entry, ...] = (
    hf("time_series_transformer", "TimeSeriesTransformerForPrediction", _past, **_SERIES),
    hf("informer", "InformerForPrediction", _past, sampling_factor=2, **_SERIES),
    hf("patchtst", "PatchTSTForPrediction", given({"future_values": real(2, 4, 2)}, past_values=real(2, 16, 2)),
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=16, ffn_dim=24,
        num_hidden_layers=2, prediction_length=4, attention_dropout=0.1, channel_attention=True),
)
# fmt: on
