"""Writes adapter files for an exported base. They contain the tensors that the exported graph takes as inputs.

The graph has three inputs for each site, in the order of the plan: `lora_A`, `lora_B` and `scale`. An input is named by
its weight and tensor, in lower case and with `_` instead of `.`, such as `head_weight_lora_a`. See
`passes.AdapterInputs` and docs/export.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from lorasc_fx.cascade import run_of
from lorasc_fx.checkpoint.files import replacing, write_tensors
from lorasc_fx.errors import SpecError, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.peft.adapter_pairs import LowRankAdapter, branch_dtypes, low_rank_pairs
from lorasc_fx.peft.change import CutOff
from lorasc_fx.plan import Plan
from lorasc_fx.util.decode import is_integer
from lorasc_fx.util.environment import module_of

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file that was written.

    Args:
        path: path of the file.
        cut: {weight name: error} of the weights whose rank was reduced to `max_rank`.
    """

    path: Path
    cut: Mapping[str, CutOff]


def adapter(
    run: Cascade | str | PathLike[str],
    path: str | PathLike[str],
    *,
    max_rank: int,
    base: Cascade | None = None,
) -> AdapterFile:
    """Write the change of a run as an adapter file, for a graph exported with `adapter_rank=max_rank`.

    All stages become one pair of factors for each site, padded with zeros to `max_rank`, with scale 1. The tensors have
    the names of the graph's inputs. Read a `.safetensors` file with `safetensors.torch.load_file`, and an
    `.onnx_adapter`, which has no scales, with `onnxruntime.LoraAdapter`.

    Args:
        run: a cascade, a checkpoint folder, or the folder of a LoRA adapter of peft. It is not changed.
        path: a path that ends with `.safetensors` or `.onnx_adapter`.
        max_rank: the adapter_rank of the exported graph. Pairs of a higher rank are replaced by the nearest
            pairs of this rank.
        base: the cascade whose graph was exported, if it is not the run itself. The file then has the sites of `base`.
            Required for an adapter of peft, for a checkpoint in the middle of a stage, and for a run with other sites.

    Returns:
        The path of the file, and the exact error of each weight whose rank was reduced.

    Raises:
        SpecError: the ending or the rank is invalid. Or factors cannot express the run, for example because it has
            changed buffers. Or the run changes a weight that has no site in `base`.
        CheckpointError: the run has another base, or cannot be read.
        StateError: `base` is missing for a checkpoint in the middle of a stage.
        ExportError: the path cannot be written.
        MissingExtra: onnxruntime is not installed, for `.onnx_adapter`.
    """
    out = path_of(path)
    if out.suffix not in (".safetensors", ".onnx_adapter"):
        raise SpecError(f"export.adapter: the path {out} must end with .safetensors or .onnx_adapter")
    rank = checked_rank(max_rank, "export.adapter", "max_rank")
    if base is None or base is run:
        change = low_rank_pairs(run, call="export.adapter")
        plan, dtypes = change.plan, change.dtypes
    else:
        with base.weights("base"):
            change = low_rank_pairs(run, base.model, call="export.adapter")
        change.check_base(run_of(base).fingerprints(), "export.adapter")
        plan, dtypes = base.plan, branch_dtypes(run_of(base))
    assert plan is not None, "low_rank_pairs reads an adapter of peft only if it gets the base model"
    if foreign := change.pairs.keys() - plan.by_weight.keys():
        raise SpecError(
            f"export.adapter: {change.name}, changes {min(foreign)}, which is not a site of the base. Adapt the base "
            "with targets that include it",
            code="sites-differ",
        )
    tensors, cut = inputs_of(change, plan, rank, dtypes)
    for weight, error in cut.items():
        log.info("export.adapter: %s: %s", weight, error)
    with replacing(out) as new:
        if out.suffix == ".safetensors":
            write_tensors(tensors, new, {"format": "pt", "max_rank": str(rank)})
        else:
            runtime = module_of("onnx", "onnxruntime")
            file = runtime.AdapterFormat()
            # The format has no tensors of shape [], so the scales are omitted. Their default in the graph is 1.
            factors = {name: value.numpy() for name, value in tensors.items() if value.dim()}
            file.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in factors.items()})
            file.export_adapter(str(new))
    return AdapterFile(out, cut)


def checked_rank(rank: int, call: str, name: str) -> int:
    """Return the rank if it is valid, otherwise raise SpecError."""
    if not is_integer(rank, 1):
        raise SpecError(f"{call}: {name} is {rank!r}; give an integer of 1 or more")
    return rank


def inputs_of(
    change: LowRankAdapter, plan: Plan, max_rank: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, torch.Tensor], dict[str, CutOff]]:
    """Return {input name: tensor} in the order of the inputs, and {weight name: error} of the reduced ranks."""
    tensors: dict[str, torch.Tensor] = {}
    cut: dict[str, CutOff] = {}
    for site in plan.sites:
        values, error = change.tensors(site, max_rank)
        dtype = dtypes[site.weight]
        tensors |= {input_name(site.weight, name): value.to(dtype).contiguous() for name, value in values.items()}
        if error.after < error.before:
            cut[site.weight] = error
    return tensors, cut


def input_name(weight: str, tensor: str) -> str:
    """Return the name of the graph's input for a tensor of a weight's branch."""
    name = re.sub(r"\W", "_", f"{weight}.{tensor}").lower()
    return f"_{name}" if name[0].isdigit() else name
