"""Pairs of a spec's fields that have no meaning together: each is one clear error."""

from __future__ import annotations

from lorasc_fx.errors import SpecError

__all__ = ["check_noise", "check_start"]


def check_noise(keep: bool, redraw: str, distribution: str) -> None:
    """Refuse to keep noise of which there is no one draw, or no one size."""
    if keep and redraw == "step":
        raise SpecError(
            "noise.keep is True and noise.redraw is 'step': a stage has many draws, and none of them is its noise; "
            "give keep=False, or redraw='stage'"
        )
    if keep and distribution == "filter":
        raise SpecError(
            "noise.keep is True and noise.distribution is 'filter', whose size differs from row to row, and what is "
            "kept has one size a weight; give keep=False, or distribution='normal'"
        )


def check_start(start: str, restart_A: str) -> None:
    """Refuse a rule for lora_A where both factors start from the weight."""
    if start != "lora" and restart_A != "fresh":
        raise SpecError(
            f"start is {start!r}, which takes lora_A out of the weight, and restart_A is {restart_A!r}; "
            "give restart_A='fresh', or start='lora'"
        )
