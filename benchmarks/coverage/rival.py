"""peft's LoRA on every linear layer and every convolution of the same architectures."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.coverage.entry import Entry, built
from benchmarks.coverage.examine import SPEC, Report, examine, run
from benchmarks.coverage.zoo import ZOO
from tests.kit.compare import difference, loss_of


def look(name: str) -> dict[str, Any]:
    """Return the report of a model under lorasc-fx as a dict, with peft's result as text in `peft`."""
    torch.set_num_threads(1)
    try:
        report = examine(ZOO[name])
    except Exception as error:  # the page shows the error
        report = Report(name, fault=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
    return {**asdict(report), "peft": peft_on(ZOO[name])}


def peft_on(entry: Entry) -> str:
    """Return a text: how many matrices peft adapts, and its faults in eval mode, or the exception that it raises."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return _differences(entry)
    except Exception as error:  # the message is the result
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def _differences(entry: Entry) -> str:
    model = built(entry).eval()
    matrices = sum(value.dim() > 1 for value in model.parameters())
    expected = run(entry, model, False)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    config = peft.LoraConfig(r=SPEC.rank, lora_alpha=int(SPEC.lora_alpha), target_modules=names, init_lora_weights=True)
    adapted = peft.get_peft_model(model, config).eval()
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    result = [f"{len(layers)} of {matrices} matrices"]
    if (gap := difference(run(entry, adapted, False), expected)) > 1e-13:  # smaller gaps come from other kernels
        result.append(f"B = 0 moves the output by {gap:.0e}")
    factors = [factor for layer in layers for factor in layer.lora_B.parameters()]
    with torch.no_grad():
        torch.manual_seed(4)
        for factor in factors:
            factor.normal_(std=0.05)
    loss_of(run(entry, adapted, False, grad=True)).backward()
    if idle := sum(factor.grad is None or not bool(factor.grad.any()) for factor in factors):
        result.append(f"{idle} without gradient")
    before = run(entry, adapted, False)
    merged = adapted.merge_and_unload()
    if not (gap := difference(run(entry, merged, False), before)) <= max(1e-10, entry.tolerance):
        result.append(f"merge off by {gap:.0e}")
    return ", ".join(result)
