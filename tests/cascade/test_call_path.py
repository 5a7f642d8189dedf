"""How much of the package a call runs before the code of its graph."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import Branch

PACKAGE = str(Path(lx.__file__).parent)
BRANCHES = str(Path(sys.modules[Branch.__module__].__file__ or "").parent)


def test_a_warmed_training_call_reaches_the_graph_through_few_functions() -> None:
    """Checks of what is around a cascade run once for each stage, and not at each call."""
    model, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, 5)
    cascade = lx.adapt(model, (x,))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for _ in range(2):
        cascade(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    functions: dict[str, None] = {}
    in_graph = False

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal in_graph
        file = frame.f_code.co_filename
        in_graph |= file.startswith(BRANCHES)
        if event == "call" and file.startswith(PACKAGE) and not in_graph:
            functions[f"{file.removeprefix(PACKAGE)} {frame.f_code.co_qualname}"] = None

    sys.setprofile(see)
    try:
        cascade(x)
    finally:
        sys.setprofile(None)
    cascade.transition(None)  # or the end of the program would warn of lost training
    assert in_graph
    assert len(functions) <= 15, list(functions)
