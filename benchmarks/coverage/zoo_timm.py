"""Architectures of timm, at least one for each file in timm/models, with arguments that make them small.

An entry has a registered name, or the name of a class if the registered function does not accept such arguments.
"""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import BlurPool2d, ConvNormAct, GatedMlp, GroupNormAct, StdConv2dSame
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg
from timm.models.cspnet import CspModelCfg, CspStagesCfg, CspStemCfg
from timm.models.fastvit import RepConditionalPosEnc
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, SepConv
from timm.models.mlp_mixer import Affine, ResBlock, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVitCfg
from timm.models.pnasnet import Cell, CellStem0, PNASNet5Large
from timm.models.resnetv2 import ResNetV2
from timm.models.selecsls import SelecSlsBlock
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_hybrid import HybridEmbed
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from benchmarks.coverage.entry import Entry, images
from tests.kit.compare import Call


class Passed(nn.Module):
    """Replaces a repeated block, and returns the input at `position`, which has the shape of the block's output."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[self.position]


def net(name: str, size: int, *, label: str = "", passed: tuple[str, ...] = (), **kwargs: Any) -> Entry:
    """Return the entry of a registered name, or of a class as `file.Class`, for images of `size` times `size` pixels.

    Args:
        label: name of the entry, if a class has several entries.
        passed: paths of repeated blocks to replace, if no argument of the model sets its depth.
    """
    file, _, cls = name.rpartition(".")
    source = file or timm.models.model_entrypoint(name).__module__.rpartition(".")[2]

    def build() -> nn.Module:
        arguments = {"num_classes": 5, **copy.deepcopy(kwargs)}  # the builder of EfficientNets modifies its arguments
        model: nn.Module
        if file:
            model = getattr(importlib.import_module(f"timm.models.{file}"), cls)(**arguments)  # noqa: TID251
        else:
            model = timm.create_model(name, pretrained=False, **arguments)
        for block in passed:
            model.set_submodule(block, Passed(0))
        return model

    return Entry(label or cls or name, source, build, images(2, 3, size, size))


# ---- convolutional networks

_HR = {"num_modules": 1, "block_type": "BASIC", "fuse_method": "SUM"}
# fmt: off
_HRNET = {"stem_width": 8,
    "stage1": dict(_HR, num_branches=1, block_type="BOTTLENECK", num_blocks=(1,), num_channels=(4,)),
    "stage2": dict(_HR, num_branches=2, num_blocks=(1, 1), num_channels=(4, 8)),
    "stage3": dict(_HR, num_branches=3, num_blocks=(1, 1, 1), num_channels=(4, 8, 8)),
    "stage4": dict(_HR, num_branches=4, num_blocks=(1, 1, 1, 1), num_channels=(4, 8, 8, 8))}
_VOV = {"stem_chs": (8, 8, 8), "stage_conv_chs": (8, 8, 8, 8), "stage_out_chs": (8, 8, 16, 16), "layer_per_block": 2,
    "block_per_stage": (1, 1, 1, 1), "residual": True, "depthwise": True, "attn": "ese"}
_HG = {"stem_type": "v2", "stem_chs": (8, 8), "stage1": (8, 8, 8, 1, False, False, 3, 2),
    "stage2": (8, 8, 16, 1, True, False, 3, 2), "stage3": (16, 8, 16, 1, True, True, 5, 2),
    "stage4": (16, 8, 16, 1, True, True, 5, 2)}
_CSP = CspModelCfg(stem=CspStemCfg(out_chs=(8, 8), kernel_size=3, stride=2, pool=""), stages=CspStagesCfg(out_chs=(8,
    16, 16), depth=(1, 1, 1), stride=2, bottle_ratio=0.5, block_ratio=(0.5, 0.5, 1.0), stage_type=("csp", "cs3",
    "dark"), block_type=("bottle", "dark", "edge"), attn_layer=("", "se", "eca")), act_layer="silu")
_SELEC = {"block": SelecSlsBlock,
    "features": [(32, 0, 8, 8, True, 2), (8, 8, 8, 16, False, 1), (16, 0, 8, 8, True, 2), (8, 8, 8, 16, False, 1)],
    "head": [(16, 24, 3, 2), (24, 16, 1, 1)], "num_features": 16, "feature_info": []}
_MOBILE = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e2_c12_se0.25"], ["ir_r1_k5_s2_e3_c16_nre"]])
_MOBILE_5 = decode_arch_def([["er_r1_k3_s2_e2_c16"], ["uir_r1_a3_k5_s2_e2_c16"],
    ["mqa_r1_k3_h2_s2_d8_c16", "uir_r1_a0_k0_s1_e2_c16"], ["uir_r1_a0_k3_s2_e2_c24"]])
_GHOSTS = [[[3, 8, 8, 0, 1]], [[3, 16, 12, 0.25, 2]], [[5, 24, 16, 0.25, 2]], [[5, 24, 16, 0, 1]]]
# fmt: on


def _pnasnet() -> nn.Module:
    """Return PNASNet with narrow cells and without repeated ones. The class has no arguments for this."""
    model = PNASNet5Large(device="meta")
    model.conv_0 = ConvNormAct(3, 8, 3, stride=2, padding=0, apply_act=False)
    model.cell_stem_0 = CellStem0(in_chs_left=8, out_chs_left=2, in_chs_right=8, out_chs_right=2)
    down, match = {"is_reduction": True}, {"match_prev_layer_dims": True}
    for name, in_left, in_right, width, options in (
        ("stem_1", 8, 10, 4, down | match),
        ("0", 10, 20, 4, match),
        ("4", 20, 20, 8, down),
        ("5", 20, 40, 8, match),
        ("8", 40, 40, 8, down),
    ):
        cell = Cell(in_chs_left=in_left, out_chs_left=width, in_chs_right=in_right, out_chs_right=width, **options)
        setattr(model, f"cell_{name}", cell)
    for number in (1, 2, 3, 6, 7, 9, 10, 11):
        setattr(model, f"cell_{number}", Passed(1))
    model.num_features = 40
    model.reset_classifier(5)
    model.last_linear.to_empty(device="cpu").reset_parameters()
    return model


# fmt: off
CONVOLUTIONAL: tuple[Entry, ...] = (
    net("resnet18", 64, layers=(1, 1, 1, 1), channels=(8, 12, 16, 24), drop_rate=0.1, drop_block_rate=0.1),
    net("convnext_atto", 64, dims=(8, 12, 16, 24), depths=(1, 1, 2, 1), drop_path_rate=0.3),
    net("densenet121", 64, growth_rate=4, block_config=(2, 2, 2)),
    net("convmixer.ConvMixer", 32, dim=16, depth=2, kernel_size=3),
    net("vgg.VGG", 32, cfg=(8, "M", 12, "M", 16, "M"), mlp_ratio=0.01),
    net("dm_nfnet_f0", 64, channels=(16, 16, 32, 32), depths=(1, 1, 1, 1), stem_chs=16, num_features=32, group_size=8,
        drop_path_rate=0.3),
    net("regnety_002", 64, w0=16, wa=20.0, wm=1.5, group_size=4, depth=5, stem_width=16),
    net("efficientnet.EfficientNet", 64, block_args=_MOBILE, num_features=24, stem_size=8),
    net("mobilenetv3.MobileNetV3", 64, block_args=_MOBILE, num_features=24, stem_size=16),
    net("hardcorenas_a", 64),
    net("hrnet.HighResolutionNet", 64, cfg=_HRNET),
    net("vovnet.VovNet", 64, cfg=_VOV),
    net("hgnet.HighPerfGpuNet", 64, cfg=_HG, head_hidden_size=16),
    net("ghostnet.GhostNet", 64, cfgs=_GHOSTS, version="v2", width=0.5, drop_rate=0.0),
    net("repghost.RepGhostNet", 64, cfgs=_GHOSTS, drop_rate=0.0),
    net("dpn68", 64, k_r=8, groups=2, k_sec=(1, 1, 1, 1), inc_sec=(4, 4, 4, 4)),
    net("dla46x_c", 64, levels=(1, 1, 1, 1, 2, 1), channels=(8, 8, 8, 16, 16, 16), cardinality=2, base_width=16),
    net("rexnet_100", 64, width_mult=0.25, depth_mult=0.5, drop_rate=0.0),
    net("selecsls.SelecSls", 64, cfg=_SELEC),
    net("skresnet18", 64, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)),
    net("resnest14d", 64, channels=(8, 8, 16, 16), stem_width=8, base_width=16),
    net("res2net50_26w_4s", 64, layers=(2, 1, 1, 1), channels=(8, 8, 16, 16), base_width=32),
    net("legacy_seresnet18", 64, layers=(1, 1, 1, 1), inplanes=16, drop_rate=0.0),
    net("resnetv2_50", 64, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=8),
    net("tresnet_m", 64, layers=(1, 1, 1, 1), width_factor=0.25),
    net("repvgg_a0", 64, blocks=(ByoBlockCfg(type="rep", d=2, c=8), ByoBlockCfg(type="rep", d=1, c=16)), stem_chs=8),
    net("botnet26t_256", 64, img_size=64, stem_chs=8,
        blocks=(ByoBlockCfg("bottle", d=1, c=16, br=0.5), ByoBlockCfg("self_attn", d=1, c=32, br=0.5))),
    net("mobilevit_xxs", 64, stem_chs=8, num_features=16, blocks=(ByoBlockCfg("bottle", d=1, c=8, s=2, gs=1, br=2.0,
        block_kwargs={"bottle_in": True, "linear_out": True}), ByoBlockCfg("mobilevit", d=1, c=16, s=1,
        block_kwargs={"transformer_dim": 16, "transformer_depth": 1, "patch_size": 2, "num_heads": 2}))),
    net("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2)),
    net("repvit_m1", 64, embed_dim=(8, 16), depth=(1, 1)),
    net("inception_next_atto", 64, depths=(1, 1, 1, 1), dims=(16, 16, 24, 32)),
    net("mambaout_femto", 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    net("starnet_s050", 64, base_dim=8, depths=(1, 1, 1, 1), mlp_ratio=2),
    net("rdnet_tiny", 64, growth_rates=(8, 8, 8), num_blocks_list=(1, 1, 1), num_init_features=8,
        is_downsample_block=(None, True, True), block_type=("Block", "Block", "BlockESE")),
    net("fasternet_t0", 64, embed_dim=8, depths=(1, 1, 1, 1), feature_dim=32),
    net("lcnetv2_small", 64, scale=0.125, depths=(1, 1, 1, 1), head_hidden_size=32),
    net("cspnet.CspNet", 64, cfg=_CSP),
    net("cspnext_tiny", 64, channels=(16, 16, 32, 32), depths=(1, 1, 1, 1), widen_factor=1.0),
    net("mobilenetv5_base", 64, block_args=_MOBILE_5, stem_size=8, num_features=32, msfa_output_resolution=4),
    net("xception.Xception", 96, passed=tuple(f"block{i}" for i in range(5, 12))),
    net("xception_aligned.XceptionAligned", 64, block_cfg=[{"in_chs": 64, "out_chs": 16, "stride": 2}, {"in_chs": 16,
        "out_chs": 16, "stride": 1}, {"in_chs": 16, "out_chs": (16, 24, 24), "stride": 2, "no_skip": True,
        "start_with_relu": False}]),
    net("nasnetalarge", 96, stem_size=12, num_features=192,
        passed=tuple(f"cell_{i}" for i in (2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17))),
    Entry("pnasnet", "pnasnet", _pnasnet, images(2, 3, 64, 64)),
    net("inception_v3", 107, passed=("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")),
    net("inception_v4", 107, passed=tuple(f"features.{i}" for i in (7, 8, 9, 12, 13, 14, 15, 16, 17, 20, 21))),
    net("inception_resnet_v2", 107, passed=(*(f"repeat.{i}" for i in range(1, 10)),
        *(f"repeat_1.{i}" for i in range(1, 20)), *(f"repeat_2.{i}" for i in range(1, 9)))),
    net("vitamin_small_224", 64, img_size=64, embed_dim=24, depth=2, num_heads=2, embed_cfg=VitCfg(embed_dim=(8, 16,
        24), depths=(1, 1, 1), stem_width=8, conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d")),
)


# ---- further models of the same files that compute something differently

_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
_MIXER: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "num_blocks": 2}
_RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
_GHOST = [[[3, 8, 8, 0, 1], [3, 16, 12, 0.25, 2], [5, 24, 12, 0, 2]]]
# fmt: on


def _blocks(*kinds: str, **options: Any) -> tuple[ByoBlockCfg, ...]:
    return tuple(ByoBlockCfg(kind, **{"d": 1, "c": 16, "s": 1, "br": 0.5, **options}) for kind in kinds)


def _args(*stages: str) -> Any:
    return decode_arch_def([[stage] for stage in stages])


def _patches(training: bool) -> Call:
    """Return a call with the patches of two images of different sizes. The second one is padded."""
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, -1, -1).clone()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    return (torch.randn(2, 6, 192, dtype=torch.float64),), {"patch_coord": coordinates, "patch_valid": valid}


# fmt: off
VARIANTS: tuple[Entry, ...] = (
    # Transformers: blocks, pools, position encodings.
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
    net("twins_svt_small", 32, img_size=32, embed_dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2),
        sr_ratios=(2, 1), wss=(4, 2)),
    net("coat_tiny", 64, img_size=64, embed_dims=(8, 8, 8, 8), serial_depths=(1, 1, 1, 1), mlp_ratios=(2,) * 4,
        parallel_depth=1, num_heads=2, crpe_window={3: 1, 5: 1}),
    net("coatnet_nano_rw_224", 64, img_size=64, embed_dim=(8, 16), depths=(1, 1), block_type=("C", "T"), stem_width=8,
        transformer_dim_head=4),
    net("metaformer.MetaFormer", 64, label="caformer", depths=(1, 1), dims=(16, 32), token_mixers=(SepConv, Attention),
        norm_layers=(LayerNorm2dNoBias, LayerNormNoBias)),
    net("levit_256d", 64, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
    net("tnt_s_legacy_patch16_224", 32, img_size=32, embed_dim=16, inner_dim=8, depth=1, num_heads_inner=2,
        num_heads_outer=2),
    Entry("naflexvit_patches", "naflexvit",
        net("naflexvit_base_patch16_map", 32, embed_dim=16, depth=2, num_heads=2, patch_size=8).build, _patches),
    # Mixers.
    net("mlp_mixer.MlpMixer", 32, label="gmlp", **_MIXER, mlp_ratio=6, block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp),
    net("mlp_mixer.MlpMixer", 32, label="resmlp", **_MIXER, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine),
    # Efficient nets: routed experts, mixed kernels, "same" padding, universal blocks.
    net("efficientnet.EfficientNet", 64, label="condconv",
        block_args=_args("ds_r1_k3_s1_e1_c8_cc3", "ir_r2_k3_s2_e2_c16_cc4"), num_features=24, stem_size=8),
    net("efficientnet.EfficientNet", 64, label="mixnet",
        block_args=_args("ds_r1_k3_s1_e1_c8", "ir_r1_k3.5_a1.1_p1.1_s2_e2_c16_se0.5"), num_features=24, stem_size=8,
        pad_type="same"),
    net("efficientnet.EfficientNet", 64, label="universal",
        block_args=_args("cn_r1_k3_s1_c8", "er_r1_k3_s2_e2_c16", "uir_r1_a3_k5_s2_e2_c16"), num_features=24,
        stem_size=8),
    net("efficientnet.EfficientNet", 64, label="groupnorm", block_args=_args("ds_r1_k3_s1_e1_c8", "ir_r1_k3_s2_e2_c16"),
        num_features=24, stem_size=8, norm_layer=partial(GroupNormAct, num_groups=4), drop_path_rate=0.3),
    # Residual nets: channel and spatial attention, blur pools, standardized weights.
    net("ecaresnet50d", 64, **_RESNET, stem_width=8, aa_layer=BlurPool2d, drop_block_rate=0.1),
    net("resnetv2.ResNetV2", 64, label="resnetv2_bit", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=8,
        norm_layer=partial(GroupNormAct, num_groups=4)),
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
    net("halonet26t", 64, stem_chs=8, blocks=_blocks("bottle", "self_attn"),
        self_attn_kwargs={"block_size": 4, "halo_size": 1}),
    net("lambda_resnet26t", 64, stem_chs=8, blocks=_blocks("bottle", "self_attn"),
        self_attn_kwargs={"r": 3, "dim_head": 4}),
    net("mobilevitv2_050", 64, stem_chs=8, blocks=_blocks("bottle", "mobilevit2", block_kwargs={}), num_features=16),
    net("regnetz_005", 64, w0=16, wa=20.0, wm=1.5, group_size=4, depth=5, stem_width=16, num_features=16),
    net("efficientvim_m1_dist", 128, embed_dim=(8, 12, 16), depths=(1, 1, 1), state_dim=(9, 4, 4)),
    net("efficientvit_mit.EfficientVitLarge", 64, widths=(8, 8, 8, 8, 16), depths=(1, 1, 1, 1, 1), head_dim=4,
        head_widths=(16, 16)),
    net("fastvit_sa12", 64, layers=(1, 1), embed_dims=(16, 32), mlp_ratios=(2, 2),
        token_mixers=("repmixer", "attention"), pos_embs=(None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
        downsamples=(False, True), se_downsamples=(False, False)),
    net("ghostnet.GhostNet", 64, label="ghostnetv3", cfgs=_GHOST, version="v3", drop_rate=0.0),
    net("resnet18", 64, label="resnet_features", **_RESNET, features_only=True),
    net("vit_tiny_patch16_224", 32, label="vit_features", **_VIT, features_only=True, out_indices=(0, 1)),
    net("swin_tiny_patch4_window7_224", 32, label="swin_features", img_size=32, embed_dim=8, depths=(1, 1),
        num_heads=(2, 2), window_size=4, features_only=True),
)
# fmt: on


# ---- transformers and mixers


def _hybrid() -> nn.Module:
    """Return a narrow ViT on the feature map of a ResNet with standardized weights. Registered names fix the widths."""
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


# fmt: off
TRANSFORMERS: tuple[Entry, ...] = (
    net("vit_tiny_patch16_224", 64, img_size=64, embed_dim=24, depth=2, num_heads=2, drop_rate=0.1,
        patch_drop_rate=0.25, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.3, qk_norm=True, reg_tokens=1),
    net("swin_tiny_patch4_window7_224", 32, img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 2), window_size=4),
    net("swinv2_tiny_window8_256", 32, img_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 2), window_size=4),
    net("swinv2_cr_tiny_224", 32, img_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 2), window_size=4),
    net("mlp_mixer.MlpMixer", 32, img_size=32, embed_dim=16, num_blocks=2, drop_rate=0.1, proj_drop_rate=0.1,
        drop_path_rate=0.3),
    net("beit_base_patch16_224", 32, img_size=32, embed_dim=16, depth=2, num_heads=2),
    net("eva02_tiny_patch14_224", 28, img_size=28, embed_dim=24, depth=2, num_heads=2),
    net("cait_xxs24_224", 32, img_size=32, embed_dim=16, depth=2, num_heads=2, depth_token_only=1, attn_drop_rate=0.1,
        drop_path_rate=0.3),
    net("deit_tiny_distilled_patch16_224", 32, img_size=32, embed_dim=24, depth=2, num_heads=2),
    net("levit_128s", 64, img_size=64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
    net("convit_tiny", 32, img_size=32, embed_dim=16, depth=2, num_heads=2, local_up_to_layer=1),
    net("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1),
    net("pit_ti_224", 32, img_size=32, base_dims=(8, 8), depth=(1, 1), heads=(2, 2), patch_size=8, stride=4),
    net("metaformer.MetaFormer", 64, depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
    net("sequencer2d_s", 28, img_size=28, layers=(1, 1), patch_sizes=(7, 2), embed_dims=(12, 16), hidden_sizes=(4, 4),
        mlp_ratios=(2.0, 2.0)),
    net("visformer_tiny", 64, img_size=64, init_channels=8, embed_dim=16, depth=(1, 1, 1), num_heads=2, group=2),
    net("tnt_s_patch16_224", 32, img_size=32, embed_dim=16, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2),
    net("twins_pcpvt_small", 64, img_size=64, embed_dims=(8, 12), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2),
        sr_ratios=(4, 2)),
    net("crossvit_9_240", 240, embed_dim=(8, 16), depth=((1, 1, 0),), num_heads=(2, 2)),
    net("coat_lite_mini", 64, img_size=64, embed_dims=(8, 8, 16, 16), serial_depths=(1, 1, 1, 2), mlp_ratios=(2,) * 4),
    net("davit_tiny", 64, depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4),
    net("volo.VOLO", 32, layers=(1, 1), img_size=32, embed_dims=(8, 16), num_heads=(2, 2), stem_hidden_dim=8),
    net("maxvit_tiny_rw_224", 64, img_size=64, embed_dim=(8, 16), depths=(1, 1), block_type=("M", "M"), stem_width=8,
        transformer_dim_head=4),
    net("pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 2)),
    net("edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(2, 2, 2, 2)),
    net("efficientformer.EfficientFormer", 224, depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 16), num_vit=1),
    net("efficientformerv2_s0", 64, depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_vit=1, img_size=64),
    net("focalnet.FocalNet", 64, depths=(1, 1), embed_dim=8, focal_levels=(2, 2), focal_windows=(3, 3)),
    net("gcvit.GlobalContextVit", 64, img_size=64, depths=(2, 2), num_heads=(2, 2), embed_dim=8, window_ratio=(8, 8)),
    net("nest.Nest", 32, drop_path_rate=0.0, img_size=32, embed_dims=(8, 16), num_heads=(2, 2), depths=(1, 1),
        num_levels=2),
    net("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1), q_pool=2,
        mask_unit_size=(4, 4), mask_unit_attn=(True, False, False)),
    net("sam2_hiera_tiny", 64, embed_dim=8, stages=(1, 1, 2), global_att_blocks=(3,), window_spec=(8, 4, 4), q_pool=2,
        global_pos_size=(4, 4)),
    net("mvitv2.MultiScaleVit", 64, img_size=(64, 64),
        cfg=MultiScaleVitCfg(depths=(1, 1), embed_dim=(8, 16), num_heads=(1, 2), stride_q=((1, 1), (2, 2)))),
    net("tiny_vit_5m_224", 64, embed_dims=(8, 8, 16), depths=(1, 1, 1), num_heads=(1, 2, 2), window_sizes=(4, 4, 4)),
    net("swiftformer_xs", 64, layers=(1, 1), embed_dims=(8, 16), downsamples=(False, True)),
    net("shvit_s1", 128, embed_dim=(8, 12, 16), partial_dim=(4, 4, 4), depth=(1, 1, 1), qk_dim=(4, 4, 4)),
    net("efficientvit_mit.EfficientVit", 64, widths=(8, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=4,
        head_widths=(16, 16)),
    net("efficientvit_msra.EfficientVitMsra", 64, img_size=64, embed_dim=(8, 16), key_dim=(4, 4), depth=(1, 1),
        num_heads=(2, 2), window_size=(4, 4), kernels=(3, 3), down_ops=(("", 1), ("subsample", 2))),
    net("nextvit_small", 64, depths=(1, 1, 5, 1), stem_chs=(8, 8, 8)),
    net("naflexvit_base_patch16_gap", 32, embed_dim=16, depth=2, num_heads=2),
    net("csatv2", 64, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), transformer_depths=(0, 0, 0, 1)),
    Entry("vit_hybrid", "vision_transformer_hybrid", _hybrid, images(2, 3, 64, 64)),
    net("test_vit_relpos", 32, img_size=32, embed_dim=16, depth=2, num_heads=2),
    net("samvit_base_patch16_224", 64, img_size=64, embed_dim=16, depth=2, num_heads=2, window_size=2,
        global_attn_indexes=(1,)),
    net("qwen3_vit_88m", 64, img_size=64, embed_dim=16, depth=2, num_heads=2, pos_embed_grid_size=4),
    net("gemma4_vit_167m", 48, img_size=48, embed_dim=16, depth=2, num_heads=2, head_dim=8, intermediate_size=24,
        position_embedding_size=16),
    net("deepseek_vit_412m", 42, img_size=42, embed_dim=16, depth=2, num_heads=2),
    net("iformer_t", 64, dims=(8, 8, 16, 16), depths=(1, 1, 3, 3), attn_groups=(0, 0, 1, 1)),
    net("lowformer_b0", 64, width_list=(8, 8, 8, 16, 16), depth_list=(0, 1, 1, 1, 1), head_widths=(16, 16)),
    net("cpubone_nano", 64, width_list=(8, 8, 8, 16, 16), depth_list=(0, 1, 1, 1, 1), head_widths=(16, 16)),
    net("efficientvim_m1", 128, embed_dim=(8, 12, 16), depths=(1, 1, 1), state_dim=(9, 4, 4)),
)

TIMM: tuple[Entry, ...] = TRANSFORMERS + CONVOLUTIONAL + VARIANTS
# fmt: on
