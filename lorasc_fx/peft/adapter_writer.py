"""Writes a cascade as one LoRA adapter of peft: all stages become one pair of factors per site, with scale 1.

The change of a site is the sum of its experts. Its A and B are therefore the factors of all experts, concatenated, with
the coefficients and scales folded in (docs/algorithm.md, "The slow state is small"). The files are JSON and
safetensors, and are written without importing peft.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lorasc_fx.cascade.inputs import stand_ins
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.views import check_view
from lorasc_fx.checkpoint.base_file import name_or_path
from lorasc_fx.checkpoint.writer import write_tensors
from lorasc_fx.errors import ExportError, SpecError, StateError, path_of, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.change import Change, CutOff, change_of, merged, nothing
from lorasc_fx.peft.format import (
    CONFIG,
    CONV1D,
    PREFIX,
    TASKS,
    TENSORS,
    TOKENS,
    Target,
    keys_of,
    wrap_counts,
)
from lorasc_fx.peft.targets import SavedModules, saved_modules, targets_of
from lorasc_fx.plan import Site
from lorasc_fx.quantized import quantized_in
from lorasc_fx.state import arithmetic
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import replacing

_VIEWS = ("slow", "fast", "averaged")

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was written.

    Args:
        folder: the folder of the adapter.
        ranks: rank of each adapted weight.
        cut: error of each weight whose rank `max_rank` reduced.
        saved: paths of the modules that were saved completely.
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
    """Write the change of all stages as a LoRA adapter that `peft.PeftModel.from_pretrained` loads with equal outputs.

    The files are `adapter_config.json` and `adapter_model.safetensors`. Parameters trained in full are saved with their
    modules (`modules_to_save`). Other buffers, such as the statistics of a batch norm, are not part of an adapter.

    Args:
        cascade: the cascade, which is not changed. Its model runs on the example inputs, to find out where an adapter
            has an effect. After a `load` without inputs, it runs on tensors of the shapes in the checkpoint.
        folder: a new or empty folder, or an existing adapter. An adapter is replaced once the new one is complete.
        view: the weights to export: `slow`, `averaged` or `fast`. For `slow` and `averaged`, a running stage that has
            trained counts as ended, as in `release`.
        max_rank: largest rank of a site. If the sum of the experts has a higher rank, it is replaced by the nearest
            pair of this rank. The exact errors are logged and returned.
        uniform_rank: pad all sites with zeros to the same rank, one of 8, 16, 32, 64, 128, 256, 320, 512. For loaders
            that ignore rank patterns (vLLM).
        dtype: dtype of the factors. The default is fp64 for weights in fp64, otherwise fp32.
        task_type: peft's task, such as `CAUSAL_LM`. By default it is derived from the model's class in transformers, so
            that `AutoPeftModelForCausalLM` and similar classes load the folder. The head of a classifier, adapted or
            not, is saved completely with its merged weights, as peft's classes for these tasks do. If peft has no such
            task, or only a head is adapted, load the folder with `AutoPeftModel`.
        base_model: name or path of the base. The default is the name or path in the config of a model of transformers
            or timm.

    Returns:
        The ranks, the errors, and the modules that were saved completely.

    Raises:
        ExportError: an adapter of peft cannot express some sites; the message lists them all with the reasons. Or the
            folder contains other files, or cannot be written. Nothing is written.
        StateError: nothing was trained, the cascade was released, or the call is inside `with cascade.weights(...)`.
        NonFiniteBranch: a branch holds inf or nan.
        SpecError: an argument is invalid.
    """
    run, model = cascade._run, cascade.model
    if max_rank is not None and not is_integer(max_rank, 1):
        raise SpecError(f"export.peft: max_rank is {max_rank!r}; give an integer of 1 or more")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"export.peft: dtype is {dtype!r}; give a floating-point dtype, such as torch.float32")

    # Compute the change of each weight.
    with run.exclusive("export.peft"):
        check_view("export.peft", view, run.plan.spec, _VIEWS)
        change = change_of(run, view)
    if not change.pairs and not change.refused:
        if not ((change.trained or change.rows) and run.plan.sites):
            raise StateError(
                "export.peft: no site has trained, so there is nothing to write; train first", code="not-available"
            )
        # An adapter of peft needs at least one pair of factors, so one site gets a zero pair.
        weight = next((site.weight for site in run.plan.sites if not site.options.tokens), None)
        if weight is None:
            raise ExportError(
                "export.peft: a LoRA adapter needs at least one weight with factors, but this cascade trains only rows "
                "(tokens). Adapt another weight, or export the weights with lorasc_fx.export.safetensors"
            )
        change.pairs[weight] = nothing(run.slow.states[weight])
    if max_rank is not None and change.magnitudes:
        raise SpecError(
            f"export.peft: max_rank is {max_rank}, but this cascade uses DoRA, and a pair of a smaller rank would have "
            "other row norms; give max_rank=None",
            code="method-not-supported",
        )

    # Find out where peft can adapt each weight, and which heads it saves completely instead.
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
        change.limit_rank(max_rank)
    if uniform_rank:
        change.pad_to_uniform_rank()

    # Report all changes that an adapter cannot express in one error.
    targets = [target for group in by_weight.values() for target in group]
    saved, unsaved = saved_modules(model, change.trained, targets)
    unreached = {name: reason for name, reason in unreached.items() if name not in heads}
    refused = change.refused | unreached | _not_addressable(model, targets) | unsaved
    if refused:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(refused.items()))
        raise ExportError(
            "export.peft: an adapter of peft cannot express the change of these weights; nothing was written. Exclude "
            f"them, or export the weights with lorasc_fx.export.safetensors:{reasons}"
        )

    # Make the configuration and the tensors.
    ranks, tokens = change.ranks, _tokens(run, change)
    config = _config(model, {target: ranks[name] for name, group in by_weight.items() for target in group}, saved)
    config |= _auto_class(model, task, task_type is not None, saved.modules)
    config |= {"trainable_token_indices": {path: list(rows) for path, rows, _ in tokens} or None}
    config |= {"base_model_name_or_path": base_model or _name_of(model), "use_dora": bool(change.magnitudes)}
    tensors = _saved_tensors(run, saved, change) | _factors(run, by_weight, change, dtype)
    for path, _, values in tokens:
        width = arithmetic(model.get_parameter(f"{path}.weight").dtype)
        tensors[f"{PREFIX}{path}.{TOKENS}"] = values.to(dtype or width)

    # Write them next to the folder, and replace the folder at the end.
    out = path_of(folder)
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give the name of a folder", code="path-in-the-way")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ExportError(
            f"{out} contains files but no {CONFIG}, so it is not an adapter; give an empty or a new folder",
            code="path-in-the-way",
        )
    with replacing(out) as new:
        if out.is_dir():  # keep the user's own files
            shutil.copytree(out, new, symlinks=True)
        else:
            new.mkdir()
        for name in (CONFIG, TENSORS, "adapter_model.bin"):
            (new / name).unlink(missing_ok=True)
        write_tensors(tensors, new / TENSORS, {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    written = PeftAdapter(out, ranks, change.cut, saved.modules)
    for line in str(written).splitlines()[1:]:
        log.info("export.peft: %s", line.strip())
    for name, group in by_weight.items():
        if len(group) > 1:
            warn(
                f"{name} is tied, so the adapter has one pair for each of "
                f"{' and '.join(target.path for target in group)}. It is correct as an adapter, but peft's merge would "
                "add all pairs to the weight. Merge with cascade.release() instead",
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
    """Return the factors and magnitudes of all pairs, by their keys in the file."""
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
    """Return path, row indices and values for each module with trained rows. A tied weight has several modules."""
    names = named_weights(run.model).names
    return [
        (name.rpartition(".")[0], rows, values.clone())
        for weight, (rows, values) in change.rows.items()
        for name in names[weight]
    ]


def _saved_tensors(run: Run, saved: SavedModules, change: Change) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of completely saved modules, by their keys in the file."""
    current: dict[str, torch.Tensor] = {**run.parameters_by_name(), **dict(run.model.named_buffers())}
    tensors = {}
    for key, name in saved.keys.items():
        if name in change.trained:
            value = change.trained[name]
        elif name in run.slow.states:  # the parameter itself holds noise
            value = run.slow.value(name, "slow", current[name])
        else:
            value = current[name].detach()
        tensors[key] = value.to("cpu", copy=True).contiguous()
    return tensors


def _not_addressable(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return the `target_parameters` that peft does not find, or whose name also matches others, with the reason."""
    wraps = wrap_counts(targets)
    parameters = {target.name: target for target in targets if target.is_parameter}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    reasons = {}
    for name, target in parameters.items():
        wrapped = next((path for path in wraps if target.path.startswith(f"{path}.")), None)
        confused = next((other for other in names if other.endswith(f".{name}") and other not in parameters), None)
        if wrapped is not None:
            reasons[name] = f"peft wraps {wrapped} for its own parameters, and then does not find {target.path} in it"
        elif confused is not None:  # peft compares the suffixes of names
            reasons[name] = f"peft would also adapt {confused} under its name"
    return reasons


def _head_paths(model: nn.Module, task: str | None) -> list[str]:
    """Return the paths of the modules that peft's class for a task saves completely."""
    _, heads = TASKS.get(task or "", ("", ()))
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] in heads]


def _heads_of(
    run: Run, task: str | None, change: Change, by_weight: Mapping[str, Sequence[Target]]
) -> dict[str, torch.Tensor]:
    """Return the merged parameters of the heads that peft's class for a task saves completely, by name.

    The result is empty if only heads are adapted, or if an adapter cannot store a head completely.
    """
    parameters = run.parameters_by_name()
    paths = tuple(f"{path}." for path in _head_paths(run.model, task))
    inside = [name for name in parameters if name.startswith(paths) and name not in change.trained]
    others = [target for name, group in by_weight.items() if name not in inside for target in group]
    _, unsaved = saved_modules(run.model, [*change.trained, *inside], others)
    not_plain = {*unsaved, *change.refused, *quantized_in(parameters)}
    if not others or any(name in not_plain for name in inside):
        return {}
    states = run.slow.states
    return {name: merged(change, states[name]) if name in states else parameters[name].detach() for name in inside}


def _auto_class(model: nn.Module, task: str | None, given_by_user: bool, saved: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a configuration from which peft's Auto classes build the base.

    A task for which peft reads a head that is not in `saved` is an error if the user gave it, and is omitted otherwise.
    """
    lacking = next((path for path in _head_paths(model, task) if path not in saved), None)
    if lacking is not None and given_by_user:
        raise SpecError(
            f"export.peft: task_type is {task!r}, and peft's class for this task reads {lacking} from the adapter, "
            "which cannot store it here. Omit task_type, or train the head in full (train=...)",
            code="conflicting-options",
        )
    task = None if lacking is not None else task
    library = type(model).__module__
    if task is not None or not library.startswith("transformers."):
        return {"task_type": task}
    return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": library}}


def _config(model: nn.Module, ranks: Mapping[Target, int], saved: SavedModules) -> dict[str, Any]:
    """Return the configuration of an adapter. lora_alpha equals the rank everywhere, so the scale is 1.

    A pattern is `^` and the escaped path. peft matches `(.*\\.)?(PATTERN)$`. Because of the `^`, a pattern does not
    match a longer path with the same suffix.
    """
    default = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(target.pattern)}": rank for target, rank in ranks.items() if rank != default}
    paths = [target.path for target in ranks if not target.is_parameter]
    suffixes = tuple(f".{path}" for path in paths)
    # peft compares suffixes of paths if target_modules is a list. A string is a regular expression for the full path.
    ambiguous = paths and any(name.endswith(suffixes) and name not in paths for name, _ in model.named_modules())
    config: dict[str, Any] = {
        "auto_mapping": None,
        "bias": "lora_only" if saved.biases else "none",
        "fan_in_fan_out": any(target.layout is CONV1D for target in ranks),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": default,
        "lora_dropout": 0.0,
        "modules_to_save": list(saved.modules) or None,
        "peft_type": "LORA",
        "r": default,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "revision": None,
        "target_modules": "|".join(map(re.escape, paths)) if ambiguous else paths,
        "task_type": None,
        "use_rslora": False,
    }
    if parameters := [target.name for target in ranks if target.is_parameter]:
        config["target_parameters"] = parameters
    return config


def _name_of(model: nn.Module) -> str | None:
    """Return the name or path that a model of transformers or timm was loaded from. None if it is unknown."""
    config = getattr(model, "pretrained_cfg", None)
    if type(model).__module__.startswith("timm.") and isinstance(config, Mapping):
        if config.get("source") == "local-dir":
            return f"local-dir:{config.get('file')}"
        if config.get("source") == "hf-hub":
            return f"hf-hub:{config.get('hf_hub_id')}"
        tag = config.get("tag")
        return f"{config.get('architecture')}.{tag}" if tag else config.get("architecture")
    return name_or_path(model)


def _task_of(model: nn.Module) -> str | None:
    """Return peft's name of the task of a model of transformers. None for other models and other tasks."""
    if not type(model).__module__.startswith("transformers."):
        return None
    tables = module_of("text", "transformers.models.auto.modeling_auto")
    for task, (table, _) in TASKS.items():
        if type(model).__name__ in getattr(tables, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            return task
    return "FEATURE_EXTRACTION" if type(model).__name__ in tables.MODEL_MAPPING_NAMES.values() else None
