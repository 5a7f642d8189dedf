"""Nothing is fetched: import, adapt, a step, a transition, save and load open no socket and start no process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WATCHED = """
import json, socket, sys, tempfile

import torch, safetensors.torch, torch.export, torch._dynamo

seen = []
outside = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.", "http.", "ftplib.")
sys.addaudithook(lambda event, args: seen.append(f"{event} {args[:2]}") if event.startswith(outside) else None)

import lorasc_fx as lx
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
again = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
again.load_state_dict(model.state_dict())
x = torch.randn(3, 5)
cascade = lx.adapt(model, args=(x,))
optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
for _ in range(2):
    cascade(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    cascade.transition(optimizer)
with tempfile.TemporaryDirectory() as folder:
    lx.save(cascade, folder, optimizer=optimizer)
    loaded = lx.load(folder, again, args=(x,))
    loaded.resume(torch.optim.AdamW(loaded.param_groups(lr=0.1)))
assert torch.equal(loaded(x), cascade(x))
loaded.release()
ours = list(seen)
socket.socket().close()  # or the watch would see nothing at all
print(json.dumps([ours, seen]))
"""


def test_nothing_is_fetched() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, seen = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    assert seen[0].startswith("socket.__new__")
