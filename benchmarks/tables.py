"""The tables of docs/costs.md. A table is a function `(work, rounds) -> rows`, and a row is {column: cell}.

Each model of a table is measured in a new process, so that peak memory and first calls do not depend on other models.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS, products

from .measure import Turn, alternate, in_child, keep_freed, least, peak_memory, ratios, reset_peak_memory, saved_bytes
from .models import COMPILED, MODELS, STARTED, WORKS, Work, decoder, narrow
from .rivals import RANK, Rival, adapted, check_same_work, entries, make, make_all, optimizer_of, train, wrapped

Row = dict[str, str]
Rows = Iterator[Row]


@dataclass(frozen=True)
class Table:
    """A function that measures, with its settings.

    Args:
        text: the paragraph above the table.
        models: names of the models that are measured by default.
        devices: the devices on which the table can be measured.
    """

    measure: Callable[[Work, int], Rows]
    text: str
    models: tuple[str, ...]
    threads: int = 2
    devices: tuple[str, ...] = ("cpu",)


TABLES: dict[str, Table] = {}
SIX = tuple(name for name in WORKS if name != "tiny")


def _table(text: str, models: tuple[str, ...] = SIX, **options: Any) -> Callable[..., Callable[[Work, int], Rows]]:
    """Decorator: add a function to `TABLES` under its name."""

    def add(measure: Callable[[Work, int], Rows]) -> Callable[[Work, int], Rows]:
        TABLES[measure.__name__] = Table(measure, text, models, **options)
        return measure

    return add


def measure(name: str, model: str, rounds: int) -> list[Row]:
    """Measure a model in this process, and return its rows."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    torch.set_num_threads(TABLES[name].threads)
    torch.manual_seed(0)
    keep_freed()
    return list(TABLES[name].measure(MODELS[model], rounds))


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


@_table(
    "Seconds of a training step (forward, and backward to the input) over the seconds of the frozen model: CPU seconds"
    " of all threads, or on a GPU those between two CUDA events. Ratio of the minima. *Folded* is the released model;"
    " its deviation from 1.00 is noise.",
    devices=("cpu", "cuda"),
)
def steps(work: Work, rounds: int) -> Rows:
    """Compare steps."""
    rivals = make_all(work)
    turns = {name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}
    seconds = alternate(turns, rounds, _device(rivals["ours"].model))
    pairs = [*((name, "frozen") for name in ("ours", "peft", "full", "folded")), ("ours", "peft")]
    yield {"model": work.title, **ratios(seconds, pairs)}


@contextmanager
def _without_onednn() -> Iterator[None]:
    with mock.patch.object(products, "onednn_is_faster", return_value=False):
        yield


@contextmanager
def _without_grouped() -> Iterator[None]:
    from lorasc_fx.branch.placements import MatrixOps

    beside = MatrixOps.grouped
    table = {name: function for name, function in products._FROZEN.items() if "grouped" not in name}

    def grouped(*args: Any, weight: Any = None, **options: Any) -> torch.Tensor:
        return beside(*args, **options)

    with mock.patch.object(products, "_FROZEN", table), mock.patch.object(MatrixOps, "grouped", staticmethod(grouped)):
        yield


@_table(
    "CPU seconds of a step without a kernel, over the seconds with it: *oneDNN* instead of MKL for frozen products, and"
    " a backward of the *grouped* products of frozen stacked weights that computes no gradient of them. Ratio of the"
    " minima.",
    threads=1,
)
def kernels(work: Work, rounds: int) -> Rows:
    """Compare steps with and without each kernel."""
    model, batch, turns = work.build(), work.batch(), dict[str, Turn]()
    left_out = {"with both": nullcontext, "without oneDNN": _without_onednn, "without grouped": _without_grouped}

    def step(rival: Rival, without: Callable[[], AbstractContextManager[None]]) -> None:
        with without():
            rival.step()

    for name, without in left_out.items():
        with without():
            rival = make("ours", work, copy.deepcopy(model), batch)
        turns[name] = Turn(rival.prepare, partial(step, rival, without))
    seconds = alternate(turns, rounds)
    yield {"model": work.title, **ratios(seconds, [(name, "with both") for name in list(left_out)[1:]])}


@_table(
    "MiB that autograd keeps between forward and backward, without parameters and buffers; two columns have adapter"
    " dropout. *Peak* is the memory of a process that trains only this model, with interpreter and libraries (on a GPU:"
    " memory that torch allocates). lorasc-fx copies W0 when the first stage ends, so *ours* is measured in the second"
    " stage.",
    devices=("cpu", "cuda"),
)
def memory(work: Work, rounds: int) -> Rows:
    """Count the bytes that autograd keeps, and measure the peak memory of each variant in a child process."""
    names = ["frozen", "full", "peft", "ours", *(("peft, dropout", "ours, dropout") if work.dropout else ())]
    rivals = make_all(work, tuple(names))
    row = {name: _mib(saved_bytes(rival.loss, rival.model)) for name, rival in rivals.items()}
    del rivals
    for name in ("frozen", "full", "peft", "ours"):
        # With this threshold, malloc maps large blocks separately, so that they leave no holes in the heap.
        peaks = in_child(_peaks, work.name, name, MALLOC_MMAP_THRESHOLD_=str(128 << 10))
        row |= {f"peak: {variant}": _mib(size) for variant, size in peaks.items()}
    yield {"model": work.title, **row}


def _peaks(name: str, variant: str) -> dict[str, int]:
    """Return {column: peak bytes of three steps} of a variant. Ours has a column for each of its first two stages."""
    work = MODELS[name]
    model, batch = work.build(), work.batch()
    on_gpu = _device(model) == "cuda"
    rival = make(variant, work, model, batch)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats() if on_gpu else reset_peak_memory()
        for _ in range(3):
            rival.prepare()
            rival.step()
        return torch.cuda.max_memory_allocated() if on_gpu else peak_memory()

    first_stage = peak()
    if not isinstance(rival.model, lx.Cascade):
        return {variant: first_stage}
    rival.model.zero_grad(set_to_none=True)
    rival.model.transition(None)
    return {variant: peak(), "ours, first stage": first_stage}


@_table(
    "`torch.compile` with inductor and empty caches. *First step* includes the compilation, in wall seconds. Then each"
    " variant trains and ends a stage: ours by `transition`, peft's by `merge_and_unload`, `get_peft_model` and another"
    " `torch.compile`; the next columns count recompiled graphs and time the first step of stage 2. Steps as above.",
    tuple(COMPILED),
)
def compiled(work: Work, rounds: int) -> Rows:
    """Compare compiled models. Raise RuntimeError if a timed step compiles."""
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"])

    def first_step(rival: Rival) -> tuple[float, int]:
        seconds, before = dict[str, float](), graphs()
        rival.prepare()
        least(seconds, "step", rival.step, wall=True)
        rival.prepare()
        rival.step()
        return seconds["step"], graphs() - before

    torch._dynamo.reset()
    model, batch, rivals, row = work.build(), work.batch(), dict[str, Rival](), {"model": work.title}
    with config.patch(compile_threads=1):
        for name in ("frozen", "peft", "ours"):
            eager = make(name, work, copy.deepcopy(model), batch)
            with fresh_cache():
                rivals[name] = replace(eager, model=torch.compile(eager.model))
                row[f"first step, s: {name}"] = f"{first_step(rivals[name])[0]:.1f}"
                if name != "frozen":
                    optimizer = optimizer_of(eager.model)
                    train(optimizer)
                    if isinstance(eager.model, lx.Cascade):
                        eager.model.transition(optimizer)
                    else:
                        after: Any = eager.model
                        rivals[name] = replace(eager, model=torch.compile(wrapped(work, after.merge_and_unload())))
                    seconds, count = first_step(rivals[name])
                    row |= {f"recompiled: {name}": str(count), f"first step of stage 2, s: {name}": f"{seconds:.2f}"}
        before = graphs()
        seconds = alternate({name: Turn(rival.prepare, rival.step) for name, rival in rivals.items()}, rounds)
    if graphs() != before:
        raise RuntimeError(f"{work.title}: the timed steps compiled {graphs() - before} more graphs")
    yield row | ratios(seconds, [("ours", "frozen"), ("peft", "frozen"), ("ours", "peft")])


def _prompt(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of `generate` for eight new tokens after the first eight positions of a batch."""
    start = {name: value[:, :8] for name, value in batch.items()}
    return {**start, "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@_table(
    "Seconds, ours / peft's, for the same task; on a CPU the sum over all threads. `transition` is compared"
    " with `merge_and_unload`, `get_peft_model` and a new optimizer; `fold` (`folded_state_dict`) with a copy of the"
    " state dict between `merge_adapter` and `unmerge_adapter`; `release` with `merge_and_unload`; `save` with"
    " `save_pretrained`; `load`, which here captures the graph, with `from_pretrained`; `weights` (into"
    ' `weights("slow")` and back) with `merge_adapter` and `unmerge_adapter`; `generate` makes eight tokens.',
    devices=("cpu", "cuda"),
)
def costs(work: Work, rounds: int) -> Rows:
    """Compare operations that run once, or once per stage."""
    model, batch = work.build(), work.batch()
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    wall = _device(model) == "cuda"
    timed = partial(least, wall=wall)

    def through_slow(cascade: lx.Cascade) -> None:
        with cascade.weights("slow"):
            pass

    def merged_state(wrapper: Any) -> dict[str, torch.Tensor]:
        wrapper.merge_adapter()
        state = {name: value.clone() for name, value in wrapper.state_dict().items()}
        wrapper.unmerge_adapter()
        return state

    def next_wrapper(wrapper: Any) -> tuple[Any, torch.optim.Optimizer]:
        after = wrapped(work, wrapper.merge_and_unload())
        return after, optimizer_of(after)

    for _ in range(rounds):
        cascade = timed(ours, "adapt", partial(adapted, work, copy.deepcopy(model), batch))
        wrapper = timed(theirs, "adapt", partial(wrapped, work, copy.deepcopy(model)))
        check_same_work(work.title, cascade, wrapper)
        optimizer, their_optimizer = optimizer_of(cascade), optimizer_of(wrapper)
        for _ in range(3):
            train(optimizer)
            timed(ours, "transition", partial(cascade.transition, optimizer))
            train(their_optimizer)
            wrapper, their_optimizer = timed(theirs, "transition", partial(next_wrapper, wrapper))
        train(optimizer)
        train(their_optimizer)
        timed(ours, "fold", cascade.folded_state_dict)
        timed(theirs, "fold", partial(merged_state, wrapper))
        timed(ours, "weights", partial(through_slow, cascade))
        timed(theirs, "weights", lambda wrapper=wrapper: (wrapper.merge_adapter(), wrapper.unmerge_adapter()))
        if hasattr(model, "generate"):
            timed(ours, "generate", partial(cascade.generate, **_prompt(batch)))
            timed(theirs, "generate", partial(wrapper.generate, **_prompt(batch)))
        with tempfile.TemporaryDirectory() as folder:
            saved, adapter = Path(folder, "ours"), Path(folder, "peft")
            timed(ours, "save", partial(lx.save, cascade, saved))
            timed(theirs, "save", partial(wrapper.save_pretrained, adapter))
            timed(ours, "load", partial(lx.load, saved, copy.deepcopy(model), kwargs=dict(batch))).release()
            timed(theirs, "load", partial(peft.PeftModel.from_pretrained, copy.deepcopy(model), adapter))
        timed(ours, "release", cascade.release)
        timed(theirs, "release", wrapper.merge_and_unload)
    yield {"model": work.title, **{name: f"{ours[name]:.2f} / {theirs[name]:.2f}" for name in ours}}


@_table(
    "CPU seconds of what comes before the first step, on one thread, with two examples as inputs. *Forward*,"
    " *backward* and *export* (`torch.export.export`) are for comparison. `load` has no inputs, and the first call"
    " after it captures the graph. *MiB added* is the peak memory that `adapt` adds to the process.",
    (*SIX, *STARTED),
    threads=1,
)
def start(work: Work, rounds: int) -> Rows:
    """Measure `adapt`, `load` and first calls."""
    model = work.build()
    batch = {name: value[:2] for name, value in work.batch().items()}
    adapted(WORKS["tiny"], WORKS["tiny"].build(), WORKS["tiny"].batch()).release()  # imports, and fills caches
    work.loss(model(**batch)).backward()
    seconds: dict[str, float] = {}
    added = 0
    for index in range(rounds):
        loss = least(seconds, "forward", lambda: work.loss(model(**batch)))
        least(seconds, "backward", loss.backward)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            least(seconds, "export", lambda: torch.export.export(model, (), batch, strict=False))
        twin = copy.deepcopy(model)
        if index == 0:
            reset_peak_memory()
            before = peak_memory()
        cascade = least(seconds, "adapt", partial(adapted, work, twin, batch))
        added = added or peak_memory() - before
        with torch.no_grad():
            least(seconds, "first evaluation", lambda cascade=cascade: cascade.eval()(**batch))
        cascade.train(model.training)
        with tempfile.TemporaryDirectory() as folder:
            lx.save(cascade, Path(folder))
            del cascade
            loaded = least(seconds, "load", partial(lx.load, folder, copy.deepcopy(model)))
            least(seconds, "first call after load", partial(loaded, **batch))
        del loaded
        least(seconds, "adapt by peft", partial(wrapped, work, copy.deepcopy(model)))
    bound = 1.4 * seconds["export"] + 3 * seconds["forward"] + seconds["backward"]
    cells = {name: f"{value:.2f}" for name, value in seconds.items()}
    yield {
        "model": work.title, **cells, "adapt / (1.4 export + 3 forward + backward)": f"{seconds['adapt'] / bound:.2f}",
        "MiB added": _mib(added),
    }  # fmt: skip


@_table(
    "CPU milliseconds of calls that spend most of their time in Python: a BERT of 12 layers and width 64, and a token"
    " that a Llama of 8 layers and the same width generates with its cache. *Eager* is the model without branches.",
    ("tiny",),
    threads=1,
)
def calls(work: Work, rounds: int) -> Rows:
    """Compare calls of narrow models, which spend most of their time in Python."""
    repeats, x = 20, torch.randint(0, 100, (2, 16))

    def variants(model: nn.Module, leaves: list[str]) -> dict[str, Any]:
        narrow_work = replace(work, targets=tuple(f"*.{leaf}" for leaf in leaves), peft={"target_modules": leaves})
        theirs = wrapped(narrow_work, copy.deepcopy(model))
        ours = adapted(narrow_work, copy.deepcopy(model), {"input_ids": x})
        return {"eager": model, "peft": theirs.train(model.training), "ours": ours.train(model.training)}

    def call(model: nn.Module, backward: bool) -> None:
        for _ in range(repeats):
            output = model(input_ids=x)
            if backward:
                output[0].sum().backward()

    @torch.no_grad()
    def tokens(model: Any) -> None:
        model.generate(input_ids=x, max_new_tokens=repeats, min_new_tokens=repeats, do_sample=False, pad_token_id=0)

    def row(name: str, models: dict[str, Any], run: Callable[[Any], None]) -> Row:
        seconds = alternate({key: Turn(lambda: None, partial(run, model)) for key, model in models.items()}, rounds)
        cells = {key: f"{1e3 * min(values) / repeats:.2f}" for key, values in seconds.items()}
        return {"call": name, **cells, **ratios(seconds, [("ours", "eager"), ("ours", "peft")])}

    encoders = variants(narrow(), ["query", "key", "value", "dense"])
    yield row("forward", encoders, partial(call, backward=False))
    yield row("forward and backward", encoders, partial(call, backward=True))
    decoders = variants(decoder(), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    yield row("token of generate", decoders, tokens)
    with decoders["ours"].weights("slow"):
        yield row("token inside weights('slow')", decoders, tokens)


_BY_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK}),
    "dora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK, "use_dora": True}),
    "vera": ("VeraConfig", {"r": RANK}),
    "hira": ("HiraConfig", {"r": RANK}),
    "shira": ("ShiraConfig", {"r": RANK}),
    "miss": ("MissConfig", {"r": RANK}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": RANK}),
    "lokr": ("LoKrConfig", {"r": RANK, "alpha": RANK}),
    "delora": ("DeloraConfig", {"r": RANK}),
}
"""{method: peft's configuration class and options}. peft has no LoRA-XS."""


@_table(
    "A training step of each adapter method, beside peft's layers with the same method and size; ratios as above.",
    ("bert-base",),
)
def methods(work: Work, rounds: int) -> Rows:
    """Compare adapter methods."""
    model, batch = work.build(), work.batch()

    def rival(model: nn.Module) -> Rival:
        return Rival(model, work, {name: value.clone().requires_grad_(True) for name, value in batch.items()})

    for name, method in METHODS.items():
        alpha = {"lora_alpha": float(RANK)} if "lora_alpha" in method.options else {}
        spec = lx.CascadeSpec(adapter=name, targets=work.targets, rank=RANK, **alpha)
        rivals = {
            "frozen": rival(copy.deepcopy(model).requires_grad_(False)),
            "ours": rival(lx.adapt(copy.deepcopy(model), kwargs=dict(batch), spec=spec)),
        }
        if name in _BY_PEFT:
            config, options = _BY_PEFT[name]
            theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, config)(**work.peft, **options))
            rivals["peft"] = rival(theirs)
            check_same_work(name, rivals["ours"].model, theirs)
        seconds = alternate({key: Turn(variant.prepare, variant.step) for key, variant in rivals.items()}, rounds)
        pairs = [("ours", "frozen"), ("peft", "frozen"), ("ours", "peft")]
        yield {
            "adapter": f"`{name}`", "trained entries": f"{entries(rivals['ours'].model):,}", **ratios(seconds, pairs)
        }  # fmt: skip


@_table(
    "A forward of 8 rows without gradients by a bank of adapters (`lx.AdapterBank`), by a model with one folded"
    " adapter, and by peft (`set_adapter`, `adapter_names`). It has one adapter, or 1, 2 or 8 different ones in the"
    " rows. Ratios as above.",
    ("vit-s", "bert-base", "gpt2"),
)
def serving(work: Work, rounds: int) -> Rows:
    """Compare a bank with peft."""
    names = [f"adapter{index}" for index in range(8)]
    model = work.build().eval()
    batch = {name: value.reshape(8, -1, *value.shape[2:]) for name, value in work.batch().items()}
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, **work.peft)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, parameter in theirs.eval().named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        theirs.save_pretrained(folder)
        adapters = {name: Path(folder, name) for name in names}
        bank = lx.AdapterBank(copy.deepcopy(model), adapters, kwargs=batch, max_rank=RANK)
        folded = copy.deepcopy(theirs).merge_and_unload()
        turns = {
            "folded": Turn(lambda: None, lambda: folded(**batch)),
            "one, ours": Turn(lambda: None, lambda: bank(**batch, adapter=names[0])),
            "one, peft": Turn(lambda: theirs.set_adapter(names[0]), lambda: theirs(**batch)),
        }
        for count in (1, 2, 8):
            rows = [name for _, name in zip(range(8), cycle(names[:count]), strict=False)]
            _check_same_output(work.title, bank(**batch, adapter=rows), theirs(**batch, adapter_names=rows))
            turns[f"{count}, ours"] = Turn(lambda: None, partial(bank, **batch, adapter=rows))
            turns[f"{count}, peft"] = Turn(lambda: None, partial(theirs, **batch, adapter_names=rows))
        pairs = [("one, ours", "folded"), ("one, peft", "folded")]
        pairs += [(f"{count}, ours", reference) for count in (1, 2, 8) for reference in ("folded", f"{count}, peft")]
        yield {"model": work.title.replace("2 x 256", "8 x 64"), **ratios(alternate(turns, rounds), pairs)}


def _check_same_output(title: str, ours: Any, theirs: Any) -> None:
    """Raise RuntimeError if the outputs differ by more than 1e-4 of peft's largest entry."""
    ours, theirs = (output if isinstance(output, torch.Tensor) else output[0] for output in (ours, theirs))
    if (gap := float((ours - theirs).abs().max() / theirs.abs().max())) > 1e-4:
        raise RuntimeError(f"{title}: ours and peft differ by {gap:.1e} of the output")
