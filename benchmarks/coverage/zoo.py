"""The architectures of the zoo."""

from __future__ import annotations

from benchmarks.coverage.entry import Entry
from benchmarks.coverage.zoo_hf_signals import SERIES, SPEECH, TEXT
from benchmarks.coverage.zoo_hf_text import HF_TEXT
from benchmarks.coverage.zoo_hf_vision import DENSE, IMAGES
from benchmarks.coverage.zoo_timm import TIMM
from benchmarks.coverage.zoo_torchvision import TORCHVISION

LIBRARIES: dict[str, tuple[Entry, ...]] = {
    "timm": tuple(TIMM),
    "torchvision": tuple(TORCHVISION),
    "transformers": (*HF_TEXT, *IMAGES, *DENSE, *SPEECH, *TEXT, *SERIES),
}
ZOO: dict[str, Entry] = {entry.name: entry for entries in LIBRARIES.values() for entry in entries}

QUICK = ("vit_tiny_patch16_224", "resnet18", "tv_fcn", "gpt2", "llama", "mixtral", "hf_patchtst")
"""Architectures that `make test` examines. `make ci-slow` examines a sixteenth of the others."""
