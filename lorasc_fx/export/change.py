"""What the stages added to each weight, as one pair of factors: the low-rank side of a cascade, without its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorasc_fx.branch import Factors, Which, factors_of
from lorasc_fx.export.low_rank import CutOff, compressed, factored, padded, stacked
from lorasc_fx.export.peft_config import RANKS
from lorasc_fx.runtime.core import Core
from lorasc_fx.runtime.folding import ended, trained_value

__all__ = ["Change", "change_of"]


@dataclass
class Change:
    """Of a whole cascade.

    Args:
        pairs: by weight, in fp64, as the weight is stored; of weights that have moved.
        trained: values of parameters trained in full, in their own dtype.
        refused: reasons of weights whose change is no product of factors.
        cut: what a smaller rank cost.
    """

    pairs: dict[str, Factors] = field(default_factory=dict)
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cut: dict[str, CutOff] = field(default_factory=dict)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each pair."""
        return {name: pair.a.shape[-2] for name, pair in self.pairs.items()}

    def at_most(self, rank: int) -> None:
        """Cut every pair of a higher rank, and note what that cost."""
        for name, before in self.ranks.items():
            if before > rank:
                self.pairs[name], self.cut[name] = compressed(self.pairs[name], rank)

    def at_one_rank(self) -> None:
        """Bring all pairs to the first of RANKS that holds the highest, by zeros; refuse those above the last."""
        ranks = self.ranks
        over = {name: rank for name, rank in ranks.items() if rank > RANKS[-1]}
        self.refused |= {name: f"its rank is {rank}, over {RANKS[-1]}; give max_rank" for name, rank in over.items()}
        if not over:
            one = next(rank for rank in RANKS if rank >= max(ranks.values(), default=1))
            self.pairs = {name: padded(pair, one) for name, pair in self.pairs.items()}


def change_of(core: Core, which: Which) -> Change:
    """Return the change of a cascade's weights; of slow and averaged ones a stage that has trained counts as ended.

    What a dense collapse has left is factored at its numerical rank: the delta is there, and its pair is never larger
    than twice that. Kept noise has full rank, and is refused.
    """
    slow = core.slow if which == "fast" else ended(core)
    branches, change = core.branches_by_weight(), Change()
    for name, state in slow.states.items():
        coefficients, delta = state.terms("slow" if which == "fast" and slow.parked else which)
        terms = list(zip(coefficients, (expert.factors for expert in state.experts), strict=True))
        if which == "fast" and name in branches and bool(branches[name].lora_B.any()):
            terms.append((1.0, factors_of(branches[name], torch.device("cpu"))))
        if delta is not None and bool(delta.any()):
            terms.append((1.0, factored(delta)))
        if state.kept:
            change.refused[name] = "it keeps the noise of a stage (noise.keep), which has no low rank"
        elif (pair := stacked(terms)) is not None:
            change.pairs[name] = pair
    for name, value in core.trained_parameters().items():
        found = trained_value(slow, name, which, value)
        change.trained[name] = found.detach().to("cpu", value.dtype)
    return change
