"""A form of your own: a fused operator, `gelu(x W^T + b)`, whose weight can be adapted."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

import lorasc_fx as lx
from lorasc_fx.graph import WeightForm, register_form


@torch.library.custom_op("my::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu(linear(x, weight, bias))


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def backward(ctx, grad):
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        return torch.autograd.grad(gelu(linear(*inputs)), inputs, grad)


linear_gelu.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

# Adding a branch to the output, after the gelu, would not change the weight. So the branch is added to the weight.
FORM = WeightForm("my.linear_gelu", "linear", (linear_gelu,), ("x", "weight", "bias"))


class Fused(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear_gelu(input, self.weight, self.bias)


def main() -> lx.Cascade:
    model = nn.Sequential(Fused(6, 8), nn.Linear(8, 3))
    with register_form(FORM):  # or `handle = register_form(FORM)`, until `handle.remove()`
        return lx.adapt(model, args=(torch.randn(4, 6),), spec=lx.CascadeSpec(rank=2))


if __name__ == "__main__":
    print(main())
