"""State that torch keeps for accelerators: names, random generators, and autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Exceptions for too little memory on the host and on a device. Callers that try something else must raise them."""


def in_use() -> tuple[str, ModuleType] | None:
    """Return type and module (such as `torch.cuda`) of the accelerator. None if this process has not used it."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    used = getattr(module, "is_initialized", module.is_available)()  # torch.mps needs no initialization
    return (device.type, module) if used else None


def name_of(device: torch.device) -> str:
    """Return the device type of an accelerator and, if torch knows it, the product name."""
    product = getattr(torch.get_device_module(device), "get_device_name", None)  # torch.mps has none
    return f"{device.type} {product(device) if product is not None else ''}"


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device, or 0 if torch cannot tell.

    Memory that torch's allocator holds in reserve does not count as free.
    """
    module = torch.get_device_module(device)
    info = getattr(module, "mem_get_info", None) or getattr(torch.accelerator, "get_memory_info", None)  # torch 2.10
    try:
        return int(info(device)[0]) if info is not None else 0
    except RuntimeError:  # torch.mps has no such function
        return 0


@lru_cache(maxsize=8)
def has_fp64(device: torch.device) -> bool:
    """Whether a device supports fp64. MPS does not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def generator_states() -> dict[str, torch.Tensor]:
    """Return the states of torch's default generators: `torch` of the CPU, and `cuda/0` of a device in use."""
    states = {"torch": torch.get_rng_state()}
    if (accelerator := in_use()) is not None:
        kind, module = accelerator
        states |= {f"{kind}/{index}": module.get_rng_state(index) for index in range(module.device_count())}
    return states


def set_generator_states(states: Mapping[str, torch.Tensor]) -> None:
    """Restore the result of `generator_states`. States of devices that do not exist in this process are ignored."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        module = torch.get_device_module(device)
        for index in range(module.device_count()):
            if (state := states.get(f"{device.type}/{index}")) is not None:
                module.set_rng_state(state, index)
    torch.set_rng_state(states["torch"])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore torch's default generators at the end of a block, on the host and on each device in use."""
    states = generator_states()
    try:
        yield
    finally:
        set_generator_states(states)


def seed_generators(value: int) -> None:
    """Seed the generators of `generator_states`. torch.manual_seed would also seed an unused accelerator."""
    torch.default_generator.manual_seed(value)
    if (accelerator := in_use()) is not None:
        _, module = accelerator
        seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed  # torch.mps has one device
        seed_all(value)
