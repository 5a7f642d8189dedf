"""The configuration of a cascade: frozen dataclasses that validate themselves and convert to and from dictionaries.

The paper (arXiv 2407.01491) does not say how noise is drawn, what alpha (here `pace`) is, whether noise stays after
a fold, or which learning rate follows a restart. docs/method.md lists our choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from lorasc_fx.options import (
    ADAPTERS,
    AVERAGES,
    DISTRIBUTIONS,
    NEXT_A,
    PACES,
    RESTARTS,
    SCALES,
    STARTS,
    GivenPace,
    NextA,
    PaceRule,
    Start,
)
from lorasc_fx.spec_checks import (
    CONFLICTS,
    NOISE_CONFLICTS,
    OF_PEFT,
    RULE_CONFLICTS,
    USUAL_DECAY,
    USUAL_PENALTY,
    USUAL_RANK,
    check_adapter_options,
)
from lorasc_fx.util.decode import Check, check, checks_names, choice, decode

KINDS = ("linear", "conv", "embedding", "recurrent", "experts")
"""Kinds of weights. A target that is none of these names is a glob on weight names."""

PLACEMENTS = ("beside", "merged", "weight")
"""Where a branch computes (docs/design.md)."""

Redraw = Literal["stage", "step"]
Where = Literal["sites", "all"]
OnNonFinite = Literal["raise", "skip"]
Placement = Literal["auto", "beside", "merged", "weight"]
Adapter = Annotated[
    str,
    Check(
        ADAPTERS.__contains__,
        "give the name of a method in docs/method.md, or one that register_branch knows",
        ADAPTERS,
    ),
]
AdapterOptions = tuple[tuple[str, float], ...]
Pattern = Annotated[str, Check(bool, f"give a kind {KINDS} or a glob on weight names")]
Rank = Annotated[int, Check(lambda rank: 1 <= rank < 2**31, "a rank is an integer of 1 or more")]
Alpha = Annotated[float, Check(lambda alpha: alpha > 0, "it scales the branch: give a number above 0")]
Rate = Annotated[float, Check(lambda rate: rate > 0, "it makes a learning rate: give a number above 0")]
Dropout = Annotated[float, Check(lambda p: 0 <= p < 1, "it is the share that is set to zero: give a number in [0, 1)")]
Tokens = Annotated[
    tuple[Annotated[int, Check(lambda row: 0 <= row < 2**31, "give the number of a row, 0 or more")], ...],
    Check(lambda rows: len({*rows}) == len(rows), "give each row once"),
]
Share = Annotated[float, Check(lambda p: 0 < p <= 1, "it is a share of the fast weights: give a number in (0, 1]")]
Pace = Annotated[
    Share | tuple[Share, ...] | Annotated[str, choice(PACES)],
    Check(lambda pace: pace != (), "give a share of the fast weights in (0, 1], one for each stage, 'mean' or 'loss'"),
]


@checks_names
@dataclass(frozen=True)
class Noise:
    """Noise on the frozen weights while a stage trains: `strength * std(W) * U(-1/2, 1/2)`.

    Args:
        strength: lambda of algorithm.md, 0 is off.
        distribution: `uniform` as above (NoisyTune, 2202.12024), `normal` of the same variance, or `filter` (Flat-LoRA,
            2409.14396): `strength * |W_i| / sqrt(n) * N(0, 1)` in row i of n entries. The paper uses the rows of the
            weight with its branch, and a strength that grows from 0. Here the rows are from the start of the stage, and
            the strength is constant.
        keep: whether the noise of a stage stays in the slow weights. Otherwise the fold removes it, bit for bit.
        where: `sites`, or `all` weight matrices except the ones trained in full.
        redraw: once per `stage`, or after each optimizer `step` as in Flat-LoRA. Each draw costs a fold, because the
            weights are computed again from W0.
    """

    strength: Annotated[
        float, Check(lambda strength: strength >= 0, "it scales a standard deviation: give 0 (off) or more")
    ] = 0.0
    distribution: Annotated[str, choice(DISTRIBUTIONS)] = "uniform"
    keep: bool = False
    where: Where = "sites"
    redraw: Redraw = "stage"

    def __post_init__(self) -> None:
        check(self, "noise", conflicts=NOISE_CONFLICTS)

    @property
    def is_on(self) -> bool:
        """Whether there is noise."""
        return self.strength > 0

    @property
    def follows_steps(self) -> bool:
        """Whether it is drawn again after each optimizer step."""
        return self.is_on and self.redraw == "step"

    def on_others(self, names: Iterable[str]) -> list[str]:
        """Return the names of the weights without a branch that have noise."""
        return list(names) if self.is_on and self.where == "all" else []


@checks_names
@dataclass(frozen=True)
class Rule:
    """Other options for the weights that a pattern matches; the first match counts.

    Args:
        pattern: a kind, or a glob on weight names.
        rank, lora_alpha: replace the fields of the spec.
        tokens: rows to train, such as new tokens of an embedding, instead of a branch of the spec's adapter. A tied
            head has the same rows.
    """

    pattern: Pattern
    rank: Rank | None = None
    lora_alpha: Alpha | None = None
    tokens: Tokens = ()

    def __post_init__(self) -> None:
        check(self, "rules", self.pattern, conflicts=RULE_CONFLICTS)


@checks_names
@dataclass(frozen=True)
class TrainRule:
    """Options of the parameters trained in full that a glob matches; the first match counts.

    Args:
        pattern: glob on parameter names. `CascadeSpec.train` has to match these parameters as well.
        lr: their learning rate, instead of the one given to `param_groups`.
        slow: whether they have a slow copy, instead of `CascadeSpec.slow_train`.
    """

    pattern: Annotated[str, Check(bool, "give a glob on parameter names")]
    lr: Rate | None = None
    slow: bool | None = None

    def __post_init__(self) -> None:
        check(self, "train_rules", self.pattern)


@dataclass(frozen=True)
class SiteOptions:
    """Options of the branch of one site, from a spec and its rules.

    Args:
        adapter: name of the method.
        rank: in the running stage.
        lora_alpha, use_rslora: define the scale.
        adapter_options: options of the method, as pairs.
        ranks: rank in stage 1, 2, ...; the last one repeats. Empty: the rank does not change.
        train_A: whether A is trained.
        nearest_full_gradient: whether the gradient of B is corrected to the step nearest to full training.
        tokens: trained rows, if a rule gives them.
    """

    rank: Rank
    lora_alpha: Alpha
    adapter: Adapter = "lora"
    use_rslora: bool = False
    adapter_options: AdapterOptions = ()
    ranks: tuple[Rank, ...] = ()
    train_A: bool = True
    nearest_full_gradient: bool = False
    tokens: Tokens = ()

    def at_stage(self, stage: int) -> SiteOptions:
        """Return the options in a stage: the rank follows `ranks`."""
        return replace(self, rank=self.ranks[min(stage, len(self.ranks)) - 1]) if self.ranks else self

    @property
    def scale(self) -> float:
        """`lora_alpha / rank`, or `/ sqrt(rank)` under rsLoRA; 1 for a method without a scale."""
        if "lora_alpha" not in self.method.options:
            return 1.0
        return SCALES[self.use_rslora].scale(self.rank, self.lora_alpha)

    @property
    def method(self) -> type[Any]:
        """The branch class of `adapter`."""
        return ADAPTERS[self.adapter]


@checks_names
@dataclass(frozen=True)
class CascadeSpec:
    """All that a user asks of an adaptation.

    Args:
        targets: kinds (see KINDS; all by default) or globs on weight names. A glob that names a module means its
            weights.
        exclude: globs on weight names that are never changed.
        train: globs on names of parameters to train in full (a new head, norms).
        untie: globs on names of tied parameters, such as a head that shares its weight with the embedding. They become
            separate parameters, and stay separate after a release.
        rules: another rank or lora_alpha, or rows to train, by pattern; the first match counts.
        adapter: the method: `lora`, `dora` (2402.09353), or another row of docs/method.md, or one of your own
            (`register_branch`).
        adapter_options: options of the method, by name (docs/method.md). A mapping is stored as pairs.
        rank: r of the branches.
        lora_alpha: numerator of the scale `s = lora_alpha / rank`. use_rslora: divide by `sqrt(rank)` instead.
        dropout: share of the entries of a branch's input that are set to zero in train mode, as in peft's LoRA. Such
            branches compute beside their op, because only there they have an input.
        ranks: rank of stage 1, 2, ...; the last one repeats. Empty: every stage has `rank`. It does not change the rank
            that a rule gives.
        train_A: whether A is trained. Without it only A x is saved for the backward (LoRA-FA, 2308.03303).
        nearest_full_gradient: multiply the gradient of B by `(A A^T)^-1 / s^2`. With a frozen A this is the step
            nearest to full training.
        lr_ratio: learning rate of B divided by the learning rate of A (LoRA+, 2402.12354, there about 16).
        train_rules: learning rate and slow copy by pattern, for parameters under `train`; the first match counts.
        average: average of the slow weights over the ends of stages, for `weights("averaged")`: `ema`, exponential with
            average_decay, or `swa`, the plain mean (1803.05407).
        placement: where the branches compute: `beside` the op, `merged` with it, on the `weight`, or `auto` by a cost
            model. If a node does not allow the given placement, another one is used.
        pace: share of the fast weights that a transition adds to the slow ones (the paper's alpha), in (0, 1]. A
            sequence has one share for each stage; the last one repeats. `mean` is 1/t in stage t: with restart="fast"
            the slow weights are the mean of the weights at the ends of stages. `loss` weights each stage in this mean
            by `L_t^-loss_penalty` of its loss L_t (2504.18580), which `transition(optimizer, loss=...)` takes.
        loss_penalty: p of pace="loss"; 0 is the plain mean, and a larger one prefers stages with a small loss.
        momentum: m of Nesterov's momentum over stages (SNOO, 2510.15830): `d_t = F_t - S_{t-1}`,
            `v_t = m v_{t-1} + d_t`, `S_t = S_{t-1} + pace (d_t + m v_t)`. With 0 it is LoRASC's rule.
        restart: whether the next stage starts from the slow or from the fast weights.
        noise: see `Noise`.
        restart_A: A of the next stage: `fresh` random values, or `kept` from the stage before.
        restart_pairs: share of the rank-1 pairs of each branch that a transition restarts (SRLoRA, 2505.12433): those
            with the smallest terms stay in the weight, and the others are trained on with their optimizer state.
        start: the factors of a stage: `lora` (A as restart_A says, B = 0), or out of the weight, which then holds the
            residual while the stage trains: its largest singular triplets (`pissa`, 2404.02948), its smallest ones
            (`milora`, 2406.09044), or the first columns and rows of its QR decomposition (`olora`, 2406.01775).
            `loftq` (2310.08659) starts beside a quantized weight from the nearest pair to what quantization took from
            it; `adapt` is given the files of the model before by `base`.
        carry_rank: largest rank of the delta of earlier stages beside a quantized weight. A delta of a higher rank is
            replaced by the nearest one. None: the rank of the matrix.
        optimizer_state: of the branches at a transition: `reset`, `kept`, or the share in (0, 1) of the smallest
            entries that are set to zero (ReLoRA, 2307.05695).
        slow_train: whether parameters under `train` follow the slow rule as well.
        on_nonfinite: a branch with inf or nan at a fold is an error (`raise`) or is left out (`skip`).
        seed: seed of initial values and noise. `torch.manual_seed` and a trainer's seed do not change them, so give
            another seed for each repetition of an experiment.
    """

    OTHER_NAMES: ClassVar[Mapping[str, str]] = OF_PEFT

    targets: Annotated[tuple[str, ...], Check(bool, f"give kinds {KINDS} or globs on weight names")] = KINDS
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    untie: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    adapter: Adapter = "lora"
    adapter_options: AdapterOptions = ()
    rank: Rank = USUAL_RANK
    lora_alpha: Alpha = 8.0
    use_rslora: bool = False
    dropout: Dropout = 0.0
    ranks: tuple[Rank, ...] = ()
    train_A: bool = True
    nearest_full_gradient: bool = False
    lr_ratio: Rate = 1.0
    train_rules: tuple[TrainRule, ...] = ()
    average: Annotated[str, choice(AVERAGES)] = "off"
    average_decay: Annotated[
        float, Check(lambda decay: 0 < decay < 1, "it is what an average keeps: give a number in (0, 1)")
    ] = USUAL_DECAY
    placement: Placement = "auto"
    pace: Pace = 0.5
    loss_penalty: Annotated[float, Check(lambda p: p >= 0, "it is an exponent: give a number of 0 or more")] = (
        USUAL_PENALTY
    )
    momentum: Annotated[float, Check(lambda m: 0 <= m < 1, "it is a momentum: give a number in [0, 1)")] = 0.0
    restart: Annotated[str, choice(RESTARTS)] = "slow"
    noise: Noise = field(default_factory=Noise)
    restart_A: Annotated[str, choice(NEXT_A)] = "fresh"
    restart_pairs: Annotated[
        float, Check(lambda share: 0 < share <= 1, "it is a share of the pairs of a branch: give a number in (0, 1]")
    ] = 1.0
    start: Annotated[str, choice(STARTS)] = "lora"
    carry_rank: Rank | None = None
    optimizer_state: (
        Literal["reset", "kept"]
        | Annotated[float, Check(lambda share: 0 < share < 1, "give 'reset', 'kept' or a ratio in (0, 1) to prune")]
    ) = "reset"
    slow_train: bool = True
    on_nonfinite: OnNonFinite = "raise"
    seed: Annotated[int, Check(lambda seed: 0 <= seed < 2**63, "give an integer from 0 to 2**63 - 1")] = 0

    def __post_init__(self) -> None:
        if isinstance(self.adapter_options, Mapping):
            object.__setattr__(self, "adapter_options", tuple(sorted(self.adapter_options.items())))
        check(self, conflicts=CONFLICTS)
        check_adapter_options(self.adapter, self.adapter_options)
        object.__setattr__(self, "rank", (*self.ranks, self.rank)[0])

    def site_options(self, rule: Rule | None = None) -> SiteOptions:
        """Return the options of a site in the first stage, with the rule that matches it, if any."""
        if rule is not None and rule.tokens:
            return SiteOptions(len(rule.tokens), float(self.lora_alpha), "tokens", tokens=rule.tokens)
        given = {option.name: getattr(self, option.name) for option in fields(SiteOptions) if option.name != "tokens"}
        if rule is not None and rule.rank is not None:
            given |= {"rank": rule.rank, "ranks": ()}
        if rule is not None and rule.lora_alpha is not None:
            given["lora_alpha"] = rule.lora_alpha
        return SiteOptions(**{**given, "lora_alpha": float(given["lora_alpha"])})

    @property
    def factor_start(self) -> Start:
        """The strategy of `start`."""
        return STARTS[self.start]

    @property
    def next_a(self) -> NextA:
        """The strategy of `restart_A`."""
        return NEXT_A[self.restart_A]

    @property
    def method(self) -> type[Any]:
        """The branch class of `adapter`."""
        return ADAPTERS[self.adapter]

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the slow weights is kept."""
        return AVERAGES[self.average].kept

    @property
    def pace_rule(self) -> PaceRule:
        """The strategy of `pace`."""
        if isinstance(self.pace, str):
            return PACES[self.pace]
        return GivenPace(self.pace if isinstance(self.pace, tuple) else (self.pace,))

    def pace_at(self, stage: int, losses: Mapping[int, float]) -> float:
        """Return the pace of a stage; the first one is 1. `losses` has the loss of each stage, if the pace needs it."""
        return self.pace_rule.at(stage, losses, self.loss_penalty)

    def rank_at(self, stage: int) -> int:
        """Return the rank of a stage, unless a rule gives another one; the first stage is 1."""
        return self.ranks[min(stage, len(self.ranks)) - 1] if self.ranks else self.rank

    def average_share(self, count: int) -> float | None:
        """Return the share of new slow weights in an average of `count` stages before; None without an average."""
        average = AVERAGES[self.average]
        if not average.kept:
            return None
        return 1.0 if count == 0 else average.share(count, self.average_decay)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers, for JSON and TOML. Fields that are None are left out."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CascadeSpec:
        """Build a spec from plain data.

        Raises:
            SpecError: an unknown key (with the nearest known one), or a value that the field refuses.
        """
        spec: CascadeSpec = decode(cls, data, ("spec",))
        return spec


def _plain(value: Any) -> Any:
    if isinstance(value, (Noise, Rule, TrainRule)):
        items = {option.name: _plain(getattr(value, option.name)) for option in fields(value)}
        return {name: item for name, item in items.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
