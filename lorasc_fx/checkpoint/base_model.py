"""The name of a base model, by which a run that is loaded without one builds it: a model of transformers or of timm.

The name alone is not enough where a model was built with a head of its own, so the configuration goes with it. Classes
are looked up in the library's own tables of models, code of a repository is never run, and weights are read from
safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.base_file import SINGLE, BaseFile, headers, name_or_path, open_base, shards_of
from lorasc_fx.checkpoint.layout import sanitized
from lorasc_fx.errors import CheckpointError, StateError
from lorasc_fx.quantized import dense
from lorasc_fx.util.decode import Check, choice, decode
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.fingerprint import fingerprint

_EXTRAS = {"transformers": "text", "timm": "vision"}
_DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_QUANTIZED = {"bitsandbytes": "BitsAndBytesConfig", "quanto": "QuantoConfig"}
"""Classes of transformers that say how a base is quantized as it is loaded, by method; they hold plain values."""
_PREQUANTIZED = (*_QUANTIZED, "awq", "compressed-tensors", "gptq", "hqq", "torchao")
"""Methods of quantized files that are read by installed packages; others fetch kernels from the hub."""
_MUCH = 0.1
"""Share of the numbers of a model that is more than a new head."""
_ATTENTION = ("eager", "sdpa")
"""Implementations that are a part of torch and transformers; others can be code from elsewhere."""
_IMPLEMENTATIONS = {"attn_implementation": _ATTENTION, "experts_implementation": ("eager", "batched_mm", "grouped_mm")}
"""Settings of a configuration that can name code on the hub, by a part of their key, and the values that do not."""
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "use_pretrained_backbone")
"""Settings of a configuration by which transformers would fetch code or weights from elsewhere."""
_COUNT = re.compile("layer|label|expert|group|head|depth|stage|block|position")
"""Keys of a configuration whose number transformers may count up to in Python, before there is a tensor."""
_MOST_COUNTED, _MOST = 1 << 17, 1 << 31
"""Largest number under such a key, and under another one, unless the base's own config.json has it."""
_MODULES_EACH = 16
"""Modules, parameters and buffers that a model has for each of its parameters, at most; a layer of Llama has 3."""
_FEW, _SMALL = 1000, 1 << 26
"""Of a model with few parameters; entries of buffers and of new heads that no file has."""
_TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM": "CAUSAL_LM",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""Tasks of peft, and what transformers calls its table of models for each."""


_Transformers = TypedDict(
    "_Transformers", {"class": str, "config": dict[str, Any], "attention": Annotated[str, choice(_ATTENTION)] | None}
)


class _Timm(TypedDict):
    num_classes: Annotated[int, Check(lambda count: count >= 0, "give a number of classes")]
    file: str | None


@dataclass(frozen=True)
class BaseModel:
    """How a base is built.

    Args:
        library: `transformers` or `timm`.
        name: `name_or_path` of a model of transformers; of timm `architecture.tag`, `hf-hub:ID` or `local-dir:FOLDER`.
        dtype: of its weights, without "torch.".
        options: of transformers `class`, `config` and `attention`; of timm `num_classes`, and the `file` of the weights
            if these are not those of the name.
    """

    library: Annotated[str, choice(_EXTRAS)]
    name: Annotated[str, Check(lambda name: name and name.isprintable(), "give the name of a base")]
    dtype: Annotated[str, choice(_DTYPES)]
    options: dict[str, Any]

    @classmethod
    def of(cls, run: Run, call: str, name: str | None = None) -> BaseModel:
        """Return how the base of a run is built, under a name of the user's if there is one.

        Raises:
            StateError: the model is of neither library, or does not say where its weights come from, or its library
                builds another one by this name.
        """
        model = run.model
        adapted = (state.base for state in run.slow.states.values() if not state.full)
        held = next(adapted, next(model.parameters()))
        dtype = str(held.dtype).removeprefix("torch.")
        library, config = _library_of(model), getattr(model, "config", None)
        given = name if name is not None else name_of(model)
        if library is None or given is None or dtype not in _DTYPES:
            what = f"is {type(model).__name__}" + (f" of {library}" if library else "")
            raise StateError(
                f"{call}: the base cannot be named: it {what}, and does not say where its weights come from. Build it "
                "by from_pretrained of transformers or create_model(pretrained=True) of timm, or give base_model=...; "
                "for any other model there is lorasc_fx.save(cascade, folder), lorasc_fx.load(folder, model)",
                code="no-base",
            )
        if library == "timm":
            return cls(library, given, dtype, _timm_options(model, given, call))
        assert config is not None
        attention = getattr(config, "_attn_implementation", None)
        about = json.loads(config.to_json_string(use_diff=True))
        about.pop("auto_map", None)  # the class is one of the library
        method = about.get("quantization_config", {}).get("quant_method")
        pre_quantized = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
        if method not in (None, *(_PREQUANTIZED if pre_quantized else _QUANTIZED)):
            raise StateError(
                f"{call}: the base cannot be named: {method} has quantized it as it was loaded, and it is built again "
                f"for {' and '.join(_QUANTIZED)} alone, and from quantized files of {', '.join(_PREQUANTIZED)}. Use "
                "lorasc_fx.save(cascade, folder), and give the model to lorasc_fx.load(folder, model)",
                code="no-base",
            )
        options = {
            "class": type(model).__name__,
            "config": about,
            "attention": attention if attention in _ATTENTION else None,
        }
        return cls(library, given, dtype, options)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> BaseModel:
        """Return what a manifest holds.

        Raises:
            ValueError: it is no such name.
        """
        base: BaseModel = decode(cls, held, ("model",))
        decode(_Transformers if base.library == "transformers" else _Timm, base.options, ("model", "options"))
        for path, value in _settings_of(base.options.get("config", {})):
            _check_setting(path, value)
        return base

    def build(self, where: str, parameters: int, entries: int = 0) -> nn.Module:
        """Return the base, in eval mode. Only local files are read, unless HF_HUB_OFFLINE is 0 in the environment.

        Args:
            where: for messages.
            parameters: number of parameters that the base has. A larger model is not built, whatever its configuration
                says, which may be forged.
            entries: of those parameters that are not in the files of the base, such as a new head.

        Raises:
            CheckpointError: it cannot be built: no such model, no such files, or it would be larger than these.
            MissingExtra: the library is not installed.
        """
        library = module_of(_EXTRAS[self.library], self.library)
        random = torch.random.fork_rng(devices=[])  # a head that the name has not is filled at random
        try:
            with random:
                weights = self._weights(fetch=_may_fetch())
                size = _Size(parameters, self._entries(weights) + entries)
                model: nn.Module = (
                    self._transformers(library, size)
                    if self.library == "transformers"
                    else self._timm(library, weights, size)
                )
        except Exception as fault:
            cause = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise CheckpointError(
                f"{where}: {self.library} cannot build its base {sanitized(self.name)!r} here: {sanitized(cause, 300)}"
                ". Put its files there, set HF_HUB_OFFLINE=0 to have them fetched, or build the model and give it: "
                "lorasc_fx.load(folder, model)",
                code="no-base",
            ) from fault
        return model.eval()

    def _entries(self, weights: Path) -> int:
        """Return the number of entries that the files of the base hold, as dense tensors."""
        if self.library == "timm" and not (weights.name.endswith(".safetensors") and weights.is_file()):
            raise FileNotFoundError(f"{sanitized(str(weights))} is no safetensors file")
        try:
            shapes, _ = headers(shards_of(weights))
        except (CheckpointError, OSError):
            if not _may_fetch():
                raise
            return sys.maxsize  # they are fetched as the model is built
        packed = 16 if self.options.get("config", {}).get("quantization_config") else 1  # two bits in an int32, say
        return packed * sum(map(math.prod, shapes.values()))

    def _transformers(self, library: Any, size: _Size) -> Any:
        defined = getattr(library, self.options["class"]) if self.options["class"] in dir(library) else None
        if not (isinstance(defined, type) and issubclass(defined, library.PreTrainedModel)):
            raise ValueError(f"it has no model {sanitized(self.options['class'])}")
        kind: Any = defined
        more: dict[str, Any] = {}
        if self.options["attention"]:
            more["attn_implementation"] = self.options["attention"]
        about, safe = dict(self.options["config"]), {"local_files_only": not _may_fetch(), "trust_remote_code": False}
        own = kind.config_class.get_config_dict(self.name, **safe)[0]
        _check_numbers(about, own)
        with torch.device("meta"), size.held():
            kind(kind.config_class.from_dict(copy.deepcopy(about)))
        how = about.get("quantization_config")
        if how and "quantization_config" not in own:
            del about["quantization_config"]  # the files are not quantized: it was done as they were loaded
            name = _QUANTIZED[how["quant_method"]]
            more["quantization_config"] = getattr(library, name).from_dict(how)
        return kind.from_pretrained(
            self.name,
            config=kind.config_class.from_dict(about),
            dtype=_DTYPES[self.dtype],
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **safe,
            **more,
        )

    def _timm(self, library: Any, weights: Path, size: _Size) -> Any:
        source, _, rest = self.name.rpartition(":")
        name, overlay = self.name, {}
        if source == "hf-hub":
            _hub_file(rest, "config.json", _may_fetch())
            name = f"local-dir:{weights.parent}"
        elif not source:
            overlay = {"pretrained_cfg_overlay": {"file": str(weights)}}
        with size.held():
            model = library.create_model(name, pretrained=True, num_classes=self.options["num_classes"], **overlay)
        return model.to(_DTYPES[self.dtype])

    def _weights(self, fetch: bool = False) -> Path:
        """Return the safetensors file of the base, or its folder."""
        if self.library == "transformers":
            return (
                Path(self.name) if Path(self.name).is_dir() else Path(_hub_file(self.name, "config.json", fetch)).parent
            )
        source, _, rest = self.name.rpartition(":")
        if source == "local-dir":
            return Path(rest, SINGLE)
        if not source and self.options["file"]:
            return Path(self.options["file"])
        timm = module_of("vision", "timm")
        return Path(_hub_file(rest if source else timm.get_pretrained_cfg(self.name).hf_hub_id, SINGLE, fetch))

    def tensors_beside(self, run: Run, call: str) -> dict[str, torch.Tensor]:
        """Return W0 of what the files of the base do not have (`_new_in`), by its name in a checkpoint. A checkpoint
        holds W0 of what is trained in full anyway.
        """
        states, parameters = run.slow.states, run.parameters_by_name()
        names = [name for name in self._new_in(run.model, run.fingerprints(), call) if name not in run.slow.trained]
        values = {name: states[name].base if name in states else parameters[name] for name in names}
        return {f"base/{name}": dense(value).detach().to("cpu", copy=True) for name, value in values.items()}

    def _new_in(self, model: nn.Module, fingerprints: Mapping[str, str], call: str) -> list[str]:
        """Return the parameters that the files of the base have not, or in another shape, such as a new head.

        Where that is much, the files may name it otherwise: the base is built, and what it has otherwise is new.

        Args:
            model: that was adapted. Its own files are looked at where those of the name are not here.
            fingerprints: of W0, by parameter.
            call: for messages.

        Raises:
            StateError: the files are not here.
        """
        try:
            parameters = dict(model.named_parameters())
            new = self._files(model).lacking(parameters)
            numbers = sum(parameter.numel() for parameter in parameters.values())
            if sum(parameters[name].numel() for name in new) <= _MUCH * numbers:
                return new
            built = dict(self.build(call, len(parameters), numbers).named_parameters())
        except (CheckpointError, OSError, ValueError) as fault:  # of the hub: it is not in the cache
            raise StateError(
                f"{call}: the files of the base {self.name!r} are not here, and what they lack, such as a new head, "
                f"cannot be told: {sanitized(str(fault), 300)}. Put them there, or use lorasc_fx.save(cascade, "
                "folder), and give the model to lorasc_fx.load(folder, model)",
                code="no-base",
            ) from fault
        return [
            name for name, digest in fingerprints.items() if name not in built or fingerprint(built[name]) != digest
        ]

    def _files(self, model: nn.Module) -> BaseFile:
        """Return where the tensors of the base lie, or of the model if it was moved from there to this name."""
        try:
            base = open_base(self._weights(), model)
        except (CheckpointError, OSError, ValueError):
            if (before := name_of(model)) is None or before == self.name:
                raise
            base = open_base(replace(self, name=before)._weights(), model)
        assert base is not None
        return base


class _Size:
    """Limits for a model that is being built.

    Args:
        parameters: number of parameters.
        entries: of all of them.
    """

    def __init__(self, parameters: int, entries: int) -> None:
        self._modules = _FEW + _MODULES_EACH * parameters
        self._entries = {"parameters": 2 * entries + _SMALL, "buffers": 2 * entries + _SMALL}  # timm makes heads twice
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise ValueError as soon as a model that this thread builds becomes larger than its files can fill.

        A tensor that is too large has no memory yet: the system gives it as it is filled.
        """
        hooks = (
            register_module_parameter_registration_hook(partial(self._count, "parameters")),
            register_module_buffer_registration_hook(partial(self._count, "buffers")),
            register_module_module_registration_hook(partial(self._count, "")),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, kind: str, module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._modules -= 1
        if kind and value is not None and not nn.parameter.is_lazy(value):
            self._entries[kind] -= value.numel()
        if self._modules < 0 or min(self._entries.values()) < 0:
            raise ValueError("its configuration asks for a larger model than its files hold")


def _settings_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a configuration, each with the keys that lead to it."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield f"{path}.{key}", value
        if isinstance(value, (dict, list)):
            yield from _settings_of(value, f"{path}.{key}")


def _check_setting(path: str, value: Any) -> None:
    """Raise ValueError for a setting by which transformers would fetch code, or weights, of somebody else."""
    key = path.rpartition(".")[2]
    refused = key in _CODE and bool(value)
    for part, known in _IMPLEMENTATIONS.items():
        if part in path:  # one for each part of a model is a table under such a key
            refused |= not (isinstance(value, (dict, bool)) or value in (None, *known))
    if key == "quantization_config" and value is not None:
        refused |= not isinstance(value, dict) or value.get("quant_method") not in _PREQUANTIZED
    if refused:
        raise ValueError(
            f"'model': its config has {sanitized(path[1:])} = {sanitized(value)}, which can be code of somebody else"
        )


def _check_numbers(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for a number so large that a model cannot have it, unless the base's own files have it."""
    known = dict(_settings_of(own))
    for path, value in _settings_of(config):
        most = _MOST_COUNTED if _COUNT.search(path) else _MOST
        if isinstance(value, (int, float)) and abs(value) > most and known.get(path) != value:
            raise ValueError(f"its config has {sanitized(path[1:])} = {sanitized(value)}; the most is {most}")


def name_of(model: nn.Module) -> str | None:
    """Return what a model of transformers or timm says that it was loaded from; None for one that does not."""
    config = getattr(model, "pretrained_cfg", None)
    if _library_of(model) == "timm" and isinstance(config, Mapping):
        if config.get("source") == "local-dir":
            return f"local-dir:{config.get('file')}"
        if config.get("source") == "hf-hub":
            return f"hf-hub:{config.get('hf_hub_id')}"
        tag = config.get("tag")
        return f"{config.get('architecture')}.{tag}" if tag else config.get("architecture")
    return name_or_path(model)


def task_type_of(model: nn.Module) -> str | None:
    """Return peft's name of the task of a model of transformers; None for others, and for tasks that peft has not."""
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
    return package if package in _EXTRAS and hasattr(model, _MARKS[package]) else None


_MARKS = {"transformers": "config", "timm": "pretrained_cfg"}
"""Attributes of the models that a library builds by name."""


def _timm_options(model: nn.Module, name: str, call: str) -> dict[str, Any]:
    """Return the options of a model of timm, after a look at whether they build it."""
    timm = module_of("vision", "timm")
    config: Any = model.pretrained_cfg
    classes, file = int(getattr(model, "num_classes", 0)), config.get("file") if not config.get("source") else None
    with torch.random.fork_rng(devices=[]):
        architecture = name if name.startswith("local-dir:") else config["architecture"]
        built = timm.create_model(architecture, pretrained=False, num_classes=classes)
    if _settings(model) != _settings(built):
        raise StateError(
            f"{call}: the base cannot be named: timm builds another model as {name} with {classes} classes than this "
            "one, which was built with other arguments. Use lorasc_fx.save(cascade, folder), and give the model to "
            "lorasc_fx.load(folder, model)",
            code="no-base",
        )
    return {"num_classes": classes, "file": file}


def _settings(model: nn.Module) -> list[Any]:
    """Return what tells two models apart but for their numbers: shapes, classes, and settings that modules hold."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plain = (bool, int, float, str, tuple)
    modules = {
        name: (type(module), {key: value for key, value in vars(module).items() if isinstance(value, plain)})
        for name, module in model.named_modules()
    }
    for _, settings in modules.values():
        settings.pop("training")
    return [shapes, modules]


def _hub_file(repository: str | None, name: str, fetch: bool) -> str:
    """Return the path of a file of a repository on the hub, from the cache, or fetched."""
    hub = module_of("text", "huggingface_hub")
    if not repository:
        raise FileNotFoundError("it names no repository on the hub")
    path: str = hub.hf_hub_download(repository, name, local_files_only=not fetch)
    return path


def _may_fetch() -> bool:
    """Whether the user's environment allows the network: only where HF_HUB_OFFLINE says so in so many words."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("0", "no", "off", "false")
