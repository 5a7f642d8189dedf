"""In parts by columns and rows: outputs, gradients and weights of one process, over steps and transitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scale.parallel import WORKS, cascade_of, end, in_parts, train
from tests.scale.ranks import spawn

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("names", [("mlp", "mlp, kept", "gpt"), ("llama",)], ids=["small", "llama"])
def test_it_computes_what_one_process_computes(names: tuple[str, ...], tmp_path: Path) -> None:
    spawn(in_parts, names, str(tmp_path))
    for name in names:
        cascade = cascade_of(WORKS[name])
        expected = train(cascade, WORKS[name])
        expected |= {f"gathered {key}": value for key, value in end(cascade).items()}
        for rank in range(2):
            found = load_file(tmp_path / f"{name} {rank}.safetensors")
            local = {key: found.pop(key).item() for key in list(found) if key.startswith("local ")}
            assert set(found) == set(expected)
            for key, value in expected.items():
                torch.testing.assert_close(
                    found[key], value, rtol=1e-12, atol=1e-12, msg=lambda said, key=key: f"{key}: {said}"
                )
            assert any(key.startswith("gradient") and value.abs().max() > 1e-4 for key, value in expected.items())
            model = cascade_of(WORKS[name]).model
            assert local["local model"] < 0.75 * sum(each.numel() for each in model.parameters())
