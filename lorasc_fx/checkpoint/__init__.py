"""Reads, restores and writes versions of checkpoints, and computes the folded weights of a checkpoint or cascade.

A checkpoint is either restored completely, or rejected with one error. Damage is detected by digests. Names in a file
are not used as paths, and nothing in a file is executed.

A version is written into a temporary folder, which is synced and then renamed. If a writer is killed, the next save
deletes its temporary folder, under the lock of `files.one_writer`. A version is renamed before it is deleted, so that a
partly deleted version is never loaded. Only versions of the same run are deleted, because other programs may write into
the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from lorasc_fx.branch import Branch
from lorasc_fx.cascade.run import Planned, Run
from lorasc_fx.cascade.training import check_numbers
from lorasc_fx.cascade.transition import ended
from lorasc_fx.cascade.weights import check_quantized, check_view
from lorasc_fx.checkpoint.content import (
    Content,
    RunState,
    Stateful,
    check_branches,
    decoded,
    gathered_random_states,
    gradients_of,
    install,
)
from lorasc_fx.checkpoint.files import (
    FORMAT,
    KEY,
    MANIFEST,
    Manifest,
    Tensors,
    canonical,
    digest_of,
    file_names,
    list_versions,
    make_folder,
    next_name,
    one_writer,
    pack,
    packed,
    recovery_advice,
    refusing,
    sync,
    unpack,
    write_tensors,
)
from lorasc_fx.errors import CheckpointError, NonFiniteBranch, SpecError, StateError, named, path_of, reason_of
from lorasc_fx.parameters import names_of
from lorasc_fx.plan import Plan
from lorasc_fx.shards import ProcessGroup, local
from lorasc_fx.state import Learner, Part, ViewName, check_finite, host
from lorasc_fx.state.stage import all_finite
from lorasc_fx.util.decode import decode, is_integer
from lorasc_fx.util.fingerprint import data_of, file_digest, fingerprints, text_digest
from lorasc_fx.util.undo import Undo

_WRITING, _DELETING = ".writing-", ".leaving-"
_TEMPORARY = re.compile(r"\.(writing|leaving)-[0-9a-f]{32}")


@dataclass(frozen=True)
class Checkpoint:
    """A version that was read.

    Args:
        path: path of the version. For a state dict, its name in messages.
        content, plan: content of the version, and the plan in it.
        advice: what the user can do if the version cannot be used, for messages.
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
        """Names of the saved buffers, and of the saved parameters that a forward pass changes."""
        return set(self.content.buffer)

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """W0 of the parameters trained in full, by name."""
        return {name: stored.base for name, stored in self.content.slow.items() if stored.base is not None}

    def refusing(self) -> AbstractContextManager[None]:
        """Convert errors inside the block to CheckpointErrors that name this checkpoint."""
        return refusing(self.path, self.advice)

    def decoded(self) -> RunState:
        """Return the state in this checkpoint; see `content.decoded`. Raises CheckpointError for an invalid state."""
        with self.refusing():
            return decoded(self.content, self.plan)

    def with_learners(self) -> tuple[RunState, dict[str, Learner]]:
        """Return the stored state, and {weight name: branch, or parameter trained in full} of the running stage."""
        state = self.decoded()
        with self.refusing():
            return state, state.learners()


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read the newest version in a checkpoint folder, or in a run folder of `lorasc-fx train`.

    Raises:
        CheckpointError: the folder has no version, or the newest one is damaged. The message names the file.
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
            files.append(dict(sorted(load(data).items())))  # safetensors returns another order in each process
    tensors = dict(files[0])  # only the first file has the unsharded tensors
    with refusing(path, advice):
        for name, axis in manifest.shards.items():
            tensors[name] = torch.cat([file[name] for file in files], axis)
    return _checkpoint(path, manifest, tensors, advice)


def _checkpoint(path: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor], advice: str) -> Checkpoint:
    """Return the checkpoint of a manifest and its tensors, after checking that a cascade can be built from it.

    Raises:
        CheckpointError: a field or tensor is missing, unexpected or invalid.
    """
    with refusing(path / MANIFEST, advice):
        content: Content = decode(Content, unpack(manifest.content, tensors))
        plan = Plan.from_json(json.dumps(content.plan))
        check_branches(content, plan)
    return Checkpoint(path, content, plan, advice)


def from_state_dict(table: Mapping[str, torch.Tensor], where: str) -> Checkpoint:
    """Return the checkpoint in a state dict, which has the tensors of a version and the manifest as bytes.

    Raises:
        CheckpointError: the state dict has no manifest, or is damaged.
    """
    packed, advice, path = table.get(KEY), "use another checkpoint", Path(where)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        names = ", ".join(list(table)[:2]) or "nothing"
        raise CheckpointError(
            f"{where}: this is not the state of a cascade: it has no {KEY}, but {names}. To load weights of the model "
            "itself, load them before you adapt it"
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
    """Raise CheckpointError unless a model has the parameters of a checkpoint's base, with the same values.

    Parameters trained in full may have other values, because the checkpoint stores W0 of them.

    Args:
        digests: fingerprints of W0 of the parameters, by name. By default they are computed from `parameters`.
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
    """Raise CheckpointError if a model and a base have different parameters or fingerprints.

    Args:
        subject: the start of the message, before "another base".
        base: fingerprints of the base, by parameter name.
        digests: fingerprints of the model's parameters that the base has too, by name.
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
    """Raise CheckpointError if a site in the checkpoint's plan is tied to other parameters than in the model.

    `matrices` is {first name of a weight matrix: all its names}.
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
    """Restore plan and state of a checkpoint in a cascade with the same sites, as part of a transaction."""
    state = checkpoint.decoded()
    with checkpoint.refusing():
        install(run, state.on(run.slow), undo)
    if run.digests:
        base = checkpoint.content.base
        # Assign a new dict, because a rollback restores the old one.
        run.digests = {**run.digests, **{name: base[name] for name in checkpoint.bases}}


def take_over(run: Run, checkpoint: Checkpoint, undo: Undo) -> None:
    """Replace the state and the gradients of a cascade by a checkpoint of the same base, spec and sites."""
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
"""A function that takes W0 and returns the folded weight, in the same shape and dtype, on the same device."""


@dataclass(frozen=True)
class FoldedWeights:
    """The changes that a fold makes to a base.

    Args:
        where: the run or checkpoint, for messages.
        base: fingerprint of each base parameter, by its first name.
        changes: {first name of a changed parameter: function from W0 to the folded value}.
        full: folded values of the parameters trained in full, by first name. They do not depend on the base.
        buffers: current buffers of the model, by name.
        aliases: {name of a tied parameter: all names of this parameter}.
        running: number of the running stage if it has trained, and so counts as ended. Otherwise None.
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
        # A checkpoint does not store W0, so the caller gives it, for this weight only.
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
    """A run that the user gives to `merge` or to a bank, as a cascade or as a checkpoint folder.

    Args:
        source: the run, or the folder.
        name: name of the run, for messages.
        call: name of the user's call, for messages.

    Attributes:
        run: the run of the cascade, or the checkpoint that was read.
        plan, frontend: the plan of the run, and the front end that captured its model.
        base: fingerprints of the base, by parameter name.
        written: names of tensors to leave out of a comparison with the base: buffers, and parameters that forward
            writes.
        changed_buffers: names of the tensors in `written` that differ from the base.
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
        """Return the run as one part of a sum. A running stage that has trained counts as ended, as in `release`.

        Args:
            bases: W0 by weight name. Required for a checkpoint in the middle of a stage.

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
                    f"{self.name}, is in the middle of stage {state.plan.stage}. Ending the stage needs the weights of "
                    "the base: give the model too",
                    code="stage-not-ended",
                )
            states = {key: weight.on_base(host(bases[key])) for key, weight in slow.states.items()}
            slow = replace(slow, states=states).after_stage(state.plan, learners)
        buffers = {name: value for name, value in state.buffers.items() if value is not None}
        return Part(self.name, state.plan, slow.without_base(), buffers)


# ---- writing


def write_version(
    run: Run,
    root: Path,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Stateful],
    extra: Mapping[str, object],
    keep: int,
    group: ProcessGroup,
) -> Path:
    """Write a new version into `root`, and delete all but the last `keep` versions. See `lorasc_fx.save`.

    Every rank of the group calls this. Each rank writes its shards. The first rank also writes everything else.
    """
    if not is_integer(keep, 1):
        raise SpecError(f"save: keep is {keep!r}; give the number of versions to keep, an integer of 1 or more")
    is_first = group.rank == 0
    writers = run.slow.group.size  # the ranks that share the weights; all other ranks are replicas
    takes_part = group.rank < writers
    tensors: Tensors = {}
    manifest: dict[str, Any] = {}
    version = temporary = root
    created: Path | None = None  # the folder to delete if anything fails
    with contextlib.ExitStack() as stack:
        reading = stack.enter_context(contextlib.ExitStack())
        try:
            # Check on all ranks that the cascade can be saved, before any rank writes.
            with group.agreed("save"):
                if not group.is_alone:
                    check_between_steps(run, "save")
                if takes_part:
                    reading.enter_context(run.exclusive("save", sharded=True, keeps=True))
                    check_run_finite(run)
            rng = gathered_random_states(group, "save")
            # Copy the state into host memory. The first rank locks the folder and creates a temporary one.
            with group.agreed("save"), _as_checkpoint_error(root, "cannot be written"):
                if takes_part:
                    tensors, manifest = contents(Content.of(run, optimizers, schedulers, extra, rng), run)
                reading.close()  # the copies are written without holding the locks of the weights
                if is_first:
                    make_folder(root)
                    if stack.enter_context(one_writer(root)):
                        for path in root.iterdir():  # delete temporary folders of killed writers
                            if _TEMPORARY.fullmatch(path.name):
                                remove(path)
                    version = root / next_name(root)
                    created = temporary = root / f"{_WRITING}{uuid.uuid4().hex}"
                    created.mkdir()
            temporary = Path(group.gather_text(str(temporary), "save")[0])
            # Each rank writes its file. The manifest is written last, because it has the digests of all files.
            names, digest = file_names(writers), ""
            with group.agreed("save"), _as_checkpoint_error(root):
                if takes_part:
                    shards = manifest["shards"]
                    to_write = {name: value for name, value in tensors.items() if is_first or name in shards}
                    path = temporary / names[group.rank]
                    write_tensors(to_write, path)
                    sync(path)
                    digest = file_digest(path)
            digests = group.gather_text(digest, "save")
            with group.agreed("save"), _as_checkpoint_error(root):
                if is_first:
                    manifest["files"] = dict(zip(names, digests[:writers], strict=True))
                    _write_manifest(manifest, temporary)
                    temporary.rename(version)
                    created = version
                    sync(root)
        except BaseException:
            if created is not None:
                _drop(created)
            raise
        for old in list_versions(root)[:-keep] if is_first else ():
            if _replaces(manifest, old):
                _drop(old)
    return Path(group.gather_text(str(version), "save")[0])


def check_between_steps(run: Run, call: str) -> None:
    """Raise StateError if gradients wait for a step, because each rank may have different gradients."""
    waiting = run.pending.waiting(run.trainable())
    if waiting:
        raise StateError(
            f"{call}: {waiting[0]} has a gradient that no optimizer step has used, and each rank may have a different "
            f"one; call {call} between optimizer.step() and the next backward",
            code="gradients-pending",
        )


def check_run_finite(run: Run) -> None:
    """Raise if a branch holds inf or nan, because `load` would reject the checkpoint after older ones are deleted.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    if run.slow.group.any(not all_finite(run.by_key.values())):
        broken = next(
            (name for name, branch in run.branches_by_weight().items() if not branch.finite()), "another rank"
        )
        raise NonFiniteBranch(
            f"save: the branch of {broken} holds inf or nan; nothing was written, and the last version is unchanged. "
            "Load it, and continue with a lower learning rate or with clipped gradients"
        )


def contents(content: Content, run: Run) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a version by name, as copies of this rank's shards, and the manifest."""
    try:
        for owner in content.optimizers:
            check_numbers(owner.state, "optimizer")
    except ValueError as fault:
        raise CheckpointError(
            f"save: {fault}; nothing was written, and the last version is unchanged. Load it, and continue with a "
            "lower learning rate or with clipped gradients",
            code="non-finite",
        ) from fault
    axes = content.axes(run.slow) if run.is_sharded else {}
    try:
        plain, tensors = pack(content)
        manifest = json.loads(json.dumps({"format": FORMAT, "content": plain}, allow_nan=False))
    except (RecursionError, TypeError, ValueError) as fault:
        raise CheckpointError(
            "save: a buffer, a gradient, extra, or the state of the optimizer or scheduler contains a value that "
            f"neither JSON nor safetensors can store: {fault}; use numbers, strings, lists, dicts and dense tensors",
            code="not-serializable",
        ) from fault
    shards = {name: axes[id(tensor)] for name, tensor in tensors.items() if id(tensor) in axes}
    copies = {
        name: local(tensor.detach()).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return copies, {**manifest, "shards": shards}


def to_state_dict(run: Run) -> dict[str, torch.Tensor]:
    """Return the state of a cascade, without optimizer and scheduler, as copies of tensors by name.

    Raises:
        NonFiniteBranch: a branch holds inf or nan.
    """
    check_run_finite(run)
    tensors, manifest = contents(Content.of(run), run)
    return {**tensors, KEY: packed(manifest, digest_of(tensors))}


@contextlib.contextmanager
def _as_checkpoint_error(root: Path, failure: str = "the checkpoint was not written") -> Iterator[None]:
    """Convert errors of the file system to CheckpointErrors."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(
            f"{root}: {failure}: {reason_of(fault)}; existing versions are unchanged", code="write-failed"
        ) from fault


def _write_manifest(manifest: dict[str, object], folder: Path) -> None:
    """Add the digest of a manifest, write it, and sync it and its folder."""
    manifest["digest"] = text_digest(canonical(manifest))
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def remove(folder: Path) -> None:
    """Delete a folder. Ignore files that cannot be deleted."""
    shutil.rmtree(folder, ignore_errors=True)


def _drop(version: Path) -> None:
    """Delete a version, or the temporary folder of a failed save. If this fails, a later save deletes the folder."""
    with contextlib.suppress(OSError):
        if not _TEMPORARY.fullmatch(version.name):
            version = version.rename(version.with_name(f"{_DELETING}{uuid.uuid4().hex}"))
        remove(version)


def _replaces(manifest: Mapping[str, Any], version: Path) -> bool:
    """Return whether an older version is of the same run, which means that it has the same base and spec."""
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError):  # the file is damaged, or is not a manifest
        old, new = json.loads((version / MANIFEST).read_bytes())["content"], manifest["content"]
        return bool(old["base"] == new["base"] and old["plan"]["spec"] == new["plan"]["spec"])
    return False
