"""A cascade as one LoRA adapter of peft: all its stages in one pair of factors a site, with a scale of 1.

The change of a site is the sum of its experts, so A is the stack of theirs and B their row, with coefficients and
scales folded in (algorithm.md, "The slow state is small"). Nothing of peft is imported: JSON and safetensors, in its
format.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from lorasc_fx.cascade import Cascade
from lorasc_fx.cascade.experts import check_which
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.base_model import name_of, task_type_of
from lorasc_fx.errors import ExportError, SpecError, StateError, path_of, warn
from lorasc_fx.peft.factors import Change, CutOff, change_of, merged, nothing
from lorasc_fx.peft.format import CONFIG, CONV1D, TENSORS, Target, keys_of, wrap_counts
from lorasc_fx.peft.targets import Saved, save_whole, targets_of
from lorasc_fx.quantized import is_quantized
from lorasc_fx.state import arithmetic
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.files import replacing

_WHICH = ("slow", "fast", "averaged")

_SAVED_WHOLE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft's classes for a task save whole, whatever the configuration says (peft 0.21, `peft_model.py`)."""

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class PeftAdapter:
    """What was written.

    Args:
        folder: where.
        ranks: of each adapted weight.
        cut: what `max_rank` cost each weight that had a higher rank.
        saved: modules that were saved whole.
    """

    folder: Path
    ranks: Mapping[str, int]
    cut: Mapping[str, CutOff]
    saved: tuple[str, ...]

    def __str__(self) -> str:
        """Return it for people: a line for each weight that lost something."""
        lines = [f"{self.folder}: {len(self.ranks)} weights adapted, ranks {_span(self.ranks.values())}"]
        lines[0] += f"; saved whole: {', '.join(self.saved)}" if self.saved else ""
        lines += [
            f"  {name}: rank {cut.before} to {cut.after}, error {cut.error:.3g} of {cut.norm:.3g} ({cut.relative:.2%})"
            for name, cut in self.cut.items()
        ]
        return "\n".join(lines)


def peft(
    cascade: Cascade,
    folder: str | PathLike[str],
    *,
    which: Literal["slow", "fast", "averaged"] = "slow",
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
) -> PeftAdapter:
    """Write what the stages added as a LoRA adapter that `peft.PeftModel.from_pretrained` loads with equal outputs.

    `adapter_config.json` and `adapter_model.safetensors`, scale 1. What was trained in full goes with its modules
    (`modules_to_save`). Buffers outside these modules, as the statistics of a batch norm, are no part of an adapter.

    Args:
        cascade: stays as it is; its model runs once on the example inputs, to see where an adapter reaches.
        folder: absent, empty, or an adapter, which is replaced when the new one is whole.
        which: `slow`, with a stage that has trained folded as `release` does; `averaged`, likewise; or `fast`.
        max_rank: no site gets a higher rank; a sum of experts is cut to the nearest of this rank, through QR of both
            factors and an SVD of the core. The exact errors are logged, and are in the result.
        uniform_rank: all sites get one rank of 8, 16, 32, 64, 128, 256, 320, 512, by zeros, for loaders that ignore
            patterns (vLLM).
        dtype: of the factors; by default fp64 for weights of fp64, else fp32.
        task_type: peft's, as `CAUSAL_LM`; by default that of a class of transformers, so that
            `AutoPeftModelForCausalLM` and the like load the folder. The head of a classifier, adapted or not, is saved
            whole with its merged weights, as peft's classes for these tasks do. For tasks that peft has not, and where
            nothing but a head is adapted, it is `AutoPeftModel`.
        base_model: name or path of the base, by default what a model of transformers or timm says of itself.

    Returns:
        Ranks, errors and modules saved whole.

    Raises:
        ExportError: there are sites that an adapter of peft cannot express, all of which are named with the reason; or
            the folder holds something else, or cannot be written. Nothing was written.
        StateError: nothing was trained, after `release`, or inside `weights`.
        NonFiniteBranch: a branch holds inf or nan.
        SpecError: an invalid argument.
    """
    run, model = cascade._run, cascade.model
    _check(max_rank, dtype)
    with run.exclusive("export.peft"):
        check_which("export.peft", which, run.plan.spec, _WHICH)
        change = change_of(run, which)
    if not change.pairs and not change.refused:
        if not (change.trained and run.plan.sites):
            raise StateError(
                "export.peft: no site has trained, and an adapter without a change is none", code="not-available"
            )
        first = run.plan.sites[0].weight  # peft knows no adapter that only saves modules whole
        change.pairs[first] = nothing(run.slow.states[first])
    if max_rank is not None and change.magnitudes:
        raise SpecError(
            f"export.peft: max_rank is {max_rank}, and the rows of this cascade are scaled (use_dora): a nearest pair "
            "of a smaller rank has other norms; give max_rank=None",
            code="dora-not-supported",
        )
    sites = [site for site in run.plan.sites if site.weight in change.pairs]
    by_weight, unreached = targets_of(model, sites, *cascade.example)
    task = task_type if task_type is not None else task_type_of(model)
    heads = _heads_of(run, task, change, by_weight)
    for name, value in heads.items():
        change.trained[name] = value
        change.pairs.pop(name, None)
        change.magnitudes.pop(name, None)
        by_weight.pop(name, None)
    if max_rank is not None:
        change.at_most(max_rank)
    if uniform_rank:
        change.at_one_rank()
    targets = [target for group in by_weight.values() for target in group]
    saved, unsaved = save_whole(model, change.trained, targets)
    unreached = {name: reason for name, reason in unreached.items() if name not in heads}
    refused = change.refused | unreached | _leaking(model, targets) | _nested(targets) | unsaved
    if refused:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(refused.items()))
        raise ExportError(f"export.peft: no adapter of peft expresses this cascade; nothing was written:{reasons}")
    ranks = change.ranks
    config = _config(
        model,
        {target: ranks[name] for name, group in by_weight.items() for target in group},
        saved.modules,
        saved.biases,
        **_named(model, task, task_type is not None, base_model, saved.modules),
        use_dora=bool(change.magnitudes),
    )
    tensors = _whole(run, saved, change) | _factors(run, by_weight, change, dtype)

    out = path_of(folder)
    _check_folder(out)
    with replacing(out) as new:
        if out.is_dir():  # the user's own files stay
            shutil.copytree(out, new, symlinks=True)
        else:
            new.mkdir()
        for name in (CONFIG, TENSORS, "adapter_model.bin"):
            (new / name).unlink(missing_ok=True)
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        shutil.copymode(new / CONFIG, new / TENSORS)  # safetensors lets its owner alone read it
    written = PeftAdapter(out, ranks, change.cut, saved.modules)
    for line in str(written).splitlines()[1:]:
        log.info("export.peft: %s", line.strip())
    for name, group in by_weight.items():
        if len(group) > 1:
            warn(
                f"{name} is tied, and peft keeps a pair for each of {' and '.join(target.path for target in group)}: "
                "right as an adapter, but its merge adds them all. Merge by cascade.release() instead",
                "tied-weight-exported-twice",
            )
    return written


def _check(max_rank: int | None, dtype: torch.dtype | None) -> None:
    if max_rank is not None and (not is_integer(max_rank, 1)):
        raise SpecError(f"export.peft: max_rank is {max_rank!r}; a rank is an integer of 1 or more")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"export.peft: dtype is {dtype!r}; give a floating dtype, as torch.float32")


def _factors(
    run: Run, by_weight: Mapping[str, Sequence[Target]], change: Change, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of all pairs by their keys."""
    keys = keys_of(run.model, [target for targets in by_weight.values() for target in targets])
    tensors: dict[str, torch.Tensor] = {}
    for name, targets in by_weight.items():
        base = run.slow.states[name].base
        for target in targets:
            parts = [*target.layout.to_peft(change.pairs[name], base.shape)]
            if name in change.magnitudes:
                parts.append(change.magnitudes[name].view(target.layout.magnitude_shape(base.shape)))
            for key, tensor in zip(keys[target], parts, strict=False):
                tensors[key] = tensor.to(dtype or arithmetic(base.dtype)).clone(memory_format=torch.contiguous_format)
    return tensors


def _whole(run: Run, saved: Saved, change: Change) -> dict[str, torch.Tensor]:
    """Return the tensors of what is saved whole, by their keys."""
    held: dict[str, torch.Tensor] = {**run.parameters_by_name(), **dict(run.model.named_buffers())}
    tensors = {}
    for key, name in saved.keys.items():
        if name in change.trained:
            value = change.trained[name]
        elif name in run.slow.states:  # a matrix that carries noise
            value = run.slow.value(name, "slow", held[name])
        else:
            value = held[name].detach()
        tensors[key] = value.to("cpu", copy=True).contiguous()
    return tensors


def _nested(targets: Sequence[Target]) -> dict[str, str]:
    """Return the parameters of a module that peft wraps inside another such module, where it does not find them."""
    wrapped = wrap_counts(targets)
    return {
        target.name: f"peft wraps {outer} for its parameters, and does not find those of {target.path} inside it"
        for target in targets
        for outer in wrapped
        if target.is_parameter and target.path.startswith(f"{outer}.")
    }


def _heads_of(
    run: Run, task: str | None, change: Change, by_weight: Mapping[str, Sequence[Target]]
) -> dict[str, torch.Tensor]:
    """Return the parameters of the heads that peft's class for a task saves whole, by name, with what the branches
    added to them; none where nothing else is adapted, or an adapter cannot hold them so.
    """
    parameters, whole = run.parameters_by_name(), _SAVED_WHOLE.get(task or "", ())
    paths = [f"{path}." for path, _ in run.model.named_modules() if path.rpartition(".")[2] in whole]
    inside = [name for name in parameters if name.startswith(tuple(paths)) and name not in change.trained]
    others = [target for name, group in by_weight.items() if name not in inside for target in group]
    _, unsaved = save_whole(run.model, [*change.trained, *inside], others)
    if not others or any(
        name in unsaved or name in change.refused or is_quantized(parameters[name]) for name in inside
    ):
        return {}
    states = run.slow.states
    return {name: merged(change, states[name]) if name in states else parameters[name].detach() for name in inside}


def _named(
    model: nn.Module, task: str | None, asked: bool, base_model: str | None, saved: Sequence[str]
) -> dict[str, str | dict[str, str] | None]:
    """Return the keys of a configuration by which peft's Auto classes build the base.

    Args:
        model: the user's own.
        task: peft's name of it.
        asked: whether the user gave it.
        base_model: of the base, if the user gave it.
        saved: modules that the adapter holds whole.

    Raises:
        SpecError: a head is not among them, which peft's class for the given task takes whole from an adapter.
    """
    whole = _SAVED_WHOLE.get(task or "", ())
    heads = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in whole]
    lacking = next((path for path in heads if path not in saved), None)
    if lacking is not None and asked:
        raise SpecError(
            f"export.peft: task_type is {task!r}, and an adapter cannot hold {lacking} whole, as peft's class for this "
            "task takes it. Leave task_type out, or train the head in full (train=...)",
            code="conflicting-options",
        )
    task = None if lacking is not None else task
    library = type(model).__module__
    mapping = (
        {"base_model_class": type(model).__name__, "parent_library": library}
        if task is None and library.startswith("transformers.")
        else None
    )
    return {"task_type": task, "auto_mapping": mapping, "base_model_name_or_path": base_model or name_of(model)}


def _span(ranks: Iterable[int]) -> str:
    low, *_, high = sorted([*ranks, *ranks])
    return str(low) if low == high else f"{low} to {high}"


def _config(
    model: nn.Module,
    ranks: Mapping[Target, int],
    saved: Sequence[str],
    biases: bool,
    **more: Any,
) -> dict[str, Any]:
    """Return the configuration of an adapter whose scale is 1 everywhere.

    Patterns are written as `^` and the escaped path: peft matches `(.*\\.)?(PATTERN)$`, where `^` holds at the start
    only, so that a module whose path ends like another's keeps its own rank.

    Args:
        model: its base.
        ranks: by target.
        saved: modules that are saved whole.
        biases: of adapted modules are in the file.
        more: other keys.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(target.pattern)}": rank for target, rank in ranks.items() if rank != usual}
    by_name = [target.path for target in ranks if not target.is_parameter]
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(target.layout is CONV1D for target in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "revision": None,
        "target_modules": _targets(model, by_name),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    if parameters := [target.name for target in ranks if target.is_parameter]:
        config["target_parameters"] = parameters
    return config | more


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """Return the modules' paths; as one regular expression where peft would take a path for the end of another's."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) and name not in paths for name, _ in model.named_modules()) if ends else False:
        return "|".join(map(re.escape, paths))
    return list(paths)


def _leaking(model: nn.Module, targets: Iterable[Target]) -> dict[str, str]:
    """Return the `target_parameters` whose name means another parameter to peft as well, which takes ends of names."""
    wanted = [target.name for target in targets if target.is_parameter]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {
        name: f"its name means {other} to peft as well"
        for name in wanted
        if (other := next((other for other in names if other.endswith(f".{name}") and other not in wanted), None))
    }


def _check_folder(folder: Path) -> None:
    """Raise ExportError for a file, or for a folder that is neither empty nor an adapter's."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; give the name of a folder", code="path-in-the-way")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ExportError(
            f"{folder} holds other files and no {CONFIG}; give an empty folder, or a new one", code="path-in-the-way"
        )
