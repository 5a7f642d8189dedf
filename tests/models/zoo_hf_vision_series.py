"""Transformers' time series models, small by configuration."""

from __future__ import annotations

from typing import Any

from tests.models.entry import Entry
from tests.models.zoo_hf_vision_build import fixed, given, model, real, whole

_SERIES: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "num_static_categorical_features": 1,
    "cardinality": [5],
    "embedding_dimension": [3],
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layerdrop": 0.3,
    "decoder_layerdrop": 0.3,
}
_past = given(
    past_values=real(2, 11),
    past_time_features=real(2, 11, 2),
    past_observed_mask=fixed([[True] * 11, [False] * 2 + [True] * 9]),
    static_categorical_features=whole(5, 2, 1),
    future_values=real(2, 4),
    future_time_features=real(2, 4, 2),
)

SERIES: tuple[Entry, ...] = (
    Entry(
        "hf_time_series_transformer",
        "modeling_time_series_transformer",
        model("TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig", **_SERIES),
        _past,
    ),
    Entry(
        "hf_informer",
        "modeling_informer",
        model("InformerForPrediction", "InformerConfig", sampling_factor=2, **_SERIES),
        _past,
    ),
    Entry(
        "hf_patchtst",
        "modeling_patchtst",
        model(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            ffn_dim=24,
            num_hidden_layers=2,
            prediction_length=4,
            attention_dropout=0.1,
            channel_attention=True,
        ),
        given({"future_values": real(2, 4, 2)}, past_values=real(2, 16, 2)),
    ),
)
