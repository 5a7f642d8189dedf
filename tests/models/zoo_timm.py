"""Architectures of timm, one for each file of timm/models, small by their own arguments: transformers and mixers."""

from __future__ import annotations

from functools import partial

from timm.layers import GroupNormAct, StdConv2dSame
from timm.models.mvitv2 import MultiScaleVitCfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from tests.models.entry import Entry, images
from tests.models.zoo_timm_2 import CONVOLUTIONAL
from tests.models.zoo_timm_3 import VARIANTS
from tests.models.zoo_timm_build import net


def _hybrid() -> nn.Module:
    """Return a ViT on the feature map of a ResNet with standardized weights; each registered name fixes the widths."""
    backbone = ResNetV2(
        layers=(1, 1),
        channels=(16, 32),
        stem_chs=8,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=StdConv2dSame,
        norm_layer=partial(GroupNormAct, num_groups=4),
    )
    return VisionTransformer(
        img_size=64,
        patch_size=1,
        num_classes=5,
        embed_dim=16,
        depth=1,
        num_heads=2,
        embed_layer=partial(HybridEmbed, backbone=backbone),
    )


TRANSFORMERS: tuple[Entry, ...] = (
    net(
        "vit_tiny_patch16_224",
        64,
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=2,
        drop_rate=0.1,
        patch_drop_rate=0.25,
        attn_drop_rate=0.1,
        proj_drop_rate=0.1,
        drop_path_rate=0.3,
        qk_norm=True,
        reg_tokens=1,
    ),
    net("swin_tiny_patch4_window7_224", 32, img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4),
    net("swinv2_tiny_window8_256", 32, img_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 2), window_size=4),
    net("swinv2_cr_tiny_224", 32, img_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 2), window_size=4),
    net(
        "mlp_mixer.MlpMixer",
        32,
        img_size=32,
        embed_dim=16,
        num_blocks=2,
        drop_rate=0.1,
        proj_drop_rate=0.1,
        drop_path_rate=0.3,
    ),
    net("beit_base_patch16_224", 32, img_size=32, embed_dim=16, depth=2, num_heads=2),
    net("eva02_tiny_patch14_224", 28, img_size=28, embed_dim=24, depth=2, num_heads=2),
    net(
        "cait_xxs24_224",
        32,
        img_size=32,
        embed_dim=16,
        depth=2,
        num_heads=2,
        depth_token_only=1,
        attn_drop_rate=0.1,
        drop_path_rate=0.3,
    ),
    net("deit_tiny_distilled_patch16_224", 32, img_size=32, embed_dim=24, depth=2, num_heads=2),
    net("levit_128s", 64, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
    net("convit_tiny", 32, img_size=32, embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1),
    net("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1),
    net("pit_ti_224", 32, img_size=32, base_dims=(8, 8), depth=(1, 1), heads=(2, 2), patch_size=8, stride=4),
    net("metaformer.MetaFormer", 64, depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
    net(
        "sequencer2d_s",
        28,
        img_size=28,
        layers=(1, 1),
        patch_sizes=(7, 2),
        embed_dims=(12, 16),
        hidden_sizes=(4, 4),
        mlp_ratios=(2.0, 2.0),
    ),
    net("visformer_tiny", 64, img_size=64, init_channels=8, embed_dim=16, depth=(1, 1, 1), num_heads=2, group=2),
    net("tnt_s_patch16_224", 32, img_size=32, embed_dim=16, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2),
    net(
        "twins_pcpvt_small",
        64,
        img_size=64,
        embed_dims=(8, 12),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        depths=(2, 2),
        sr_ratios=(4, 2),
    ),
    net("crossvit_9_240", 240, embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2)),
    net("coat_lite_mini", 64, img_size=64, embed_dims=(8, 8, 16, 16), serial_depths=(1, 1, 1, 2), mlp_ratios=(2,) * 4),
    net("davit_tiny", 64, depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4),
    net("volo.VOLO", 32, layers=(1, 1), img_size=32, embed_dims=(8, 16), num_heads=(2, 2), stem_hidden_dim=8),
    net(
        "maxvit_tiny_rw_224",
        64,
        img_size=64,
        embed_dim=(8, 16),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8,
        transformer_dim_head=4,
    ),
    net("pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 2)),
    net("edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(2, 2, 2, 2)),
    net("efficientformer.EfficientFormer", 224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 16), num_vit=1),
    net("efficientformerv2_s0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_vit=1, img_size=64),
    net("focalnet.FocalNet", 64, depths=(1, 1), embed_dim=8, focal_levels=(2, 2), focal_windows=(3, 3)),
    net("gcvit.GlobalContextVit", 64, img_size=64, depths=(2, 2), num_heads=(2, 2), embed_dim=8, window_ratio=(8, 8)),
    net(
        "nest.Nest",
        32,
        drop_path_rate=0.0,
        img_size=32,
        embed_dims=(8, 16),
        num_heads=(2, 2),
        depths=(1, 1),
        num_levels=2,
    ),
    net(
        "hiera_tiny_224",
        64,
        img_size=(64, 64),
        embed_dim=8,
        num_heads=1,
        stages=(1, 1, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, False, False),
    ),
    net(
        "sam2_hiera_tiny",
        64,
        embed_dim=8,
        stages=(1, 1, 2),
        global_att_blocks=(3,),
        window_spec=(8, 4, 4),
        q_pool=2,
        global_pos_size=(4, 4),
    ),
    net(
        "mvitv2.MultiScaleVit",
        64,
        img_size=(64, 64),
        cfg=MultiScaleVitCfg(depths=(1, 1), embed_dim=(8, 16), num_heads=(1, 2), stride_q=((1, 1), (2, 2))),
    ),
    net("tiny_vit_5m_224", 64, embed_dims=(8, 8, 16), depths=(1, 1, 1), num_heads=(1, 2, 2), window_sizes=(4, 4, 4)),
    net("swiftformer_xs", 64, layers=(1, 1), embed_dims=(8, 16), downsamples=(False, True)),
    net("shvit_s1", 128, embed_dim=(8, 12, 16), partial_dim=(4, 4, 4), depth=(1, 1, 1), qk_dim=(4, 4, 4)),
    net(
        "efficientvit_mit.EfficientVit", 64, widths=(8, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=4, head_widths=(16, 16)
    ),
    net(
        "efficientvit_msra.EfficientVitMsra",
        64,
        img_size=64,
        embed_dim=(8, 16),
        key_dim=(4, 4),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=(4, 4),
        kernels=(3, 3),
        down_ops=(("", 1), ("subsample", 2)),
    ),
    net("nextvit_small", 64, depths=(1, 1, 5, 1), stem_chs=(8, 8, 8)),
    net("naflexvit_base_patch16_gap", 32, embed_dim=16, depth=2, num_heads=2),
    net("csatv2", 64, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), transformer_depths=(0, 0, 0, 1)),
    Entry("vit_hybrid", "vision_transformer_hybrid", _hybrid, images(2, 3, 64, 64)),
    net("test_vit_relpos", 32, img_size=32, embed_dim=16, depth=2, num_heads=2),
    net(
        "samvit_base_patch16_224",
        64,
        img_size=64,
        embed_dim=16,
        depth=2,
        num_heads=2,
        window_size=2,
        global_attn_indexes=(1,),
    ),
    net("qwen3_vit_88m", 64, img_size=64, embed_dim=16, depth=2, num_heads=2, pos_embed_grid_size=4),
    net(
        "gemma4_vit_167m",
        48,
        img_size=48,
        embed_dim=16,
        depth=2,
        num_heads=2,
        head_dim=8,
        intermediate_size=24,
        position_embedding_size=16,
    ),
    net("deepseek_vit_412m", 42, img_size=42, embed_dim=16, depth=2, num_heads=2),
    net("iformer_t", 64, dims=(8, 8, 16, 16), depths=(1, 1, 3, 3), attn_groups=(0, 0, 1, 1)),
    net("lowformer_b0", 64, width_list=(8, 8, 8, 16, 16), depth_list=(0, 1, 1, 1, 1), head_widths=(16, 16)),
    net("cpubone_nano", 64, width_list=(8, 8, 8, 16, 16), depth_list=(0, 1, 1, 1, 1), head_widths=(16, 16)),
    net("efficientvim_m1", 128, embed_dim=(8, 12, 16), depths=(1, 1, 1), state_dim=(9, 4, 4)),
)

TIMM: tuple[Entry, ...] = TRANSFORMERS + CONVOLUTIONAL + VARIANTS
