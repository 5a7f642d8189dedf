"""An adapter method of your own: LoRA with a trained gain for each rank, `delta = s B diag(c) A`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.branch import Declared, LowRankBranch
from lorasc_fx.branch.lora import random_factor
from lorasc_fx.plan import Site


class GainBranch(LowRankBranch):
    """A [rank, in] starts random, B [out, rank] with zeros and c [rank] with ones, so delta starts at zero."""

    options = frozenset({"lora_alpha", "use_rslora"})  # the method has LoRA's scale

    @classmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        a, b = site.factor_shapes
        return {"gain_A": Declared(a, random_factor), "gain_B": Declared(b), "gain_c": Declared((site.rank,), 1.0)}

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
