"""A cascade as one LoRA adapter of peft: all its stages in one pair of factors per site, with scale 1.

The change of a site is the sum of its experts, so A and B are theirs, concatenated, with coefficients and scales folded
in (algorithm.md, "The slow state is small"). peft is not imported: the files are JSON and safetensors in its format.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from lorasc_fx.cascade.experts import check_view
from lorasc_fx.cascade.inputs import stand_ins
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.base_file import name_or_path
from lorasc_fx.errors import ExportError, SpecError, StateError, path_of, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.factors import Change, CutOff, change_of, merged, nothing
from lorasc_fx.peft.format import (
    CONFIG,
    CONV1D,
    PREFIX,
    TENSORS,
    TOKENS,
    Target,
    keys_of,
    wrap_counts,
)
from lorasc_fx.peft.targets import Saved, save_whole, targets_of
from lorasc_fx.plan import Site
from lorasc_fx.quantized import quantized_in
from lorasc_fx.state import arithmetic
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import replacing

_VIEWS = ("slow", "fast", "averaged")

_SAVED_WHOLE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft's classes for a task always save completely (peft 0.21, `peft_model.py`)."""

_TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM": "CAUSAL_LM",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""Tasks of peft, with the name of the table of models that transformers has for each."""

_MARKS = {"transformers": "config", "timm": "pretrained_cfg"}
"""Attributes of the models that a library builds by name."""

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class PeftAdapter:
    """What was written.

    Args:
        folder: that it was written to.
        ranks: of each adapted weight.
        cut: what `max_rank` cost each weight that had a higher rank.
        saved: modules that were saved completely.
    """

    folder: Path
    ranks: Mapping[str, int]
    cut: Mapping[str, CutOff]
    saved: tuple[str, ...]

    def __str__(self) -> str:
        """Return a summary, with a line for each weight whose rank was reduced."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = str(low) if low == high else f"{low} to {high}"
        lines = [f"{self.folder}: {len(self.ranks)} weights adapted, ranks {ranks}"]
        lines[0] += f"; saved completely: {', '.join(self.saved)}" if self.saved else ""
        lines += [f"  {name}: {cut}" for name, cut in self.cut.items()]
        return "\n".join(lines)


def peft(
    cascade: Cascade,
    folder: str | PathLike[str],
    *,
    view: Literal["slow", "fast", "averaged"] = "slow",
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
) -> PeftAdapter:
    """Write what the stages added as a LoRA adapter that `peft.PeftModel.from_pretrained` loads with equal outputs.

    The files are `adapter_config.json` and `adapter_model.safetensors`. Parameters trained in full are saved with their
    modules (`modules_to_save`). Other buffers, such as the statistics of a batch norm, are not part of an adapter.

    Args:
        cascade: is not changed. Its model runs on the example inputs, to find out where an adapter has an effect. After
            a `load` without inputs it runs on tensors of the shapes that the checkpoint holds.
        folder: absent, empty, or an adapter, which is replaced when the new one is complete.
        view: `slow` or `averaged`, for which a stage that has trained is folded as by `release`; or `fast`.
        max_rank: no site gets a higher rank: a sum of experts is replaced by the nearest pair of this rank. The exact
            errors are logged, and are in the result.
        uniform_rank: pad all sites with zeros to one rank of 8, 16, 32, 64, 128, 256, 320, 512, for loaders that ignore
            patterns (vLLM).
        dtype: of the factors; by default fp64 for weights in fp64, otherwise fp32.
        task_type: of peft, such as `CAUSAL_LM`; by default the task of a class of transformers, so that
            `AutoPeftModelForCausalLM` and the like load the folder. The head of a classifier, adapted or not, is saved
            completely with its merged weights, as peft's classes for these tasks do. For tasks unknown to peft, or if
            only a head is adapted, `AutoPeftModel` loads the folder.
        base_model: name or path of the base, by default what a model of transformers or timm says of itself.

    Returns:
        Ranks, errors and the modules that were saved completely.

    Raises:
        ExportError: an adapter of peft cannot express some sites, which are all named with the reason; or the folder
            holds something else, or cannot be written. Nothing was written.
        StateError: nothing was trained, after `release`, or inside `weights`.
        NonFiniteBranch: a branch holds inf or nan.
        SpecError: an invalid argument.
    """
    run, model = cascade._run, cascade.model
    if max_rank is not None and not is_integer(max_rank, 1):
        raise SpecError(f"export.peft: max_rank is {max_rank!r}; a rank is an integer of 1 or more")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"export.peft: dtype is {dtype!r}; give a floating-point dtype, such as torch.float32")

    # What the stages have added to each weight.
    with run.exclusive("export.peft"):
        check_view("export.peft", view, run.plan.spec, _VIEWS)
        change = change_of(run, view)
    if not change.pairs and not change.refused:
        if not ((change.trained or change.rows) and run.plan.sites):
            raise StateError(
                "export.peft: no site has trained, so there is nothing to write; train first", code="not-available"
            )
        # peft has no adapters that only save modules, or train only rows
        first = next((site.weight for site in run.plan.sites if not site.options.tokens), None)
        if first is None:
            raise ExportError("export.peft: an adapter of LoRA needs a weight with factors, and only rows were adapted")
        change.pairs[first] = nothing(run.slow.states[first])
    if max_rank is not None and change.magnitudes:
        raise SpecError(
            f"export.peft: max_rank is {max_rank}, and the rows of this cascade are scaled (DoRA): a pair of a smaller "
            "rank would have other row norms; give max_rank=None",
            code="method-not-supported",
        )

    # Where peft can adapt each weight, and which heads it saves completely instead.
    sites = [site for site in run.plan.sites if site.weight in change.pairs]
    by_weight, unreached = _targets(cascade, sites)
    task = task_type if task_type is not None else _task_of(model)
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

    # Everything that an adapter cannot express is refused in one error.
    targets = [target for group in by_weight.values() for target in group]
    saved, unsaved = save_whole(model, change.trained, targets)
    unreached = {name: reason for name, reason in unreached.items() if name not in heads}
    refused = change.refused | unreached | _out_of_reach(model, targets) | unsaved
    if refused:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(refused.items()))
        raise ExportError(f"export.peft: an adapter of peft cannot express this cascade; nothing was written:{reasons}")

    ranks, tokens = change.ranks, _tokens(run, change)
    config = _config(model, {target: ranks[name] for name, group in by_weight.items() for target in group}, saved)
    config |= _auto_class(model, task, task_type is not None, saved.modules)
    config |= {"trainable_token_indices": {path: list(rows) for path, rows, _ in tokens} or None}
    config |= {"base_model_name_or_path": base_model or _name_of(model), "use_dora": bool(change.magnitudes)}
    tensors = _saved_tensors(run, saved, change) | _factors(run, by_weight, change, dtype)
    for path, _, values in tokens:
        width = arithmetic(model.get_parameter(f"{path}.weight").dtype)
        tensors[f"{PREFIX}{path}.{TOKENS}"] = values.to(dtype or width)

    out = path_of(folder)
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give the name of a folder", code="path-in-the-way")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ExportError(
            f"{out} holds other files and no {CONFIG}; give an empty folder, or a new one", code="path-in-the-way"
        )
    with replacing(out) as new:
        if out.is_dir():  # the user's own files stay
            shutil.copytree(out, new, symlinks=True)
        else:
            new.mkdir()
        for name in (CONFIG, TENSORS, "adapter_model.bin"):
            (new / name).unlink(missing_ok=True)
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        shutil.copymode(new / CONFIG, new / TENSORS)  # safetensors makes it private to its owner
    written = PeftAdapter(out, ranks, change.cut, saved.modules)
    for line in str(written).splitlines()[1:]:
        log.info("export.peft: %s", line.strip())
    for name, group in by_weight.items():
        if len(group) > 1:
            warn(
                f"{name} is tied, and peft keeps a pair for each of {' and '.join(target.path for target in group)}: "
                "correct as an adapter, but its merge adds them all. Merge with cascade.release() instead",
                "tied-weight-exported-twice",
            )
    return written


def _targets(cascade: Cascade, sites: Sequence[Site]) -> tuple[dict[str, tuple[Target, ...]], dict[str, str]]:
    """Return the result of `targets_of` on the example inputs, or on stand-ins after a load without inputs."""
    description = cascade._run.inputs
    if cascade._graphs.example is not None or description is None:
        return targets_of(cascade.model, sites, *cascade.example)
    device = next(cascade.model.parameters()).device
    try:
        return targets_of(cascade.model, sites, *stand_ins(description, device))
    except Exception as fault:  # whatever the user's model raises on other values
        raise StateError(
            "export.peft: the run was loaded without example inputs, and the model raises on tensors of the shapes "
            f"that the checkpoint holds: {type(fault).__name__}: {fault}. Give args or kwargs to lorasc_fx.load",
            code="not-available",
        ) from fault


def _factors(
    run: Run, by_weight: Mapping[str, Sequence[Target]], change: Change, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the factors and magnitudes of all pairs by their keys in the file."""
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


def _tokens(run: Run, change: Change) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Return the path of each module with trained rows, with their numbers and values; all names of a tied weight."""
    names, found = named_weights(run.model).names, []
    for weight, (rows, values) in change.rows.items():
        paths = [name.rpartition(".")[0] for name in names[weight]]
        found += [(path, rows, values.clone()) for path in paths]
    return found


def _saved_tensors(run: Run, saved: Saved, change: Change) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of modules that are saved completely, by their keys in the file."""
    current: dict[str, torch.Tensor] = {**run.parameters_by_name(), **dict(run.model.named_buffers())}
    tensors = {}
    for key, name in saved.keys.items():
        if name in change.trained:
            value = change.trained[name]
        elif name in run.slow.states:  # a matrix that holds noise
            value = run.slow.value(name, "slow", current[name])
        else:
            value = current[name].detach()
        tensors[key] = value.to("cpu", copy=True).contiguous()
    return tensors


def _out_of_reach(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return the `target_parameters` that peft does not find, or confuses with others, with the reason."""
    wraps = wrap_counts(targets)
    wanted = {target.name: target for target in targets if target.is_parameter}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    reasons = {}
    for name, target in wanted.items():
        outer = next((path for path in wraps if target.path.startswith(f"{path}.")), None)
        confused = next(
            (confused for confused in names if confused.endswith(f".{name}") and confused not in wanted), None
        )
        if outer is not None:
            reasons[name] = f"peft wraps {outer} for its parameters, and then does not find those of {target.path}"
        elif confused is not None:  # peft compares the ends of names
            reasons[name] = f"its name also means {confused} to peft"
    return reasons


def _head_paths(model: nn.Module, task: str | None) -> list[str]:
    """Return the modules that peft's class for a task saves completely."""
    heads = _SAVED_WHOLE.get(task or "", ())
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] in heads]


def _heads_of(
    run: Run, task: str | None, change: Change, by_weight: Mapping[str, Sequence[Target]]
) -> dict[str, torch.Tensor]:
    """Return the merged parameters of the heads that peft's class for a task saves completely, by name.

    There are none if nothing else is adapted, or if an adapter cannot store them so.
    """
    parameters = run.parameters_by_name()
    paths = tuple(f"{path}." for path in _head_paths(run.model, task))
    inside = [name for name in parameters if name.startswith(paths) and name not in change.trained]
    others = [target for name, group in by_weight.items() if name not in inside for target in group]
    _, unsaved = save_whole(run.model, [*change.trained, *inside], others)
    not_plain = {*unsaved, *change.refused, *quantized_in(parameters)}
    if not others or any(name in not_plain for name in inside):
        return {}
    states = run.slow.states
    return {name: merged(change, states[name]) if name in states else parameters[name].detach() for name in inside}


def _auto_class(model: nn.Module, task: str | None, given_by_user: bool, saved: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a configuration by which peft's Auto classes build the base.

    Args:
        model: the user's own.
        task: peft's name for it.
        given_by_user: whether the user gave the task.
        saved: modules that the adapter stores completely.

    Raises:
        SpecError: the user gave a task whose class in peft takes a head from the adapter that is not among `saved`.
    """
    lacking = next((path for path in _head_paths(model, task) if path not in saved), None)
    if lacking is not None and given_by_user:
        raise SpecError(
            f"export.peft: task_type is {task!r}, and peft's class for this task takes {lacking} from the adapter, "
            "which cannot store it here. Leave task_type out, or train the head in full (train=...)",
            code="conflicting-options",
        )
    task = None if lacking is not None else task
    library = type(model).__module__
    if task is not None or not library.startswith("transformers."):
        return {"task_type": task}
    return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": library}}


def _config(model: nn.Module, ranks: Mapping[Target, int], saved: Saved) -> dict[str, Any]:
    """Return the configuration of an adapter with scale 1 everywhere.

    A pattern is `^` and the escaped path. peft matches `(.*\\.)?(PATTERN)$`, in which `^` matches only at the start, so
    that a module whose path ends like another's keeps its own rank.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(target.pattern)}": rank for target, rank in ranks.items() if rank != usual}
    paths = [target.path for target in ranks if not target.is_parameter]
    ends = tuple(f".{path}" for path in paths)
    # peft compares the ends of paths, but a string is a regular expression for the complete path.
    ambiguous = paths and any(name.endswith(ends) and name not in paths for name, _ in model.named_modules())
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "lora_only" if saved.biases else "none",
        "fan_in_fan_out": any(target.layout is CONV1D for target in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": list(saved.modules) or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "revision": None,
        "target_modules": "|".join(map(re.escape, paths)) if ambiguous else paths,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    if parameters := [target.name for target in ranks if target.is_parameter]:
        config["target_parameters"] = parameters
    return config


def _name_of(model: nn.Module) -> str | None:
    """Return where a model of transformers or timm says that it was loaded from; None if it does not."""
    config = getattr(model, "pretrained_cfg", None)
    if _library_of(model) == "timm" and isinstance(config, Mapping):
        if config.get("source") == "local-dir":
            return f"local-dir:{config.get('file')}"
        if config.get("source") == "hf-hub":
            return f"hf-hub:{config.get('hf_hub_id')}"
        tag = config.get("tag")
        return f"{config.get('architecture')}.{tag}" if tag else config.get("architecture")
    return name_or_path(model)


def _task_of(model: nn.Module) -> str | None:
    """Return peft's name for the task of a model of transformers; None for other models and other tasks."""
    if _library_of(model) != "transformers":
        return None
    tables = sys.modules.get("transformers.models.auto.modeling_auto") or module_of(
        "text", "transformers.models.auto.modeling_auto"
    )
    for task, table in _TASKS.items():
        if type(model).__name__ in getattr(tables, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            return task
    return "FEATURE_EXTRACTION" if type(model).__name__ in tables.MODEL_MAPPING_NAMES.values() else None


def _library_of(model: nn.Module) -> str | None:
    """Return the library that defines the class of a model, if it builds models by name."""
    package = type(model).__module__.partition(".")[0]
    return package if package in _MARKS and hasattr(model, _MARKS[package]) else None
