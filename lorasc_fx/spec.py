"""Configuration of a cascade: frozen dataclasses that check their fields and convert to and from dictionaries.

The formulas are in docs/algorithm.md, and docs/method.md lists every option with its formula and source. The LoRASC
paper (arXiv 2407.01491) leaves several choices open: how noise is drawn, the value of alpha (here `pace`), whether
noise stays after a fold, and the learning rate after a restart. Where an option below has no source, the default is our
own choice (docs/method.md, "What the paper leaves open").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import Annotated, Any, ClassVar, Literal

import torch

from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.quantized import is_quantized
from lorasc_fx.util.decode import Check, Conflict, check, checks_names, decode


def scale_of(rank: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return the scale s of a branch: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` as in rsLoRA (2312.03732)."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


ADAPTERS: dict[str, type[Any]] = {}
"""Subclasses of `lorasc_fx.branch.Branch` by the value of `CascadeSpec.adapter`.

`lorasc_fx.branch.methods` fills this table, and `lorasc_fx.register_branch` adds to it. It is in this file because
`branch` imports this file, so this file cannot import `branch`.
"""


GRIDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    str(dtype).removeprefix("torch."): lambda weight, dtype=dtype: weight.to(dtype).to(weight.dtype)  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}
"""{value of `CascadeSpec.grid`: function that rounds a weight}. See `register_grid` for the functions."""

OWN_GRID = "own"
"""The value of `CascadeSpec.grid` that selects, for each quantized weight, its own grid."""


def register_grid(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Register a rounding function for `CascadeSpec(grid=name)`. To load a checkpoint with it, register it first.

    Args:
        name: name of the grid. For `CascadeSpec(grid=function)`, it is the qualified name of the function.
        function: rounds its argument to the nearest values of a grid, in the same shape and dtype. The argument is a
            weight in its stored layout [out, in] (transformers' Conv1D: [in, out]), the kernel of a convolution
            [out, in/groups, *kernel], or one matrix of a stack. The function must be deterministic, and must not write
            to its argument.

    Raises:
        SpecError: the name is empty, or already belongs to another function.
    """
    is_taken = name == OWN_GRID or not _same_function(GRIDS.get(name, function), function)
    if not name or is_taken:
        raise SpecError(
            f"grid: the name {name!r} is {'that of another grid' if name else 'empty'}. Give the function another one "
            "by register_grid(NAME, function), and then CascadeSpec(grid=NAME)"
        )
    GRIDS[name] = function


def _same_function(one: object, other: object) -> bool:
    """Whether two functions are the same, or one is the other one defined again (by a notebook cell that ran twice)."""
    if one is other:
        return True
    names = ("__code__", "__closure__", "__defaults__", "__kwdefaults__")
    plain = isinstance(one, FunctionType) and isinstance(other, FunctionType) and one.__globals__ is other.__globals__
    return plain and all(getattr(one, name) == getattr(other, name) for name in names)


PEFT_OPTIONS = {
    "r": "rank",
    "alpha": "lora_alpha",
    "target_modules": "targets, globs on weight names: '*.query' for peft's 'query'",
    "target_parameters": "targets",
    "layers_to_transform": "targets, such as 'layers.3.*'",
    "layers_pattern": "targets, such as 'layers.3.*'",
    "exclude_modules": "exclude, globs on weight names",
    "modules_to_save": "train, globs on parameter names",
    "trainable_token_indices": "rules, such as lorasc_fx.Rule('*.embed_tokens.weight', tokens=(5, 7))",
    "bias": "train, such as ('*.bias',)",
    "lora_bias": "train, such as ('*.bias',)",
    "lora_dropout": "dropout",
    "rank_pattern": "rules, of lorasc_fx.Rule",
    "alpha_pattern": "rules, of lorasc_fx.Rule",
    "init_lora_weights": "start: 'lora' or 'pissa'",
    "loraplus_lr_ratio": "lr_ratio",
    "use_dora": "adapter='dora'",
    "ensure_weight_tying": "nothing: tied weights stay tied",
    "fan_in_fan_out": "nothing: the layout of the weight is inferred from the graph",
    "task_type": "nothing: pass it to export.peft",
    "inference_mode": "nothing: call release() for inference",
}
"""{option of peft's LoraConfig: our counterpart}, for the error about an unknown option."""

RULE_CONFLICTS = tuple(
    Conflict(
        ("tokens", option),
        lambda tokens, value: tokens and value is not None,
        "these rows are trained directly, without low-rank factors",
        f"Remove tokens or {option}",
    )
    for option in ("rank", "lora_alpha")
)
"""Conflicts between options of `Rule`."""

METHOD_OPTIONS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "use_rslora": False,
    "start": "lora",
    "restart_factors": "both",
    "train_A": True,
    "lr_ratio": 1.0,
    "dropout": 0.0,
}
"""{option that only some adapter methods support (see `Branch.options`): default value}."""

GRID_VALUES: dict[str, tuple[Any, ...]] = {
    "placement": ("auto", "weight"),
    "dropout": (0.0,),
    "start": ("lora",),
    "restart_factors": ("both", "B"),
    "noise.keep": (False,),
}
"""{option: the values of it that can be combined with a grid}."""

CONFLICTS = (
    Conflict(
        ("dropout", "placement"),
        lambda dropout, placement: dropout and placement in ("merged", "weight"),
        "a branch has an input to drop only beside its op",
        "Set placement='beside' or 'auto', or dropout=0",
    ),
    Conflict(
        ("average", "noise.keep"),
        lambda average, keep: average and keep,
        "the average would contain a share of the noise of each stage, and only experts have coefficients for shares",
        "Set average=False or noise.keep=False",
    ),
    Conflict(
        ("restart_factors", "start"),
        lambda factors, start: factors != "both" and start != "lora",
        "this start computes both factors of a branch from the weight at each stage",
        "Set restart_factors='both' or start='lora'",
    ),
    Conflict(
        ("restart_factors", "adapter"),
        lambda factors, adapter: ADAPTERS[adapter].magnitude and factors == "none",
        "DoRA's magnitudes restart from the norms of the weight, without a delta",
        "Set restart_factors='both' or adapter='lora'",
    ),
    Conflict(
        ("adapter", "restart"),
        lambda adapter, restart: ADAPTERS[adapter].magnitude and restart != "slow",
        "slow and fast weights of DoRA would have different row scales, which one list of experts cannot represent",
        "Set restart='slow' or adapter='lora'",
    ),
    Conflict(
        ("adapter", "noise.keep", "noise.strength"),
        lambda adapter, keep, strength: ADAPTERS[adapter].magnitude and keep and strength,
        "later stages of DoRA would rescale the kept noise",
        "Set keep=False or adapter='lora'",
    ),
    Conflict(
        ("adapter", "average"),
        lambda adapter, average: ADAPTERS[adapter].magnitude and average,
        "averaged weights of DoRA have different row scales, which one list of experts cannot represent",
        "Set average=False or adapter='lora'",
    ),
    Conflict(
        ("adapter", "placement"),
        lambda adapter, placement: placement != "auto" and placement not in ADAPTERS[adapter].placements,
        "this adapter method does not support the placement",
        "Set placement='auto'",
    ),
    *(
        Conflict(
            ("grid", option),
            lambda grid, value, allowed=allowed: grid and value not in allowed,
            "the branch computes the rounded sum of the weight and its delta, which starts at zero in each stage",
            f"Set grid=None or {option}={allowed[0]!r}",
        )
        for option, allowed in GRID_VALUES.items()
    ),
    *(
        Conflict(
            ("adapter", option),
            lambda adapter, value, option=option, default=default: (
                value != default and option not in ADAPTERS[adapter].options
            ),
            "this adapter method has no such option",
            f"Set adapter='lora' or remove {option}",
        )
        for option, default in METHOD_OPTIONS.items()
    ),
)
"""Conflicts between options of `CascadeSpec`. They are checked after the value of each field."""


def check_adapter_options(adapter: str, options: Iterable[tuple[str, float]]) -> None:
    """Check names and values of the options of an adapter method (`CascadeSpec.adapter_options`).

    Raises:
        SpecError: the method has no such option, or the option has an invalid value.
    """
    method = ADAPTERS[adapter]
    for name, value in options:
        if name not in method.defaults:
            options_text = ", ".join(f"{option} (default {default:g})" for option, default in method.defaults.items())
            raise SpecError(
                f"adapter_options: {name!r} is not an option of adapter={adapter!r}"
                f"{nearest(name, method.defaults)}; its options: {options_text or 'none'}",
                code="unknown-name",
            )
        check = method.checks.get(name)
        if check is not None and not check.accepts(value):
            raise SpecError(f"adapter_options[{name!r}] is {value!r} with adapter={adapter!r}; {check.remedy}")


KINDS = ("linear", "conv", "embedding", "recurrent", "stacked")
"""Kinds of weights. Any other text in `CascadeSpec.targets` is a glob on weight names."""

PLACEMENTS = ("beside", "merged", "weight")
"""Values of `Site.placement`: where a branch computes (docs/algorithm.md, "Placements")."""

Distribution = Literal["uniform", "normal"]
Where = Literal["sites", "all"]
Restart = Literal["slow", "fast"]
RestartFactors = Literal["both", "B", "none"]
Start = Literal["lora", "pissa"]
PlacementOption = Literal["auto", "beside", "merged", "weight"]
Adapter = Annotated[
    str,
    Check(
        ADAPTERS.__contains__,
        "give the name of a method in docs/method.md, or one registered by register_branch",
        ADAPTERS,
    ),
]
AdapterOptions = tuple[tuple[str, float], ...]
Grid = (
    Annotated[
        str,
        Check(
            lambda grid: grid in GRIDS or grid == OWN_GRID,
            f"give a dtype, {OWN_GRID!r} for quantized weights, or a function (after a load: register_grid first)",
            GRIDS,
        ),
    ]
    | Callable[[torch.Tensor], torch.Tensor]
    | None
)
Pattern = Annotated[str, Check(bool, f"give a kind {KINDS} or a glob on weight names")]
Rank = Annotated[int, Check(lambda rank: 1 <= rank < 2**31, "a rank is an integer of 1 or more")]
Alpha = Annotated[float, Check(lambda alpha: alpha > 0, "give a number above 0, because it scales the branch")]
Rate = Annotated[float, Check(lambda rate: rate > 0, "give a number above 0, because it defines a learning rate")]
Dropout = Annotated[float, Check(lambda p: 0 <= p < 1, "it is a probability: give a number in [0, 1)")]
Tokens = Annotated[
    tuple[Annotated[int, Check(lambda row: 0 <= row < 2**31, "give a row index of 0 or more")], ...],
    Check(lambda rows: len({*rows}) == len(rows), "give each row once"),
]
Share = Annotated[float, Check(lambda p: 0 < p <= 1, "it is a share of the fast weights: give a number in (0, 1]")]
Pace = Annotated[
    Share | tuple[Share, ...] | Literal["mean"],
    Check(lambda pace: pace != (), "give a number in (0, 1], one for each stage, or 'mean'"),
]


@checks_names
@dataclass(frozen=True)
class Noise:
    """Noise that is added to the frozen weights while a stage trains (docs/algorithm.md, row "noise").

    Each entry of a weight W gets `strength * std(W) * U(-1/2, 1/2)`. The noise of a weight depends only on the seed,
    the stage and the name of the weight.

    Args:
        strength: as in docs/algorithm.md, relative to the standard deviation of the weight. 0 (default) turns noise
            off. NoisyTune (2202.12024) uses 0.15.
        distribution: `uniform` (default), as above and in NoisyTune, or `normal`: N(0, 1/12), the same variance.
        keep: if True, the noise of each stage stays in the slow weights. If False (default), the fold removes it
            exactly.
        where: `sites` (default) for the adapted weights only, or `all` for every weight matrix except those trained
            in full.
    """

    strength: Annotated[
        float, Check(lambda strength: strength >= 0, "it scales a standard deviation: give a number of 0 (off) or more")
    ] = 0.0
    distribution: Distribution = "uniform"
    keep: bool = False
    where: Where = "sites"

    def __post_init__(self) -> None:
        check(self, "noise")

    def on_others(self, names: Iterable[str]) -> list[str]:
        """Return which of these names of weights without a branch get noise: all if `where` is "all", else none."""
        return list(names) if self.strength and self.where == "all" else []


@checks_names
@dataclass(frozen=True)
class Rule:
    """Options for the weights that match a pattern. They replace options of the spec. The first matching rule counts.

    Args:
        pattern: one of KINDS, or a glob on weight names.
        rank: rank of these branches. None (default): `CascadeSpec.rank`.
        lora_alpha: numerator of the scale of these branches. None (default): `CascadeSpec.lora_alpha`.
        tokens: indices of rows to train directly, such as new tokens of an embedding, without a branch of
            `CascadeSpec.adapter`. For a tied weight, this applies to all its names. Like peft's
            `trainable_token_indices`.
    """

    pattern: Pattern
    rank: Rank | None = None
    lora_alpha: Alpha | None = None
    tokens: Tokens = ()

    def __post_init__(self) -> None:
        check(self, "rules", self.pattern, conflicts=RULE_CONFLICTS)


@dataclass(frozen=True)
class SiteOptions:
    """Options of the branch of one site, resolved from a spec and the rule that matches the site.

    Args:
        rank: rank of the branch.
        lora_alpha: numerator of the scale.
        adapter: name of the adapter method.
        use_rslora: whether the scale divides by `sqrt(rank)` instead of `rank`.
        adapter_options: options of the method, as (name, value) pairs.
        train_A: whether A is trained.
        tokens: indices of the trained rows. Empty unless a rule gives them.
        grid: name of the grid, or "".
    """

    rank: Rank
    lora_alpha: Alpha
    adapter: Adapter = "lora"
    use_rslora: bool = False
    adapter_options: AdapterOptions = ()
    train_A: bool = True
    tokens: Tokens = ()
    grid: str = ""

    def grid_of(self, weight: torch.Tensor) -> str:
        """Return the grid of a weight, or "" for none. With "own", only quantized weights have a grid."""
        return self.grid if self.grid != OWN_GRID or is_quantized(weight) else ""

    @property
    def scale(self) -> float:
        """The scale s of the delta: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` with `use_rslora`.

        1 for adapter methods without the option `lora_alpha`.
        """
        if "lora_alpha" not in self.method.options:
            return 1.0
        return scale_of(self.rank, self.lora_alpha, self.use_rslora)

    @property
    def method(self) -> type[Any]:
        """The branch class of `adapter`."""
        return ADAPTERS[self.adapter]


@checks_names
@dataclass(frozen=True)
class CascadeSpec:
    """Configuration of `lorasc_fx.adapt`: what is adapted, how branches train, and how stages are merged.

    Some options exist only for some adapter methods: lora_alpha, use_rslora, dropout, train_A, lr_ratio,
    restart_factors and start. docs/method.md lists the options that cannot be combined, from `CONFLICTS`.

    Args:
        targets: which weights get a branch: kinds (linear, conv, embedding, recurrent, stacked), or globs on weight
            names. A glob that matches a module name selects all weights of the module. Default: all kinds.
        exclude: globs on names of weights that must not be changed, even if they match targets. Default: none.
        train: globs on names of parameters to train in full, such as a new head or norms. Like peft's modules_to_save.
            Default: none.
        untie: globs on names of tied parameters, such as a head that shares its weight with the embedding. They become
            separate parameters, also after `Cascade.release`. Default: none.
        rules: other ranks, other lora_alpha, or rows to train, for weights that match a pattern (see Rule). The first
            match counts. Default: none.
        adapter: adapter method: `lora` (default), `dora` (2402.09353), another row of docs/method.md, or a name given
            to `register_branch`.
        adapter_options: options of the adapter method by name (docs/method.md), as a mapping. Stored as sorted pairs.
            Default: none.
        rank: rank r of the branches. Default: 8.
        lora_alpha: numerator of the scale `s = lora_alpha / rank`. Default: 8.0.
        use_rslora: divide by `sqrt(rank)` instead of rank (rsLoRA, 2312.03732). Default: False.
        dropout: probability that an entry of a branch's input is set to zero in train mode, like peft's lora_dropout.
            Default: 0.0.
        train_A: whether A is trained. If False, A keeps its initial values in a stage, and only A x is saved for the
            backward (LoRA-FA, 2308.03303). Default: True.
        lr_ratio: learning rate of B divided by the learning rate of A (LoRA+, 2402.12354, which suggests about 16).
            Default: 1.0.
        average: keep the mean of the slow weights at the ends of stages (SWA, 1803.05407), for
            `Cascade.weights("averaged")`. Default: False.
        placement: where branches compute: `beside` the op, `merged` into it, on the `weight`, or `auto` (default) to
            let a cost model choose. If the op of a site does not allow the placement, the site gets another one. The
            choice of `auto` is made at the first capture. See docs/algorithm.md, "Placements".
        pace: share of the fast weights that a transition merges into the slow ones, in (0, 1]; alpha in the paper.
            A sequence has one share per stage; its last entry repeats. 1.0 merges whole stages (COLA, 2401.04151).
            `mean` is 1/n for the n-th of the stages that the slow weights are made of (n = t without a rewind): with
            restart="fast", the slow weights are then the mean of the weights at the ends of these stages. Default: 0.5.
        restart: whether the next stage starts from the `slow` (default) or the `fast` weights.
        noise: noise on the frozen weights (see Noise). Default: off.
        restart_factors: which factors restart at a transition: `both` (default), `B` alone, or `none`: in the next
            stage of a loop, A and B continue to train with their optimizer state, whatever `optimizer_state` says. A
            transition only applies the slow rule then.
        start: factors at the start of a stage. `lora` (default): random A, and B = 0. `pissa` (2404.02948): the largest
            singular triplets of the weight W, which holds the residual `W - s B A` while the stage trains.
        optimizer_state: optimizer state of the branches at a transition: `reset` (default), `kept`, or the share in
            (0, 1) of the smallest entries of each moment that are set to zero (ReLoRA, 2307.05695).
        slow_train: whether the share `pace` of the change of parameters in `train` is kept too, or all of it
            (docs/algorithm.md, "slow update"). Default: True.
        grid: train with the weights that a fold will store, rounded to a grid: `bfloat16`, `float16`, `float8_e4m3fn`,
            `own` for the grid of each quantized weight, or a function that rounds a weight (see `register_grid`).
            Forward computes with the rounded `W + s B A`, and gradients pass through the rounding. Default: None.
        seed: seed of initial values and noise. `torch.manual_seed` and the seed of a trainer do not affect them, so
            give each repetition of an experiment another seed. Default: 0.

    Raises:
        SpecError: a value has the wrong type or is out of range, or options cannot be combined.
    """

    OTHER_NAMES: ClassVar[Mapping[str, str]] = PEFT_OPTIONS

    targets: Annotated[tuple[str, ...], Check(bool, f"give kinds {KINDS} or globs on weight names")] = KINDS
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    untie: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    adapter: Adapter = "lora"
    adapter_options: AdapterOptions = ()
    rank: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool = False
    dropout: Dropout = 0.0
    train_A: bool = True
    lr_ratio: Rate = 1.0
    average: bool = False
    placement: PlacementOption = "auto"
    pace: Pace = 0.5
    restart: Restart = "slow"
    noise: Noise = field(default_factory=Noise)
    restart_factors: RestartFactors = "both"
    start: Start = "lora"
    optimizer_state: (
        Literal["reset", "kept"]
        | Annotated[float, Check(lambda share: 0 < share < 1, "give 'reset', 'kept', or the share in (0, 1) to prune")]
    ) = "reset"
    slow_train: bool = True
    grid: Grid = None
    seed: Annotated[int, Check(lambda seed: 0 <= seed < 2**63, "give an integer from 0 to 2**63 - 1")] = 0

    def __post_init__(self) -> None:
        if isinstance(self.adapter_options, Mapping):
            # Pairs in sorted order: a spec must be hashable, and equal specs must compare equal.
            object.__setattr__(self, "adapter_options", tuple(sorted(self.adapter_options.items())))
        if callable(self.grid):
            named = hasattr(self.grid, "__qualname__")  # a functools.partial or a module has none
            name = f"{self.grid.__module__}.{self.grid.__qualname__}" if named else ""
            register_grid(name, self.grid)
            object.__setattr__(self, "grid", name)
        check(self, conflicts=CONFLICTS)
        check_adapter_options(self.adapter, self.adapter_options)

    def site_options(self, rule: Rule | None = None) -> SiteOptions:
        """Return the options of a site. `rule` is the rule that matches the site, if any."""
        if rule is not None and rule.tokens:
            return SiteOptions(len(rule.tokens), float(self.lora_alpha), "tokens", tokens=rule.tokens)
        rank, alpha = self.rank, self.lora_alpha
        if rule is not None:
            rank = rank if rule.rank is None else rule.rank
            alpha = alpha if rule.lora_alpha is None else rule.lora_alpha
        options = (self.use_rslora, self.adapter_options, self.train_A)
        return SiteOptions(rank, float(alpha), self.adapter, *options, grid=str(self.grid or ""))

    @property
    def method(self) -> type[Any]:
        """The branch class of `adapter`."""
        return ADAPTERS[self.adapter]

    def to_dict(self) -> dict[str, Any]:
        """Return {field: plain data}, for JSON and TOML. Fields that are None are left out."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> CascadeSpec:
        """Build a spec from plain data.

        Raises:
            SpecError: a key is unknown (the message suggests the nearest known key), or a value is invalid.
        """
        spec: CascadeSpec = decode(cls, data, ("spec",))
        return spec


def _plain(value: object) -> Any:
    if isinstance(value, (Noise, Rule)):
        items = {option.name: _plain(getattr(value, option.name)) for option in fields(value)}
        return {name: item for name, item in items.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
