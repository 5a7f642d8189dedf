"""The adapter methods besides LoRA and DoRA, the table of all methods, and the registration of user-defined ones.

A method declares its parameters in `table`. It computes its delta as factors A and B (`down` and `up` of a
`LowRankBranch`), or as a tensor (`delta` of a `Branch`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch, Declared, StartWeight, generator
from lorasc_fx.branch.deltas import Factors
from lorasc_fx.branch.lora import DoraBranch, LoraBranch, LowRankBranch, random_factor
from lorasc_fx.branch.products import PRODUCTS, is_eager
from lorasc_fx.errors import SpecError
from lorasc_fx.plan import Site
from lorasc_fx.spec import ADAPTERS
from lorasc_fx.util.decode import Check

Table = Mapping[str, Declared]

ALL_BUT_STACKED = frozenset({"linear", "conv", "embedding", "recurrent"})


# ---- Methods whose delta is a low-rank product


class LoraXsBranch(LowRankBranch):
    """LoRA-XS (2405.17604, section 3): `delta = s B R A`, with a trained R between two frozen factors of the weight.

    With the SVD `W = U diag(v) V^T` of the weight at the start of the stage, `B = U_r diag(v_r)` and `A = V_r^T`. R
    starts at zero, so the delta starts at zero, but the gradient of R is not zero. The authors' code initializes R from
    N(0, 1e-5).

    Attributes:
        xs_R: R [rank, rank], or [matrices, rank, rank] for stacked matrices.
        xs_A, xs_B: frozen factors A [rank, in] and B [out, rank].
    """

    xs_R: nn.Parameter
    xs_A: nn.Parameter
    xs_B: nn.Parameter
    pads_with_zeros = True
    options = frozenset({"lora_alpha", "use_rslora"})
    beside_quantized = False

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return the trained R [rank, rank], and the frozen factors that `values_from` computes from the weight."""
        a, b = site.factor_shapes
        r = (*a[:-2], site.rank, site.rank)
        return {"xs_R": Declared(r), "xs_A": Declared(a, trained=False), "xs_B": Declared(b, trained=False)}

    @property
    def down(self) -> torch.Tensor:
        """The factor A."""
        return self.xs_A

    @property
    def up(self) -> torch.Tensor:
        """`B R`."""
        return self.xs_B @ self.xs_R

    def values_from(
        self, site: Site, values: Mapping[str, torch.Tensor], weight: StartWeight
    ) -> Mapping[str, torch.Tensor]:
        """Return A and B from the SVD of the weight. Ranks beyond the sides of the matrix are zero.

        Raises:
            SpecError: the weight contains inf or nan.
        """
        matrix = self.matrix(weight.exact())
        if not bool(torch.isfinite(matrix).all()):
            raise SpecError(
                f"{self.weight_name} contains inf or nan, but adapter='lora-xs' computes its decomposition. "
                f"Exclude the weight (exclude=({self.weight_name!r},)), or give another adapter",
                code="non-finite",
            )
        u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
        count = min(site.rank, singular.shape[-1])
        up, down = torch.zeros_like(values["xs_B"]), torch.zeros_like(values["xs_A"])
        up[..., :count] = u[..., :count] * singular[..., None, :count]
        down[..., :count, :] = vh[..., :count, :]
        # Broadcast the factors, because a decomposition may have other bits on other machines.
        return {"xs_A": weight.shard.group.broadcast(down), "xs_B": weight.shard.group.broadcast(up)}


class VeraBranch(LowRankBranch):
    """VeRA (2310.11454, equation 2): `delta = diag(b) B diag(d) A`, with trained b and d, and frozen random A and B.

    All sites with the same number of inputs share A, and all sites with the same number of outputs share B. `VeraModel`
    of peft uses slices of one large pair instead.

    Attributes:
        vera_lambda_b: vector b [out].
        vera_lambda_d: vector d [rank]. It starts at the option `d_initial`.
        vera_A, vera_B: shared tensors A [rank, in] and B [out, rank].
    """

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter
    kinds = ALL_BUT_STACKED
    defaults: ClassVar[Mapping[str, float]] = {"d_initial": 0.1}
    checks: ClassVar[Mapping[str, Check]] = {
        "d_initial": Check(
            lambda start: start != 0,
            "give a number other than 0: b starts at zero, so with d = 0 both gradients would be zero",
        )
    }

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        a, b = site.factor_shapes
        self.vera_A, self.vera_B = shared_tensor(seed, "vera_A", a), shared_tensor(seed, "vera_B", b)

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return b and d. A and B are not parameters, but drawn again when a run is loaded."""
        d_initial = cls.options_at(site)["d_initial"]
        return {"vera_lambda_b": Declared(site.matrix_shape[:1]), "vera_lambda_d": Declared((site.rank,), d_initial)}

    @property
    def down(self) -> torch.Tensor:
        """`diag(d) A`."""
        return self.vera_lambda_d.unsqueeze(-1) * self.vera_A.like(self.vera_lambda_d)

    @property
    def up(self) -> torch.Tensor:
        """`diag(b) B`."""
        return self.vera_lambda_b.unsqueeze(-1) * self.vera_B.like(self.vera_lambda_b)


class SharedTensor:
    """A random tensor that is determined by its key. All branches with the same key refer to the same object.

    It is not a parameter. It is neither trained nor saved, and drawn again when a run is loaded.

    Args:
        seed, purpose, shape: the key.
    """

    def __init__(self, seed: int, purpose: str, shape: tuple[int, ...]) -> None:
        self.key = seed, purpose, shape
        bound = (6 / max(1, shape[-1])) ** 0.5  # Kaiming uniform for ReLU, as in peft's VeRA
        draw = torch.rand(shape, generator=generator(seed, 0, purpose, ""), dtype=torch.float32)
        self._values = {(torch.device("cpu"), torch.float32): draw.mul_(2 * bound).sub_(bound)}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values on the device and in the dtype of a tensor. The conversion is cached."""
        key = tensor.device, tensor.dtype
        if key not in self._values:
            self._values[key] = next(iter(self._values.values())).to(tensor.device, tensor.dtype)
        return self._values[key]

    def __deepcopy__(self, memo: dict[int, object]) -> SharedTensor:
        """Return the same object, because its values never change."""
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedTensor], tuple[Any, ...]]:
        """Pickle only the key."""
        return shared_tensor, self.key


_TENSORS: WeakValueDictionary[tuple[Any, ...], SharedTensor] = WeakValueDictionary()


def shared_tensor(seed: int, purpose: str, shape: tuple[int, ...]) -> SharedTensor:
    """Return the shared tensor for a key. It is freed when no branch refers to it."""
    key = seed, purpose, shape
    tensor = _TENSORS.get(key)
    if tensor is None:
        _TENSORS[key] = tensor = SharedTensor(*key)
    return tensor


class MissBranch(LowRankBranch):
    """MiSS (2409.15371, "balance"): blocks of inputs share one trained matrix, `delta[o, i] = D[i mod r, o]`.

    The product sums the blocks of `rank` inputs and multiplies the sum by D. So the delta is a low-rank product with a
    fixed A of zeros and ones.

    Attributes:
        miss_block: D [rank, out].
    """

    miss_block: nn.Parameter
    kinds = ALL_BUT_STACKED

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.columns = site.matrix_shape[1]

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return D."""
        return {"miss_block": Declared((site.rank, site.matrix_shape[0]))}

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why a rank larger than the number of inputs is refused, or "". Such a rank leaves rows of D unused."""
        rank, inputs = site.rank, site.matrix_shape[1]
        if rank <= inputs:
            return ""
        unused = rank - inputs
        return f"has {inputs} inputs, so rank {rank} would leave {unused} rows unused. Give a rank of at most {inputs}"

    @property
    def down(self) -> torch.Tensor:
        """A [rank, in]: 1 if the input uses this row of D, otherwise 0."""
        rows = torch.arange(self.rank, device=self.miss_block.device)
        inputs = torch.arange(self.columns, device=self.miss_block.device) % self.rank
        return (rows.unsqueeze(1) == inputs).to(self.miss_block.dtype)

    @property
    def up(self) -> torch.Tensor:
        """D^T [out, rank]."""
        return self.miss_block.t()


MIN_NORM = 1e-4
"""Lower limit for the norms of a_i and b_i in DeLoRA, as in peft, because B is zero at the start of a stage."""


class DeloraBranch(LowRankBranch):
    """DeLoRA (2503.18225, equation 8): a sum of normalized rank-1 terms, so that the norm of the delta is bounded.

    `delta = B diag(lambda / (r |a_i| |b_i|)) A diag(w)`, with rows a_i of A and columns b_i of B. w are the column
    norms of the weight at the start of the stage. The scale is 1.

    Attributes:
        delora_A, delora_B: factors A [rank, in] and B [out, rank].
        delora_lambda: bound lambda [1], trained. It starts at the option `bound`.
        delora_w_norm: column norms w [in], frozen.
    """

    delora_A: nn.Parameter
    delora_B: nn.Parameter
    delora_lambda: nn.Parameter
    delora_w_norm: nn.Parameter
    kinds = ALL_BUT_STACKED
    beside_quantized = False
    defaults: ClassVar[Mapping[str, float]] = {"bound": 15.0}
    checks: ClassVar[Mapping[str, Check]] = {
        "bound": Check(lambda bound: bound > 0, "give a number above 0, because it bounds the norm of the delta")
    }

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return A, B, lambda, and w, which `values_from` computes."""
        a, b = site.factor_shapes
        return {
            "delora_A": Declared(a, random_factor),
            "delora_B": Declared(b),
            "delora_lambda": Declared((1,), cls.options_at(site)["bound"]),
            "delora_w_norm": Declared(a[-1:], trained=False),
        }

    @property
    def down(self) -> torch.Tensor:
        """`A diag(w)`."""
        return self.delora_A * self.delora_w_norm

    @property
    def up(self) -> torch.Tensor:
        """`B diag(lambda / (r |a_i| |b_i|))`."""
        rows = self.delora_A.norm(dim=1).clamp_min(MIN_NORM)
        columns = self.delora_B.norm(dim=0).clamp_min(MIN_NORM)
        factors: torch.Tensor = self.delora_B * (self.delora_lambda / self.rank / (rows * columns))
        return factors

    def values_from(
        self, site: Site, values: Mapping[str, torch.Tensor], weight: StartWeight
    ) -> Mapping[str, torch.Tensor]:
        """Return w, the column norms of the weight."""
        return {"delora_w_norm": self.matrix(weight.exact()).norm(dim=0)}


class TokensBranch(LowRankBranch):
    """Trains only some rows of an embedding, and of a head tied to it: `Rule(pattern, tokens=...)`.

    `delta = E D`. D is trained and starts at zero. E [out, count] has the columns of the identity matrix that belong to
    these rows. Other rows keep their bits. Source: `trainable_token_indices` of peft (`tuners/trainable_tokens`), which
    trains the rows themselves instead of their delta. The gradients are the same.

    Attributes:
        token_deltas: D [count, in].
        rows: indices [count] of the rows.
    """

    token_deltas: nn.Parameter
    rows: torch.Tensor
    kinds = frozenset({"embedding", "linear"})

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.outputs = site.matrix_shape[0]
        self.register_buffer("rows", torch.tensor(site.options.tokens, device=like.device), persistent=False)

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return D."""
        return {"token_deltas": Declared((len(site.options.tokens), site.matrix_shape[1]))}

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why the rows cannot be trained, or ""."""
        tokens, rows = site.options.tokens, site.matrix_shape[0]
        if not tokens:
            return "has no rows to train. Name them in a rule: Rule(pattern, tokens=(...))"
        if max(tokens) >= rows:
            return f"has {rows} rows, so tokens={max(tokens)} is out of range. Give rows from 0 to {rows - 1}"
        return ""

    @property
    def down(self) -> torch.Tensor:
        """The factor D."""
        return self.token_deltas

    @property
    def up(self) -> torch.Tensor:
        """The factor E."""
        outputs = torch.arange(self.outputs, device=self.token_deltas.device)
        return (outputs.unsqueeze(1) == self.rows).to(self.token_deltas.dtype)


# ---- Methods whose delta is a tensor in the shape of the weight


class HiraBranch(Branch):
    """HiRA (Huang et al., ICLR 2025, equation 3): `delta = W * (B A)`, an elementwise product with the weight.

    W is the weight at the start of the stage. The scale is 1.

    Attributes:
        hira_A, hira_B: A [rank, in] and B [out, rank], which start as in LoRA.
    """

    hira_A: nn.Parameter
    hira_B: nn.Parameter
    kinds = ALL_BUT_STACKED
    pads_with_zeros = True
    uses_weight = True

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return A and B."""
        a, b = site.factor_shapes
        return {"hira_A": Declared(a, random_factor), "hira_B": Declared(b)}

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return `W * (B A)` in the shape of the weight."""
        assert weight is not None
        product = self.hira_B @ self.hira_A
        return weight * (product.t() if self.transposed else product).reshape(weight.shape).to(weight.dtype)


class ShiraBranch(Branch):
    """SHiRA (2406.13175, "SHiRA-Rand"): trained values at fixed random positions of the weight.

    There are as many values as LoRA has parameters, and they start at zero. Positions are drawn without replacement.
    They depend only on the seed and the name of the weight, so they are the same in all stages.

    Attributes:
        shira_values: trained values [count], with `count = min(rank * (in + out), in * out)`.
        positions: a random permutation of the indices of the flattened matrix, [in * out]. Its first `count` entries
            are the positions of the values.
    """

    shira_values: nn.Parameter
    positions: torch.Tensor
    kinds = ALL_BUT_STACKED
    pads_with_zeros = True

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        out, columns = site.matrix_shape
        order = torch.randperm(out * columns, generator=generator(seed, 0, "shira", site.weight))
        self.matrix_shape = out, columns
        self.register_buffer("positions", order.to(like.device), persistent=False)

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return the values."""
        out, columns = site.matrix_shape
        return {"shira_values": Declared((min(site.rank * (out + columns), out * columns),))}

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the values at their positions, and zeros elsewhere, in the shape of the weight."""
        out, columns = self.matrix_shape
        values = self.shira_values
        flat = values.new_zeros(out * columns).scatter(0, self.positions[: values.shape[0]], values)
        matrix = flat.view(out, columns)
        return (matrix.t() if self.transposed else matrix).reshape(self.weight_shape)


class OftBranch(Branch):
    """OFT (2306.07280, section 3): `W' = W R^T` with a trained block-diagonal rotation R of the inputs.

    Each block is the Cayley transform `R = (I + Q)(I - Q)^-1` of a trained skew-symmetric matrix Q. By default, as in
    peft, R is computed by the start of a Neumann series, `I + 2 Q + 2 Q^2 + ... + Q^n` (OFTv2, 2506.19847). Q starts at
    zero. `rank` is the size of a block. If it does not divide the number of inputs, the nearest divisor is used, as in
    peft. Unlike peft, size 1 is not used, because it has no parameters. The scale is 1.

    Attributes:
        oft_R: entries of each Q above the diagonal, [blocks, size * (size - 1) / 2].
        positions: indices of these entries in the flattened Q.
    """

    oft_R: nn.Parameter
    positions: torch.Tensor
    kinds = ALL_BUT_STACKED
    defaults: ClassVar[Mapping[str, float]] = {"neumann_terms": 5}
    checks: ClassVar[Mapping[str, Check]] = {
        "neumann_terms": Check(
            lambda terms: terms == int(terms) and (terms == 0 or terms >= 2),  # with 1 term, R is the identity
            "give a number of terms, an integer of 2 or more, or 0 for the exact transform",
        )
    }
    uses_weight = True

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.size = block_size(site.matrix_shape[1], site.rank)
        self.terms = int(self.options_at(site)["neumann_terms"])
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=like.device)
        self.register_buffer("positions", rows * self.size + columns, persistent=False)

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why a single input is refused, or ""."""
        if site.matrix_shape[1] == 1:
            return f"has a single input, which cannot be rotated. Exclude the weight (exclude=({site.weight!r},))"
        return ""

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return the entries of Q."""
        columns = site.matrix_shape[1]
        size = block_size(columns, site.rank)
        return {"oft_R": Declared((columns // size, size * (size - 1) // 2))}

    def rotation(self) -> torch.Tensor:
        """Return `R - I` [blocks, size, size]."""
        blocks, size = self.oft_R.shape[0], self.size
        upper = self.oft_R.new_zeros(blocks, size * size).scatter(1, self.positions.expand(blocks, -1), self.oft_R)
        upper = upper.view(blocks, size, size)
        skew = upper - upper.transpose(-2, -1)
        if not self.terms:
            identity = torch.eye(size, device=skew.device, dtype=skew.dtype)
            rotation: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
            return rotation - identity
        # The coefficients are 2, except 1 for the last power if it is not the first. As in peft, 3 terms count as 4.
        last = max(self.terms, 4) - 1 if self.terms > 2 else self.terms - 1
        total, power = torch.zeros_like(skew), skew
        for exponent in range(1, last + 1):
            total = total + (power if exponent == last > 1 else 2 * power)
            power = power @ skew
        return total

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return `W (R - I)^T` in the shape of the weight."""
        assert weight is not None
        matrix, rotation = self.matrix(weight), self.rotation().to(weight.dtype)
        blocks = matrix.reshape(matrix.shape[0], -1, self.size).transpose(0, 1)
        moved = (blocks @ rotation.transpose(-2, -1)).transpose(0, 1).reshape(matrix.shape)
        return (moved.t() if self.transposed else moved).reshape(weight.shape)

    def merged(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: object
    ) -> torch.Tensor:
        """Return the output of the op with the adapted weight.

        For a product, rotate the input instead (`x R`), so that the backward needs no gradient of the full weight. A
        non-contiguous x is not rotated: `x R` would be contiguous, and its product rounded differently.
        """
        if op == "conv" or not self.scale or (is_eager(x) and not x.is_contiguous()):
            return super().merged(x, weight, bias, op=op, **options)
        blocks = x.unflatten(-1, (-1, self.size))
        moved = torch.einsum("...bi,bij->...bj", blocks, self.rotation().to(x.dtype))
        return PRODUCTS[op](x + moved.reshape(x.shape).to(x.dtype), weight, bias)


def block_size(columns: int, size: int) -> int:
    """Return the divisor of `columns` that is nearest to `size`, the smaller one in a tie.

    Size 1 is returned only if `columns` is 1, because a block of size 1 has no parameters.
    """
    if size >= columns:
        return columns
    above = next(value for value in range(size, columns + 1) if columns % value == 0)
    below = next(value for value in range(size, 0, -1) if columns % value == 0)
    return below if below > 1 and size - below <= above - size else above


class LokrBranch(Branch):
    """LoKr (2309.14859, LyCORIS, section 3): `delta = s w1 (x) w2`, a Kronecker product of two trained factors.

    The numbers of outputs and inputs are each split into two factors, by the option `decompose_factor` or as equally as
    possible. By default, w1 has the smaller factors. w2 has the other ones, and the kernel of a convolution. If r is
    less than half the longer side of w2, then w2 is itself a product of rank r. w1 starts at zero, and w2 at random
    values, as in `LoKrModel` of peft with decompose_both=False.

    Attributes:
        lokr_w1: w1 [out_1, in_1].
        lokr_w2: w2 [out_2, in_2, *kernel]. If it is a product: lokr_w2_a [out_2, rank] and
            lokr_w2_b [rank, in_2 * kernel].
    """

    lokr_w1: nn.Parameter
    kinds = frozenset({"linear", "conv"})
    options = frozenset({"lora_alpha", "use_rslora"})
    defaults: ClassVar[Mapping[str, float]] = {"decompose_factor": -1}
    checks: ClassVar[Mapping[str, Check]] = {
        "decompose_factor": Check(
            lambda factor: factor == int(factor) and (factor == -1 or factor >= 1),
            "give the number of rows of w1, an integer of 1 or more, or -1 for the most even split",
        )
    }

    @classmethod
    def table(cls, site: Site) -> Table:
        """Return w1, and w2 or its factors."""
        factor = int(cls.options_at(site)["decompose_factor"])
        out, columns, kernel = *site.matrix_shape, tuple(site.shape[2:])
        size, rank = math.prod(kernel), site.rank
        (out_1, out_2), (in_1, in_2) = factors(out, factor), factors(columns // size, factor)
        w1 = Declared((out_1, in_1))
        if rank >= max(out_2, in_2) / 2:
            return {"lokr_w1": w1, "lokr_w2": Declared((out_2, in_2, *kernel), _random_kernel)}
        a, b = Declared((out_2, rank), random_factor), Declared((rank, in_2 * size), random_factor)
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the Kronecker product in the shape of the weight."""
        parameters = dict(self.named_parameters())
        w2: torch.Tensor | None = parameters.get("lokr_w2")
        w2 = parameters["lokr_w2_a"] @ parameters["lokr_w2_b"] if w2 is None else w2
        w1, matrix = self.lokr_w1, w2.flatten(1)
        # Rows of the product are (out_1, out_2) and columns (in_1, in_2, *kernel), in the order of the weight.
        product = torch.kron(w1, matrix) * self.scale
        return (product.t() if self.transposed else product).reshape(self.weight_shape)


def _random_kernel(seed: int, stage: int, purpose: str, weight: str, shape: tuple[int, ...]) -> torch.Tensor:
    return random_factor(seed, stage, purpose, weight, (shape[0], math.prod(shape[1:]))).view(shape)


def factors(dimension: int, factor: int) -> tuple[int, int]:
    """Split a dimension into two factors, like peft.

    If `factor` divides the dimension, return `factor` and the quotient. Otherwise return the two most equal factors,
    the smaller one first. Unless `factor` is -1, it is an upper limit for the smaller one.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small = max(value for value in range(1, math.isqrt(dimension) + 1) if dimension % value == 0 and value <= limit)
    return small, dimension // small


METHODS: dict[str, type[Branch]] = {
    "lora": LoraBranch,
    "dora": DoraBranch,
    "lora-xs": LoraXsBranch,
    "vera": VeraBranch,
    "hira": HiraBranch,
    "shira": ShiraBranch,
    "miss": MissBranch,
    "oft": OftBranch,
    "lokr": LokrBranch,
    "delora": DeloraBranch,
}
"""Branch classes by the value of `CascadeSpec.adapter`.

`tokens` is not in this table, because only a rule that names rows selects it, and not a spec.
"""

ADAPTERS.update(METHODS, tokens=TokensBranch)

BUILT_IN = frozenset(ADAPTERS.values())


def register_branch(name: str, cls: type[Branch]) -> None:
    """Register an adapter method, so that `CascadeSpec(adapter=name)` accepts it.

    A process that loads a checkpoint of such a run must register the class first. See examples/own_branch.py. `adapt`
    checks each new branch. It raises SpecError if a parameter is not declared, or if the delta has a wrong shape or is
    not zero before training.

    Args:
        name: name of the method.
        cls: a subclass of `lorasc_fx.branch.Branch`, or of `LowRankBranch` if the delta is a low-rank product.

    Raises:
        SpecError: the name belongs to another class, or the class is abstract.
    """
    if not isinstance(name, str) or not name:
        raise SpecError(f"register_branch: name is {name!r}; give a string such as 'my-adapter'")
    if not (isinstance(cls, type) and issubclass(cls, Branch)) or cls.__abstractmethods__:
        raise SpecError(
            f"register_branch: {cls!r} is not a complete branch. Give a subclass of lorasc_fx.branch.Branch that "
            "defines table, and delta (or down and up of a LowRankBranch)"
        )
    if ADAPTERS.get(name, cls) is not cls:
        raise SpecError(
            f"register_branch: the name {name!r} belongs to the adapter {ADAPTERS[name].__name__}; give another name"
        )
    ADAPTERS[name] = cls


def check_registered(branch: Branch, site: Site, weight: Callable[[], torch.Tensor]) -> None:
    """Check a new branch of a class that the user has registered.

    Args:
        branch: the branch with its initial values.
        weight: function that returns the weight at the start of the stage. Called only if the delta depends on it.

    Raises:
        SpecError: the class declares other parameters, the delta has another shape than the weight, or it is not zero
            while the parameters in `Branch.zeros` are zero.
    """
    title = f"the branch of {site.weight} (adapter={site.options.adapter!r}, class {type(branch).__name__})"
    shapes = {name: tuple(value.shape) for name, value in branch.named_parameters()}
    declared = {name: tuple(shape) for name, shape in branch.shapes(site).items()}
    for name in {**declared, **shapes}:
        if shapes.get(name) != declared.get(name):
            raise SpecError(
                f"{title} has the parameter {name} of shape {shapes.get(name)}, but declares {declared.get(name)}. "
                "Declare each parameter with its shape in `table`, and let `Branch.__init__` create it",
                code="wrong-function-result",
            )
    if not branch.zeros:
        raise SpecError(
            f"{title} has no trained parameter that starts at zero, so its delta cannot be zero before training. "
            "Declare one in `table`, for example B of a product B A",
            code="wrong-function-result",
        )
    value = weight() if branch.uses_weight else None
    # The delta must be zero for all values of the other parameters, so check it with changed values too.
    trained = copy.deepcopy(branch)
    with torch.no_grad():
        for name, parameter in trained.trainable().items():
            if name not in branch.zeros:
                parameter.add_(1.0)
        _check_delta(title, branch, site, value)
        _check_delta(title, trained, site, value)


def _check_delta(title: str, branch: Branch, site: Site, weight: torch.Tensor | None) -> None:
    delta, lead = branch.delta(weight), 2 if site.stacked else 1
    shapes = tuple(delta.shape) if isinstance(delta, torch.Tensor) else (tuple(delta.b.shape), tuple(delta.a.shape))
    matrix = (*site.shape[:lead], math.prod(site.shape[lead:]))
    expected: tuple[Any, ...] = site.shape
    if isinstance(delta, Factors):
        rank = delta.b.shape[-1] if delta.b.dim() else 0
        expected = (*matrix[:-1], rank), (*matrix[:-2], rank, matrix[-1])
    if shapes != expected:
        raise SpecError(
            f"{title} has a delta of shape {shapes}, but the weight needs {expected}. Correct `delta`, or `down` and "
            "`up` of a LowRankBranch",
            code="wrong-function-result",
        )
    largest = (delta.b @ delta.a if isinstance(delta, Factors) else delta).abs().max().item()
    if largest != 0:
        raise SpecError(
            f"{title} changes the weight before training, by up to {largest:.2g}. The delta must be zero while "
            f"{', '.join(branch.zeros)} of `table` are zero, whatever the other parameters are",
            code="wrong-function-result",
        )
