"""Protect the process from an execution: random generators, standard streams, logs, warnings, and modes of torch."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import overrides
from torch.backends import mha
from torch.utils import _python_dispatch

from lorasc_fx.util.environment import generator_states, seed_generators, set_generator_states
from lorasc_fx.util.torch_private import higher_order
from lorasc_fx.util.undo import PROCESS, Block, isolated


@isolated
def quiet(undo: Block, grad: bool = True) -> None:
    """Context manager: restore random generators, suppress output and logs of tracers, and set the gradient mode.

    The fused kernels of nn.MultiheadAttention and nn.TransformerEncoder are off, because they have no gradient. Only
    one thread at a time can be inside such a block.
    """
    undo.enter(PROCESS)
    numpy = sys.modules.get("numpy")  # if it is not imported, the model does not use its generator
    undo(partial(random.setstate, random.getstate()))
    if numpy is not None:
        undo(partial(numpy.random.set_state, numpy.random.get_state()))
    undo(partial(set_generator_states, generator_states()))
    undo(partial(mha.set_fastpath_enabled, mha.get_fastpath_enabled()))
    mha.set_fastpath_enabled(False)
    undo(partial(logging.disable, logging.root.manager.disable))
    logging.disable(logging.CRITICAL)
    undo.enter(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    # An export that fails prints its graph. The error message contains the reason.
    undo.enter(contextlib.redirect_stdout(io.StringIO()))
    undo.enter(contextlib.redirect_stderr(io.StringIO()))
    undo.enter(torch.set_grad_enabled(grad))


@isolated
def eager(undo: Block) -> None:
    """Context manager: run functions that `torch.compile` has wrapped eagerly.

    Control flow ops (torch.cond, while_loop, scan) still compile their bodies. In an eager body, weights that the body
    reads from its closure would get no gradients.
    """
    undo.enter(torch.compiler.set_stance("force_eager"))
    compile_body = getattr(higher_order, "_hop_compile_and_call", None)
    if compile_body is not None:  # not in torch 2.9
        undo(partial(setattr, higher_order, "_hop_compile_and_call", compile_body))
        higher_order._hop_compile_and_call = partial(_with_compiler, compile_body)


_IS_GRAD_ENABLED = torch.is_grad_enabled
"""The original function of torch. `observe` replaces it during an execution."""


def _with_compiler(compile_body: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    """Run a control flow op outside of the modes of this package, because dynamo cannot compile its body under them."""
    with contextlib.ExitStack() as stack:
        # Dynamo builds tables of torch's functions when it first compiles. They must contain the original function.
        stack.callback(setattr, torch, "is_grad_enabled", torch.is_grad_enabled)
        torch.is_grad_enabled = _IS_GRAD_ENABLED
        stack.enter_context(torch.compiler.set_stance("default"))
        while isinstance(_python_dispatch._get_current_dispatch_mode(), ObserverMode):
            stack.enter_context(_python_dispatch._pop_mode_temporarily())
        while isinstance(overrides._get_current_function_mode(), ObserverMode):
            stack.enter_context(overrides._pop_mode_temporarily())
        return compile_body(*args, **kwargs)


class ObserverMode:
    """Base class of the torch modes of this package. These modes observe calls and do not change them."""


def seed(value: int = 0) -> None:
    """Seed the generators of Python, numpy and torch, which `quiet` restores."""
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value)
    seed_generators(value)
