"""A clear error if the Hugging Face Hub cannot be reached, instead of the errors of network libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lorasc_fx.errors import ExportError

_CONNECTION_ERRORS = {"ConnectError", "ConnectionError", "ConnectTimeout"}
"""Class names of errors of httpx, requests and Python. By name, because the libraries may not be installed."""


def uploading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `push_to_hub` method so that it raises ExportError if the Hub cannot be reached."""

    @functools.wraps(method)
    def push_to_hub(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as fault:
            if not _CONNECTION_ERRORS & {kind.__name__ for kind in type(fault).__mro__}:
                raise
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            raise ExportError(
                f"push_to_hub: the Hugging Face Hub cannot be reached ({reason[0]}). Write a folder with "
                "save_pretrained (of a Trainer: save_model), and upload it later with "
                "huggingface_hub.upload_folder(repo_id=..., folder_path=...)",
                code="write-failed",
            ) from fault

    return push_to_hub
