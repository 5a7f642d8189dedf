"""Packages, versions, accelerators and random generators of the process."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lorasc_fx.errors import MissingExtra, nearest


@cache
def version() -> str:
    """Return the version of this package."""
    try:
        return importlib.metadata.version("lorasc-fx")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


@cache
def source_digest() -> str:
    """Return the SHA-256 of the source code of this package. It also distinguishes checkouts of one version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def module_of(extra: str, name: str) -> Any:
    """Import and return a module of an optional package.

    Args:
        extra: name of the extra in pyproject.toml that installs the package.
        name: name of the module.

    Raises:
        MissingExtra: the package is not installed.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)  # noqa: TID251 - names of packages in our own sources
    except ModuleNotFoundError as fault:
        if fault.name is None or fault.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its dependencies is missing
        raise missing(extra, package) from fault


def missing(extra: str, package: str) -> MissingExtra:
    """Return the error for a missing package, with the pip command that installs it."""
    return MissingExtra(f"this needs the package {package!r}, which is not installed: pip install 'lorasc-fx[{extra}]'")


def require(extra: str, *names: str) -> None:
    """Raise MissingExtra unless the modules of an extra can be imported."""
    for name in names:
        module_of(extra, name)


def lazy_modules(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that imports its submodules on first use."""

    def import_on_use(name: str) -> ModuleType:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")  # noqa: TID251 - one of our own modules
        raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, modules)}")

    return import_on_use, lambda: sorted({*vars(sys.modules[package]), *modules})


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Exceptions for too little memory on the host and on a device. Code that catches all errors must re-raise them."""


def in_use() -> tuple[str, ModuleType] | None:
    """Return the accelerator as (type, module such as `torch.cuda`). None if this process has not used it."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    used = getattr(module, "is_initialized", module.is_available)()  # torch.mps needs no initialization
    return (device.type, module) if used else None


def generator_states() -> dict[str, torch.Tensor]:
    """Return {name: state} of torch's default generators: `torch` for the CPU, `cuda/0` for a device in use."""
    states = {"torch": torch.get_rng_state()}
    if (accelerator := in_use()) is not None:
        kind, module = accelerator
        states |= {f"{kind}/{index}": module.get_rng_state(index) for index in range(module.device_count())}
    return states


def set_generator_states(states: Mapping[str, torch.Tensor]) -> None:
    """Restore the states from `generator_states`. States of devices that this process lacks are ignored."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        module = torch.get_device_module(device)
        for index in range(module.device_count()):
            if (state := states.get(f"{device.type}/{index}")) is not None:
                module.set_rng_state(state, index)
    torch.set_rng_state(states["torch"])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Context manager: restore torch's default generators at the end, on the host and on devices in use."""
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
