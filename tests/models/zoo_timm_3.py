"""Architectures of timm: further members of files that the zoo has already, for what they compute in another way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import BlurPool2d, GatedMlp, GroupNormAct
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg
from timm.models.fastvit import RepConditionalPosEnc
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, SepConv
from timm.models.mlp_mixer import Affine, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock

from tests.models.entry import Call, Entry
from tests.models.zoo_timm_build import net

_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
_MIXER: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "num_blocks": 2}
_RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
_GHOST = [[[3, 8, 8, 0, 1], [3, 16, 12, 0.25, 2], [5, 24, 12, 0, 2]]]


def _blocks(*kinds: str, **options: Any) -> tuple[ByoBlockCfg, ...]:
    return tuple(ByoBlockCfg(kind, **{"d": 1, "c": 16, "s": 1, "br": 0.5, **options}) for kind in kinds)


def _args(*stages: str) -> Any:
    return decode_arch_def([[stage] for stage in stages])


def _patches(training: bool) -> Call:
    """Patches of two images of other sizes, the second one padded."""
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, -1, -1).clone()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    return (torch.randn(2, 6, 192, dtype=torch.float64),), {"patch_coord": coordinates, "patch_valid": valid}


VARIANTS: tuple[Entry, ...] = (
    # Transformers: blocks, pools, position codes.
    net("vit_base_patch16_siglip_224", 32, **_VIT),
    net("vit_small_patch16_dinov3", 32, **_VIT),
    net("vit_base_patch16_rope_224", 32, **_VIT),
    net("eva02_base_patch16_clip_224", 32, **_VIT),
    net("eva.Eva", 32, label="eva_postnorm", **_VIT, use_post_norm=True, qkv_fused=False, swiglu_mlp=True),
    net("beitv2_base_patch16_224", 32, **_VIT, use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
    net("vision_transformer.VisionTransformer", 32, label="vit_scaling", **_VIT, block_fn=ParallelScalingBlock),
    net("vision_transformer.VisionTransformer", 32, label="vit_things", **_VIT, block_fn=ParallelThingsBlock),
    net("vision_transformer.VisionTransformer", 32, label="vit_diff", **_VIT, block_fn=DiffParallelScalingBlock),
    net("vit_relpos_base_patch16_rpn_224", 32, **_VIT),
    net("vit_srelpos_small_patch16_224", 32, **_VIT),
    net("deit3_small_patch16_224", 32, **_VIT, drop_path_rate=0.3),
    net(
        "twins_svt_small",
        32,
        img_size=32,
        embed_dims=(8, 16),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        depths=(2, 2),
        sr_ratios=(2, 1),
        wss=(4, 2),
    ),
    net(
        "coat_tiny",
        64,
        img_size=64,
        embed_dims=(8, 8, 8, 8),
        serial_depths=(1, 1, 1, 1),
        mlp_ratios=(2,) * 4,
        parallel_depth=1,
        num_heads=2,
        crpe_window={3: 1, 5: 1},
    ),
    net(
        "coatnet_nano_rw_224",
        64,
        img_size=64,
        embed_dim=(8, 16),
        depths=(1, 1),
        block_type=("C", "T"),
        stem_width=8,
        transformer_dim_head=4,
    ),
    net(
        "metaformer.MetaFormer",
        64,
        label="caformer",
        depths=(1, 1),
        dims=(16, 32),
        token_mixers=(SepConv, Attention),
        norm_layers=(LayerNorm2dNoBias, LayerNormNoBias),
    ),
    net("levit_256d", 64, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
    net(
        "tnt_s_legacy_patch16_224",
        32,
        img_size=32,
        embed_dim=16,
        inner_dim=8,
        depth=1,
        num_heads_inner=2,
        num_heads_outer=2,
    ),
    Entry(
        "naflexvit_patches",
        "naflexvit",
        net("naflexvit_base_patch16_map", 32, embed_dim=16, depth=2, num_heads=2, patch_size=8).build,
        _patches,
    ),
    # Mixers.
    net(
        "mlp_mixer.MlpMixer",
        32,
        label="gmlp",
        **_MIXER,
        mlp_ratio=6,
        block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp,
    ),
    net("mlp_mixer.MlpMixer", 32, label="resmlp", **_MIXER, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine),
    # Efficient nets: routed experts, mixed kernels, "same" padding, universal blocks.
    net(
        "efficientnet.EfficientNet",
        64,
        label="condconv",
        block_args=_args("ds_r1_k3_s1_e1_c8_cc3", "ir_r2_k3_s2_e2_c16_cc4"),
        num_features=24,
        stem_size=8,
    ),
    net(
        "efficientnet.EfficientNet",
        64,
        label="mixnet",
        block_args=_args("ds_r1_k3_s1_e1_c8", "ir_r1_k3.5_a1.1_p1.1_s2_e2_c16_se0.5"),
        num_features=24,
        stem_size=8,
        pad_type="same",
    ),
    net(
        "efficientnet.EfficientNet",
        64,
        label="universal",
        block_args=_args("cn_r1_k3_s1_c8", "er_r1_k3_s2_e2_c16", "uir_r1_a3_k5_s2_e2_c16"),
        num_features=24,
        stem_size=8,
    ),
    net(
        "efficientnet.EfficientNet",
        64,
        label="groupnorm",
        block_args=_args("ds_r1_k3_s1_e1_c8", "ir_r1_k3_s2_e2_c16"),
        num_features=24,
        stem_size=8,
        norm_layer=partial(GroupNormAct, num_groups=4),
        drop_path_rate=0.3,
    ),
    # Residual nets: attention of channels and space, blur pools, standardized weights.
    net("ecaresnet50d", 64, **_RESNET, stem_width=8, aa_layer=BlurPool2d, drop_block_rate=0.1),
    net(
        "resnetv2.ResNetV2",
        64,
        label="resnetv2_bit",
        layers=(1, 1, 1, 1),
        channels=(16, 16, 32, 32),
        stem_chs=8,
        norm_layer=partial(GroupNormAct, num_groups=4),
    ),
    net("seresnext26d_32x4d", 64, **_RESNET, stem_width=8, cardinality=2, base_width=32),
    net("resnet50", 64, label="cbam", **_RESNET, block_args={"attn_layer": "cbam"}),
    net("nf_ecaresnet26", 64, channels=(16, 16, 32, 32), depths=(1, 1, 1, 1), stem_chs=16),
    net("convnextv2_atto", 64, dims=(8, 12, 16, 24), depths=(1, 1, 1, 1)),
    net("skresnext50_32x4d", 64, **_RESNET, cardinality=2, base_width=32),
    net("legacy_seresnext26_32x4d", 64, layers=(1, 1, 1, 1), groups=4, inplanes=16, drop_rate=0.0),
    net("densenetblur121d", 64, growth_rate=4, block_config=(2, 2)),
    net("dla60_res2net", 64, levels=(1, 1, 1, 1, 1, 1), channels=(8, 8, 8, 16, 16, 16), base_width=32),
    net("mobileone_s0", 64, stem_chs=8, blocks=_blocks("one", "one", block_kwargs={"num_conv_branches": 2})),
    net("gcresnext26ts", 64, stem_chs=8, blocks=_blocks("bottle", "basic", "dark", "edge", c=32, br=1.0)),
    net("bat_resnext26ts", 64, stem_chs=8, blocks=_blocks("bottle", "bottle"), attn_kwargs={"block_size": 4}),
    net(
        "halonet26t",
        64,
        stem_chs=8,
        blocks=_blocks("bottle", "self_attn"),
        self_attn_kwargs={"block_size": 4, "halo_size": 1},
    ),
    net(
        "lambda_resnet26t",
        64,
        stem_chs=8,
        blocks=_blocks("bottle", "self_attn"),
        self_attn_kwargs={"r": 3, "dim_head": 4},
    ),
    net("mobilevitv2_050", 64, stem_chs=8, blocks=_blocks("bottle", "mobilevit2", block_kwargs={}), num_features=16),
    net("regnetz_005", 64, w0=16, wa=20.0, wm=1.5, group_size=4, depth=5, stem_width=16, num_features=16),
    net("efficientvim_m1_dist", 128, embed_dim=(8, 12, 16), depths=(1, 1, 1), state_dim=(9, 4, 4)),
    net(
        "efficientvit_mit.EfficientVitLarge",
        64,
        widths=(8, 8, 8, 8, 16),
        depths=(1, 1, 1, 1, 1),
        head_dim=4,
        head_widths=(16, 16),
    ),
    net(
        "fastvit_sa12",
        64,
        layers=(1, 1),
        embed_dims=(16, 32),
        mlp_ratios=(2, 2),
        token_mixers=("repmixer", "attention"),
        pos_embs=(None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
        downsamples=(False, True),
        se_downsamples=(False, False),
    ),
    net("ghostnet.GhostNet", 64, label="ghostnetv3", cfgs=_GHOST, version="v3", drop_rate=0.0),
    net("resnet18", 64, label="resnet_features", **_RESNET, features_only=True),
    net("vit_tiny_patch16_224", 32, label="vit_features", **_VIT, features_only=True, out_indices=(0, 1)),
    net(
        "swin_tiny_patch4_window7_224",
        32,
        label="swin_features",
        img_size=32,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        features_only=True,
    ),
)
