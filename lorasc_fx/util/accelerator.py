"""What torch keeps for each accelerator: its name, the states of its random generators, and its autocast."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from types import ModuleType

import torch

RNG = "rng/torch"
"""Name of the host's generator among the states; that of a device is `rng/cuda/0`, say."""


def in_use() -> tuple[str, ModuleType] | None:
    """Return type and module (`torch.cuda`, `torch.mps`, ...) of the accelerator, if this process has used one."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    used = getattr(module, "is_initialized", module.is_available)()  # torch.mps needs no initialization
    return (device.type, module) if used else None


def name_of(device: torch.device) -> str:
    """Return the type of an accelerator and, if torch knows it, the name of the product."""
    product = getattr(torch.get_device_module(device), "get_device_name", None)  # torch.mps has none
    return f"{device.type} {product(device) if product is not None else ''}"


@lru_cache(maxsize=8)
def has_fp64(device: torch.device) -> bool:
    """Whether a device computes in fp64. MPS does not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def generator_states() -> dict[str, torch.Tensor]:
    """Return the states of torch's default generators, of the host and of each device of the accelerator in use."""
    states = {RNG: torch.get_rng_state()}
    if (found := in_use()) is not None:
        kind, module = found
        states |= {f"rng/{kind}/{index}": module.get_rng_state(index) for index in range(module.device_count())}
    return states


def set_generator_states(states: Mapping[str, torch.Tensor]) -> None:
    """Restore what `generator_states` returned. Devices that are not here are left out."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        module = torch.get_device_module(device)
        for index in range(module.device_count()):
            if (state := states.get(f"rng/{device.type}/{index}")) is not None:
                module.set_rng_state(state, index)
    torch.set_rng_state(states[RNG])


def seed_generators(value: int) -> None:
    """Seed the generators of `generator_states`. torch.manual_seed would reach those of an idle accelerator too."""
    torch.default_generator.manual_seed(value)
    if (found := in_use()) is not None:
        _, module = found
        seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed  # torch.mps has one device
        seed_all(value)


def autocast_state() -> Hashable:
    """Return whether the host and the accelerator autocast, and to which dtypes."""
    device = torch.accelerator.current_accelerator()
    kinds = [kind for kind in ("cpu", device and device.type) if kind and torch.amp.is_autocast_available(kind)]
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
