"""Every architecture of the zoo, and those that are quick enough to be looked at on each run."""

from __future__ import annotations

from tests.models.entry import Entry
from tests.models.zoo_hf_text import HF_TEXT
from tests.models.zoo_hf_vision import HF_VISION
from tests.models.zoo_timm import TIMM
from tests.models.zoo_torchvision import TORCHVISION

LIBRARIES: dict[str, tuple[Entry, ...]] = {
    "timm": tuple(TIMM),
    "torchvision": tuple(TORCHVISION),
    "transformers": (*HF_TEXT, *HF_VISION),
}
ZOO: dict[str, Entry] = {entry.name: entry for entries in LIBRARIES.values() for entry in entries}

_PICTURES = ("vit_tiny_patch16_224", "resnet18", "convnext_atto", "mobilevitv2_050", "ConvMixer", "VGG", "tv_fcn")
_TEXTS = ("bert", "gpt2", "llama", "mixtral", "modernbert", "fnet")
QUICK = frozenset((*_PICTURES, *_TEXTS, "tv_regnet", "hf_vit", "hf_patchtst"))
"""Those that the suite looks at on each run; `make ci-slow` looks at all."""
