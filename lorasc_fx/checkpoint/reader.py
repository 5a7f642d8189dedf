"""Reads and checks a checkpoint, restores it, and computes the folded weights of a checkpoint or a cascade.

A checkpoint is either restored completely, or rejected with one error. Digests tell damage. Names in a file are not
used as paths, and nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load

from lorasc_fx.branch import Branch
from lorasc_fx.cascade.run import Planned, Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.cascade.weights import check_quantized, check_view
from lorasc_fx.checkpoint.content import Content, RunState, check_branches, decoded, gradients_of, install
from lorasc_fx.checkpoint.files import (
    KEY,
    MANIFEST,
    Manifest,
    digest_of,
    file_names,
    list_versions,
    recovery_advice,
    refusing,
    unpack,
)
from lorasc_fx.errors import CheckpointError, SpecError, StateError, named, path_of
from lorasc_fx.parameters import names_of
from lorasc_fx.plan import Plan
from lorasc_fx.state import Learner, Part, ViewName, check_finite, host
from lorasc_fx.util.decode import decode
from lorasc_fx.util.fingerprint import data_of, fingerprints
from lorasc_fx.util.undo import Undo


@dataclass(frozen=True)
class Checkpoint:
    """The content of a version that was read.

    Args:
        path: path of the version. For a state dict, its name in messages.
        content, plan: its content.
        advice: what the user can do if it cannot be used, for messages.
    """

    path: Path
    content: Content = field(repr=False)
    plan: Plan
    advice: str

    @property
    def frontend(self) -> str:
        """The front end that the user has chosen."""
        return self.content.frontend

    @property
    def written(self) -> set[str]:
        """Names of the model's buffers, and of the parameters that forward writes."""
        return set(self.content.buffer)

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """W0 of the parameters trained in full, by name."""
        return {name: stored.base for name, stored in self.content.slow.items() if stored.base is not None}

    def refusing(self) -> AbstractContextManager[None]:
        """Convert errors inside the block to CheckpointErrors that name this checkpoint."""
        return refusing(self.path, self.advice)

    def decoded(self) -> RunState:
        """Return the state in this checkpoint, see `content.decoded`. Raises CheckpointError if it is invalid."""
        with self.refusing():
            return decoded(self.content, self.plan)

    def with_learners(self) -> tuple[RunState, dict[str, Learner]]:
        """Return the state in this checkpoint, and the learners of its running stage by weight, without a model."""
        state = self.decoded()
        with self.refusing():
            return state, state.learners()


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version in a checkpoint folder, or in a run folder of `lorasc-fx train`.

    Raises:
        CheckpointError: there is none, or it is damaged. The message names the file and the reason.
    """
    root, advice = path_of(folder), "give a folder that lorasc_fx.save has written"
    with refusing(root, advice):
        versions = list_versions(root) or list_versions(root / "cascade")
    if not versions:
        if (root / "adapter_config.json").is_file():
            advice = "it is an adapter of peft: call lorasc_fx.from_peft(folder, model, ...) instead"
        raise CheckpointError(f"{root}: no checkpoint in this folder; {advice}", code="no-checkpoint")
    path = versions[-1]
    advice = recovery_advice(path)
    with refusing(path / MANIFEST, advice, code="unreadable-file"):
        data = (path / MANIFEST).read_bytes()
    manifest, files = Manifest.of(data, path, advice), []
    for name, digest in zip(file_names(len(manifest.files)), manifest.files.values(), strict=True):
        with refusing(path / name, advice):
            data = (path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"differs from its digest in {MANIFEST}: the file is damaged")
            files.append(dict(sorted(load(data).items())))  # the order of safetensors differs between processes
    tensors = dict(files[0])  # only the first file has the tensors without shards
    with refusing(path, advice):
        for name, axis in manifest.shards.items():
            tensors[name] = torch.cat([file[name] for file in files], axis)
    return _checkpoint(path, manifest, tensors, advice)


def _checkpoint(path: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor], advice: str) -> Checkpoint:
    """Return the checkpoint of a manifest and its tensors, if a cascade can safely be built from it.

    Raises:
        CheckpointError: a field or tensor is missing, unexpected or invalid.
    """
    with refusing(path / MANIFEST, advice):
        content: Content = decode(Content, unpack(manifest.content, tensors))
        plan = Plan.from_json(json.dumps(content.plan))
        check_branches(content, plan)
    return Checkpoint(path, content, plan, advice)


def from_state_dict(table: Mapping[str, torch.Tensor], where: str) -> Checkpoint:
    """Return the checkpoint in a state dict: the tensors of a version, and its manifest as a tensor of bytes.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    packed, advice, path = table.get(KEY), "use another checkpoint", Path(where)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        names = ", ".join(list(table)[:2]) or "nothing"
        raise CheckpointError(
            f"{where}: this is not the state of a cascade: it has no {KEY}, but {names}. Load weights of the model "
            "itself before you adapt it"
        )
    foreign = next((name for name in table if name != KEY and "/" not in name), None)
    if foreign is not None:  # for example, a weight of the model
        raise CheckpointError(f"{where}: {foreign} is not a tensor of a cascade; remove it")
    tensors = {name: tensor.cpu() for name, tensor in table.items()}  # experts are kept in host memory
    manifest = Manifest.of(bytes(data_of(tensors.pop(KEY).contiguous())), path, advice)
    with refusing(path, advice):
        if list(manifest.files.values()) != [digest_of(tensors)]:
            raise ValueError(f"its tensors differ from the digest in {KEY}: the state is damaged")
    return _checkpoint(path, manifest, tensors, advice)


def check_base(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    digests: Mapping[str, str] | None = None,
    written: Collection[str] = (),
    advice: str = "load onto the weights that were adapted",
) -> None:
    """Check that a model has the parameters of a checkpoint's base. Raises CheckpointError.

    Parameters trained in full may have other values, because the checkpoint contains their W0.

    Args:
        digests: fingerprints of the parameters' W0, if they are known.
        written: names of further parameters that forward writes.
    """
    base: Mapping[str, str] = checkpoint.content.base
    replaced = {}
    for name, value in checkpoint.bases.items():
        parameter = parameters.get(name)
        if parameter is not None and (parameter.shape, parameter.dtype) == (value.shape, value.dtype):
            replaced[name] = value
    if digests is None:
        to_compare = {name: value for name, value in parameters.items() if name in base and name not in replaced}
        digests = fingerprints(to_compare)
    digests = {**digests, **fingerprints(replaced)}
    check_digests(f"{checkpoint.path}: this is", base, digests, parameters, {*checkpoint.written, *written}, advice)


def check_digests(
    subject: str,
    base: Mapping[str, str],
    digests: Mapping[str, str],
    names: Iterable[str],
    written: Collection[str],
    advice: str,
) -> None:
    """Raise CheckpointError if the fingerprints of a model and a base differ.

    Args:
        subject: the start of the message, before "another base".
        base: fingerprints of the base, by parameter name.
        digests: fingerprints of the model, for parameters that the base has.
        names: names of all parameters of the model.
        written: names of parameters to skip, because forward writes them.
    """
    missing = [name for name in base if name not in digests and name not in written]
    unexpected = [name for name in names if name not in base and name not in written]
    changed = [name for name, digest in digests.items() if base.get(name, digest) != digest and name not in written]
    for fault, parameters in (("lacks", missing), ("also has", unexpected), ("differs in", changed)):
        if parameters:
            raise CheckpointError(
                f"{subject} another base: the model {fault} {named(parameters)}; {advice}",
                code="base-differs",
            )


def check_ties(checkpoint: Checkpoint, matrices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise CheckpointError if a site of a checkpoint's plan has other ties in the model.

    `matrices` has all names of each weight matrix, by its first name.
    """
    for site in checkpoint.plan.sites:
        if (site.weight, *site.aliases) != (names := matrices.get(site.weight, ())):
            saved, current = ", ".join(site.aliases) or "nothing", ", ".join(names[1:]) or "nothing"
            raise CheckpointError(
                f"{checkpoint.path / MANIFEST}: {site.weight} is tied to {saved} in the plan, but to {current} in the "
                "model; build the same model that was adapted",
                code="sites-differ",
            )


def restore(run: Run, checkpoint: Checkpoint, undo: Undo) -> None:
    """Restore the plan and the state of a checkpoint in a cascade with the same sites, as part of a transaction."""
    state = checkpoint.decoded()
    with checkpoint.refusing():
        install(run, state.on(run.slow), undo)
    if run.digests:
        base = checkpoint.content.base
        # Assign a new dict, because a rollback restores the old one.
        run.digests = {**run.digests, **{name: base[name] for name in checkpoint.bases}}


def take_over(run: Run, checkpoint: Checkpoint, undo: Undo) -> None:
    """Replace state and pending gradients of a cascade by a checkpoint of the same base, spec and sites."""
    advice = "adapt a model with the same weights as the saved run"
    check_base(checkpoint, run.parameters_by_name(), run.fingerprints(), run.written_parameters(), advice)
    ours, theirs = run.plan.spec.to_dict(), checkpoint.plan.spec.to_dict()
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{checkpoint.path}: was saved with {name} = {theirs.get(name)}, but this cascade has "
                f"{ours.get(name)}; adapt with the same spec",
                code="spec-differs",
            )
    sites, saved_sites = run.plan.by_weight, checkpoint.plan.by_weight
    if odd := sorted(sites.keys() ^ saved_sites.keys()):
        where = "only in the checkpoint" if odd[0] in saved_sites else "only in this cascade"
        raise CheckpointError(
            f"{checkpoint.path}: {odd[0]} is adapted {where}; adapt in the same mode and with the same "
            "example inputs, or create the cascade with lorasc_fx.load",
            code="sites-differ",
        )
    run.commit(Planned(run.plan, run.slow, gradients={}), undo)
    restore(run, checkpoint, undo)
    with checkpoint.refusing():
        gradients = gradients_of(run, checkpoint.content)
    run.commit(gradients, undo)


Change = Callable[[torch.Tensor], torch.Tensor]
"""A function from W0 to the folded weight, with the same shape, dtype and device."""


@dataclass(frozen=True)
class FoldedWeights:
    """The changes that a fold makes to a base.

    Args:
        where: the run or checkpoint, for messages.
        base: fingerprint of each base parameter, by its first name.
        changes: a function for each changed parameter, by its first name.
        full: folded values of the parameters trained in full, by first name. They do not depend on the base.
        buffers: current buffers of the model, by name.
        aliases: all names of a tied parameter, by each of its names.
        running: number of the running stage if it has trained and therefore counts as ended, otherwise None.
    """

    where: str
    base: Mapping[str, str]
    changes: Mapping[str, Change]
    full: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    running: int | None = None


def folded_run(run: Run, call: str, view: str) -> FoldedWeights:
    """Return the folded weights of a cascade. A running stage that has trained counts as ended.

    Args:
        view: `slow` or `averaged`.

    Raises:
        StateError: a quantized weight has trained. Files in the layout of the base cannot store it.
    """
    check_view(call, view, run.plan.spec)
    view_name: ViewName = "averaged" if view == "averaged" else "slow"
    slow, parameters = ended(run, call), run.parameters_by_name()
    check_quantized(f"{call} into the files of a base", slow, None)
    changes: dict[str, Change] = {
        name: partial(slow.value, name, view_name)
        for name, state in slow.states.items()
        if state.changed and name not in slow.quantized
    }
    full = {name: slow.value(name, view_name, parameters[name]) for name in slow.trained}
    changes |= {name: partial(_cast, value) for name, value in full.items()}
    buffers = {name: buffer.detach().cpu() for name, buffer in run.model_state().items()}
    return FoldedWeights(call, run.fingerprints(), changes, full, buffers, names_of(run.model))


def folded_checkpoint(checkpoint: Checkpoint, view: ViewName) -> FoldedWeights:
    """Return the folded weights of a checkpoint. A running stage that has trained counts as ended.

    Raises:
        CheckpointError: the tensors do not fit the plan.
        StateError: view is `averaged`, but the spec keeps no average.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    plan = checkpoint.plan
    check_view(f"fold {checkpoint.path}", view, plan.spec)
    state, learners = checkpoint.with_learners()
    slow, has_trained = state.slow, state.slow.moved(learners)
    if has_trained:
        for learner in learners.values():
            if isinstance(learner, Branch):
                check_finite(learner, plan.stage)

    def folded(name: str, base: torch.Tensor) -> torch.Tensor:
        # A checkpoint has no W0, so take it from the caller, for this weight only.
        weight = slow.states[name]
        single = replace(slow, states={name: weight if weight.full else weight.on_base(base)})
        if has_trained:
            single = single.after_stage(plan, {name: learners[name]} if name in learners else {})
        return single.value(name, view, base)

    changes: dict[str, Change] = {
        name: partial(folded, name) for name, weight in slow.states.items() if has_trained or weight.changed
    }
    full = {name: folded(name, value) for name, value in state.values.items()}
    changes |= {name: partial(_cast, value) for name, value in full.items()}
    buffers = {name: value for name, value in state.buffers.items() if value is not None}
    aliases = {name: group for site in plan.sites for group in [(site.weight, *site.aliases)] for name in group}
    base, running = dict(checkpoint.content.base), plan.stage if has_trained else None
    return FoldedWeights(str(checkpoint.path), base, changes, full, buffers, aliases, running)


def _cast(value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return value.detach().to(device=base.device, dtype=base.dtype)


class RunSource:
    """A run that the user gives to `merge` or to a bank: a cascade's run or a checkpoint folder.

    Args:
        source: the run, or the folder.
        name: name of the run, for messages.
        call: name of the user's call, for messages.

    Attributes:
        run: the run, or the checkpoint that was read.
        plan, frontend: the plan of the run, and the front end that captured its model.
        base: fingerprints of its base by parameter name.
        written: names of tensors to skip in a comparison with the base: buffers, and parameters that forward writes.
        changed_buffers: names of these tensors that differ from the base.
    """

    def __init__(self, source: Run | str | PathLike[str], name: str, call: str) -> None:
        self.base: Mapping[str, str]
        self.written: Collection[str]
        self.run: Run | Checkpoint
        if isinstance(source, Run):
            source.check_ready(call, keeps=True)
            self.run, self.name = source, f"{name}, a cascade"
            self.base, self.written = source.fingerprints(), source.written_parameters()
            self.changed_buffers = source.changed_buffers()
        elif isinstance(source, (str, PathLike)):
            self.run = read(source)
            self.name = f"{name}, {self.run.path}"
            self.base, self.written = self.run.content.base, self.run.written
            self.changed_buffers = list(self.run.content.changed_buffers)
        else:
            raise SpecError(f"{call}: {name} is a {type(source).__name__}; give a checkpoint folder or a cascade")
        self.plan, self.frontend = self.run.plan, self.run.frontend

    def check_base(self, digests: Mapping[str, str], call: str) -> None:
        """Raise CheckpointError if the fingerprints differ from the base of this run."""
        advice = "give runs that all adapted the same base"
        check_digests(f"{call}: {self.name}, is of", self.base, digests, digests, self.written, advice)

    def part(self, bases: Mapping[str, torch.Tensor]) -> Part:
        """Return the run as one summand. A running stage that has trained counts as ended, as in `release`.

        Args:
            bases: W0 by name. Required if the source is a checkpoint in the middle of a stage.

        Raises:
            StateError: the checkpoint is in the middle of a stage, and W0 of a weight is missing.
            CheckpointError: the tensors of the checkpoint do not fit its plan.
            NonFiniteBranch: a running branch holds inf or nan.
        """
        if isinstance(self.run, Run):
            buffers = {key: buffer.detach().clone() for key, buffer in self.run.model_state().items()}
            return Part(self.name, self.plan, ended(self.run, "merge").without_base(), buffers)
        state, learners = self.run.with_learners()
        slow = state.slow
        if slow.moved(learners):
            if slow.states.keys() - bases.keys():
                raise StateError(
                    f"{self.name}, is in the middle of stage {state.plan.stage}. To end the stage, the weights of the "
                    "base are needed: give the model too",
                    code="stage-not-ended",
                )
            states = {key: weight.on_base(host(bases[key])) for key, weight in slow.states.items()}
            slow = replace(slow, states=states).after_stage(state.plan, learners)
        buffers = {name: value for name, value in state.buffers.items() if value is not None}
        return Part(self.name, state.plan, slow.without_base(), buffers)
