"""Torchvision architectures, small by configuration: images, segmentation, detection, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, optical_flow, regnet, segmentation, video
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import DefaultBoxGenerator
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.optical_flow import raft
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video import mvit
from torchvision.models.video.resnet import Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple, R2Plus1dStem
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv

from benchmarks.coverage.entry import Entry, images
from tests.kit.compare import Call


def _scenes(masks: bool = False, keypoints: int = 0) -> Callable[[bool], Call]:
    """Return a maker of calls with two images of different sizes and, in train mode, their targets."""

    def make(training: bool) -> Call:
        pictures = [torch.rand(3, 64, width, dtype=torch.float64) for width in (64, 48)]
        if not training:
            return (pictures,), {}
        targets: list[dict[str, torch.Tensor]] = []
        for picture in pictures:
            corner = 4 + 8 * torch.rand(2, 2, dtype=torch.float64)
            boxes = torch.cat([corner, corner + 20 + 12 * torch.rand(2, 2, dtype=torch.float64)], dim=1)
            target = {"boxes": boxes, "labels": torch.randint(1, 2 if keypoints else 3, (2,))}
            if masks:
                target["masks"] = (torch.rand(2, *picture.shape[1:]) > 0.5).to(torch.uint8)
            if keypoints:
                points = corner[:, None].float() + 16 * torch.rand(2, keypoints, 2)
                target["keypoints"] = torch.cat([points, torch.ones(2, keypoints, 1)], dim=2)
            targets.append(target)
        return (pictures, targets), {}

    return make


class _Thin(BasicConv2d):
    """GoogLeNet's convolution with an eighth of its channels."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__(3 if in_channels == 3 else in_channels // 8, out_channels // 8, **kwargs)


class _ThinAux(InceptionAux):
    """GoogLeNet's auxiliary head on an eighth of its channels."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(in_channels // 8, num_classes, dropout=dropout)


def _googlenet() -> nn.Module:
    blocks = [_Thin, partial(Inception, conv_block=_Thin), _ThinAux]
    model = models.GoogLeNet(num_classes=5, transform_input=True, init_weights=False, blocks=blocks)
    model.fc = nn.Linear(128, 5)
    return model


def _trunk() -> nn.Sequential:
    """Return the features of a MobileNetV3. Maps 1 to 3 have 8 channels and the last has 48, at strides up to 16."""
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    setting = [block(8, 3, 16, 8, True, "RE", 2), block(8, 5, 24, 8, True, "HS", 2), block(8, 3, 24, 8, False, "HS", 2)]
    return models.MobileNetV3(setting, 16, norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)).features


def _segmentation(model: type[nn.Module], head: Callable[[int, int], nn.Module]) -> nn.Module:
    """Return a segmentation model with an auxiliary head."""
    backbone = IntermediateLayerGetter(_trunk(), {"4": "out", "2": "aux"})
    return model(backbone, head(48, 5), segmentation.fcn.FCNHead(8, 5))


def _pyramid(width: int = 16) -> nn.Module:
    return BackboneWithFPN(_trunk(), {"2": "0", "3": "1"}, [8, 8], width)


def _regions(model: type[nn.Module], more: str = "") -> nn.Module:
    """Return a two-stage detector that samples few regions. `more` names further heads (a key of `_HEADS`)."""
    heads: dict[str, Any] = {"num_classes": 3, **(_HEADS[more]() if more else {})}
    return model(
        _pyramid(),
        min_size=64,
        max_size=80,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((12,), (24,), (40,)), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=30,
        rpn_post_nms_top_n_train=40,
        rpn_post_nms_top_n_test=10,
        rpn_batch_size_per_image=32,
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 7 * 7, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, heads.pop("num_classes")),
        box_score_thresh=0.0,
        box_detections_per_img=5,
        box_batch_size_per_image=16,
        **heads,
    )


def _dense(model: type[nn.Module], width: int, ratios: tuple[float, ...]) -> nn.Module:
    """Return a one-stage detector."""
    anchors = detection.rpn.AnchorGenerator(((12,), (24,), (40,)), (ratios,) * 3)
    kept = {"score_thresh": 0.0, "detections_per_img": 5}
    return model(_pyramid(width), 3, min_size=64, max_size=80, anchor_generator=anchors, **kept)


def _ssdlite() -> nn.Module:
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    backbone = SSDLiteFeatureExtractorMobileNet(_trunk(), 3, norm, width_mult=0.1)
    anchors = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    widths = detection._utils.retrieve_out_channels(backbone, (64, 64))
    head = SSDLiteHead(widths, anchors.num_anchors_per_location(), 3, norm)
    # Keep every box in eval mode, because no target matches a box of the coarsest maps.
    kept = {"score_thresh": 0.0, "nms_thresh": 1.0, "detections_per_img": 1000}
    return detection.ssd.SSD(backbone, anchors, (64, 64), 3, head=head, **kept)


def _s3d() -> nn.Module:
    norm = partial(nn.BatchNorm3d, eps=0.001, momentum=0.001)
    model = nn.Module.__new__(video.S3D)
    nn.Module.__init__(model)
    model.features = nn.Sequential(
        TemporalSeparableConv(3, 8, 7, 2, 3, norm),
        nn.MaxPool3d(kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        SepInceptionBlock3D(8, 4, 6, 8, 2, 4, 4, norm),
        nn.MaxPool3d(kernel_size=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)),
        SepInceptionBlock3D(20, 8, 6, 8, 4, 8, 8, norm),
    )
    model.avgpool = nn.AvgPool3d(kernel_size=(2, 4, 4), stride=1)
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(32, 5, kernel_size=1))
    return model


class _Correlation(raft.CorrBlock):
    """RAFT's correlation in fp64. RAFT creates the first coordinates in fp32."""

    def index_pyramid(self, centroids_coords: torch.Tensor) -> torch.Tensor:
        return super().index_pyramid(centroids_coords.double())


class _Motion(raft.MotionEncoder):
    """RAFT's motion encoder in fp64. RAFT creates the first flow, zeros, in fp32."""

    def forward(self, flow: torch.Tensor, corr_features: torch.Tensor) -> torch.Tensor:
        return super().forward(flow.double(), corr_features)


def _raft() -> nn.Module:
    layers = (8, 8, 12, 16, 24)
    corr = _Correlation(num_levels=2, radius=2)
    motion = _Motion(in_channels_corr=corr.out_channels, corr_layers=(16,), flow_layers=(16, 8), out_channels=18)
    recurrent = raft.RecurrentBlock(input_size=18 + 8, hidden_size=16, kernel_size=(3,), padding=(1,))
    return optical_flow.RAFT(
        feature_encoder=raft.FeatureEncoder(
            block=raft.BottleneckBlock, layers=layers, norm_layer=nn.InstanceNorm2d, strides=(2, 1, 2, 2)
        ),
        context_encoder=raft.FeatureEncoder(block=raft.BottleneckBlock, layers=layers, norm_layer=None),
        corr_block=corr,
        update_block=raft.UpdateBlock(
            motion_encoder=motion, recurrent_block=recurrent, flow_head=raft.FlowHead(in_channels=16, hidden_size=16)
        ),
    )


def _frames(training: bool) -> Call:
    return tuple(torch.rand(2, 1, 3, 64, 64, dtype=torch.float64)), {"num_flow_updates": 2}


def tv(name: str, source: str, build: Callable[[], nn.Module], *size: int, **more: Any) -> Entry:
    """Return the entry `tv_NAME`, whose input is two images [3, *size] unless `more` has `inputs`."""
    return Entry(f"tv_{name}", source, build, more.pop("inputs", None) or images(2, 3, *size), **more)


# fmt: off
_CLASS_TOKEN = "the head reads the last class token only, whose query is not pooled and has no relative position"
_FIVE: dict[str, Any] = {"num_classes": 5}
_FUSED = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 2)]
_CN = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 1)]
_MVIT = [mvit.MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    mvit.MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1])]
_HEADS = {
    "mask": lambda: {"mask_head": detection.mask_rcnn.MaskRCNNHeads(16, (16, 16), 1),
        "mask_predictor": detection.mask_rcnn.MaskRCNNPredictor(16, 16, 3)},
    "keypoint": lambda: {"num_classes": 2, "keypoint_head": detection.keypoint_rcnn.KeypointRCNNHeads(16, (16, 16)),
        "keypoint_predictor": detection.keypoint_rcnn.KeypointRCNNPredictor(16, 4)},
}
TORCHVISION: tuple[Entry, ...] = (
    tv("resnext", "resnet", lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], **_FIVE, groups=2,
        width_per_group=8, zero_init_residual=True), 64, 64),
    tv("mobilenet_v2", "mobilenetv2", lambda: models.mobilenet_v2(**_FIVE, width_mult=0.25), 64, 64),
    tv("shufflenet_v2", "shufflenetv2", lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 64], **_FIVE), 64, 64),
    tv("squeezenet", "squeezenet", lambda: models.squeezenet1_1(**_FIVE), 48, 48),
    tv("googlenet", "googlenet", _googlenet, 64, 64),
    tv("regnet", "regnet", lambda: models.RegNet(regnet.BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2],
        se_ratio=0.25), **_FIVE, stem_width=8), 32, 32),
    tv("convnext", "convnext", lambda: models.ConvNeXt(_CN, stochastic_depth_prob=0.2, **_FIVE), 32, 32),
    tv("efficientnet_v2", "efficientnet", lambda: models.EfficientNet(_FUSED, dropout=0.2, stochastic_depth_prob=0.2,
        last_channel=64, **_FIVE), 32, 32),
    tv("vit", "vision_transformer", lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1,
        attention_dropout=0.1, **_FIVE), 32, 32),
    tv("swin_v2", "swin_transformer", lambda: models.SwinTransformer([2, 2], 24, [2, 2], [3, 3], [4, 4],
        stochastic_depth_prob=0.2, **_FIVE, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 32, 32),
    tv("maxvit", "maxvit", lambda: models.MaxVit((32, 32), 8, 4, [16, 16], [1, 1], 8, 0.2, **_FIVE), 32, 32),
    tv("fcn", "fcn", lambda: _segmentation(segmentation.FCN, segmentation.fcn.FCNHead), 32, 32),
    tv("deeplabv3", "deeplabv3", lambda: _segmentation(segmentation.DeepLabV3,
        partial(segmentation.deeplabv3.DeepLabHead, atrous_rates=(1, 2))), 32, 32),
    tv("lraspp", "lraspp", lambda: segmentation.LRASPP(IntermediateLayerGetter(_trunk(), {"2": "low", "4": "high"}),
        8, 48, 5, inter_channels=16), 64, 64),
    tv("faster_rcnn", "faster_rcnn", lambda: _regions(detection.FasterRCNN), inputs=_scenes()),
    tv("mask_rcnn", "mask_rcnn", lambda: _regions(detection.MaskRCNN, "mask"), inputs=_scenes(masks=True)),
    tv("keypoint_rcnn", "keypoint_rcnn", lambda: _regions(detection.KeypointRCNN, "keypoint"),
        inputs=_scenes(keypoints=4)),
    tv("retinanet", "retinanet", lambda: _dense(detection.RetinaNet, 16, (0.5, 1.0, 2.0)), inputs=_scenes()),
    tv("fcos", "fcos", lambda: _dense(detection.FCOS, 32, (1.0,)), inputs=_scenes()),
    tv("ssdlite", "ssdlite", _ssdlite, inputs=_scenes()),
    tv("r2plus1d", "resnet", lambda: video.VideoResNet(video.resnet.BasicBlock, [Conv2Plus1D, Conv3DSimple,
        Conv3DNoTemporal, Conv3DNoTemporal], [1, 1, 1, 1], R2Plus1dStem, **_FIVE), 4, 16, 16),
    tv("mvit_v2", "mvit", lambda: video.MViT((32, 32), 4, _MVIT, residual_pool=True, residual_with_cls_embed=False,
        rel_pos_embed=True, proj_after_attn=True, stochastic_depth_prob=0.2, **_FIVE), 4, 32, 32,
        unused={"blocks.1.attn.rel_pos_?": _CLASS_TOKEN, "blocks.1.attn.pool_q.pool.weight": _CLASS_TOKEN}),
    tv("s3d", "s3d", _s3d, 8, 64, 64),
    tv("raft", "raft", _raft, inputs=_frames),
)
# fmt: on
