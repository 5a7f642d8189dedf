"""Transformers' image and video models, detectors, segmenters and depth estimators, small by configuration."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.zoo_hf import boxes, given, hf, real, whole

# fmt: off
PLAIN: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8}
DROPPED: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

_pictures = given({"labels": whole(3, 2)}, pixel_values=real(2, 3, 32, 32))
_large = given({"labels": whole(3, 2)}, pixel_values=real(2, 3, 64, 64))
_clips = given({"labels": whole(3, 2)}, pixel_values=real(2, 4, 3, 32, 32))

IMAGES: tuple[Entry, ...] = (
    hf("vit", "ViTForImageClassification", _pictures, num_labels=3, **PLAIN, **DROPPED),
    hf("deit", "DeiTForImageClassificationWithTeacher", given(pixel_values=real(2, 3, 32, 32)), num_labels=3, **PLAIN,
        **DROPPED),
    hf("swin", "SwinForImageClassification", _pictures, num_labels=3, image_size=32, patch_size=4, embed_dim=16,
        depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.2, use_absolute_embeddings=True),
    hf("swinv2", "Swinv2ForImageClassification", _pictures, num_labels=3, image_size=32, patch_size=4, embed_dim=16,
        depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.2, pretrained_window_sizes=[0, 0]),
    hf("convnextv2", "ConvNextV2ForImageClassification", _pictures, num_labels=3, num_stages=3,
        hidden_sizes=[16, 24, 32], depths=[1, 2, 1], drop_path_rate=0.2),
    # With sdpa, while it is traced, BEiT adds a boolean mask to the bias, which raises the bias by 1.0.
    hf("beit", "BeitForImageClassification", _pictures, num_labels=3, use_relative_position_bias=True,
        attn_implementation="eager", use_absolute_position_embeddings=True, **PLAIN, **DROPPED),
    hf("dinov2", "Dinov2ForImageClassification", _pictures, num_labels=3, use_swiglu_ffn=True, drop_path_rate=0.2,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8, mlp_ratio=2),
    hf("dinov3", "DINOv3ViTModel", given(pixel_values=real(2, 3, 32, 32)), source="modeling_dinov3_vit",
        num_register_tokens=2, use_gated_mlp=True, drop_path_rate=0.2, pos_embed_shift=0.1, pos_embed_jitter=1.1,
        **PLAIN),
    hf("hiera", "HieraForImageClassification", _pictures, num_labels=3, embed_dim=16, image_size=[32, 32],
        patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], depths=[1, 2], num_heads=[1, 2], num_query_pool=1,
        masked_unit_size=[4, 4], masked_unit_attention=[True, False], drop_path_rate=0.1),
    hf("mobilevit", "MobileViTForImageClassification", _large, num_labels=3, image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 12, 16, 16, 24, 32], num_attention_heads=2, expand_ratio=2.0, output_stride=16),
    hf("levit", "LevitForImageClassificationWithTeacher", given(pixel_values=real(2, 3, 64, 64)), num_labels=3,
        image_size=64, hidden_sizes=[32, 32, 48], num_attention_heads=[2, 2, 3], depths=[1, 1, 1], key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], drop_path_rate=0,
        tolerance=2e-12),  # batch norm over a few positions amplifies rounding errors, also without branches
    hf("pvt", "PvtForImageClassification", _pictures, num_labels=3, image_size=32, num_encoder_blocks=3,
        depths=[1, 1, 1], sequence_reduction_ratios=[4, 2, 1], hidden_sizes=[16, 24, 32], patch_sizes=[4, 2, 2],
        strides=[4, 2, 2], num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], drop_path_rate=0.1, **DROPPED),
    hf("cvt", "CvtForImageClassification", _pictures, num_labels=3, embed_dim=[8, 16, 24], num_heads=[1, 2, 3],
        depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.1], mlp_ratio=[2.0, 2.0, 2.0],
        unused={"*.stages.2.layers.2.*.convolution_projection_query.*":
            "the head reads the class token only, not convolved"}),
    hf("videomae", "VideoMAEForVideoClassification", _clips, num_labels=3, num_frames=4, **PLAIN, **DROPPED),
    hf("timesformer", "TimesformerForVideoClassification", _clips, num_labels=3, num_frames=4, **PLAIN, **DROPPED),
    hf("vivit", "VivitForVideoClassification", _clips, num_labels=3, num_frames=4, tubelet_size=[2, 8, 8],
        **{key: value for key, value in (PLAIN | DROPPED).items() if key != "patch_size"}),
)
# Backbones. `out_features` and `out_indices` name the stages or layers whose feature maps they return.
_RESNET: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
_SWIN: dict[str, Any] = {"model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8,
    "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DINOV2: dict[str, Any] = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "mlp_ratio": 2, "image_size": 32, "patch_size": 8, "reshape_hidden_states": False, "out_indices": [1, 2, 3, 4]}

_DETR: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 6,
    "num_labels": 3}
_found = given({"labels": boxes(2)}, pixel_values=real(2, 3, 64, 64))
_drawn = given({"labels": whole(3, 2, 32, 32)}, pixel_values=real(2, 3, 32, 32))

_seen = given(pixel_values=real(2, 3, 64, 64))
_neck: dict[str, Any] = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 16}

_ZERO_QUERIES = {"*decoder.layers.0.self_attn.v_proj.weight": "the first layer's queries are zero",
    "*decoder.layers.0.self_attn.[qk]_proj.weight": "the first layer's values are equal: no weighing moves the mean"}

DENSE: tuple[Entry, ...] = (
    # DETR and YOLOS get no labels: their losses have class weights in fp32, so eager torch raises in fp64.
    hf("detr", "DetrForObjectDetection", _seen, backbone_config=_RESNET, auxiliary_loss=True, **_DETR,
        unused=_ZERO_QUERIES),
    hf("yolos", "YolosForObjectDetection", given(pixel_values=real(2, 3, 32, 32)), num_labels=3, num_detection_tokens=5,
        **PLAIN | {"image_size": [32, 32]}, **DROPPED),
    hf("deformable_detr", "DeformableDetrForObjectDetection", _found, backbone_config=_RESNET, num_feature_levels=3,
        encoder_n_points=2, decoder_n_points=2, with_box_refine=True, auxiliary_loss=True, **_DETR),
    hf("segformer", "SegformerForSemanticSegmentation", _drawn, num_labels=3, num_encoder_blocks=3, depths=[1, 1, 1],
        sr_ratios=[4, 2, 1], hidden_sizes=[16, 24, 32], patch_sizes=[7, 3, 3], strides=[4, 2, 2],
        num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], decoder_hidden_size=24),
    hf("dpt", "DPTForSemanticSegmentation", _drawn, num_labels=3, backbone_out_indices=[0, 1, 2, 3],
        use_batch_norm_in_fusion_residual=True, **PLAIN | {"num_hidden_layers": 4}, **DROPPED, **_neck),
    hf("depth_anything", "DepthAnythingForDepthEstimation", given(pixel_values=real(2, 3, 32, 32)),
        backbone_config=_DINOV2, patch_size=8, reassemble_hidden_size=32, head_hidden_size=8, **_neck),
    hf("maskformer", "MaskFormerForInstanceSegmentation", _seen, backbone_config=_SWIN,
        decoder_config={"model_type": "detr"} | _DETR, fpn_feature_size=32, mask_feature_size=32, num_labels=3,
        unused=_ZERO_QUERIES),
    hf("sam", "SamModel", given(pixel_values=real(1, 3, 32, 32), input_points=real(1, 2, 3, 2, scale=8.0),
        input_labels=whole(2, 1, 2, 3)), vision_config=dict(PLAIN, output_channels=16, global_attn_indexes=[1],
        window_size=3, num_pos_feats=8, mlp_dim=48),
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        unused={"mask_decoder.output_hypernetworks_mlps.0.*":
            "where several masks are asked for, the first is cut off"}),
)
# fmt: on
