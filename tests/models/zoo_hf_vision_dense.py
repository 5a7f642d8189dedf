"""Transformers' detectors, segmenters and depth estimators, small by configuration; backbones by configuration too."""

from __future__ import annotations

from typing import Any

from tests.models.entry import Entry
from tests.models.zoo_hf_vision_build import boxes, given, model, real, whole
from tests.models.zoo_hf_vision_images import DROPPED, PLAIN


def _resnet() -> dict[str, Any]:
    """Return the settings of a small ResNet whose last three stages leave it."""
    return {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    }


def _swin() -> dict[str, Any]:
    """Return the settings of a small Swin whose four stages leave it."""
    return {
        "model_type": "swin",
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 2,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }


def _dinov2() -> dict[str, Any]:
    """Return the settings of a small DINOv2 whose four layers leave it."""
    return {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": 8,
        "reshape_hidden_states": False,
        "out_indices": [1, 2, 3, 4],
    }


_DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 6,
    "num_labels": 3,
}
_found = given({"labels": boxes(2)}, pixel_values=real(2, 3, 64, 64))
_drawn = given({"labels": whole(3, 2, 32, 32)}, pixel_values=real(2, 3, 32, 32))

_seen = given(pixel_values=real(2, 3, 64, 64))
_neck: dict[str, Any] = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 16}

_ZERO_QUERIES = {
    "*decoder.layers.0.self_attn.v_proj.weight": "the first layer's queries are zero",
    "*decoder.layers.0.self_attn.[qk]_proj.weight": "the first layer's values are equal: no weighing moves the mean",
}

DENSE: tuple[Entry, ...] = (
    # No labels for DETR and YOLOS: their losses weigh classes in fp32, which eager torch refuses in fp64.
    Entry(
        "hf_detr",
        "modeling_detr",
        model("DetrForObjectDetection", "DetrConfig", backbone_config=_resnet(), auxiliary_loss=True, **_DETR),
        _seen,
        unused=_ZERO_QUERIES,
    ),
    Entry(
        "hf_yolos",
        "modeling_yolos",
        model(
            "YolosForObjectDetection",
            "YolosConfig",
            num_labels=3,
            num_detection_tokens=5,
            **(PLAIN | {"image_size": [32, 32]}),
            **DROPPED,
        ),
        given(pixel_values=real(2, 3, 32, 32)),
    ),
    Entry(
        "hf_deformable_detr",
        "modeling_deformable_detr",
        model(
            "DeformableDetrForObjectDetection",
            "DeformableDetrConfig",
            backbone_config=_resnet(),
            num_feature_levels=3,
            encoder_n_points=2,
            decoder_n_points=2,
            with_box_refine=True,
            auxiliary_loss=True,
            **_DETR,
        ),
        _found,
    ),
    Entry(
        "hf_segformer",
        "modeling_segformer",
        model(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_labels=3,
            num_encoder_blocks=3,
            depths=[1, 1, 1],
            sr_ratios=[4, 2, 1],
            hidden_sizes=[16, 24, 32],
            patch_sizes=[7, 3, 3],
            strides=[4, 2, 2],
            num_attention_heads=[1, 2, 4],
            mlp_ratios=[2, 2, 2],
            decoder_hidden_size=24,
        ),
        _drawn,
    ),
    Entry(
        "hf_dpt",
        "modeling_dpt",
        model(
            "DPTForSemanticSegmentation",
            "DPTConfig",
            num_labels=3,
            backbone_out_indices=[0, 1, 2, 3],
            use_batch_norm_in_fusion_residual=True,
            **(PLAIN | {"num_hidden_layers": 4}),
            **DROPPED,
            **_neck,
        ),
        _drawn,
    ),
    Entry(
        "hf_depth_anything",
        "modeling_depth_anything",
        model(
            "DepthAnythingForDepthEstimation",
            "DepthAnythingConfig",
            backbone_config=_dinov2(),
            patch_size=8,
            reassemble_hidden_size=32,
            head_hidden_size=8,
            **_neck,
        ),
        given(pixel_values=real(2, 3, 32, 32)),
    ),
    Entry(
        "hf_maskformer",
        "modeling_maskformer",
        model(
            "MaskFormerForInstanceSegmentation",
            "MaskFormerConfig",
            backbone_config=_swin(),
            decoder_config={"model_type": "detr"} | _DETR,
            fpn_feature_size=32,
            mask_feature_size=32,
            num_labels=3,
        ),
        _seen,
        unused=_ZERO_QUERIES,
    ),
    Entry(
        "hf_sam",
        "modeling_sam",
        model(
            "SamModel",
            "SamConfig",
            vision_config=dict(
                PLAIN, output_channels=16, global_attn_indexes=[1], window_size=3, num_pos_feats=8, mlp_dim=48
            ),
            prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        ),
        given(
            pixel_values=real(1, 3, 32, 32), input_points=real(1, 2, 3, 2, scale=8.0), input_labels=whole(2, 1, 2, 3)
        ),
        unused={
            "mask_decoder.output_hypernetworks_mlps.0.*": "where several masks are asked for, the first is cut off"
        },
    ),
)
