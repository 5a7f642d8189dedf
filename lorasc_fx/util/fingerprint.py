"""Digests of tensors and files, and checksums of weights."""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from lorasc_fx.shards import local

T = TypeVar("T")

Buffer = Any
"""Of the buffer protocol, which has a name in Python 3.12 only."""

MULTIPLIER = 0x9E3779B97F4A7C15
BLOCK = 1 << 22
"""Bytes that have keys of their own, on devices other than the host."""
PIECE = 8 * BLOCK
"""Bytes that `checksum` reads at a time there."""
HOST_BLOCK = 1 << 21
"""Bytes that `checksum` reads at a time on the host; the keys of more would leave the cache."""
WORTH_THREADS = 1 << 24
"""Bytes to read, of all tensors together, from which on threads are started for it."""


def checksum(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's dtype, shape and bits, in logical order: strides do not count.

    The bits are read once, without a large copy. Of a tensor subclass (DTensor, a quantized weight) it is that of the
    tensors held here; a tensor on the meta device has no bits.
    """
    total = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    bare = local(tensor.detach())
    if is_traceable_wrapper_subclass(bare):
        for name in bare.__tensor_flatten__()[0]:
            total = total * MULTIPLIER + checksum(getattr(bare, name))
        return total % (1 << 64)
    if bare.is_meta or not bare.numel():
        return total
    bare = bare.reshape(1) if bare.dim() == 0 else bare
    if bare.device.type != "cpu":
        return (total * MULTIPLIER + device_sum(bare)) % (1 << 64)
    with _disable_current_modes():  # nobody counts or fakes these operations
        keys = _keys(HOST_BLOCK // 8, bare.device)
        for block in _blocks(bare, HOST_BLOCK // bare.element_size()):
            plain = block.contiguous()
            data = data_of(plain if plain.data_ptr() % 8 == 0 else plain.clone())
            part = zlib.crc32(data[len(data) // 8 * 8 :])  # of the bytes that fill no word
            # Words of 64 bits are multiplied by odd keys and summed, as in `device_sum`. The highest bits of two words
            # can cancel out, so there is a second sum of words that start four bytes later.
            for start in (0, 4):
                if (count := (len(data) - start) // 8) > 0:
                    words = torch.frombuffer(data, dtype=torch.int64, count=count, offset=start)
                    part = part * MULTIPLIER + int(torch.dot(words, keys[:count]))
            total = (total * MULTIPLIER + part) % (1 << 64)
    return total


def device_sum(tensor: torch.Tensor) -> int:
    """Return the checksum of the entries of a tensor, computed where it lies.

    A block of 32-bit words x_i has the sum of k_i x_i mod 2^64 with fixed odd k_i, so that each word counts by its
    position; the sums of the blocks are the coefficients of a polynomial.
    """
    keys, sums = _keys(BLOCK // 4, tensor.device), []
    for piece in _blocks(tensor, PIECE // tensor.element_size()):
        words = _words(piece)
        whole = len(words) // len(keys) * len(keys)
        sums.append(words[:whole].view(-1, len(keys)).to(torch.int64).mul_(keys).sum(1))
        if whole < len(words):
            sums.append(words[whole:].to(torch.int64).mul_(keys[: len(words) - whole]).sum(0, keepdim=True))
    total = 0
    for part in torch.cat(sums).tolist():
        total = (total * MULTIPLIER + part) % (1 << 64)
    return total


def _blocks(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Yield the entries in logical order, in vectors of at most `most` entries that depend on the shape only."""
    row = tensor.numel() // len(tensor)
    if row > most:
        for index in range(len(tensor)):
            yield from _blocks(tensor[index], most)
        return
    count = most // row
    for rows in tensor.split(count - count % 4 or count):  # by 4, so that most blocks are whole words
        yield rows.reshape(-1)


def _words(block: torch.Tensor) -> torch.Tensor:
    """Return the bits of a vector as integers of 32 bits, or of its entries' size where they do not fill these."""
    if block.stride(0) != 1 or block.storage_offset() * block.element_size() % 4:
        block = block.clone(memory_format=torch.contiguous_format)
    narrow = {1: torch.uint8, 2: torch.int16}.get(block.element_size(), torch.int32)
    return block.view(torch.int32 if block.nbytes % 4 == 0 else narrow)


@lru_cache(maxsize=8)
def _keys(count: int, device: torch.device) -> torch.Tensor:
    """Return fixed odd integers of 64 bits."""
    source = torch.Generator("cpu").manual_seed(0)
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=source, dtype=torch.int64, device="cpu")
    return (keys | 1).to(device)


def fingerprint(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight, or a tensor in one
        names, how = tensor.__tensor_flatten__()
        return text_digest(f"{type(tensor).__name__}{how}{[fingerprint(getattr(tensor, name)) for name in names]}")
    plain = tensor.detach().to("cpu").contiguous()
    return fingerprint_of(plain.dtype, tuple(plain.shape), [data_of(plain)])


def fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the fingerprint of each tensor, by name."""
    return _of_each(fingerprint, tensors)


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the checksum of each tensor, by name."""
    return _of_each(checksum, tensors)


def _of_each(digest: Callable[[torch.Tensor], T], tensors: Mapping[str, torch.Tensor]) -> dict[str, T]:
    """Return the digest of each tensor, by name. Uses as many threads as torch does if there is much to read."""
    threads, size = torch.get_num_threads(), sum(tensor.nbytes for tensor in tensors.values())
    if threads == 1 or size < WORTH_THREADS:
        return {name: digest(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def fingerprint_of(dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[Buffer]) -> str:
    """Return the fingerprint of a tensor that comes as blocks of its bytes."""
    digest = hashlib.sha256(f"{dtype}{shape}".encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def data_of(plain: torch.Tensor) -> Buffer:
    """Return the bytes of a contiguous tensor in host memory. The buffer shares and keeps alive the tensor's memory."""
    size = plain.numel() * plain.element_size()
    if not size:
        return bytearray()
    data: Any = (ctypes.c_char * size).from_address(plain.data_ptr())
    data.tensor = plain  # ctypes keeps only the address: a temporary tensor would be freed
    return data


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
