"""How the base of a run is built again, if it is a model of transformers or timm: its name and its configuration.

The name alone is not enough, because a model may have a new head. Classes are looked up in the library's tables of
models. Code from a repository is never executed, and weights are read from safetensors files only. A manifest may be
forged, so settings that could name code or need much memory are refused.
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
from lorasc_fx.checkpoint.base_file import SINGLE, BaseFile, headers, name_or_path, shards_of
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
"""Configuration classes of transformers for methods that quantize a base while loading it. They hold plain values."""
_PREQUANTIZED = (*_QUANTIZED, "awq", "compressed-tensors", "gptq", "hqq", "torchao")
"""Methods of quantized files that installed packages read. Others fetch kernels from the hub."""
_MAX_HEAD = 0.1
"""Largest share of a model's entries that a new head has."""
_ATTENTION = ("eager", "sdpa")
"""Implementations that are part of torch and transformers. Others can be code from elsewhere."""
_IMPLEMENTATIONS = {"attn_implementation": _ATTENTION, "experts_implementation": ("eager", "batched_mm", "grouped_mm")}
"""By a part of their key: settings that can name code on the hub, with the values that do not."""
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "use_pretrained_backbone")
"""Settings that make transformers fetch code or weights from elsewhere."""
_COUNT = re.compile("layer|label|expert|group|head|depth|stage|block|position")
"""Keys of a configuration up to whose number transformers may loop in Python, before it makes a tensor."""
_MAX_COUNT, _MAX_NUMBER = 1 << 17, 1 << 31
"""Largest number under such a key, and under any other one, unless the base's own config.json has it."""
_MODULES_EACH = 16
"""Most modules, parameters and buffers that a model has per parameter; a layer of Llama has 3."""
_FEW_MODULES, _FEW_ENTRIES = 1000, 1 << 26
"""What any model may have: modules, parameters and buffers; entries of buffers and new heads that no file has."""
_TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM": "CAUSAL_LM",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""Tasks of peft, with the name of the table of models that transformers has for each."""


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
        options: for transformers `class`, `config` and `attention`; for timm `num_classes`, and the `file` of the
            weights if the user chose another one.
    """

    library: Annotated[str, choice(_EXTRAS)]
    name: Annotated[str, Check(lambda name: name and name.isprintable(), "give the name of a base")]
    dtype: Annotated[str, choice(_DTYPES)]
    options: dict[str, Any]

    @classmethod
    def of(cls, run: Run, call: str, name: str | None = None) -> BaseModel:
        """Return how the base of a run is built, under the name that the user gave, if any.

        Raises:
            StateError: the model is of neither library, or does not say where its weights come from, or its library
                builds another model by this name.
        """
        model = run.model
        adapted = (state.base for state in run.slow.states.values() if not state.full)
        parameter = next(adapted, next(model.parameters()))
        dtype = str(parameter.dtype).removeprefix("torch.")
        library, config = _library_of(model), getattr(model, "config", None)
        base_name = name if name is not None else name_of(model)
        if library is None or base_name is None or dtype not in _DTYPES:
            description = f"is {type(model).__name__}" + (f" of {library}" if library else "")
            raise StateError(
                f"{call}: the base cannot be named: it {description}, and its weights have no known source. Build it "
                "with from_pretrained of transformers or create_model(pretrained=True) of timm, or give base_model=. "
                "Or use lorasc_fx.save(cascade, folder) and lorasc_fx.load(folder, model)",
                code="no-base",
            )
        if library == "timm":
            return cls(library, base_name, dtype, _timm_options(model, base_name, call))
        assert config is not None
        attention = getattr(config, "_attn_implementation", None)
        about = json.loads(config.to_json_string(use_diff=True))
        about.pop("auto_map", None)  # the class is one of the library
        method = about.get("quantization_config", {}).get("quant_method")
        pre_quantized = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
        if method not in (None, *(_PREQUANTIZED if pre_quantized else _QUANTIZED)):
            raise StateError(
                f"{call}: the base cannot be named: {method} quantized it during loading. This is repeated only for "
                f"{' and '.join(_QUANTIZED)}, and for quantized files of {', '.join(_PREQUANTIZED)}. Use "
                "lorasc_fx.save(cascade, folder) and lorasc_fx.load(folder, model)",
                code="no-base",
            )
        options = {
            "class": type(model).__name__,
            "config": about,
            "attention": attention if attention in _ATTENTION else None,
        }
        return cls(library, base_name, dtype, options)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BaseModel:
        """Return the base that a manifest names.

        Raises:
            ValueError: a field is missing or invalid, or a setting could name code of somebody else.
        """
        base: BaseModel = decode(cls, fields, ("model",))
        decode(_Transformers if base.library == "transformers" else _Timm, base.options, ("model", "options"))
        for path, value in _settings_of(base.options.get("config", {})):
            _check_setting(path, value)
        return base

    def build(self, where: str, parameters: int, entries: int = 0) -> nn.Module:
        """Return the base, in eval mode. Only local files are read, unless HF_HUB_OFFLINE is 0 in the environment.

        Args:
            where: for messages.
            parameters: number of parameters of the base. A larger model is not built, whatever its configuration says.
            entries: number of entries of the parameters that the files of the base lack, such as a new head.

        Raises:
            CheckpointError: there is no such model, or there are no such files, or the model would be larger than them.
            MissingExtra: the library is not installed.
        """
        library = module_of(_EXTRAS[self.library], self.library)
        try:
            with torch.random.fork_rng(devices=[]):  # a new head is filled at random
                weights = self._weights(fetch=_may_fetch())
                size = _Size(parameters, self._entries(weights) + entries)
                build = self._transformers if self.library == "transformers" else self._timm
                model: nn.Module = build(library, weights, size)
        except Exception as fault:
            cause = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise CheckpointError(
                f"{where}: {self.library} cannot build its base {sanitized(self.name)!r} here: {sanitized(cause, 300)}"
                ". Put its files there, set HF_HUB_OFFLINE=0 to fetch them, or build the model yourself and call "
                "lorasc_fx.load(folder, model)",
                code="no-base",
            ) from fault
        return model.eval()

    def _entries(self, weights: Path) -> int:
        """Return the number of entries of the tensors in the files of the base, when they are dense."""
        if self.library == "timm" and not (weights.name.endswith(".safetensors") and weights.is_file()):
            raise FileNotFoundError(f"{sanitized(str(weights))} is not a safetensors file")
        try:
            tensors = headers(shards_of(weights))
        except (CheckpointError, OSError):
            if not _may_fetch():
                raise
            return sys.maxsize  # they are fetched when the model is built
        packed = 16 if self.options.get("config", {}).get("quantization_config") else 1  # two bits in an int32, say
        return packed * sum(math.prod(tensor.shape) for tensor in tensors.values())

    def _transformers(self, library: Any, _: Path, size: _Size) -> Any:
        defined = getattr(library, self.options["class"]) if self.options["class"] in dir(library) else None
        if not (isinstance(defined, type) and issubclass(defined, library.PreTrainedModel)):
            raise ValueError(f"it does not have the model {sanitized(self.options['class'])}")
        kind: Any = defined
        more: dict[str, Any] = {}
        if self.options["attention"]:
            more["attn_implementation"] = self.options["attention"]
        about, safe = dict(self.options["config"]), {"local_files_only": not _may_fetch(), "trust_remote_code": False}
        own_config = kind.config_class.get_config_dict(self.name, **safe)[0]
        _check_numbers(about, own_config)
        with torch.device("meta"), size.held():
            kind(kind.config_class.from_dict(copy.deepcopy(about)))
        how = about.get("quantization_config")
        if how and "quantization_config" not in own_config:
            del about["quantization_config"]  # the files are dense: transformers quantizes them while loading
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
        source, _, location = self.name.rpartition(":")
        name, overlay = self.name, {}
        if source == "hf-hub":
            _hub_file(location, "config.json", _may_fetch())
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
        source, _, location = self.name.rpartition(":")
        if source == "local-dir":
            return Path(location, SINGLE)
        if not source and self.options["file"]:
            return Path(self.options["file"])
        timm = module_of("vision", "timm")
        return Path(_hub_file(location if source else timm.get_pretrained_cfg(self.name).hf_hub_id, SINGLE, fetch))

    def tensors_beside(self, run: Run, call: str) -> dict[str, torch.Tensor]:
        """Return W0 of what the files of the base lack (`_new_in`), by its name in a checkpoint.

        Parameters trained in full are left out, because every checkpoint holds their W0.
        """
        states, parameters = run.slow.states, run.parameters_by_name()
        names = [name for name in self._new_in(run.model, run.fingerprints(), call) if name not in run.slow.trained]
        values = {name: states[name].base if name in states else parameters[name] for name in names}
        return {f"base/{name}": dense(value).detach().to("cpu", copy=True) for name, value in values.items()}

    def _new_in(self, model: nn.Module, fingerprints: Mapping[str, str], call: str) -> list[str]:
        """Return the parameters that the files of the base lack, or hold in another shape, such as a new head.

        If these are many, the files may have other names: then the base is built, and compared by fingerprints.

        Args:
            model: that was adapted.
            fingerprints: of W0, by parameter.
            call: for messages.

        Raises:
            StateError: the files are not here.
        """
        try:
            parameters = dict(model.named_parameters())
            new = self._files(model).lacking(parameters)
            entries = sum(parameter.numel() for parameter in parameters.values())
            if sum(parameters[name].numel() for name in new) <= _MAX_HEAD * entries:
                return new
            built = dict(self.build(call, len(parameters), entries).named_parameters())
        except (CheckpointError, OSError, ValueError) as fault:  # of the hub: it is not in the cache
            raise StateError(
                f"{call}: the files of the base {self.name!r} are not here, so it is unknown what they lack, such as a "
                f"new head: {sanitized(str(fault), 300)}. Put them there, or use lorasc_fx.save(cascade, folder) and "
                "lorasc_fx.load(folder, model)",
                code="no-base",
            ) from fault
        return [
            name for name, digest in fingerprints.items() if name not in built or fingerprint(built[name]) != digest
        ]

    def _files(self, model: nn.Module) -> BaseFile:
        """Return the files of the base, or the files that the model was loaded from if the base has moved since."""
        try:
            return BaseFile(self._weights(), model)
        except (CheckpointError, OSError, ValueError):
            if (before := name_of(model)) is None or before == self.name:
                raise
            return BaseFile(replace(self, name=before)._weights(), model)


class _Size:
    """Limits the size of a model while it is built.

    Args:
        parameters: number of parameters.
        entries: number of their entries.
    """

    def __init__(self, parameters: int, entries: int) -> None:
        self._modules = _FEW_MODULES + _MODULES_EACH * parameters
        self._entries = {
            "parameters": 2 * entries + _FEW_ENTRIES,
            "buffers": 2 * entries + _FEW_ENTRIES,
        }  # timm makes heads twice
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise ValueError as soon as this thread builds a model that is larger than its files can fill.

        A tensor that is too large does not occupy memory yet: the system provides it when the tensor is filled.
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
    """Raise ValueError for a setting that makes transformers fetch code or weights of somebody else."""
    key = path.rpartition(".")[2]
    refused = key in _CODE and bool(value)
    for part, allowed in _IMPLEMENTATIONS.items():
        if part in path:  # with several parts of a model, a table under such a key has one for each
            refused |= not (isinstance(value, (dict, bool)) or value in (None, *allowed))
    if key == "quantization_config" and value is not None:
        refused |= not isinstance(value, dict) or value.get("quant_method") not in _PREQUANTIZED
    if refused:
        raise ValueError(
            f"'model': its config has {sanitized(path[1:])} = {sanitized(value)}, which can be code of somebody else"
        )


def _check_numbers(config: Mapping[str, Any], own_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number that is too large for a model, unless the base's own files have it."""
    own_values = dict(_settings_of(own_config))
    for path, value in _settings_of(config):
        most = _MAX_COUNT if _COUNT.search(path) else _MAX_NUMBER
        if isinstance(value, (int, float)) and abs(value) > most and own_values.get(path) != value:
            raise ValueError(f"its config has {sanitized(path[1:])} = {sanitized(value)}; the most is {most}")


def name_of(model: nn.Module) -> str | None:
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


def task_type_of(model: nn.Module) -> str | None:
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
    return package if package in _EXTRAS and hasattr(model, _MARKS[package]) else None


_MARKS = {"transformers": "config", "timm": "pretrained_cfg"}
"""Attributes of the models that a library builds by name."""


def _timm_options(model: nn.Module, name: str, call: str) -> dict[str, Any]:
    """Return the options of a model of timm, after checking that they build this model."""
    timm = module_of("vision", "timm")
    config: Any = model.pretrained_cfg
    classes, file = int(getattr(model, "num_classes", 0)), config.get("file") if not config.get("source") else None
    with torch.random.fork_rng(devices=[]):
        architecture = name if name.startswith("local-dir:") else config["architecture"]
        built = timm.create_model(architecture, pretrained=False, num_classes=classes)
    if _settings(model) != _settings(built):
        raise StateError(
            f"{call}: the base cannot be named: this model was built with other arguments, and timm builds a different "
            f"one as {name} with {classes} classes. Use lorasc_fx.save(cascade, folder) and lorasc_fx.load(folder, "
            "model)",
            code="no-base",
        )
    return {"num_classes": classes, "file": file}


def _settings(model: nn.Module) -> list[Any]:
    """Return what distinguishes two models apart from their values: shapes, classes, and settings of modules."""
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
    """Return the path of a file of a repository on the hub, from the cache or fetched."""
    hub = module_of("text", "huggingface_hub")
    if not repository:
        raise FileNotFoundError("it does not name a repository on the hub")
    path: str = hub.hf_hub_download(repository, name, local_files_only=not fetch)
    return path


def _may_fetch() -> bool:
    """Whether the environment allows the network: only if HF_HUB_OFFLINE is set to a false value."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("0", "no", "off", "false")
