"""Out: a cascade in other people's formats."""

from lorasc_fx.export.graphs import program, pt2
from lorasc_fx.export.onnx_file import onnx
from lorasc_fx.export.peft import PeftAdapter, peft
from lorasc_fx.export.weights import safetensors

__all__ = ["PeftAdapter", "onnx", "peft", "program", "pt2", "safetensors"]
