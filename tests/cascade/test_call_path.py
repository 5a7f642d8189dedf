"""Limits on how many functions and files of the package run in a call, in a transition, and in `weights`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import Branch
from lorasc_fx.cascade import usage
from tests.kit import tiny

PACKAGE = str(Path(lx.__file__).parent)
BRANCHES = str(Path(sys.modules[Branch.__module__].__file__ or "").parent)


def trained() -> tuple[lx.Cascade, torch.optim.Optimizer, torch.Tensor]:
    """Return a cascade of two linear layers after two steps, so that caches are filled."""
    model, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, 5)
    cascade = lx.adapt(model, (x,))
    optimizer = torch.optim.SGD(cascade.param_groups(lr=0.1))
    for _ in range(2):
        cascade(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return cascade, optimizer, x


def functions_in(act: Callable[[], object], until: str | None = None) -> list[str]:
    """Return the functions of the package that run, each once and without comprehensions.

    With `until`, stop at the first function in this folder.
    """
    functions: dict[str, None] = {}
    done = False

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal done
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        done |= until is not None and file.startswith(until)
        if event == "call" and file.startswith(PACKAGE) and not done and not name.startswith("<"):
            functions[f"{file.removeprefix(PACKAGE)} {frame.f_code.co_qualname}"] = None

    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(None)
    assert done is (until is not None)
    return list(functions)


def test_a_warmed_training_call_reaches_the_graph_through_few_functions() -> None:
    """Checks of the environment of a cascade run once per stage, and not in each call."""
    cascade, _, x = trained()
    functions = functions_in(lambda: cascade(x), until=BRANCHES)
    cascade.transition(None)  # or the end of the program would warn of lost training
    assert len(functions) <= 14, functions


def test_a_transition_and_other_weights_run_few_functions() -> None:
    cascade, optimizer, _ = trained()

    def look() -> None:
        with cascade.weights("slow"):
            pass

    functions = functions_in(look)
    assert len(functions) <= 67, functions
    assert len({name.split()[0] for name in functions}) <= 18
    functions = functions_in(lambda: cascade.transition(optimizer))
    assert len(functions) <= 144, functions
    assert len({name.split()[0] for name in functions}) <= 22


def test_generate_walks_the_stack_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the model, and not for each module with an adapted weight, which took a fifth of a narrow model's time."""
    ids = torch.randint(1, 16, (2, 4))
    cascade = lx.adapt(tiny.llama().eval(), (), {"input_ids": ids}, spec=lx.CascadeSpec(rank=2))
    walks, from_package = [], usage._from_package
    monkeypatch.setattr(usage, "_from_package", lambda: (walks.append(1), from_package())[1])
    cascade.generate(ids, max_new_tokens=4, do_sample=False)
    assert 0 < len(walks) <= 1 + 4  # generate, and its tokens
