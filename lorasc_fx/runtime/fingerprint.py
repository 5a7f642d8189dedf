"""Digests of tensors and files."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch

from lorasc_fx.branch import is_quantized

__all__ = ["file_digest", "fingerprint", "text_digest"]


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    if is_quantized(tensor):
        names, how = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return text_digest(f"{type(tensor).__name__}{how}{[fingerprint(getattr(tensor, name)) for name in names]}")
    plain = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    size = plain.numel() * plain.element_size()
    if size:
        digest.update((ctypes.c_char * size).from_address(plain.data_ptr()))
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
