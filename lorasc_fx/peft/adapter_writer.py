"""Writes a cascade as one LoRA adapter of peft: all stages become one pair of factors per site, with scale 1.

The change of a site is the sum of its experts. So A and B of the adapter are the concatenated factors of all experts.
Coefficients and scales are folded into them (docs/algorithm.md, "The slow state is small"). peft builds its layers on a
copy of the model, names the tensors and writes the configuration.
"""

from __future__ import annotations

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

from lorasc_fx.cascade import example_or, run_of
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.weights import check_view
from lorasc_fx.checkpoint.files import replacing, write_tensors
from lorasc_fx.errors import ExportError, SpecError, StateError, path_of, warn
from lorasc_fx.facade import Cascade
from lorasc_fx.graph import named_weights
from lorasc_fx.peft.change import Change, CutOff, change_of, nothing, residual_of
from lorasc_fx.peft.mirror import ADAPTER, CONFIG, TENSORS, Mirror, put
from lorasc_fx.peft.targets import Target, targets_of
from lorasc_fx.state import arithmetic
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.environment import module_of

_VIEWS = ("slow", "fast", "averaged")

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was written.

    Args:
        folder: the folder of the adapter.
        ranks: {weight name: rank} of the adapted weights.
        cut: {weight name: error} of the weights whose rank was reduced, by `max_rank` or `residual`.
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
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    view: Literal["slow", "fast", "averaged"] = "slow",
    max_rank: int | None = None,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
    residual: int | None = None,
) -> PeftAdapter:
    """Write the change of all stages as a LoRA adapter that `peft.PeftModel.from_pretrained` loads with equal outputs.

    The files are `adapter_config.json` and `adapter_model.safetensors`. Parameters trained in full are saved with their
    modules (`modules_to_save`). Other buffers, such as the statistics of a batch norm, are not part of an adapter.

    Args:
        cascade: the cascade, which is not changed.
        folder: a new or empty folder, or an existing adapter. An adapter is replaced once the new one is complete.
        args, kwargs: inputs that the model runs on, to find out where an adapter has an effect. The default is the
            example inputs.
        view: the weights to export: `slow`, `averaged` or `fast`. For `slow` and `averaged`, a running stage that has
            trained counts as ended, as in `release`.
        max_rank: largest rank of a site. If the sum of the experts has a higher rank, it is replaced by the nearest
            pair of this rank. The exact errors are logged and returned.
        uniform_rank: pad all sites with zeros to the largest rank, for loaders that ignore rank patterns.
        dtype: dtype of the factors. The default is fp64 for weights in fp64, otherwise fp32.
        task_type: peft's task, such as `CAUSAL_LM`. By default it is derived from the model's class in transformers, so
            that `AutoPeftModelForCausalLM` and similar classes load the folder. peft's class for a classifier saves the
            whole head. So if the head was trained by factors, or if peft has no such task, the folder has no task: load
            it with `AutoPeftModel`.
        base_model: name or path of the base. The default is the name or path in the config of a model of transformers
            or timm.
        residual: write an adapter of this rank for the *folded* model (`release`, `export.safetensors`) instead of the
            base. It is the nearest adapter to the change that the rounding of the folded weights has lost.

    Returns:
        The ranks, the errors, and the modules that were saved completely.

    Raises:
        ExportError: an adapter of peft cannot express some sites; the message lists them all with the reasons. Or the
            folder contains other files, or cannot be written. Nothing is written.
        StateError: nothing was trained, the cascade was released, there are no inputs, or the call is inside `with
            cascade.weights(...)`.
        NonFiniteBranch: a branch holds inf or nan.
        SpecError: an argument is invalid.
        MissingExtra: peft is not installed.
    """
    run, model = run_of(cascade), cascade.model
    if max_rank is not None and not is_integer(max_rank, 1):
        raise SpecError(f"export.peft: max_rank is {max_rank!r}; give an integer of 1 or more")
    if residual is not None and (not is_integer(residual, 1) or view == "fast"):
        raise SpecError(
            f"export.peft: residual is {residual!r}; give a rank of 1 or more, with view='slow' or 'averaged'"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"export.peft: dtype is {dtype!r}; give a floating-point dtype, such as torch.float32")

    # Compute the change of each weight.
    with run.exclusive("export.peft", keeps=True):
        check_view("export.peft", view, run.plan.spec, _VIEWS)
        change = change_of(run, view) if residual is None else residual_of(run, view, residual)
    if not change.pairs and not change.refused:
        if residual is not None:
            raise StateError(
                "export.peft: the folded weights hold the whole change, so there is no residual to write. Load them "
                "without an adapter",
                code="not-available",
            )
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

    # Find out where peft can adapt each weight, and let peft build the adapter on a copy of the model.
    sites = [site for site in run.plan.sites if site.weight in change.pairs]
    targets, unreached = targets_of(model, sites, *example_or(cascade, args, kwargs))
    if max_rank is not None:
        change.limit_rank(max_rank)
    if uniform_rank:
        change.pad_to_uniform_rank()
    task = task_type if task_type is not None else _task_of(model)
    mirror, problems = _mirror(run, change, targets, task)
    if problems and task_type is None and task is not None:
        # peft's class for a classifier saves the head completely, and has no factors for a head that was adapted.
        task = None
        mirror, problems = _mirror(run, change, targets, task)

    # Raise one error for all changes that an adapter cannot express.
    refused = change.refused | unreached | problems
    if refused or mirror is None:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in sorted(refused.items()))
        raise ExportError(
            "export.peft: an adapter of peft cannot express the change of these weights; nothing was written. Exclude "
            f"them, or export the weights with lorasc_fx.export.safetensors:{reasons}"
        )
    tensors = _tensors(run, mirror, targets, change, dtype)
    config = mirror.config
    config.task_type, config.inference_mode = task, True
    config.base_model_name_or_path = base_model or _name_of(model)
    library = type(model).__module__
    if task is None and library.startswith("transformers."):  # so that AutoPeftModel can build the base
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": library}

    # Write the files next to the folder, and replace the folder at the end.
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
        config.save_pretrained(new)
    written = PeftAdapter(out, change.ranks, change.cut, tuple(mirror.saved))
    for line in str(written).splitlines()[1:]:
        log.info("export.peft: %s", line.strip())
    for name, group in targets.items():
        if len(group) > 1:
            warn(
                f"{name} is tied, so the adapter has one pair for each of "
                f"{' and '.join(target.path for target in group)}. It is correct as an adapter, but peft's merge would "
                "add all pairs to the weight. Merge with cascade.release() instead",
                "tied-weight-exported-twice",
            )
    return written


def _mirror(
    run: Run, change: Change, targets: Mapping[str, Sequence[Target]], task: str | None
) -> tuple[Mirror | None, dict[str, str]]:
    """Let peft build the adapter, and return it with {name: problem} of changes that it would lack or have in addition.

    The adapter is None if peft refuses it, or cannot save a parameter of the top module.
    """
    model, names = run.model, named_weights(run.model).names
    trained = [name for weight in change.trained for name in names[weight]]
    top = "it is a parameter of the top module, and peft saves only modules inside it"
    if inside_top := {name: top for name in trained if "." not in name}:
        return None, inside_top
    wanted = {target.name: weight for weight, group in targets.items() for target in group}
    config = _config(model, change, targets, trained, task)
    try:
        mirror = Mirror(model, config)
    except Exception as fault:  # peft raises errors of many types
        reason = f"peft refuses this adapter: {' '.join(str(fault).split())[:300]}"
        return None, dict.fromkeys([*trained, *wanted.values()], reason)
    mirror.config.fan_in_fan_out = config.fan_in_fan_out  # peft resets it if a linear layer is adapted too
    saved = tuple(f"{path}." for path in mirror.saved)
    problems = {name: f"peft would adapt {name} too" for name in mirror.layers.keys() - wanted.keys()}
    for name in wanted.keys() - mirror.layers.keys():
        problems[wanted[name]] = f"peft does not adapt {name} if it saves {', '.join(mirror.saved) or 'no module'}"
    for name in trained:
        if not name.startswith(saved) and name not in mirror.biases:
            problems[name] = "peft would not save it"
    return mirror, problems


def _config(
    model: nn.Module, change: Change, targets: Mapping[str, Sequence[Target]], trained: Sequence[str], task: str | None
) -> Any:
    """Return the configuration of an adapter. lora_alpha equals the rank everywhere, so the scale is 1.

    The keys of `rank_pattern` are `^` and an escaped path. peft matches `(.*\\.)?(KEY)$`, and because of the `^`, a
    key does not match a longer path with the same suffix.
    """
    ranks, by_path, by_name = change.ranks, dict[str, int](), dict[str, int]()
    for weight, group in targets.items():
        for target in group:
            (by_name if target.named else by_path)[target.name if target.named else target.path] = ranks[weight]
    conv1d = [path for path in by_path if type(model.get_submodule(path)).__name__ == "Conv1D"]
    if by_name:  # peft does not accept target_parameters together with fan_in_fan_out, which Conv1D needs
        by_name |= {f"{path}.weight": by_path.pop(path) for path in conv1d}
    every = {**by_path, **by_name}
    default = Counter(every.values()).most_common(1)[0][0] if every else 8
    patterns = {f"^{re.escape(name)}": rank for name, rank in every.items() if rank != default}
    # peft compares suffixes of paths if target_modules is a list. A string is a regular expression for the full path.
    suffixes = tuple(f".{path}" for path in by_path)
    ambiguous = by_path and any(path.endswith(suffixes) and path not in by_path for path, _ in model.named_modules())
    biases = [name for name in trained if name.endswith(".bias") and name.removesuffix(".bias") in by_path]
    modules = sorted({name.rpartition(".")[0] for name in trained if name not in biases})
    outermost = [path for path in modules if not path.startswith(tuple(f"{outer}." for outer in modules))]
    names = named_weights(model).names
    rows = {name.rpartition(".")[0]: list(rows) for weight, (rows, _) in change.rows.items() for name in names[weight]}
    return module_of("peft", "peft").LoraConfig(
        r=default,
        lora_alpha=default,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules="|".join(map(re.escape, by_path)) if ambiguous else list(by_path) or None,
        target_parameters=list(by_name) or None,
        fan_in_fan_out=bool(conv1d) and not by_name,
        modules_to_save=outermost or None,
        bias="lora_only" if biases else "none",
        use_dora=bool(change.magnitudes),
        trainable_token_indices=rows or None,
        task_type=task,
    )


def _tensors(
    run: Run, mirror: Mirror, targets: Mapping[str, Sequence[Target]], change: Change, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return {key in the file: tensor on the CPU} of the adapter."""
    parameters, canonical = run.parameters_by_name(), named_weights(run.model).canonical
    # Write the factors and the rows into peft's layers.
    for weight, group in targets.items():
        width = dtype or arithmetic(parameters[weight].dtype)
        for target in group:
            put(mirror.layers[target.name], change.pairs[weight], width, change.magnitudes.get(weight))
    for name, layer in mirror.tokens.items():
        weight = canonical[name]
        rows = change.rows[weight][1].to(dtype or arithmetic(parameters[weight].dtype))
        layer.trainable_tokens_delta[ADAPTER] = nn.Parameter(rows)
    # The other tensors of the file are tensors of the model. Tensors that were trained in full get the trained values.
    names = {id(value): name for name, value in (*parameters.items(), *mirror.saved_tensors().items())}
    current = {**parameters, **dict(run.model.named_buffers(remove_duplicate=False))}

    def exported(value: torch.Tensor) -> torch.Tensor:
        name = names.get(id(value), "")
        weight = canonical.get(name, name)
        if weight in change.trained:
            return change.trained[weight]
        if weight in run.slow.states:  # the parameter itself holds noise
            return run.slow.value(weight, "slow", current[weight])
        return current.get(weight, value)

    return {
        key: exported(value).detach().to("cpu", copy=True).contiguous() for key, value in mirror.state_dict().items()
    }


TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION", "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM": "CAUSAL_LM",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION", "QUESTION_ANS": "QUESTION_ANSWERING",
}  # fmt: skip
"""{task of peft: TASK}, where MODEL_FOR_TASK_MAPPING_NAMES of transformers lists the models for this task."""


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
    named = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return named if isinstance(named, str) and named else None


def _task_of(model: nn.Module) -> str | None:
    """Return peft's name of the task of a model of transformers. None for other models and other tasks."""
    if not type(model).__module__.startswith("transformers."):
        return None
    tables = module_of("text", "transformers.models.auto.modeling_auto")
    for task, table in TASKS.items():
        if type(model).__name__ in getattr(tables, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            return task
    return "FEATURE_EXTRACTION" if type(model).__name__ in tables.MODEL_MAPPING_NAMES.values() else None
