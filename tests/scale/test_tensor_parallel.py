"""In parts by columns and rows: outputs, gradients and weights of one process, over steps and transitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasc_fx as lx
from tests.scale.parallel import WORKS, cascade_of, end, from_files, in_parts, optimizer_of, saved_in_parts, step, train
from tests.scale.ranks import spawn

pytestmark = pytest.mark.slow


SMALL = ("mlp", "mlp, kept", "mlp, pissa", "mlp, averaged", "mlp, ranks", "gpt")


@pytest.mark.parametrize("names", [SMALL, ("llama",)], ids=["small", "llama"])
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


def test_models_of_the_meta_device_get_their_shards_from_files(tmp_path: Path) -> None:
    names = ("mlp", "mlp, pissa")
    for name in names:
        torch.manual_seed(0)
        save_file(WORKS[name].build().double().state_dict(), tmp_path / f"{name}.safetensors")
    spawn(from_files, names, str(tmp_path))
    for name in names:
        cascade = cascade_of(WORKS[name])
        size = sum(each.numel() for each in cascade.model.parameters())
        expected = train(cascade, WORKS[name])
        expected |= {f"gathered {key}": value for key, value in end(cascade).items()}
        for rank in range(2):
            found = load_file(tmp_path / f"{name} {rank}.safetensors")
            assert found.pop("local model").item() < 0.75 * size
            assert set(found) == set(expected)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["mlp", "mlp, pissa", "mlp, averaged", "mlp, ranks"])
def test_a_checkpoint_of_parts_goes_on_in_parts_and_on_one_process(name: str, tmp_path: Path) -> None:
    spawn(saved_in_parts, name, str(tmp_path))
    work, seen = WORKS[name], load_file(tmp_path / "saved 1.safetensors")
    torch.manual_seed(0)
    loaded = lx.load(tmp_path / "run", work.build().double().eval(), kwargs=work.kwargs)
    optimizer = optimizer_of(loaded)
    loaded.resume(optimizer)
    alone = cascade_of(work)
    trained = optimizer_of(alone)
    for _ in range(2):
        step(alone, trained, work)
        alone.transition(trained)
        step(alone, trained, work)
    for at in range(3):
        expected = step(alone, trained, work)
        torch.testing.assert_close(step(loaded, optimizer, work), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen[f"output {at}"], expected, rtol=1e-12, atol=1e-12)
