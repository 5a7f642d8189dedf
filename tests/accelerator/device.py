"""Builds the simulated accelerator of device.cpp, and registers it with torch as the device `sim`.

The library is built once, in a folder of the user's cache whose name depends on torch's version and on the source
(`LORASC_FX_TEST_CACHE` names another folder). `python -m tests.accelerator.device` builds it and does nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "sim"
SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O0", "-w", "-fPIC", "-shared")
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")
ops = torch.ops.simulated


def why_not() -> str:
    """The reason for which the device cannot be built here; an empty string if it can."""
    if sys.platform != "linux":
        return f"the simulated device is written for Linux, this is {sys.platform}"
    return "" if library().exists() or shutil.which("g++") else "the simulated device needs g++"


def library() -> Path:
    """The path of the built library."""
    key = hashlib.sha256(repr((torch.__version__, FLAGS)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("LORASC_FX_TEST_CACHE") or Path(cache, "lorasc-fx", "test-device")
    return Path(folder, key, "device.so")


def build() -> Path:
    """Build the library unless it is there: about 12 s of a CPU."""
    path = library()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with Path(path.parent, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds, and the others wait
            if not path.exists():
                _compile(path)
    return path


def _compile(path: Path) -> None:
    folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    folders += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    library = path.with_suffix(".new")
    subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(library), *folders, *LIBRARIES], check=True)
    library.replace(path)  # a build that was killed leaves no library


def register() -> None:
    """Load the library and give torch the device; both stay for the life of the process."""
    torch.ops.load_library(build())
    ops.start()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _let_parameters_move()


def _index(device: Any = None) -> int:
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    return ops.current_device() if index is None else index


def _generator(device: Any = None) -> torch.Generator:
    return ops.default_generator(_index(device))


@contextlib.contextmanager
def _device(device: Any) -> Iterator[None]:
    before = ops.current_device()
    ops.set_device(_index(device))
    try:
        yield
    finally:
        ops.set_device(before)


def _device_module() -> ModuleType:
    """The module `torch.sim`, with the functions of `torch.cuda` that torch and other packages call."""
    module = ModuleType(f"torch.{NAME}")
    everywhere = range(ops.device_count())
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=ops.device_count,
        current_device=ops.current_device,
        set_device=lambda device: ops.set_device(_index(device)),
        device=_device,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        current_stream=torch.accelerator.current_stream,
        manual_seed=lambda seed: _generator().manual_seed(seed),
        manual_seed_all=lambda seed: [_generator(index).manual_seed(seed) for index in everywhere],
        get_rng_state=lambda device=None: _generator(device).get_state(),
        set_rng_state=lambda state, device=None: _generator(device).set_state(state),
        get_rng_state_all=lambda: [_generator(index).get_state() for index in everywhere],
        set_rng_state_all=lambda states: [_generator(index).set_state(states[index]) for index in everywhere],
        default_generators=tuple(_generator(index) for index in everywhere),
        initial_seed=lambda: _generator().initial_seed(),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        is_bf16_supported=lambda: True,
        memory_allocated=lambda device=None: ops.in_use(_index(device)),
        max_memory_allocated=lambda device=None: ops.peak(_index(device)),
        reset_peak_memory_stats=lambda device=None: ops.reset_peak(_index(device)),
        get_device_name=lambda device=None: "simulated",
        get_device_properties=lambda device=None: SimpleNamespace(name="simulated", total_memory=8 << 30),
    )
    sys.modules[module.__name__] = module
    return module


def _let_parameters_move() -> None:
    """Let `Module.to` and `tensor.data = other` keep the Parameter objects, as on CUDA.

    For a PrivateUse1 device torch makes new Parameters. Tied parameters and an optimizer would lose them.
    """
    import torch._dynamo  # which at its first import looks at the function that is replaced here

    compatible = torch._has_compatible_shallow_copy_type
    data = torch._C.TensorBase.data

    def moves(one: torch.Tensor, source: torch.Tensor) -> bool:
        plain = type(one) in (torch.Tensor, torch.nn.Parameter)
        return plain and {one.device.type, source.device.type} == {"cpu", NAME}

    def set_data(self: torch.Tensor, source: torch.Tensor) -> None:
        ops.set_data(self, source) if moves(self, source) else data.__set__(self, source)

    torch._has_compatible_shallow_copy_type = lambda one, source: moves(one, source) or compatible(one, source)
    torch.Tensor.data = property(data.__get__, set_data)


if __name__ == "__main__":
    print(build())
