"""Matrix products for forward and backward, in the memory layouts and libraries in which they are fast.

Products with low-rank factors are memory bound. Two layouts make them faster than plain matmuls:

1. Rows [tokens, features] are viewed as chunks [chunks, tokens/chunks, features]. A batched product of a few chunks
uses all cores, but a single product with a small rank does not. 2. The factor [rank, features] is the left operand, so
that the large operand is read in the order of its memory.

A 1x1 convolution is one product per image if the memory is channels-first, and one product of all pixels if it is
channels-last. Other kernels use torch's convolution with `rank` channels. These choices come from CPU timings on the
shapes of a ResNet-50.

Large fp32 products on the CPU use oneDNN instead of torch's BLAS. torch computes them with MKL, which uses AVX-512 only
on processors of Intel. oneDNN uses AVX-512 on all processors. The results are equal up to rounding. So cascades use
oneDNN only if gradients are enabled: without gradients, they compute the same bits as the ops of the model. Banks
always use oneDNN.

The autograd functions of branches compute the formulas of docs/algorithm.md (rows "training" and "Conv"). At the
placement "beside", one fused product adds the term of the branch to the output of the op. Only A x is saved for the
backward, and x if lora_A needs a gradient. Dropout saves no mask: the backward draws it again from a seed.

Names: `low` is A x, and `back` the gradient of `low` without the scale. `grad_rows` is the gradient of the output as
rows [tokens, features]. da, db, dx, dw are gradients of lora_A, lora_B, x and the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.errors import StateError
from lorasc_fx.util.torch_private import OpOverload, dispatch_modes, functorch_is_active, mkldnn_is_enabled

_MIN_CHUNK = 64
"""Minimum number of tokens in a chunk. Smaller chunks cost more than they gain."""


def allows_custom_backward(*tensors: torch.Tensor) -> bool:
    """Whether an autograd.Function may compute with these tensors: eager mode, gradients enabled, no transforms.

    If not, callers use plain operations. Compilers plan the backward themselves. Function transforms, forward-mode
    autograd, tracers and tensor subclasses only have rules for plain operations.
    """
    if not torch.is_grad_enabled() or not is_eager(*tensors):
        return False
    return not any(tensor.is_nested for tensor in tensors) and torch.autograd.forward_ad._current_level < 0


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether these are plain tensors outside compilers, tracers and function transforms."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return plain and not functorch_is_active()


def apply(function: type[torch.autograd.Function], *args: object) -> torch.Tensor:
    """Call an autograd.Function that returns one tensor."""
    output: torch.Tensor = function.apply(*args)
    return output


def detached(output: torch.Tensor) -> torch.Tensor:
    """Return the output of an autograd.Function as a tensor that the next op may write to, even if it is a view."""
    return output.detach()


def plus(output: torch.Tensor, term: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `output + scale * term`.

    Under a compiler, this does not use `alpha`. Inductor (torch 2.13) fuses a product and `torch.add` to addmm, and
    drops the alpha.
    """
    if torch.compiler.is_compiling():
        return output + term * scale
    return torch.add(output, term, alpha=scale)


def merged_matrix(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `weight + scale * b @ a` [rows, columns] in the memory order of the weight.

    torch chooses the algorithm of a product by the memory order of its operands.
    """
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return torch.addmm(weight, b, a, alpha=scale)
    return torch.addmm(weight.t(), a.t(), b.t(), alpha=scale).t()


def with_strides(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return an adapted weight with the strides of the weight. Under tracers, or if not contiguous, return `total`.

    For a 1x1 kernel, channels-first and channels-last strides differ only along axes of length 1. But a convolution
    chooses its algorithm by strides.
    """
    if total.stride() == weight.stride() or not (total.is_contiguous() and weight.is_contiguous()):
        return total
    return total.as_strided(weight.shape, weight.stride()) if is_eager(total, weight) else total


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a product of x is computed: the autocast dtype if autocast applies, else x.dtype."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast and x.dtype != torch.float64 else x.dtype


def without_autocast(method: Callable[..., object]) -> Callable[..., object]:
    """Decorate forward or backward of an autograd.Function, to run it with autocast disabled."""

    @wraps(method)
    def call(ctx: Any, tensor: torch.Tensor, *args: object) -> Any:
        kind = tensor.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return method(ctx, tensor, *args)
        with torch.autocast(kind, enabled=False):
            return method(ctx, tensor, *args)

    return call


def chunked(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [tokens, features] as [chunks, tokens/chunks, features].

    On the CPU, the number of chunks is the largest power of two that divides the tokens and is at most the number of
    threads. On other devices there is one chunk.
    """
    tokens, chunks = rows.shape[0], 1
    if rows.device.type == "cpu":
        limit = min(torch.get_num_threads(), tokens // _MIN_CHUNK)
        while 2 * chunks <= limit and tokens % (2 * chunks) == 0:
            chunks *= 2
    return rows.reshape(chunks, tokens // chunks, rows.shape[-1])


def down(factor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `factor @ rows^T` [chunks, rank, tokens/chunks] for factor [rank, features] and chunked rows."""
    return torch.bmm(factor.expand(rows.shape[0], -1, -1), rows.transpose(1, 2))


def up(rows: torch.Tensor | None, low: torch.Tensor, factor: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `rows + scale * low^T @ factor` for chunked rows and `low` from `down`. None for `rows` means zeros."""
    factor = factor.expand(low.shape[0], -1, -1)
    if rows is None:
        return torch.bmm(low.transpose(1, 2), factor).mul_(scale)
    return torch.baddbmm(rows, low.transpose(1, 2), factor, alpha=scale)


def factor_gradient(low: torch.Tensor, rows: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return `scale * low @ rows` summed over all tokens, [rank, features]."""
    product = torch.bmm(low, rows)
    total = product[0] if product.shape[0] == 1 else product.sum(0)
    return total.mul_(scale) if scale != 1.0 else total


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation of a convolution, each with one number per spatial axis, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def is_product(self, kernel: Sequence[int]) -> bool:
        """Whether the convolution is one matrix product per pixel: kernel 1x1, stride 1, no padding, no groups."""
        return all(size == 1 for size in (*kernel, *self.stride)) and not any(self.padding) and self.groups == 1

    def dense(self, x: torch.Tensor, kernel: Sequence[int]) -> tuple[torch.Tensor, ConvGeometry]:
        """Return (x, geometry) with the same output. If a 1x1 kernel skips pixels, remove these pixels from x.

        The gradient of the smaller input and `spread` together cost half of torch's gradient of x.
        """
        unit = ConvGeometry((1,) * len(self.stride), self.padding, self.dilation, self.groups)
        if self.stride == unit.stride or not unit.is_product(kernel):
            return x, self
        return x[self._read_pixels()].clone(), unit

    def spread(self, pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x, given the gradient of the input that `dense` returned for x."""
        if pixels.shape == x.shape:
            return pixels
        image = torch.zeros_like(x)
        image[self._read_pixels()] = pixels
        return image

    def _read_pixels(self) -> tuple[Any, ...]:
        """Return the index of the pixels [batch, channels, *space] that a 1x1 kernel reads."""
        return (..., *(slice(None, None, step) for step in self.stride))

    def conv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of x with a weight."""
        convolve = CONV[len(self.stride)]
        output: torch.Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return output

    def gradients(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x, weight and bias, given the gradient of the output, or None by `mask`."""
        gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
        gradients = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            mask,
        )
        return gradients


def _in_rows(x: torch.Tensor) -> bool:
    """Whether x [batch, channels, h, w] is in channels-last memory."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Return x [batch, channels, h, w] as rows [batch * h * w, channels], which are a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return rows [batch * h * w, channels] as [batch, channels, h, w], a channels-last view. Inverse of `_pixels`."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def conv_down(a: torch.Tensor, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """Return the convolution A x [batch, rank, *space] of x [batch, in, *space] with A [rank, in, *kernel]."""
    if not geometry.is_product(a.shape[2:]):
        return geometry.conv(x, a)
    return low_rank_product(a.flatten(1), x)


def low_rank_product(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the product [batch, rank, *space] of a factor [rank, channels] and x [batch, channels, *space]."""
    if _in_rows(x):
        return _images(down(factor, chunked(_pixels(x))).transpose(1, 2), x)
    return torch.bmm(factor.expand(len(x), -1, -1), x.flatten(2)).view(len(x), len(factor), *x.shape[2:])


def conv_up(output: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `output + scale * B low` for output [batch, out, *space], low [batch, rank, *space] and b [out, rank]."""
    if _in_rows(output):
        return _images(torch.addmm(_pixels(output), _pixels(low), b.t(), alpha=scale), output)
    return torch.baddbmm(output.flatten(2), b.expand(len(output), -1, -1), low.flatten(2), alpha=scale).view(
        output.shape
    )


def conv_factor_gradient(low: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `scale * low values^T` [rank, channels], summed over batch and space.

    `low` is [batch, rank, *space] and `values` [batch, channels, *space].
    """
    if _in_rows(values):
        return factor_gradient(chunked(_pixels(low)).transpose(1, 2), chunked(_pixels(values)), scale)
    return torch.bmm(low.flatten(2), values.flatten(2).transpose(1, 2)).sum(0).mul_(scale)


def conv_kernel_gradient(
    back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, geometry: ConvGeometry, scale: float
) -> torch.Tensor:
    """Return the gradient of lora_A [rank, in, *kernel]. `back` [batch, rank, *space] is the gradient of A x."""
    if geometry.is_product(a.shape[2:]):
        return conv_factor_gradient(back, x, scale).view(a.shape)
    gradient = geometry.gradients(back, x, a, (False, True, False))[1]
    assert gradient is not None
    return gradient.mul_(scale)


def conv_input_gradient(
    back: torch.Tensor, x: torch.Tensor, a: torch.Tensor, geometry: ConvGeometry, scale: float
) -> torch.Tensor:
    """Return the gradient of x from the branch. `back` [batch, rank, *space] is the gradient of A x."""
    if not geometry.is_product(a.shape[2:]):
        gradient = geometry.gradients(back, x, a, (True, False, False))[0]
        assert gradient is not None
        return gradient.mul_(scale)
    factor = a.flatten(1)
    if _in_rows(x):
        return _images((_pixels(back) @ factor).mul_(scale), x)
    return torch.bmm(factor.t().expand(len(x), -1, -1), back.flatten(2)).mul_(scale).view(x.shape)


MIN_WORK = 1 << 24
"""Minimum number of multiply-adds for oneDNN. For smaller products, the overhead of the call exceeds the gain."""

PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": F.linear,
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w),
    "mm": lambda x, w, bias: torch.mm(x, w),
    "matmul": lambda x, w, bias: torch.matmul(x, w),
}
"""{name of an op whose weight can be merged: function of (x, weight, bias)}."""


@cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 but MKL does not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in cpu_info and torch.backends.mkldnn.is_available()


def product(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `op(x, weight, bias)` [..., out], with oneDNN if it is faster. For use inside an autograd.Function.

    `op` is a key of PRODUCTS. The weight is [out, in] for the op `linear`, and [in, out] for the others.
    """
    rows = weight if op == "linear" else weight.t()
    return _onednn(x, rows, bias) if _uses_onednn(x, rows, bias) else PRODUCTS[op](x, weight, bias)


def grouped(op: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the grouped product [rows, out], with oneDNN if it is faster. For use in an autograd.Function.

    x is [rows, in], sorted by matrix, and weight [matrices, in, out]. `offs` [matrices] has the index after the last
    row of each matrix. For rows after the last index, the output is zero.
    """
    if not len(weight) or not _uses_onednn(x, weight[0].t(), None):
        return op(x, weight, offs)
    ends = offs.tolist()
    rows = zip([0, *ends[:-1]], ends, weight, strict=True)
    parts = [product("mm", x[start:end], matrix, None) for start, end, matrix in rows]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def _is_large(x: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether `x rows^T` is an fp32 product on the CPU that is large enough for oneDNN."""
    large = x.numel() * rows.shape[0] >= MIN_WORK and x.dtype == rows.dtype == torch.float32
    return large and x.is_cpu and rows.is_cpu and x.dim() > 1 and rows.dim() == 2


def _uses_onednn(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether to use oneDNN for `x rows^T + bias`: for large plain tensors without autograd, transforms and modes."""
    return (
        _is_large(x, rows)
        and onednn_is_faster()
        and not torch.is_grad_enabled()
        and mkldnn_is_enabled()
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (x, rows))
        and (bias is None or (bias.dim() == 1 and bias.dtype == x.dtype))
        and not functorch_is_active()
        and not dispatch_modes()
    )


def _onednn(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x rows^T + bias`, computed by oneDNN."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, rows, bias, "none", [], "")
    return output


class FrozenProduct(torch.autograd.Function):
    """`op(x, weight, bias)` for x [..., in] and a frozen weight and bias."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str) -> torch.Tensor:
        """Return the output [..., out]."""
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(weight)
        return detached(product(op, x, weight, bias))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradient of x."""
        (weight,) = ctx.saved_tensors
        grad_rows = gradient.reshape(-1, gradient.shape[-1])
        matrix = weight if ctx.op == "linear" else weight.t()
        return product("mm", grad_rows, matrix, None).view(ctx.shape), None, None, None


def _frozen(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, same_bits: bool = True
) -> torch.Tensor:
    """Return `op(x, weight, bias)`. For a large product of a frozen weight, use oneDNN, also in backward."""
    if not (same_bits or torch.is_grad_enabled()):
        return product(op, x, weight, bias)
    large = _is_large(x, weight if op == "linear" else weight.t())
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not large or trained or torch.is_autocast_enabled("cpu") or not allows_custom_backward(x, weight):
        return PRODUCTS[op](x, weight, bias)
    return apply(FrozenProduct, x, weight, bias, op)


class FrozenGrouped(torch.autograd.Function):
    """Returns `output`, the grouped product of x and a frozen weight. The backward computes only the gradient of x.

    The backward of the op itself would compute the gradient of the frozen weight too.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, op: object
    ) -> torch.Tensor:
        """Return output [rows, out]. x is [rows, in], and weight [matrices, in, out]."""
        ctx.save_for_backward(weight, offs)
        ctx.op = op
        return detached(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Return the gradient of x [rows, in], given the gradient of the output [rows, out]."""
        weight, offs = ctx.saved_tensors
        return None, grouped(ctx.op, gradients[0], weight.transpose(-2, -1), offs), None, None, None


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, same_bits: bool = True) -> torch.Tensor:
    return _frozen("addmm", x, weight, bias, same_bits)


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, same_bits: bool = True) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.transformers.grouped_mm_fallback
    if not (same_bits or torch.is_grad_enabled()):
        return grouped(op, x, weight, offs)
    if weight.requires_grad or torch.is_autocast_enabled("cpu") or not allows_custom_backward(x, weight):
        return op(x, weight, offs)
    with torch.no_grad():
        output = grouped(op, x, weight, offs)
    return apply(FrozenGrouped, output, x, weight, offs, op)


_FROZEN: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear.default": partial(_frozen, "linear"),
    "aten.addmm.default": _addmm,
    "aten.mm.default": partial(_frozen, "mm"),
    "transformers.grouped_mm_fallback.default": _grouped,
}


def for_frozen(target: object, same_bits: bool = True) -> Callable[..., torch.Tensor] | None:
    """Return a function that replaces the target of a node and is faster for frozen weights, or None.

    For graphs that run eagerly. With `same_bits`, the results have the same bits if gradients are disabled.
    """
    is_op = isinstance(target, OpOverload) or target is F.linear
    if not is_op or not onednn_is_faster():
        return None
    function = _FROZEN.get("aten.linear.default" if target is F.linear else str(target))
    return function if same_bits or function is None else partial(function, same_bits=False)


# ---- autograd functions of branches


def dropout_mask(like: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Return the dropout mask of a seed: 0 with probability p, otherwise 1 / (1 - p)."""
    source = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=source).div_(1 - p)


def drop(x: torch.Tensor, p: float, seed: int | None) -> torch.Tensor:
    """Apply the dropout mask of a seed. Without a seed, return x unchanged."""
    return x if seed is None else dropout_mask(x, p, seed).mul_(x)


class Beside(torch.autograd.Function):
    """`output + scale * x A^T B^T`: the output of an op plus the term of its branch.

    Arguments: output [..., out], x [..., in], lora_A [rank, in], lora_B [out, rank], scale, dropout probability p, seed
    of the dropout mask or None. All tensors have the same dtype.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return the sum [..., out]."""
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        rows = chunked(drop(x, p, seed).reshape(-1, x.shape[-1]))
        low = down(a, rows)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, low)
        term = up(chunked(output.reshape(-1, output.shape[-1])), low, b.t().contiguous(), scale)
        return detached(term.view(output.shape))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of output, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        no_gradients = (None, None, None)
        if torch.is_grad_enabled():  # create_graph=True

            def term(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return F.linear(F.linear(drop(x, ctx.p, ctx.seed), a), b).mul(ctx.scale)

            return gradient, *differentiable_gradients(term, gradient, x, a, b), *no_gradients
        grad_rows = chunked(gradient.reshape(-1, gradient.shape[-1]))
        back = down(b.t().contiguous(), grad_rows)
        dx = da = db = None
        if ctx.needs_input_grad[3]:  # first, while grad_rows is in the CPU cache
            db = factor_gradient(low, grad_rows, ctx.scale).t()
        if ctx.needs_input_grad[2]:
            rows = chunked(drop(x, ctx.p, ctx.seed).reshape(-1, x.shape[-1]))
            da = factor_gradient(back, rows, ctx.scale)
        if ctx.needs_input_grad[1]:
            dx = up(None, back, a, ctx.scale).view(ctx.shape)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        return gradient, dx, da, db, *no_gradients


def differentiable_gradients(
    term: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, lora_A and lora_B as differentiable tensors, for a double backward.

    `term` computes the output of the branch from x, lora_A and lora_B. Raises StateError if forward did not save x,
    because lora_A is frozen.
    """
    if x is None:
        raise StateError(
            "a double backward needs the input of a branch, which is not saved with train_A=False. Set train_A=True "
            "in the spec",
            code="backward-not-supported",
        )
    needed = [value for value in (x, a, b) if value.requires_grad]
    gradients = iter(torch.autograd.grad(term(x, a, b), needed, gradient, create_graph=True))
    return tuple([next(gradients) if value.requires_grad else None for value in (x, a, b)])


def merge(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight + scale * b @ a` [rows, columns], computed in the dtype of the factors and rounded to `dtype`."""
    return merged_matrix(weight.to(a.dtype), b, a, scale).to(dtype)


class MergedProduct(torch.autograd.Function):
    """`op(x, weight + scale * B A, bias)`: the product with the merged weight, instead of the product itself.

    Arguments: x [..., in], weight, bias [out] or None, lora_A [rank, in], lora_B [out, rank], scale, op. The weight is
    [out, in] for the op `linear` and [in, out] for the others. x and bias have the dtype of the result. Under autocast,
    weight and factors may have a wider dtype.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        op: str,
    ) -> torch.Tensor:
        """Return the output [..., out] of the op with the merged weight."""
        ctx.scale, ctx.op = scale, op
        ctx.bias_shape = bias.shape if bias is not None else ()
        ctx.save_for_backward(x, weight, a, b)
        factors = (b, a) if op == "linear" else (a.t(), b.t())
        return detached(product(op, x, merge(weight, *factors, scale, x.dtype), bias))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of all tensors, but None for a weight or bias that needs no gradient."""
        x, weight, a, b = ctx.saved_tensors
        transposed, needs = ctx.op != "linear", ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        dw = dbias = None
        if needs[1]:
            dw = (rows.t() @ grad_rows if transposed else grad_rows.t() @ rows).to(weight.dtype)
        if needs[2]:
            dbias = grad_rows.sum_to_size(ctx.bias_shape)
        dx, da, db = _merged_gradients(ctx, rows, grad_rows, weight.t() if transposed else weight, a, b)
        return dx if dx is None else dx.view(x.shape), dw, dbias, da, db, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _merged_gradients(
    ctx: Any, rows: torch.Tensor, grad_rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Gradients:
    """Return the gradients of rows, lora_A and lora_B.

    dx needs the merged weight. With many rows, it is computed again, which costs less than saving it. With few rows,
    the low-rank term is added to dx instead. Only inputs of forward are saved, so a double backward works.
    """
    x_chunks, grad_chunks = chunked(rows), chunked(grad_rows)
    factor = a.to(rows.dtype)
    dx = da = db = None
    back = down(b.t().contiguous().to(rows.dtype), grad_chunks)
    if ctx.needs_input_grad[4]:  # gradients of factors first, while grad_rows and rows are in the CPU cache
        db = factor_gradient(down(factor, x_chunks), grad_chunks, ctx.scale).t().to(b.dtype)
    if ctx.needs_input_grad[3]:
        da = factor_gradient(back, x_chunks, ctx.scale).to(a.dtype)
    if ctx.needs_input_grad[0]:
        if rows.shape[0] >= weight.shape[0]:
            dx = product("mm", grad_rows, merge(weight, b, a, ctx.scale, grad_rows.dtype), None)
        else:
            dx = up(chunked(product("mm", grad_rows, weight.to(grad_rows.dtype), None)), back, factor, ctx.scale)
    return dx, da, db


class DenseGradient(torch.autograd.Function):
    """Identity whose backward converts a sparse gradient to a dense one.

    A lookup with sparse=True has a sparse gradient, which the backward of a product cannot reshape.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight unchanged."""
        return detached(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the dense gradient."""
        return gradient.to_dense() if gradient.is_sparse else gradient


def merged_kernel(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return `weight + scale * B A` [out, in/groups, *kernel], in `dtype` and with the strides of the weight."""
    if weight.is_contiguous():
        return with_strides(merge(weight.flatten(1), b, a.flatten(1), scale, dtype).view(weight.shape), weight)
    return torch.add(weight.to(a.dtype), (b @ a.flatten(1)).view(weight.shape), alpha=scale).to(dtype)


class BesideConv(torch.autograd.Function):
    """`output + scale * B (A * x)`: the output of a convolution plus the term of its branch.

    Arguments: output [batch, out, *space], x [batch, in, *space], lora_A [rank, in, *kernel], lora_B [out, rank],
    geometry, scale, dropout probability p, seed of the dropout mask or None.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        geometry: ConvGeometry,
        scale: float,
        p: float,
        seed: int | None,
    ) -> torch.Tensor:
        """Return the sum [batch, out, *space]."""
        ctx.geometry, ctx.scale, ctx.p, ctx.seed = geometry, scale, p, seed
        low = conv_down(a, *geometry.dense(drop(x, p, seed), a.shape[2:]))
        saves_x = ctx.needs_input_grad[2]
        # The gradient of x needs the shape and memory format of x, but not its values.
        ctx.like = None if saves_x else torch.empty_like(x, device="meta")
        ctx.save_for_backward(x if saves_x else None, a, b, low)
        return detached(conv_up(output, low, b, scale))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of output, x, lora_A and lora_B."""
        x, a, b, low = ctx.saved_tensors
        no_gradients = (None, None, None, None)
        if torch.is_grad_enabled():  # create_graph=True

            def term(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                kernel = (b @ a.flatten(1)).view(len(b), *a.shape[1:]) * ctx.scale
                output: torch.Tensor = ctx.geometry.conv(drop(x, ctx.p, ctx.seed), kernel)
                return output

            return gradient, *differentiable_gradients(term, gradient, x, a, b), *no_gradients
        dx = da = db = None
        back = low_rank_product(b.t().contiguous(), gradient)
        if ctx.needs_input_grad[1]:
            image = torch.empty_like(ctx.like, device=gradient.device) if x is None else x
            used, geometry = ctx.geometry.dense(image, a.shape[2:])
            dx = ctx.geometry.spread(conv_input_gradient(back, used, a, geometry, ctx.scale), image)
            dx = dx if ctx.seed is None else dx.mul_(dropout_mask(dx, ctx.p, ctx.seed))
        if ctx.needs_input_grad[2]:
            used, geometry = ctx.geometry.dense(drop(x, ctx.p, ctx.seed), a.shape[2:])
            da = conv_kernel_gradient(back, used, a, geometry, ctx.scale)
        if ctx.needs_input_grad[3]:
            db = conv_factor_gradient(low, gradient, ctx.scale).t()
        return gradient, dx, da, db, *no_gradients


class MergedConv(torch.autograd.Function):
    """`conv(x, weight + scale * B A, bias)`: the convolution with the merged kernel, instead of the convolution itself.

    Arguments: x [batch, in, *space], weight [out, in/groups, *kernel], bias [out] or None, lora_A
    [rank, in/groups, *kernel], lora_B [out, rank], geometry, scale. With groups, the backward computes the dense
    gradient of the kernel and projects it onto the factors. This is exact, and the kernel is small if the op is
    depthwise.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        geometry: ConvGeometry,
        scale: float,
    ) -> torch.Tensor:
        """Return the convolution with the merged kernel."""
        ctx.geometry, ctx.scale = geometry, scale
        ctx.save_for_backward(x, weight, a, b)
        # Without `ConvGeometry.dense`, because the convolution of fewer pixels may be rounded differently.
        return geometry.conv(x, merged_kernel(weight, a, b, scale, x.dtype), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of all tensors, but None for a weight or bias that needs no gradient."""
        x, weight, a, b = ctx.saved_tensors
        (image, geometry), needs = ctx.geometry.dense(x, weight.shape[2:]), ctx.needs_input_grad
        projects = geometry.groups > 1 or needs[1]
        merged = merged_kernel(weight, a, b, ctx.scale, x.dtype)
        da = db = None
        if not projects:  # first, while the gradient is in the CPU cache
            kernel, columns = a.to(x.dtype), b.to(x.dtype)
            back = low_rank_product(columns.t().contiguous(), gradient)
            if needs[4]:
                db = conv_factor_gradient(conv_down(kernel, image, geometry), gradient, ctx.scale).t().to(b.dtype)
            if needs[3]:
                da = conv_kernel_gradient(back, image, kernel, geometry, ctx.scale).to(a.dtype)
        dx, dw, dbias = geometry.gradients(gradient, image, merged, (needs[0], projects, needs[2]))
        dx = dx if dx is None else ctx.geometry.spread(dx, x)
        if projects:
            assert dw is not None
            dense_gradient = dw.flatten(1).to(a.dtype) * ctx.scale
            da, db = (b.t() @ dense_gradient).view(a.shape), dense_gradient @ a.flatten(1).t()
        return dx, dw.to(weight.dtype) if dw is not None and needs[1] else None, dbias, da, db, None, None
