"""Four curves: a step by rank, by number of sites and by stage, and the size of the slow state by stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx

from .measure import Turn, alternate, ratio
from .models import STACK, WORKS, Work
from .rivals import RANK, Rival, adapted, check_same_work, make, wrapped
from .transitions import train

__all__ = ["BLOCKS", "RANKS", "by_rank", "by_sites", "by_stages", "draw", "state_size", "topmost"]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCKS = (1, 2, 4, 8, 12)
STATE_RANK = 32

Rows = list[dict[str, float]]
Choice = tuple[dict[str, Any], dict[str, Any]]
"""Options of our spec, and of peft's LoraConfig."""


def by_rank(rounds: int, ranks: Sequence[int] = RANKS, work: Work = STACK) -> Rows:
    """Return the step over the frozen one by rank, ours and peft's; all take turns."""
    options = {str(rank): ({"rank": rank}, {"r": rank}) for rank in ranks}
    return [{"rank": int(name), **row} for name, row in _beside(work, options, rounds).items()]


def by_sites(rounds: int, choices: Sequence[Choice] | None = None, work: Work = WORKS["vit-s"]) -> Rows:
    """Return the same by the number of sites: by default those of the topmost blocks of a vision transformer."""
    picked = topmost(BLOCKS, work) if choices is None else choices
    options = {str(index): choice for index, choice in enumerate(picked)}
    return list(_beside(work, options, rounds).values())


def topmost(counts: Sequence[int], work: Work) -> list[Choice]:
    """Return what means the sites of so many topmost blocks, to us and to peft."""
    found: list[Choice] = []
    for count in counts:
        kept = range(max(BLOCKS) - count, max(BLOCKS))
        targets = tuple(target.replace("*.", f"blocks.{block}.*", 1) for block in kept for target in work.targets)
        pattern = rf"blocks\.({'|'.join(map(str, kept))})\.{work.peft['target_modules']}"
        found.append(({"targets": targets}, {"target_modules": pattern}))
    return found


def _beside(work: Work, options: dict[str, Choice], rounds: int) -> dict[str, Any]:
    """Return, for each choice of options, the ratios of ours and peft's to one frozen model."""
    model, batch = work.build(), work.batch()
    frozen = make("frozen", work, copy.deepcopy(model), batch)
    rivals, counts = {"frozen": frozen}, {}
    for name, (ours, theirs) in options.items():
        cascade = adapted(work, copy.deepcopy(model), batch, **ours)
        wrapper = wrapped(work, copy.deepcopy(model), **theirs)
        check_same_work(work, cascade, wrapper)
        counts[name] = len(cascade.sites)
        rivals[f"ours {name}"] = Rival(cascade, work, frozen.inputs)
        rivals[f"peft {name}"] = Rival(wrapper, work, frozen.inputs)
    times = alternate({name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}, rounds)
    return {
        name: {
            "sites": counts[name],
            **{library: ratio(times[f"{library} {name}"], times["frozen"])["paired"] for library in ("ours", "peft")},
        }
        for name in options
    }


def by_stages(rounds: int, transitions: int = 6, work: Work = STACK) -> Rows:
    """Return the step of one cascade over the frozen one, at each stage; its rounds are taken between transitions."""
    model, batch = work.build(), work.batch()
    frozen = make("frozen", work, copy.deepcopy(model), batch)
    ours = make("ours", work, model, batch)
    optimizer = torch.optim.AdamW(_cascade(ours.model).param_groups(lr=1e-3))
    rows = []
    for done in range(transitions + 1):
        if done:
            ours.prepare()
            train(_cascade(ours.model), optimizer)
            _cascade(ours.model).transition(optimizer)
        turns = {name: Turn(each.prepare, each.step) for name, each in (("frozen", frozen), ("ours", ours))}
        times = alternate(turns, rounds)
        rows.append({"transitions": done, "ours": ratio(times["ours"], times["frozen"])["paired"]})
    return rows


def state_size(transitions: int = 14, rank: int = STATE_RANK, work: Work = WORKS["vit-s"]) -> Rows:
    """Return the bytes of what the stages added (experts, or a dense delta) after each transition, and of W0."""
    cascade = adapted(work, work.build(), work.batch(), rank=rank)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    rows = [_sizes(cascade, 0)]
    for done in range(1, transitions + 1):
        train(cascade, optimizer)
        cascade.transition(optimizer)
        rows.append(_sizes(cascade, done))
    return rows


def _sizes(cascade: lx.Cascade, done: int) -> dict[str, float]:
    states = list(cascade._run.slow.states.values())
    factors = {expert.b for state in states for expert in state.experts}
    factors |= {expert.a for state in states for expert in state.experts}
    dense = {each for state in states for each in (state.slow.dense, state.start.dense) if each is not None}
    return {
        "transitions": done,
        "experts": sum(factor.nbytes for factor in factors),
        "dense": sum(each.nbytes for each in dense),
        "base": sum(state.base.nbytes for state in states),
    }


def _cascade(model: nn.Module) -> lx.Cascade:
    assert isinstance(model, lx.Cascade)
    return model


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the curves as one SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with mpl.rc_context({"svg.hashsalt": "lorasc-fx"}):  # the same file for the same numbers
        figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
        _ratios(panels[0, 0], found["rank"], "rank", "rank", ("ours", "peft"))
        panels[0, 0].set_xscale("log", base=2)
        panels[0, 0].set_xticks(ranks := [row["rank"] for row in found["rank"]], labels=[str(rank) for rank in ranks])
        _ratios(panels[0, 1], found["sites"], "sites", f"sites, rank {RANK}", ("ours", "peft"))
        _ratios(panels[1, 0], found["stages"], "transitions", f"transitions done, rank {RANK}", ("ours",))
        rows = found["state"]
        done = [row["transitions"] for row in rows]
        panels[1, 1].plot(
            done, [(row["experts"] + row["dense"]) / 2**20 for row in rows], marker="o", label="slow state"
        )
        panels[1, 1].plot(done, [row["base"] / 2**20 for row in rows], linestyle="--", label="W0")
        panels[1, 1].set(xlabel=f"transitions done, rank {STATE_RANK}", ylabel="MiB")
        panels[1, 1].legend()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _ratios(axes: Any, rows: Rows, x: str, label: str, lines: Sequence[str]) -> None:
    for name in lines:
        axes.plot([row[x] for row in rows], [row[name] for row in rows], marker="o", label=name)
    values = [row[name] for row in rows for name in lines]
    axes.set(xlabel=label, ylabel="CPU seconds of a step / frozen", ylim=(min(0.99, *values), max(values) + 0.02))
    axes.legend()
