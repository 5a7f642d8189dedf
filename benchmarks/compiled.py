"""`torch.compile` of a cascade beside that of peft's wrapper and of the frozen model: `--only compiled`.

Each rival is compiled by inductor with empty caches of its own, in this process (`compile_threads=1`). Its first step,
forward and backward, has the compilation in it. Then it trains and ends a stage: ours by `transition`, peft's by
`merge_and_unload`, `get_peft_model` and another `torch.compile`, with the caches that its first step filled. Graphs are
those that dynamo handed to inductor. At last the rivals take turns with their steps.
"""

from __future__ import annotations

import copy
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import lorasc_fx as lx

from .measure import Turn, alternate, ratio
from .models import Work
from .rivals import Rival, check_same_work, make, wrapped
from .transitions import train

__all__ = ["COMPILED", "PAIRS", "can_compile", "compiled"]

COMPILED = ("frozen", "peft", "ours")
"""The rivals."""
PAIRS = (("ours", "frozen"), ("peft", "frozen"), ("ours", "peft"))


def can_compile() -> bool:
    """Return whether there is the C++ compiler that inductor needs on a CPU."""
    from torch._inductor.config import cpp

    names = cpp.cxx if isinstance(cpp.cxx, tuple | list) else [cpp.cxx]
    return any(name is not None and shutil.which(name) is not None for name in names)


def compiled(work: Work, rounds: int) -> dict[str, Any]:
    """Return seconds and graphs of the first step, and of the first after a transition, and the ratios of a step, as
    plain data.

    Raises:
        RuntimeError: ours and peft train different numbers of entries, or a step that is timed compiled a graph.
    """
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    model, batch = work.build(), work.batch()
    rivals: dict[str, Rival] = {}
    found: dict[str, Any] = {"title": work.title, "first": {}, "transition": {}}
    torch._dynamo.reset()
    with config.patch(compile_threads=1):
        for name in COMPILED:
            eager = make(name, work, copy.deepcopy(model), batch)
            with fresh_cache():
                rival = replace(eager, model=torch.compile(eager.model))
                found["first"][name] = _counted(rival)
                if name != "frozen":
                    rival = _next_stage(eager, rival)
                    found["transition"][name] = _counted(rival)
            rivals[name] = rival
        check_same_work(work, rivals["ours"].model, rivals["peft"].model)
        before = _graphs()
        times = alternate({name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}, rounds)
    if _graphs() != before:
        raise RuntimeError(f"{work.title}: the steps compiled {_graphs() - before} more graphs; they were to be timed")
    found["seconds"] = {name: time.to_dict() for name, time in times.items()}
    found["ratios"] = {f"{one}/{other}": ratio(times[one], times[other]) for one, other in PAIRS}
    return found


def _next_stage(eager: Rival, rival: Rival) -> Rival:
    """Train, end the stage, and return the compiled rival of the next one."""
    model: Any = eager.model
    if isinstance(model, lx.Cascade):
        optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3))
        train(model, optimizer)
        model.transition(optimizer)
        return rival
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, torch.optim.AdamW(parameters, lr=1e-3))
    return replace(rival, model=torch.compile(wrapped(rival.work, model.merge_and_unload())))


def _counted(rival: Rival) -> dict[str, float]:
    """Return the seconds of a step, CPU with that of child processes, and the graphs that dynamo made in it and in the
    next one.
    """
    rival.prepare()
    before = _graphs()
    seconds = _seconds(rival.step)
    rival.prepare()
    rival.step()
    return {**seconds, "graphs": _graphs() - before}


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _seconds(run: Callable[[], None]) -> dict[str, float]:
    def cpu() -> float:
        """The compiler is a child process."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    wall_start, cpu_start = time.perf_counter(), cpu()
    run()
    return {"cpu": cpu() - cpu_start, "wall": time.perf_counter() - wall_start}
