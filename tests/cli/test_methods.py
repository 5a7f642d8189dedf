"""What each method of `compare` is, as a spec."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorasc_fx.cli.methods import METHODS
from lorasc_fx.spec import CascadeSpec, Noise, Rule

ASKED = CascadeSpec(
    rank=4,
    lora_alpha=8,
    pace=0.3,
    restart="fast",
    noise=Noise(0.2),
    rules=(Rule("conv", rank=2), Rule("*", lora_alpha=6)),
)
PLAIN = replace(ASKED, pace=1.0, restart="slow", noise=Noise())


@pytest.mark.parametrize(
    ("method", "spec", "stages"),
    [
        ("lora", PLAIN, 1),
        ("cascade", PLAIN, 5),
        ("lorasc", ASKED, 5),
        (
            "lora-summed",
            replace(PLAIN, rank=20, lora_alpha=40, rules=(Rule("conv", rank=10), Rule("*", lora_alpha=30))),
            1,
        ),
    ],
)
def test_methods_with_branches(method: str, spec: CascadeSpec, stages: int) -> None:
    row = METHODS[method]
    assert row.spec is not None
    assert (row.spec(ASKED, 5), 5 if row.staged else 1) == (spec, stages)


def test_methods_without_branches() -> None:
    assert METHODS["probe"].parameters(replace(ASKED, train=("head.*",))) == ("head.*",)
    assert METHODS["full"].parameters(ASKED) == ("*",)


def test_the_summed_rank_has_the_same_scale() -> None:
    spec = METHODS["lora-summed"].spec
    assert spec is not None
    summed = spec(ASKED, 5)
    assert summed.lora_alpha / summed.rank == ASKED.lora_alpha / ASKED.rank
