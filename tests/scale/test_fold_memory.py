"""`lorasc-fx fold` on a base of 400 MB in shards: what it holds is a few of its tensors, not the base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WIDTH, LAYERS, PER_SHARD = 1024, 100, 10
TENSOR = WIDTH * WIDTH * 4

MAKE = f"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
import lorasc_fx as lx

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})))
(folder / "base").mkdir()
held, table = list(model.state_dict().items()), dict()
for first in range(0, len(held), {PER_SHARD}):
    name = f"model-{{first:05d}}.safetensors"
    save_file(dict(held[first : first + {PER_SHARD}]), folder / "base" / name)
    table |= dict.fromkeys(dict(held[first : first + {PER_SHARD}]), name)
(folder / "base" / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": table}}))
cascade = lx.adapt(model, args=(torch.randn(2, {WIDTH}),), spec=lx.CascadeSpec(rank=2, pace=0.5))
for branch in cascade.branches.children():
    nn.init.normal_(branch.lora_B)
    branch.lora_B.data *= 1e-2
cascade.transition(None)
lx.save(cascade, folder / "run")
"""

FOLD = """
import resource, sys
import lorasc_fx.cli
from lorasc_fx.cli import main
import torch
torch.ones(2, 2) @ torch.ones(2, 2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
code = main(["fold", sys.argv[1] + "/run", "--base", sys.argv[1] + "/base", "--out", sys.argv[1] + "/folded"])
print("PEAK", before, peak())
sys.exit(code)
"""


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_peak_is_a_few_tensors(tmp_path: Path) -> None:
    run(MAKE, tmp_path)
    base = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert base > 400e6
    before, after = map(int, run(FOLD, tmp_path).rpartition("PEAK")[2].split())
    print(f"fold of {base / 1e6:.0f} MB: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB at the peak")
    experts = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert after - before < 8 * TENSOR + 3 * experts + 30e6
    assert after - before < 0.25 * base

    index = json.loads((tmp_path / "folded" / "model.safetensors.index.json").read_text())["weight_map"]
    (checkpoint,) = (tmp_path / "run").glob("version-*/*.safetensors")
    held = load_file(checkpoint)
    for name in ("0.weight", "57.weight", "99.weight"):
        with (
            safe_open(tmp_path / "base" / index[name], "pt") as one,
            safe_open(tmp_path / "folded" / index[name], "pt") as two,
        ):
            old, new = one.get_tensor(name), two.get_tensor(name)
        b, a = (held[f"expert/{name}/0/{which}"] for which in "ba")
        expected = (old.double() + 0.5 * b.double() @ a.double()).float()
        assert (expected - old).abs().max() > 1e-4
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
