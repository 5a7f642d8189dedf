"""Digests of tensors and files."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lorasc_fx.branch import is_quantized

__all__ = ["Buffer", "data_of", "file_digest", "fingerprint", "fingerprint_of", "text_digest"]

Buffer = Any
"""Of the buffer protocol, which has a name in Python 3.12 only."""


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    if is_quantized(tensor):
        names, how = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return text_digest(f"{type(tensor).__name__}{how}{[fingerprint(getattr(tensor, name)) for name in names]}")
    plain = tensor.detach().to("cpu").contiguous()
    return fingerprint_of(plain.dtype, tuple(plain.shape), [data_of(plain)])


def fingerprint_of(dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[Buffer]) -> str:
    """Return the fingerprint of a tensor that comes as blocks of its bytes."""
    digest = hashlib.sha256(f"{dtype}{shape}".encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def data_of(plain: torch.Tensor) -> Buffer:
    """Return the bytes of a contiguous tensor in host memory, not copied: what is written there is the tensor's."""
    size = plain.numel() * plain.element_size()
    return (ctypes.c_char * size).from_address(plain.data_ptr()) if size else bytearray()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
