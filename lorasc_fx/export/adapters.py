"""Adapter files for an exported base: the tensors that its graph takes as inputs.

An input has the name of its weight and tensor, in lower case and with `_` for `.`. For each site of the plan, in its
order, there are both factors and `scale` (see `passes.AdapterInputs` and docs/serving.md).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasc_fx.errors import SpecError, path_of
from lorasc_fx.facade import Cascade
from lorasc_fx.peft.factors import CutOff
from lorasc_fx.peft.low_rank import LowRankAdapter, branch_dtypes, low_rank_pairs
from lorasc_fx.plan import Plan
from lorasc_fx.util.checks import is_integer
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import replacing

log = logging.getLogger("lorasc_fx")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file that was written.

    Args:
        path: of the file.
        cut: what `max_rank` cost each weight whose change had a higher rank.
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
    """Write what a run has added to the base, for a graph exported with `adapters="inputs"`.

    All stages become one pair of factors for each site, padded with zeros to `max_rank`, with scale 1. Read a
    `.safetensors` file by `safetensors.torch.load_file`, and an `.onnx_adapter`, which has no scales, by
    `onnxruntime.LoraAdapter`. The names are those of the inputs of the graph.

    Args:
        run: a cascade, a checkpoint folder, or the folder of a LoRA adapter of peft. It is only read.
        path: ends with `.safetensors` or `.onnx_adapter`.
        max_rank: of the exported graph. Pairs of a higher rank are replaced by the nearest ones of this rank.
        base: the cascade whose graph was exported, if it is not the run itself. The file then has its sites. Needed for
            an adapter of peft, for a checkpoint in the middle of a stage, and for runs with other sites.

    Returns:
        The path, and the exact error of each rank that was reduced.

    Raises:
        SpecError: another ending or rank; factors cannot express the run, or it changes a weight that is not a site of
            `base`.
        CheckpointError: the run has another base, or cannot be read.
        StateError: a checkpoint in the middle of a stage came without `base`.
        ExportError: the path cannot be written.
        MissingExtra: onnxruntime is not installed, for `.onnx_adapter`.
    """
    out = path_of(path)
    if out.suffix not in (".safetensors", ".onnx_adapter"):
        raise SpecError(f"export.adapter: {out} does not end with .safetensors or .onnx_adapter")
    check_rank(max_rank, "export.adapter")
    if base is None or base is run:
        found = low_rank_pairs(run, call="export.adapter")
        plan, dtypes = found.plan, found.dtypes
    else:
        with base.weights("base"):
            found = low_rank_pairs(run, base.model, call="export.adapter")
        found.check_base(base._run.fingerprints(), "export.adapter")
        plan, dtypes = base.plan, branch_dtypes(base._run)
    assert plan is not None, "an adapter of peft comes with a base"
    if foreign := found.pairs.keys() - plan.by_weight.keys():
        raise SpecError(
            f"export.adapter: {found.name}, changes {min(foreign)}, which is not a site of the base. Adapt the base "
            "with targets that include it",
            code="sites-differ",
        )
    tensors, cut = inputs_of(found, plan, max_rank, dtypes)
    for weight, error in cut.items():
        log.info("export.adapter: %s: %s", weight, error)
    with replacing(out) as new:
        if out.suffix == ".safetensors":
            save_file(tensors, new, metadata={"format": "pt", "max_rank": str(max_rank)})
        else:
            runtime = module_of("onnx", "onnxruntime")
            file = runtime.AdapterFormat()
            # The format has no tensors of shape []. The graph's own default of a scale is 1.
            factors = {name: value.numpy() for name, value in tensors.items() if value.dim()}
            file.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in factors.items()})
            file.export_adapter(str(new))
    return AdapterFile(out, cut)


def check_rank(max_rank: object, call: str) -> None:
    """Raise SpecError unless this is a rank."""
    if not is_integer(max_rank, 1):
        raise SpecError(f"{call}: max_rank is {max_rank!r}; a rank is an integer of 1 or more")


def inputs_of(
    found: LowRankAdapter, plan: Plan, max_rank: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, torch.Tensor], dict[str, CutOff]]:
    """Return the tensors of an adapter by the names of the inputs, in their order, and what `max_rank` cost."""
    tensors: dict[str, torch.Tensor] = {}
    cut: dict[str, CutOff] = {}
    for site in plan.sites:
        values, error = found.tensors(site, max_rank)
        dtype = dtypes[site.weight]
        tensors |= {input_name(site.weight, name): value.to(dtype).contiguous() for name, value in values.items()}
        if error.after < error.before:
            cut[site.weight] = error
    return tensors, cut


def input_name(weight: str, tensor: str) -> str:
    """Return the name of the input for a tensor of the branch of a weight."""
    name = re.sub(r"\W", "_", f"{weight}.{tensor}").lower()
    return f"_{name}" if name[0].isdigit() else name
