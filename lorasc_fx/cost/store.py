"""Rates by machine: measured when first needed, and kept in a file for the next process.

The file is a convenience: one that is damaged or cannot be written is told of, and the rates are measured again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import uuid
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.cost.measure import measured
from lorasc_fx.cost.rates import Rates, usual

__all__ = ["cache_file", "key_of", "rates_of"]

FORMAT = 1

log = logging.getLogger("lorasc_fx")

_KNOWN: dict[str, Rates] = {}
_LOCK = threading.Lock()


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the rates of a device for a dtype: those known, those of the cache file, or measured now."""
    key = key_of(device, dtype)
    with _LOCK:
        if key not in _KNOWN:
            path = cache_file()
            found = Rates.from_json(_read(path).get(key))
            if found is None:
                log.info("measuring the operations of branches on %s", key)
                found = _measured(device, dtype)
                if found is not None:
                    _keep(path, key, found)
            if found is None:
                log.info("placements are chosen by the rates of a usual machine")
                found = usual(torch.get_num_threads())
            _KNOWN[key] = found
        return _KNOWN[key]


def _measured(device: torch.device, dtype: torch.dtype) -> Rates | None:
    try:
        found = measured(device, dtype)
    except RuntimeError as fault:  # torch has not every operation for every device and dtype, or no memory is left
        log.warning("the operations of branches cannot be measured on %s in %s: %s", device, dtype, fault)
        return None
    if found is None:
        log.info("the machine is too busy to be measured")
    return found


def cache_file() -> Path:
    """Return where the rates are kept: `LORASC_FX_CACHE`, or lorasc_fx/rates.json in the user's cache folder."""
    told = os.environ.get("LORASC_FX_CACHE")
    if told:
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasc_fx" / "rates.json"


def key_of(device: torch.device, dtype: torch.dtype) -> str:
    """Return what rates depend on: version of torch, device, number of threads, dtype."""
    on_cpu = device.type == "cpu"
    told = None if on_cpu else getattr(torch.get_device_module(device), "get_device_name", None)
    name = _cpu() if on_cpu else f"{device.type} {told(device) if told is not None else ''}"
    threads = f"{torch.get_num_threads()} threads" if on_cpu else "-"
    return " | ".join((f"torch {torch.__version__}", name, threads, str(dtype).removeprefix("torch.")))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such file on this system
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any]:
    """Return what the file holds by key; nothing where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as fault:
        log.warning("%s cannot be read (%s): the rates are measured again", path, fault)
        return {}
    held = found.get("rates") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(held, dict):
        log.warning("%s holds no rates of this format: they are measured again", path)
        return {}
    return held


def _keep(path: Path, key: str, rates: Rates) -> None:
    """Add rates to the file, which is replaced whole."""
    text = json.dumps({"format": FORMAT, "rates": {**_read(path), key: rates.to_json()}}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as fault:
        log.warning("%s cannot be written (%s): the rates are kept for this process only", path, fault)
