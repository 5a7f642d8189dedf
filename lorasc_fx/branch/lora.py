"""LoRA (2106.09685), and the base class of all methods whose delta is a low-rank product.

`delta = s B A` with A [rank, in] and B [out, rank], of a weight [out, in/groups, *kernel] that is seen as the matrix
[out, in]; stacked experts have their axis first. A weight that is stored as [in, out] gets the transposed product
(algorithm.md, rows "branch" and "training").
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.func import functional_call

from lorasc_fx.branch.contract import Branch, pad_to, unchanged
from lorasc_fx.branch.conv import ConvCall, ConvOps
from lorasc_fx.branch.factors import Factors, InitialFactors, Side
from lorasc_fx.branch.functions import draw_seed
from lorasc_fx.branch.given import BESIDE, FIRST_AXIS, Pair, Rows, beside_conv
from lorasc_fx.branch.linear import MatrixOps
from lorasc_fx.branch.low_rank import by_hand
from lorasc_fx.branch.noise import generator
from lorasc_fx.errors import PassError, StateError
from lorasc_fx.plan import Site
from lorasc_fx.shards import full_tensor
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.spec_checks import METHOD_OPTIONS

DOWN, UP = "lora_A", "lora_B"
"""Names of the factors [rank, in] and [out, rank], as in peft."""


class LowRankBranch(Branch):
    """A branch that adds `s B A`. A subclass defines its parameters, and A and B as functions of them."""

    placements = frozenset({"beside", "merged", "weight"})
    beside_quantized: ClassVar[bool] = True
    unmerged_A: torch.Tensor | None
    unmerged_B: torch.Tensor | None

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.slices = site.slices
        self.ops: type[MatrixOps | ConvOps] = ops_of(self.kind)
        self.register_buffer("unmerged_A", None, persistent=False)
        self.register_buffer("unmerged_B", None, persistent=False)

    @property
    @abc.abstractmethod
    def down(self) -> torch.Tensor:
        """A [rank, in], or [experts, rank, in]; with slices [slices * rank, in]."""

    @property
    @abc.abstractmethod
    def up(self) -> torch.Tensor:
        """B [out, rank], or [experts, out, rank]."""

    @property
    def shared_factor(self) -> str | None:
        """Name of the parameter that is A, if branches that read one input can stack theirs into one product."""
        return None

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.up.shape[-1]

    @property
    def drops(self) -> bool:
        """Whether dropout sets entries of the branch's input to zero now."""
        return self.training and self.dropout > 0

    def dropout_seed(self) -> int | None:
        """Return a new seed for the dropout of this call; None without dropout."""
        return draw_seed() if self.drops else None

    def delta(self, weight: torch.Tensor | None = None) -> Factors:
        """Return the factors as the weight is stored, with the scale in the left one."""
        left, right = self.oriented()
        return Factors(left * self.scale, right)

    def oriented(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (left, right) with `left @ right` the delta as the weight is stored, without the scale.

        With slices, left holds the rows of B of each slice as a block on its diagonal.
        """
        if self.transposed:
            return self.down.transpose(-2, -1), self.up.transpose(-2, -1)
        if self.slices:
            return torch.block_diag(*full_tensor(self.up).split(self.slices)), self.down
        return self.up, self.down

    def product(self) -> torch.Tensor:
        """Return the delta in the weight's own shape, without the scale."""
        if self.slices:
            up, down = self.up.split(self.slices), self.down.split(self.rank)
            count = range(len(self.slices))  # a proxy of torch.fx cannot be iterated
            return torch.cat([up[index] @ down[index] for index in count]).view(self.weight_shape)
        left, right = self.oriented()
        return (left @ right).view(self.weight_shape)

    def dense_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the delta in the shape of the weight."""
        return self.product() * self.scale

    def set_unmerged(self, pair: Factors | None) -> None:
        """Add `b @ a` to the output of a quantized layer as well: the delta of earlier stages, which the weight cannot
        hold.
        """
        like = next(self.parameters()).detach()
        self.unmerged_B, self.unmerged_A = (None, None) if pair is None else (pair.b.to(like), pair.a.to(like))

    def placement(self, at: str) -> Callable[..., torch.Tensor]:
        """Return the function of a placement."""
        if at in ("adapted", "factors"):
            return super().placement(at)
        return partial(getattr(self.ops, at), self)

    def padded(self, site: Site, rank: int) -> dict[str, torch.Tensor]:
        """Return the values of all parameters, see `Branch.padded`."""
        if self.unmerged_A is not None:
            raise PassError(
                f"{self.weight_name} is quantized, and its branch also adds what earlier stages have trained: these "
                "tensors do not become inputs. Leave the site out (sites=...), or lift the branches of the first stage",
                code="input-not-supported",
            )
        return super().padded(site, rank)

    def computed_with(
        self,
        tensors: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        *args: Any,
        at: str,
        rows: Sequence[Any] = FIRST_AXIS,
        **options: Any,
    ) -> torch.Tensor:
        """Compute with these tensors, see `Branch.computed_with`. Without noise, dropout, or a hand-written backward.

        Factors [rows, rank, in] and [rows, out, rank] with a scale [rows] are those of one row of the batch each.
        """
        place = Rows(*rows)
        if at == "on_weight":
            return super().computed_with(tensors, scale, *args, at=at, **options)
        pair = Pair(*self.given_factors(tensors), scale)
        if at == "in_place":
            x, weight, *bias = args
            op = options.pop("op")
            args = (self.product_with(x, weight, bias[0] if bias else None, op, **options), x)
        if self.kind == "conv":
            base, x = args
            return beside_conv(base, x, pair, ConvCall(**options), self.weight_shape, place)
        return BESIDE[at](*args, pair, rows=place, **options)

    def given_factors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as functions of these values of the parameters."""
        factors: tuple[torch.Tensor, torch.Tensor] = functional_call(self, dict(tensors), (), {"at": "factors"})
        return factors

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B."""
        return self.down, self.up

    def adapted(
        self, weight: torch.Tensor, scale: torch.Tensor, expert: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weight with `scale` times the delta. With an expert, the weight is its matrix."""
        delta = self.product() if expert is None else MatrixOps.expert_product(self, expert)
        return weight + (delta * scale).to(weight.dtype)

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight, as it is stored."""
        return self.ops.on_weight(self, weight)


class LoraBranch(LowRankBranch):
    """LoRA: A random, B zero.

    Attributes:
        lora_A: [rank, in]; trained unless the spec says train_A=False (LoRA-FA, 2308.03303).
        lora_B: [out, rank].
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    zeros: ClassVar[tuple[str, ...]] = ("lora_B",)
    slices_apart = True
    pads_with_zeros = True
    options = frozenset(METHOD_OPTIONS)

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.nearest = site.options.nearest_full_gradient
        self._inverses: tuple[object, list[torch.Tensor]] = (None, [])  # of lora_A, and the lora_A they belong to

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        a, b = site.factor_shapes
        return {"lora_A": a, "lora_B": b}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return a random A, and zeros."""
        values = super().initial_values(site, seed, stage)
        return {**values, "lora_A": random_factor(seed, stage, "lora_A", site.weight, site.factor_shapes[0])}

    @classmethod
    def trainable_names(cls, site: Site) -> Collection[str]:
        """Return all names, or all but A."""
        return [name for name in cls.shapes(site) if site.options.train_A or name != "lora_A"]

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return `factors` if the spec's start takes them out of the weight."""
        return ("factors",) if running and spec.factor_start.from_weight else ()

    def learning_rate(self, name: str, lr: float, spec: CascadeSpec) -> float:
        """Return the rate, for B times that of LoRA+ (2402.12354)."""
        return lr * spec.lr_ratio if name == "lora_B" else lr

    @property
    def down(self) -> torch.Tensor:
        """A."""
        return self.lora_A

    @property
    def up(self) -> torch.Tensor:
        """B, with the gradient that the spec asks for (`nearest_full`)."""
        if not self.nearest or not torch.is_grad_enabled():
            return self.lora_B
        slices = self.slices or (self.lora_B.shape[-2],)
        if not by_hand(self.lora_A):
            return nearest_full(self.lora_B, self.lora_A, self.scale, slices)
        # lora_A is frozen in a stage: an SVD in each forward would compute the same inverses.
        a = self.lora_A
        state = (a.data_ptr(), a._version, a.device, a.dtype, self.scale)
        if self._inverses[0] != state:
            self._inverses = state, inverses(a, self.scale, len(slices))
        return with_corrected_gradient(self.lora_B, self._inverses[1], slices)

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.lora_B.shape[-1]

    @property
    def shared_factor(self) -> str | None:
        """A can be stacked with those of other branches."""
        return "lora_A"

    def given_factors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of A and B."""
        return tensors["lora_A"], tensors["lora_B"]

    def pad(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a padded factor; the A of each slice is padded by itself."""
        if name != "lora_A" or not self.slices:
            return super().pad(name, value, shape)
        count = len(self.slices)
        return torch.cat([pad_to(part, (shape[0] // count, shape[1])) for part in value.chunk(count)])

    def cut(self, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a factor without its padding."""
        if name != "lora_A" or not self.slices:
            return super().cut(name, value, shape)
        count = len(self.slices)
        return torch.cat([part[: shape[0] // count] for part in value.chunk(count)])

    def kept_entries(self, spec: CascadeSpec) -> Mapping[str, torch.Tensor]:
        """Return masks of the pairs with the largest terms `s b_i a_i`, in the Frobenius norm, as full tensors.

        Pair i has column i of B and row i of A, in each slice and each expert; its norm is that over all of them.
        """
        count = max(1, round(spec.restart_pairs * self.rank)) if spec.restart_pairs else 0
        if count == self.rank:
            return {}
        with torch.no_grad():
            a, b = full_tensor(self.lora_A).double(), full_tensor(self.lora_B).double()
            columns = torch.stack([part.square().sum(-2) for part in b.split(self.slices or (b.shape[-2],), -2)], -2)
            rows = a.square().sum(-1).unflatten(-1, (-1, self.rank))
            kept = torch.ones(self.rank, dtype=torch.bool, device=a.device)
            kept[(rows * columns).flatten(0, -2).sum(0).argsort(stable=True)[:count]] = False
        return {"lora_A": kept.repeat(a.shape[-2] // self.rank).unsqueeze(-1), "lora_B": kept}

    def follow(self, previous: Branch, spec: CascadeSpec, pairs: bool) -> bool:
        """Keep the A of the stage before under restart_A="kept", and the pairs that do not restart."""
        assert isinstance(previous, LoraBranch)
        kept = previous.kept_entries(spec) if pairs else {}
        with torch.no_grad():
            self.lora_A.copy_(full_tensor(spec.next_a.next_a(previous.lora_A, self.lora_A.detach())))
            for name, mask in kept.items():
                parameter, before = self.get_parameter(name), full_tensor(previous.get_parameter(name).detach())
                parameter.copy_(torch.where(mask, before, parameter))
        return bool(kept)

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Write B and A, as a start that takes them out of the weight finds them."""
        with torch.no_grad():
            self.lora_A.copy_(down)
            self.lora_B.copy_(up)

    def exact_factors(self) -> Factors:
        """Return the whole factors in fp64 on the host, with the scale in the left one."""
        with torch.no_grad():
            left, right = map(full_tensor, self.oriented())
            return Factors(left.cpu().double() * self.scale, right.cpu().double().clone())

    def moved(
        self,
        initial: InitialFactors | None = None,
        cut: Callable[[torch.Tensor, Side], torch.Tensor] = unchanged,
    ) -> bool:
        """Whether B is not zero, or the factors are not those of the start. A cast of the branch is no training."""
        if initial is None or initial.factors is None:
            return super().moved(initial, cut)
        current, start, dtype = self.exact_factors().map(cut), initial.factors, self.lora_A.dtype
        if torch.equal(current.b, start.b) and torch.equal(current.a, start.a):
            return False
        return not (
            torch.equal((current.b / self.scale).to(dtype), (start.b / self.scale).to(dtype))
            and torch.equal(current.a.to(dtype), start.a.to(dtype))
        )

    def shard_axes(self, weight: torch.Tensor, parts: int, resized: bool) -> dict[str, int]:
        """Return axes that divide by the ranks.

        FSDP pads an axis that does not divide. A [rank, in] is then cut by inputs, also if its rank changes by stage,
        and experts [experts, out, rank] by the axis after the experts.
        """
        stacked, inputs = self.lora_A.dim() == 3, self.lora_A.dim() - 1
        resized = resized and not stacked
        if self.lora_A.shape[0] % parts == 0 and not resized:
            return {}
        if resized and self.lora_A.shape[inputs] % parts:
            raise StateError(
                f"shard: if ranks change by stage, FSDP shards lora_A by its inputs, but {parts} ranks do not divide "
                f"the {self.lora_A.shape[inputs]} inputs of {self.weight_name}. Exclude it, or give one rank for all "
                "stages",
                code="sharded",
            )
        axes = {"lora_A": inputs} if self.lora_A.shape[inputs] % parts == 0 else {}
        if stacked and weight.dim() == 3:
            axes |= {
                name: 1 for name, held in (("weight", weight), ("lora_B", self.lora_B)) if held.shape[1] % parts == 0
            }
        return axes

    def extra_repr(self) -> str:
        """Return what `print` shows of the branch."""
        return f"{self.weight_name}, rank={self.rank}, scale={self.scale:g}"


def ops_of(kind: str) -> type[MatrixOps | ConvOps]:
    """Return the placements of low-rank branches of weights of a kind."""
    return ConvOps if kind == "conv" else MatrixOps


def random_factor(seed: int, stage: int, purpose: str, weight: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a random factor [..., rank, in] in fp32: Kaiming uniform with a = sqrt(5), U(-1/sqrt(in), 1/sqrt(in)).

    Source: LoRA's reference code and peft's default; algorithm.md, row "branch". The values are drawn in fp32 whatever
    the dtype of the branch, so they depend on the key only.
    """
    bound = shape[-1] ** -0.5 if shape[-1] else 0.0
    draw = torch.rand(shape, generator=generator(seed, stage, purpose, weight), dtype=torch.float32)
    return draw.mul_(2 * bound).sub_(bound)


_DIAGONAL = 1e-8


@fx.wrap  # one node in a trace of torch.fx, which records no autocast
def nearest_full(b: torch.Tensor, a: torch.Tensor, scale: float, slices: tuple[int, ...]) -> torch.Tensor:
    """Return B; its gradient is multiplied by `(A A^T)^-1 / scale^2`, the nearest to full training for a fixed A.

    A step of B moves the weight by `s dB A`. The dB for which that is nearest to the weight's own gradient G, in the
    Frobenius norm, is `G A^T (A A^T)^-1 / s`, which is B's gradient `s G A^T` times `(A A^T)^-1 / s^2`. Source:
    LoRA-Pro (2407.18242), equation for a fixed A; peft's optimizer for LoRA-FA (2308.03303) steps so, and adds the same
    1e-8 to the diagonal.

    Uses plain operations, so that compilers and function transforms work: the term that is added to B is zero.

    Args:
        b: B [out, rank], or with an axis of experts before.
        a: A [rank, in], likewise; with slices [slices * rank, in].
        scale: s of the branch.
        slices: number of rows of B of each slice that has a separate A.
    """
    if not torch.is_grad_enabled():
        return b
    return with_corrected_gradient(b, inverses(a, scale, len(slices)), slices)


def inverses(a: torch.Tensor, scale: float, count: int) -> list[torch.Tensor]:
    """Return `(A A^T)^-1 / scale^2`, [rank, rank], of each of `count` slices that A stacks."""
    found = []
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        for part in a.chunk(count, -2):
            gram = part @ part.transpose(-2, -1)
            steady = gram + _DIAGONAL * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            found.append(torch.linalg.pinv(steady) / scale**2)
    return found


def with_corrected_gradient(b: torch.Tensor, factors: list[torch.Tensor], slices: tuple[int, ...]) -> torch.Tensor:
    """Return B; the gradient of the rows of each slice is multiplied by its factor [rank, rank]."""
    with torch.autocast(b.device.type, enabled=False):
        pairs = zip((b - b.detach()).split(slices, -2), factors, strict=True)
        return b.detach() + torch.cat([zero @ factor for zero, factor in pairs], -2)
