"""Out: a cascade in other people's formats."""

from lorasc_fx.export.weights import safetensors

__all__ = ["safetensors"]
