"""Pairs of a spec's fields that have no meaning together: each is one clear error."""

from __future__ import annotations

from lorasc_fx.errors import SpecError

__all__ = ["check_dora", "check_noise", "check_start"]


def check_dora(restart: str, restart_A: str, dropout: float, placement: str, keep: bool, redraw: str) -> None:
    """Refuse what a row scale does not go together with."""
    if restart != "slow":
        raise SpecError(
            f"use_dora is True and restart is {restart!r}: the rows of slow and fast weights would be scaled apart, "
            "and no one list of experts has both; give restart='slow', or use_dora=False"
        )
    if restart_A == "gradient":
        raise SpecError(
            "use_dora is True and restart_A is 'gradient', whose first step is known for plain LoRA only; "
            "give restart_A='fresh' or 'kept', or use_dora=False"
        )
    if dropout:
        raise SpecError(
            f"use_dora is True and dropout is {dropout}: the branch stands in place of its op, whose input is not "
            "dropped; give dropout=0, or use_dora=False"
        )
    if placement not in ("auto", "merged"):
        raise SpecError(
            f"use_dora is True and placement is {placement!r}: magnitudes scale the op's own product, so the branch "
            "stands in its place; give placement='auto' or 'merged', or use_dora=False"
        )
    if keep:
        raise SpecError(
            "use_dora is True and noise.keep is True: noise that stays would be scaled by every later stage; "
            "give keep=False, or use_dora=False"
        )
    if redraw != "stage":
        raise SpecError(
            "use_dora is True and noise.redraw is 'step': the norms of a stage would be those of its last draw; "
            "give redraw='stage', or use_dora=False"
        )


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
