"""Digests of tensors and files (SHA-256), and fast checksums of weights."""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from lorasc_fx.shards import local

T = TypeVar("T")

Buffer = Any
"""An object with the buffer protocol. `collections.abc.Buffer` is new in Python 3.12."""

MULTIPLIER = 0x9E3779B97F4A7C15

BLOCK = 1 << 22
"""Number of bytes after which the keys of a checksum repeat, on accelerators."""

PIECE = 8 * BLOCK
"""Number of bytes that `checksum` reads at a time on accelerators."""

HOST_BLOCK = 1 << 21
"""Number of bytes that `checksum` reads at a time on the CPU. The keys of larger blocks would not fit in the cache."""

MIN_BYTES_FOR_THREADS = 1 << 24
"""Minimum total size of tensors for which threads are faster."""


def checksum(tensor: torch.Tensor) -> int:
    """Return a 64-bit checksum of the dtype, shape and bits of a tensor. Strides do not matter.

    The bits are read without a large temporary copy. For a DTensor, only the local shard counts. The checksum of a
    quantized weight combines the checksums of the tensors in it.
    """
    with _disable_current_modes():  # active modes must not observe or replace these operations
        return _checksum(tensor)


def _checksum(tensor: torch.Tensor) -> int:
    """Return the checksum of a tensor. No mode may be active."""
    total = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    plain = local(tensor.detach())
    if is_traceable_wrapper_subclass(plain):
        for name in plain.__tensor_flatten__()[0]:
            total = total * MULTIPLIER + _checksum(getattr(plain, name))
        return total % (1 << 64)
    if not plain.numel():
        return total
    plain = plain.reshape(1) if plain.dim() == 0 else plain
    if plain.device.type != "cpu":
        return (total * MULTIPLIER + device_sum(plain)) % (1 << 64)
    keys = _keys(HOST_BLOCK // 8, plain.device)
    for vector in _blocks(plain, HOST_BLOCK // plain.element_size()):
        block = vector.contiguous()
        data = data_of(block if block.data_ptr() % 8 == 0 else block.clone())
        part = zlib.crc32(data[len(data) // 8 * 8 :])  # the last bytes, fewer than a word
        # Multiply words of 64 bits by odd keys and sum them, as in `device_sum`. Changes of the highest bits of two
        # words can cancel out, so compute a second sum, of words that start four bytes later.
        for start in (0, 4):
            if (count := (len(data) - start) // 8) > 0:
                words = torch.frombuffer(data, dtype=torch.int64, count=count, offset=start)
                part = part * MULTIPLIER + int(torch.dot(words, keys[:count]))
        total = (total * MULTIPLIER + part) % (1 << 64)
    return total


def device_sum(tensor: torch.Tensor) -> int:
    """Return a checksum of the entries of a tensor, computed on its device.

    The sum of a block of 32-bit words x_i is `sum k_i x_i mod 2^64` with fixed odd keys k_i, so that the position of a
    word matters. The sums of the blocks are combined as coefficients of a polynomial.
    """
    keys, sums = _keys(BLOCK // 4, tensor.device), []
    for piece in _blocks(tensor, PIECE // tensor.element_size()):
        words = _words(piece)
        count = len(words) // len(keys) * len(keys)  # words in full blocks
        sums.append(words[:count].view(-1, len(keys)).to(torch.int64).mul_(keys).sum(1))
        if count < len(words):
            sums.append(words[count:].to(torch.int64).mul_(keys[: len(words) - count]).sum(0, keepdim=True))
    total = 0
    for part in torch.cat(sums).tolist():
        total = (total * MULTIPLIER + part) % (1 << 64)
    return total


def _blocks(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Yield the entries in logical order, as vectors of at most `limit` entries, split by the shape alone."""
    if tensor.numel() <= limit:
        yield tensor.reshape(-1)
        return
    row = tensor.numel() // len(tensor)
    if row > limit:
        for index in range(len(tensor)):
            yield from _blocks(tensor[index], limit)
        return
    count = limit // row
    for rows in tensor.split(count - count % 4 or count):  # multiples of 4, so that most blocks consist of full words
        yield rows.reshape(-1)


def _words(block: torch.Tensor) -> torch.Tensor:
    """Return the bits of a vector as 32-bit integers. If they fill no whole number of words, as smaller integers."""
    if block.stride(0) != 1 or block.storage_offset() * block.element_size() % 4:
        block = block.clone(memory_format=torch.contiguous_format)
    fallback = {1: torch.uint8, 2: torch.int16}.get(block.element_size(), torch.int32)
    return block.view(torch.int32 if block.nbytes % 4 == 0 else fallback)


@lru_cache(maxsize=8)
def _keys(count: int, device: torch.device) -> torch.Tensor:
    """Return [count] fixed random odd 64-bit integers."""
    source = torch.Generator("cpu").manual_seed(0)
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=source, dtype=torch.int64, device="cpu")
    return (keys | 1).to(device)


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, as hexadecimal text."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight, or a part of one
        names, how = tensor.__tensor_flatten__()
        return text_digest(f"{type(tensor).__name__}{how}{[fingerprint(getattr(tensor, name)) for name in names]}")
    plain = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(data_of(plain))
    return digest.hexdigest()


def _map_tensors(digest: Callable[[torch.Tensor], T], tensors: Mapping[str, torch.Tensor]) -> dict[str, T]:
    """Return {name: digest of the tensor}. For large tensors, use as many threads as torch."""
    threads = torch.get_num_threads()
    with _disable_current_modes():  # for all tensors at once
        if threads == 1 or sum(tensor.nbytes for tensor in tensors.values()) < MIN_BYTES_FOR_THREADS:
            return dict(zip(tensors, map(digest, tensors.values()), strict=True))
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


fingerprints: Callable[[Mapping[str, torch.Tensor]], dict[str, str]] = partial(_map_tensors, fingerprint)
"""Takes {name: tensor}, and returns {name: fingerprint}."""

checksums: Callable[[Mapping[str, torch.Tensor]], dict[str, int]] = partial(_map_tensors, _checksum)
"""Takes {name: tensor}, and returns {name: checksum}."""


def data_of(plain: torch.Tensor) -> Buffer:
    """Return the bytes of a contiguous CPU tensor as a buffer that shares its memory and keeps it alive."""
    size = plain.numel() * plain.element_size()
    if not size:
        return bytearray()
    data: Any = (ctypes.c_char * size).from_address(plain.data_ptr())
    data.tensor = plain  # ctypes stores only the address, so keep the tensor alive
    return data


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
