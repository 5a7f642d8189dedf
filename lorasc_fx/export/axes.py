"""Renames the dynamic axes of an ONNX model from torch's symbols (`s77`) to readable names (`batch`)."""

from __future__ import annotations

from typing import Any

AXES = {
    1: ("batch",),
    2: ("batch", "sequence"),
    3: ("batch", "sequence", "features"),
    4: ("batch", "channels", "height", "width"),
    5: ("batch", "channels", "frames", "height", "width"),
}
"""Names for the axes of an input, by its number of axes."""


def name_axes(onnx_program: Any) -> None:
    """Name each dynamic axis by its position in the first input that has it. Write constant sizes as numbers."""
    graph = onnx_program.model.graph
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            symbol = getattr(size, "value", None)  # None for a number
            if symbol is not None and symbol.isdigit():  # torch writes a dynamic size that turned out constant so
                value.shape[axis] = int(symbol)
            elif symbol is not None and symbol.isidentifier() and value in graph.inputs:
                defaults = AXES.get(len(value.shape), ())
                names.setdefault(symbol, _unused(defaults[axis] if axis < len(defaults) else f"axis_{axis}", names))
    if hasattr(onnx_program, "rename_axes"):  # torch 2.9 does not have it
        onnx_program.rename_axes(names)


def _unused(name: str, names: dict[str, str]) -> str:
    """Return the name, with a number appended if another axis already has it."""
    count = sum(used == name or used.startswith(f"{name}_") for used in names.values())
    return f"{name}_{count + 1}" if count else name
