"""The private names of torch that this package uses, with the reason for each. No other file names one.

These names exist in torch 2.9 to 2.15. If a new version of torch removes one, replace it here.
"""

# ruff: noqa: PLC0414 - mypy takes such an alias for a name that other files may import
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Context manager that disables `__torch_function__` of tensor subclasses.
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass

# The same as `torch.compiler.disable`, but without an import of all of dynamo.
from torch._compile import _disable_dynamo as disable_dynamo

# Bodies of control flow ops, which `torch.compile` compiles. `_hop_compile_and_call` is not in torch 2.9.
from torch._higher_order_ops import utils as higher_order

# Types of the targets of nodes, and the type that `torch.library.custom_op` returns.
from torch._library.custom_ops import CustomOpDef as CustomOpDef
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket

# Represent the full tensors of a sharded model without memory.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

__all__ = ["disable_dynamo", "higher_order"]

current_autograd_node: Callable[[], Any] = torch._C._current_autograd_node
"""Returns the autograd node whose backward runs. Activation checkpointing recomputes a region inside it."""
current_backward: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the running backward, or -1 outside of a backward."""
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Returns the number of active dispatch modes, which must see the plain ops."""
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Returns whether vmap, grad or jvp runs. They cannot transform a custom backward."""
grouped_mm: Callable[..., torch.Tensor] = torch._grouped_mm
"""The product of stacked matrices that `F.grouped_mm` calls."""
has_storage: Callable[[torch.Tensor], bool] = torch._C._has_storage
"""Returns whether a tensor has a storage. Sparse tensors and some subclasses have none."""
mkldnn_is_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled
"""Returns `torch.backends.mkldnn.enabled`, but faster."""
saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
"""Returns the active hooks on saved tensors, which checkpointing sets."""
sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""Returns the number of the next autograd node of this thread, to find out which nodes a call creates."""
set_version_counter: Callable[[tuple[torch.Tensor, ...], tuple[int, ...]], None] = (
    torch._C._autograd._unsafe_set_version_counter
)
"""Sets the version counters of tensors, to restore them after a write that is undone exactly."""


def frame_callback() -> Any:
    """Return the callback that dynamo gets for each frame, or None while dynamo is off."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback()


def import_dynamo() -> None:
    """Import dynamo before a function of torch is patched, because its tables hold functions of torch by identity."""


def lookup_backend(name: Any) -> Any:
    """Return the backend of torch.compile with this name. Imports dynamo."""
    return torch._dynamo.lookup_backend(name)
