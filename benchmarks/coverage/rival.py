"""What peft does on the same architecture: LoRA on every linear (`all-linear`) and every convolution."""

from __future__ import annotations

import warnings

import peft
import torch
from torch import nn

from benchmarks.coverage.entry import Entry, built
from benchmarks.coverage.examine import SPEC, difference, run


def peft_on(entry: Entry) -> str:
    """Return what becomes of the model under peft, in a few words.

    In eval mode: B = 0 must change nothing, the merged model must compute what the adapted one did.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _tell(entry)
    except Exception as fault:  # whatever peft raises is the answer
        lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
        return f"{type(fault).__name__}: {lines[0][:120] if lines else ''}"


def _tell(entry: Entry) -> str:
    model = built(entry).eval()
    matrices = sum(value.dim() > 1 for value in model.parameters())
    expected = run(entry, model, False)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    config = peft.LoraConfig(r=SPEC.rank, lora_alpha=int(SPEC.lora_alpha), target_modules=names, init_lora_weights=True)
    adapted = peft.get_peft_model(model, config).eval()
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    told = [f"{len(layers)} of {matrices} matrices"]
    if (gap := difference(run(entry, adapted, False), expected)) > 1e-13:  # below, torch took another kernel
        told.append(f"B = 0 moves the output by {gap:.0e}")
    factors = [factor for layer in layers for factor in layer.lora_B.parameters()]
    with torch.no_grad():
        torch.manual_seed(4)
        for factor in factors:
            factor.normal_(std=0.05)
    output = run(entry, adapted, False, grad=True)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if _weighs(leaf)]
    if leaves:
        sum((leaf * torch.randn_like(leaf)).sum() for leaf in leaves).backward()
    idle = sum(factor.grad is None or not bool(factor.grad.any()) for factor in factors)
    if idle:
        told.append(f"{idle} adapters without a gradient")
    before = run(entry, adapted, False)
    merged = adapted.merge_and_unload()
    if not (gap := difference(run(entry, merged, False), before)) <= max(1e-10, entry.tolerance):
        told.append(f"merged differs by {gap:.0e}")
    return ", ".join(told)


def _weighs(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad
