"""Exports to other formats: safetensors, `.pt2`, ONNX, peft adapters, and adapter files for an exported base."""

from lorasc_fx.errors import ExportError
from lorasc_fx.export.adapter_files import AdapterFile, adapter
from lorasc_fx.export.graph_files import onnx, program, pt2
from lorasc_fx.export.safetensors_files import safetensors
from lorasc_fx.peft.adapter_reader import peft_spec
from lorasc_fx.peft.adapter_writer import PeftAdapter, peft

__all__ = [
    "AdapterFile", "ExportError", "PeftAdapter", "adapter", "onnx", "peft", "peft_spec", "program", "pt2",
    "safetensors",
]  # fmt: skip
