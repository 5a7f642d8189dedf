"""Other formats: safetensors, `.pt2` and ONNX out, LoRA adapters of peft out and in."""

from lorasc_fx.errors import ExportError
from lorasc_fx.export.graphs import program, pt2
from lorasc_fx.export.onnx_file import onnx
from lorasc_fx.export.peft import PeftAdapter, peft
from lorasc_fx.export.peft_import import peft_spec
from lorasc_fx.export.weights import safetensors

__all__ = ["ExportError", "PeftAdapter", "onnx", "peft", "peft_spec", "program", "pt2", "safetensors"]
