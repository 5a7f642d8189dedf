"""Transformers' architectures for vision, speech, text with images, and time series."""

from __future__ import annotations

from tests.models.entry import Entry
from tests.models.zoo_hf_vision_dense import DENSE
from tests.models.zoo_hf_vision_images import IMAGES
from tests.models.zoo_hf_vision_series import SERIES
from tests.models.zoo_hf_vision_speech import SPEECH
from tests.models.zoo_hf_vision_text import TEXT

HF_VISION: tuple[Entry, ...] = (*IMAGES, *DENSE, *SPEECH, *TEXT, *SERIES)
