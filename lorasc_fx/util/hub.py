"""Says in one sentence that the Hugging Face Hub cannot be reached, in place of an error of a network library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lorasc_fx.errors import ExportError

_UNREACHED = {"ConnectError", "ConnectionError", "ConnectTimeout"}
"""Names of errors of httpx, requests and Python. None of these libraries has to be installed."""


def uploading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `push_to_hub` that raises ExportError if the Hub cannot be reached."""

    @functools.wraps(method)
    def push_to_hub(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as fault:
            if not _UNREACHED & {kind.__name__ for kind in type(fault).__mro__}:
                raise
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            raise ExportError(
                f"push_to_hub: the Hugging Face Hub cannot be reached ({reason[0]}). Write a folder by save_pretrained "
                "(of a Trainer: save_model), and upload it later: huggingface_hub.upload_folder(repo_id=..., "
                "folder_path=...)",
                code="write-failed",
            ) from fault

    return push_to_hub
