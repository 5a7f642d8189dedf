"""Loads mutations one after the other, watched: `python -m tests.damage.runner FIRST LAST` prints what came of them.

In a process of its own, as an audit hook cannot be taken away again, a limit of memory is the process's, and a crash
ends one.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401 - whose generator is saved then
import torch
from safetensors.torch import load
from torch import nn

import lorasc_fx as lx
from lorasc_fx.plan import Plan
from lorasc_fx.spec import Noise
from tests.damage.mutations import MANIFEST, TENSORS, mutated, put
from tests.errors.models import inputs, loss_of
from tests.errors.state import State, of, raw
from tests.kit.state import read

X = inputs(3, 5)
SPEC = lx.CascadeSpec(train=("head.*",), rank=1, restart="fast", noise=lx.Noise(0.2, keep=True))
ROOM = 768 << 20
"""Bytes of address space that a load may take on top of what stands: threads of torch and what it maps need most."""
RUNS = ("exec", "compile", "import", "pickle.", "marshal.", "subprocess.", "socket.", "os.system", "os.exec", "os.fork",
        "os.posix_spawn", "os.spawn", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir", "os.symlink",
        "shutil.")  # fmt: skip


SAID = (
    "frontend", "base", "slow", "trained", "idle", "extra", "optimizer", "scheduler",
    "tensor_references",
)  # fmt: skip


class Small(nn.Module):
    """Two sites, one that keeps experts and one that collapses; buffers; a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.mid, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.norm(torch.tanh(self.body(x))))))


def optimizers(cascade: lx.Cascade) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def written(folder: Path, stages: int, spec: lx.CascadeSpec = SPEC) -> dict[str, bytes]:
    """The files of a version after some stages, one under way."""
    cascade = lx.adapt(Small(), args=(X,), spec=spec, frontend="symbolic")
    optimizer, scheduler = optimizers(cascade)
    for stage in range(stages + 1):
        loss_of(cascade(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if stage < stages:
            cascade.transition(optimizer)
            scheduler.step()
    loss_of(cascade(X)).backward()  # gradients that wait
    extra = {"losses": [0.5, float("inf")], "epoch": 3, "name": "run", "order": torch.arange(3)}
    path = lx.save(cascade, folder, optimizer=optimizer, scheduler=scheduler, extra=extra)
    return {name: (path / name).read_bytes() for name in (MANIFEST, TENSORS)}


# ---- watching


@dataclass
class Watch:
    """Events of the audit hook that mean that something was run, written, or opened for it."""

    on: bool = False
    seen: set[str] = field(default_factory=set)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes)):
                self.seen.add(f"open {path!r} {'to write' if flags & 3 else 'to read'}")
        elif event == "exec":
            self.seen.add(f"exec {getattr(args[0], 'co_filename', '?').partition('.')[0]}")
        elif event.startswith(RUNS):
            self.seen.add(f"{event} {args[0] if event == 'import' else ''}")


# ---- one mutation


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(ours[key] == theirs[key] for key in ours)


def says(folder: Path, again: Path) -> str:
    """What differs between a folder that was loaded and what its cascade is saved as: "" for nothing."""
    there, here = ((path / "version-00000001") for path in (folder, again))
    manifests = [json.loads((path / MANIFEST).read_bytes()) for path in (there, here)]
    plans = [Plan.from_json(json.dumps(manifest["plan"])) for manifest in manifests]
    if plans[0] != plans[1]:
        return "plan"
    for manifest in manifests:
        for state in manifest["slow"].values():
            state["noises"] = [{**kept, "noise": vars(Noise(**kept["noise"]))} for kept in state["noises"]]
        for what in ("optimizer", "scheduler"):  # a field that nobody knows is not looked at
            known = ("class", "groups", "numbers", "state")
            manifest[what] = {key: value for key, value in manifest.get(what, {}).items() if key in known}
        manifest.get("tensor_references", []).sort(key=json.dumps)  # in no order
        for group in manifest["optimizer"]["groups"]:
            group.pop("decoupled_weight_decay", None)  # AdamW sets it itself, whatever it is given
    for key in SAID:
        if manifests[0].get(key) != manifests[1].get(key):
            return key
    for key in ("python", "numpy"):
        if manifests[0]["rng"].get(key, manifests[1]["rng"][key]) != manifests[1]["rng"][key]:
            return f"rng of {key}"
    tensors = [load((path / TENSORS).read_bytes()) for path in (there, here)]
    if tensors[0].keys() != tensors[1].keys():
        return "names of tensors"
    generator = torch.Generator()
    generator.set_state(tensors[0]["rng/torch"])  # a generator does not keep what its state has for filling
    tensors[0]["rng/torch"] = generator.get_state()
    for name, ours in tensors[1].items():
        if raw(tensors[0][name].to(ours.dtype)) != raw(ours):
            return name
    return ""


def outcome(
    folder: Path, model: nn.Module, before: State, watch: Watch, benign: set[str], args: tuple[torch.Tensor, ...] = (X,)
) -> str:
    """What comes of a load and a resume: refused, at which door; or loaded as the folder says; all else is a fault."""
    inside = str(folder)
    watch.seen.clear()
    watch.on = True
    try:
        read(folder)
        door = "load"
    except lx.CheckpointError as fault:
        door = "read"
        if str(folder) not in str(fault) or len(str(fault)) > 1500:
            return f"FAULT: a message without its file: {fault}"[:300]
    finally:
        watch.on = False
    odd = {each for each in watch.seen if not (each.startswith("open ") and inside in each and "to read" in each)}
    if odd:
        return f"FAULT: reading did {sorted(odd)[:3]}"
    if door == "read":
        return "refused at read"
    watch.on = True
    try:
        cascade = lx.load(folder, model, args=args)
    except lx.CheckpointError as fault:
        watch.on = False
        if not same(of(model), before):
            return f"FAULT: refused, and the model has changed: {fault}"
        return "refused at load" if str(folder) in str(fault) else f"FAULT: a message without its file: {fault}"
    finally:
        watch.on = False
    odd = {each for each in watch.seen - benign if not (each.startswith("open ") and inside in each)}
    if odd:
        return f"FAULT: loading did {sorted(odd)[:3]}"
    optimizer, scheduler = optimizers(cascade)
    held = of(cascade, optimizer), dict(scheduler.state_dict())
    try:
        extra = cascade.resume(optimizer, scheduler)
    except lx.CheckpointError as fault:
        if not same(of(cascade, optimizer), held[0]) or scheduler.state_dict() != held[1]:
            return f"FAULT: refused, and something has changed: {fault}"
        return "refused at resume"
    with tempfile.TemporaryDirectory() as again:
        lx.save(cascade, again, optimizer=optimizer, scheduler=scheduler, extra=extra)
        differs = says(folder, Path(again))
    return f"FAULT: loaded, and differs in {differs}" if differs else "loaded as it says"


def run(first: int, last: int) -> dict[str, Any]:
    """Outcomes by count, and each fault with the number of its mutation and what that did."""
    top = Path(tempfile.mkdtemp())
    files, other = written(top / "one", 2), written(top / "other", 1)
    watch = Watch()
    sys.addaudithook(watch)
    found: Counter[str] = Counter()
    faults: list[str] = []
    try:
        put_whole = top / "whole" / "version-00000001"
        put_whole.mkdir(parents=True)
        put(put_whole, files)
        model = Small()
        lx.load(top / "whole", Small(), args=(X,))  # what a first load imports
        before = of(model)
        watch.on = True
        lx.load(top / "whole", Small(), args=(X,))  # what every load of it does
        watch.on = False
        benign = {each for each in watch.seen if not each.startswith("open ")}
        came = outcome(top / "whole", Small(), before, watch, benign)
        assert came == "loaded as it says", came
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        for index in range(first, last):
            folder = top / f"mutation {index}"
            what = mutated(index, files, other, folder)
            try:
                args = () if index % 4 else (X,)  # with inputs a load captures, which is most of its time
                came = outcome(folder, model, before, watch, benign, args)
            except Exception as fault:
                came = f"FAULT: {type(fault).__name__}: {fault}"[:300]
            if came.startswith("FAULT"):
                faults.append(f"{index} ({what[:160]}): {came}")
            found[came.partition(":")[0]] += 1
            if not came.startswith("refused at read"):
                model = Small()  # a load may have taken it
                before = of(model)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return {"outcomes": dict(found), "faults": faults, "benign": sorted(benign)}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
