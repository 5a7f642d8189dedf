"""Trees of other libraries that torch has to know before it can take them apart: key-value caches."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["know_trees", "whole"]


def whole(value: Any) -> bool:
    """Whether a value of a type that torch takes apart refuses to be: it is then one leaf (a recurrent cache)."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None or type(value) in (dict, list, tuple):
        return False
    try:
        node.flatten_fn(value)
    except RuntimeError:  # transformers: "should be applied to DynamicCache containing only ..."
        return True
    return False


def know_trees(model: nn.Module) -> None:
    """Let transformers, where it is in use, register its caches with torch's pytree, as it does for its own exports."""
    if "transformers.cache_utils" in sys.modules and importlib.util.find_spec("transformers.exporters") is not None:
        own = importlib.import_module("transformers.exporters.exporter_dynamo")  # noqa: TID251 - our own name
        own.register_cache_pytrees_for_model(model)
