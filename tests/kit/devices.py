"""A stand-in for the module of an accelerator, with generators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def pretend_accelerator(patch: pytest.MonkeyPatch, kind: str, generators: list[torch.Generator]) -> None:
    """Let torch have an accelerator of this kind with a device for each of these generators, which are the host's."""
    module = SimpleNamespace(
        is_available=lambda: bool(generators),
        device_count=lambda: len(generators),
        get_rng_state=lambda index: generators[index].get_state(),
        set_rng_state=lambda state, index: generators[index].set_state(state),
    )

    def seed(value: int) -> None:
        for generator in generators:
            generator.manual_seed(value)

    if kind == "mps":  # torch.mps has fewer functions
        module.manual_seed = seed
    else:
        module.is_initialized, module.manual_seed_all = module.is_available, seed
    patch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: torch.device(kind) if generators or not check_available else None,
    )
    patch.setattr(torch, "get_device_module", lambda device=None: module)
