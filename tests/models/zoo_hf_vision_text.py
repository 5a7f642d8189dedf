"""Transformers' models of images and text together, small by configuration."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.entry import Entry
from tests.models.zoo_hf_vision_build import fixed, given, model, real, whole
from tests.models.zoo_hf_vision_images import DROPPED, PLAIN

_TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {"initializer_range": 0.02}
_LOSS: dict[str, Any] = {"tolerance": 1e-6, "because": "the loss of a language model is computed in fp32"}
_pair = given(
    {"return_loss": fixed(True)},
    input_ids=whole(40, 2, 6, low=3),
    attention_mask=fixed([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    pixel_values=real(2, 3, 32, 32),
)
# Sixteen places for an image's patches.
_PLACES = [39] * 16


def _told() -> torch.Tensor:
    """Return two texts around one image each."""
    return torch.cat([torch.randint(3, 30, (2, 2)), torch.tensor([_PLACES, _PLACES]), torch.randint(3, 30, (2, 4))], 1)


def _corners() -> torch.Tensor:
    """Return two documents' word boxes, by their corners."""
    low = torch.randint(0, 20, (2, 6, 2))
    return torch.cat([low, low + torch.randint(1, 20, (2, 6, 2))], 2)


TEXT: tuple[Entry, ...] = (
    Entry(
        "hf_clip",
        "modeling_clip",
        model("CLIPModel", "CLIPConfig", projection_dim=16, text_config=_TEXT | _IDS, vision_config=PLAIN),
        _pair,
    ),
    Entry(
        "hf_siglip",
        "modeling_siglip",
        model("SiglipModel", "SiglipConfig", text_config=_TEXT | _IDS, vision_config=PLAIN),
        _pair,
    ),
    Entry(
        "hf_chinese_clip",
        "modeling_chinese_clip",
        model(
            "ChineseCLIPModel",
            "ChineseCLIPConfig",
            projection_dim=16,
            text_config=_TEXT | {"pad_token_id": 0},
            vision_config=PLAIN,
        ),
        _pair,
    ),
    Entry(
        "hf_altclip",
        "modeling_altclip",
        model(
            "AltCLIPModel",
            "AltCLIPConfig",
            projection_dim=16,
            text_config=_TEXT | {"project_dim": 24, "pad_token_id": 1, "initializer_factor": 1.0},
            vision_config=PLAIN,
        ),
        _pair,
    ),
    Entry(
        "hf_groupvit",
        "modeling_groupvit",
        model(
            "GroupViTModel",
            "GroupViTConfig",
            projection_dim=16,
            projection_intermediate_dim=24,
            text_config=_TEXT | _IDS,
            vision_config=PLAIN
            | {
                "depths": [1, 1, 1],
                "num_hidden_layers": 3,
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 2],
            },
        ),
        _pair,
    ),
    Entry(
        "hf_owlvit",
        "modeling_owlvit",
        model(
            "OwlViTForObjectDetection", "OwlViTConfig", projection_dim=32, text_config=_TEXT | _IDS, vision_config=PLAIN
        ),
        given(input_ids=whole(40, 4, 6, low=3), pixel_values=real(2, 3, 32, 32)),
        unused={"owlvit.visual_projection.weight": "detection does not return how whole images and texts match"},
    ),
    Entry(
        "hf_blip",
        "modeling_blip",
        model(
            "BlipForConditionalGeneration",
            "BlipConfig",
            projection_dim=16,
            image_text_hidden_size=16,
            text_config=_TEXT | _IDS | {"encoder_hidden_size": 32, "projection_dim": 16, "hidden_dropout_prob": 0.1},
            vision_config=PLAIN | _SMALL,
        ),
        given({"labels": whole(40, 2, 6, low=3)}, input_ids=whole(40, 2, 6, low=3), pixel_values=real(2, 3, 32, 32)),
        **_LOSS,
    ),
    Entry(
        "hf_llava",
        "modeling_llava",
        model(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            image_token_index=39,
            image_seq_length=16,
            text_config=_TEXT | {"model_type": "llama", "num_key_value_heads": 2, "attention_dropout": 0.1},
            vision_config=PLAIN | {"model_type": "clip_vision_model"},
        ),
        given({"labels": whole(30, 2, 22, low=3)}, input_ids=_told, pixel_values=real(2, 3, 32, 32)),
        **_LOSS,
    ),
    Entry(
        "hf_qwen2_vl",
        "modeling_qwen2_vl",
        model(
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            image_token_id=39,
            video_token_id=38,
            vision_start_token_id=37,
            vision_end_token_id=36,
            text_config=_TEXT
            | {
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "rope_parameters": {"type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            },
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 1,
            },
        ),
        given(
            {"labels": whole(30, 2, 22, low=3)},
            input_ids=_told,
            mm_token_type_ids=fixed([[0] * 2 + [1] * 16 + [0] * 4] * 2),
            pixel_values=real(32, 96),
            image_grid_thw=fixed([[1, 4, 4], [1, 4, 4]]),
        ),
        **_LOSS,
    ),
    Entry(
        "hf_vilt",
        "modeling_vilt",
        model(
            "ViltForQuestionAnswering",
            "ViltConfig",
            vocab_size=40,
            max_position_embeddings=24,
            num_labels=3,
            **PLAIN,
            **DROPPED,
        ),
        given(
            {"labels": lambda: torch.rand(2, 3, dtype=torch.float64)},
            input_ids=whole(40, 2, 6),
            pixel_values=real(2, 3, 32, 32),
        ),
    ),
    Entry(
        "hf_flava",
        "modeling_flava",
        model(
            "FlavaModel",
            "FlavaConfig",
            hidden_size=32,
            projection_dim=16,
            image_config=PLAIN,
            text_config=_TEXT,
            multimodal_config={
                key: PLAIN[key]
                for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            },
        ),
        given(input_ids=whole(40, 2, 6), pixel_values=real(2, 3, 32, 32)),
    ),
    Entry(
        "hf_layoutlm",
        "modeling_layoutlm",
        model(
            "LayoutLMForSequenceClassification",
            "LayoutLMConfig",
            max_2d_position_embeddings=50,
            num_labels=3,
            **_TEXT,
            **DROPPED,
        ),
        given({"labels": whole(3, 2)}, input_ids=whole(40, 2, 6), bbox=_corners),
    ),
    Entry(
        "hf_perceiver",
        "modeling_perceiver",
        model(
            "PerceiverForImageClassificationLearned",
            "PerceiverConfig",
            num_labels=3,
            num_latents=6,
            d_latents=16,
            d_model=512,
            num_blocks=2,
            num_self_attends_per_block=1,
            num_self_attention_heads=2,
            num_cross_attention_heads=1,
            image_size=6,
        ),
        given({"labels": whole(3, 2)}, inputs=real(2, 3, 6, 6)),
    ),
)
