"""Architectures of timm, one for each file of timm/models, small by their own arguments: convolutional ones."""

from __future__ import annotations

from timm.layers import ConvNormAct
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg
from timm.models.cspnet import CspModelCfg, CspStagesCfg, CspStemCfg
from timm.models.pnasnet import Cell, CellStem0, PNASNet5Large
from timm.models.selecsls import SelecSlsBlock
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from tests.models.entry import Entry, images
from tests.models.zoo_timm_build import Passed, net

_HR = {"num_modules": 1, "block_type": "BASIC", "fuse_method": "SUM"}
_HRNET = {
    "stem_width": 8,
    "stage1": dict(_HR, num_branches=1, block_type="BOTTLENECK", num_blocks=(1,), num_channels=(4,)),
    "stage2": dict(_HR, num_branches=2, num_blocks=(1, 1), num_channels=(4, 8)),
    "stage3": dict(_HR, num_branches=3, num_blocks=(1, 1, 1), num_channels=(4, 8, 8)),
    "stage4": dict(_HR, num_branches=4, num_blocks=(1, 1, 1, 1), num_channels=(4, 8, 8, 8)),
}
_VOV = {
    "stem_chs": (8, 8, 8),
    "stage_conv_chs": (8, 8, 8, 8),
    "stage_out_chs": (8, 8, 16, 16),
    "layer_per_block": 2,
    "block_per_stage": (1, 1, 1, 1),
    "residual": True,
    "depthwise": True,
    "attn": "ese",
}
_HG = {
    "stem_type": "v2",
    "stem_chs": (8, 8),
    "stage1": (8, 8, 8, 1, False, False, 3, 2),
    "stage2": (8, 8, 16, 1, True, False, 3, 2),
    "stage3": (16, 8, 16, 1, True, True, 5, 2),
    "stage4": (16, 8, 16, 1, True, True, 5, 2),
}
_CSP = CspModelCfg(
    stem=CspStemCfg(out_chs=(8, 8), kernel_size=3, stride=2, pool=""),
    stages=CspStagesCfg(
        out_chs=(8, 16, 16),
        depth=(1, 1, 1),
        stride=2,
        bottle_ratio=0.5,
        block_ratio=(0.5, 0.5, 1.0),
        stage_type=("csp", "cs3", "dark"),
        block_type=("bottle", "dark", "edge"),
        attn_layer=("", "se", "eca"),
    ),
    act_layer="silu",
)
_SELEC = {
    "block": SelecSlsBlock,
    "features": [(32, 0, 8, 8, True, 2), (8, 8, 8, 16, False, 1), (16, 0, 8, 8, True, 2), (8, 8, 8, 16, False, 1)],
    "head": [(16, 24, 3, 2), (24, 16, 1, 1)],
    "num_features": 16,
    "feature_info": [],
}
_MOBILE = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e2_c12_se0.25"], ["ir_r1_k5_s2_e3_c16_nre"]])
_MOBILE_5 = decode_arch_def(
    [
        ["er_r1_k3_s2_e2_c16"],
        ["uir_r1_a3_k5_s2_e2_c16"],
        ["mqa_r1_k3_h2_s2_d8_c16", "uir_r1_a0_k0_s1_e2_c16"],
        ["uir_r1_a0_k3_s2_e2_c24"],
    ]
)
_GHOST = [[[3, 8, 8, 0, 1]], [[3, 16, 12, 0.25, 2]], [[5, 24, 16, 0.25, 2]], [[5, 24, 16, 0, 1]]]


def _pnasnet() -> nn.Module:
    """Return PNASNet with narrow cells and without those that repeat another one; the class has no knobs."""
    model = PNASNet5Large(device="meta")
    model.conv_0 = ConvNormAct(3, 8, 3, stride=2, padding=0, apply_act=False)
    model.cell_stem_0 = CellStem0(in_chs_left=8, out_chs_left=2, in_chs_right=8, out_chs_right=2)
    down, match = {"is_reduction": True}, {"match_prev_layer_dims": True}
    for name, left, right, width, options in (
        ("stem_1", 8, 10, 4, down | match),
        ("0", 10, 20, 4, match),
        ("4", 20, 20, 8, down),
        ("5", 20, 40, 8, match),
        ("8", 40, 40, 8, down),
    ):
        cell = Cell(in_chs_left=left, out_chs_left=width, in_chs_right=right, out_chs_right=width, **options)
        setattr(model, f"cell_{name}", cell)
    for number in (1, 2, 3, 6, 7, 9, 10, 11):
        setattr(model, f"cell_{number}", Passed(1))
    model.num_features = 40
    model.reset_classifier(5)
    model.last_linear.to_empty(device="cpu").reset_parameters()
    return model


CONVOLUTIONAL: tuple[Entry, ...] = (
    net("resnet18", 64, layers=(1, 1, 1, 1), channels=(8, 12, 16, 24), drop_rate=0.1, drop_block_rate=0.1),
    net("convnext_atto", 64, dims=(8, 12, 16, 24), depths=(1, 1, 2, 1), drop_path_rate=0.3),
    net("densenet121", 64, growth_rate=4, block_config=(2, 2, 2)),
    net("convmixer.ConvMixer", 32, dim=16, depth=2, kernel_size=3),
    net("vgg.VGG", 32, cfg=(8, "M", 12, "M", 16, "M"), mlp_ratio=0.01),
    net(
        "dm_nfnet_f0",
        64,
        channels=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        stem_chs=16,
        num_features=32,
        group_size=8,
        drop_path_rate=0.3,
    ),
    net("regnety_002", 64, w0=16, wa=20.0, wm=1.5, group_size=4, depth=5, stem_width=16),
    net("efficientnet.EfficientNet", 64, block_args=_MOBILE, num_features=24, stem_size=8),
    net("mobilenetv3.MobileNetV3", 64, block_args=_MOBILE, num_features=24, stem_size=16),
    net("hardcorenas_a", 64),
    net("hrnet.HighResolutionNet", 64, cfg=_HRNET),
    net("vovnet.VovNet", 64, cfg=_VOV),
    net("hgnet.HighPerfGpuNet", 64, cfg=_HG, head_hidden_size=16),
    net("ghostnet.GhostNet", 64, cfgs=_GHOST, version="v2", width=0.5, drop_rate=0.0),
    net("repghost.RepGhostNet", 64, cfgs=_GHOST, drop_rate=0.0),
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
    net(
        "botnet26t_256",
        64,
        img_size=64,
        stem_chs=8,
        blocks=(ByoBlockCfg("bottle", d=1, c=16, br=0.5), ByoBlockCfg("self_attn", d=1, c=32, br=0.5)),
    ),
    net(
        "mobilevit_xxs",
        64,
        stem_chs=8,
        num_features=16,
        blocks=(
            ByoBlockCfg("bottle", d=1, c=8, s=2, gs=1, br=2.0, block_kwargs={"bottle_in": True, "linear_out": True}),
            ByoBlockCfg(
                "mobilevit",
                d=1,
                c=16,
                s=1,
                block_kwargs={"transformer_dim": 16, "transformer_depth": 1, "patch_size": 2, "num_heads": 2},
            ),
        ),
    ),
    net("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2)),
    net("repvit_m1", 64, embed_dim=(8, 16), depth=(1, 1)),
    net("inception_next_atto", 64, depths=(1, 1, 1, 1), dims=(16, 16, 24, 32)),
    net("mambaout_femto", 64, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    net("starnet_s050", 64, base_dim=8, depths=(1, 1, 1, 1), mlp_ratio=2),
    net(
        "rdnet_tiny",
        64,
        growth_rates=(8, 8, 8),
        num_blocks_list=(1, 1, 1),
        num_init_features=8,
        is_downsample_block=(None, True, True),
        block_type=("Block", "Block", "BlockESE"),
    ),
    net("fasternet_t0", 64, embed_dim=8, depths=(1, 1, 1, 1), feature_dim=32),
    net("lcnetv2_small", 64, scale=0.125, depths=(1, 1, 1, 1), head_hidden_size=32),
    net("cspnet.CspNet", 64, cfg=_CSP),
    net("cspnext_tiny", 64, channels=(16, 16, 32, 32), depths=(1, 1, 1, 1), widen_factor=1.0),
    net("mobilenetv5_base", 64, block_args=_MOBILE_5, stem_size=8, num_features=32, msfa_output_resolution=4),
    net("xception.Xception", 96, passed=tuple(f"block{i}" for i in range(5, 12))),
    net(
        "xception_aligned.XceptionAligned",
        64,
        block_cfg=[
            {"in_chs": 64, "out_chs": 16, "stride": 2},
            {"in_chs": 16, "out_chs": 16, "stride": 1},
            {"in_chs": 16, "out_chs": (16, 24, 24), "stride": 2, "no_skip": True, "start_with_relu": False},
        ],
    ),
    net(
        "nasnetalarge",
        96,
        stem_size=12,
        num_features=192,
        position=0,
        passed=tuple(f"cell_{i}" for i in (2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17)),
    ),
    Entry("pnasnet", "pnasnet", _pnasnet, images(2, 3, 64, 64)),
    net("inception_v3", 107, passed=("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")),
    net("inception_v4", 107, passed=tuple(f"features.{i}" for i in (7, 8, 9, 12, 13, 14, 15, 16, 17, 20, 21))),
    net(
        "inception_resnet_v2",
        107,
        passed=(
            *(f"repeat.{i}" for i in range(1, 10)),
            *(f"repeat_1.{i}" for i in range(1, 20)),
            *(f"repeat_2.{i}" for i in range(1, 9)),
        ),
    ),
    net(
        "vitamin_small_224",
        64,
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=2,
        embed_cfg=VitCfg(
            embed_dim=(8, 16, 24),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        ),
    ),
)
