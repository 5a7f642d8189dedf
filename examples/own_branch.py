"""An adapter method of your own: LoRA with a trained gain for each rank, `delta = s B diag(c) A`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.branch import LowRankBranch
from lorasc_fx.branch.lora import random_factor
from lorasc_fx.plan import Site


class GainBranch(LowRankBranch):
    """A [rank, in] is random, B [out, rank] zero, and c [rank] one: a stage starts at its weight."""

    zeros = ("gain_B",)  # while these are zero, the delta is zero
    options = frozenset({"lora_alpha", "use_rslora"})  # the method has LoRA's scale

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        a, b = site.factor_shapes
        return {"gain_A": a, "gain_B": b, "gain_c": (site.rank,)}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> Mapping[str, Tensor]:
        values = super().initial_values(site, seed, stage)  # zeros
        a = random_factor(seed, stage, "gain_A", site.weight, site.factor_shapes[0])
        return {**values, "gain_A": a, "gain_c": torch.ones(site.rank)}

    @property
    def down(self) -> Tensor:
        return self.get_parameter("gain_A")

    @property
    def up(self) -> Tensor:
        return self.get_parameter("gain_B") * self.get_parameter("gain_c")


lx.register_branch("lora-gain", GainBranch)


def main() -> lx.Cascade:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 6)
    cascade = lx.adapt(model, args=(x,), spec=lx.CascadeSpec(adapter="lora-gain", rank=2))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2))  # with groups gain_A, gain_B and gain_c
    for _ in cascade.stages(2, optimizer):
        cascade(x).square().mean().backward()
        optimizer.step()
    return cascade


if __name__ == "__main__":
    print(main())
