"""Readable names for the dynamic axes of an ONNX model, in place of torch's (`s77`)."""

from __future__ import annotations

from typing import Any

AXES = {
    1: ("batch",),
    2: ("batch", "sequence"),
    3: ("batch", "sequence", "features"),
    4: ("batch", "channels", "height", "width"),
    5: ("batch", "channels", "frames", "height", "width"),
}
"""Usual names of the axes of an input, by its number of axes."""


def name_axes(onnx_program: Any) -> None:
    """Name each dynamic axis after its place in the first input that has it. Write constant sizes as numbers."""
    graph = onnx_program.model.graph
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            symbol = getattr(size, "value", None)  # None for a number
            if symbol is not None and symbol.isdigit():  # torch writes a size that it found to be constant like this
                value.shape[axis] = int(symbol)
            elif symbol is not None and symbol.isidentifier() and value in graph.inputs:
                usual = AXES.get(len(value.shape), ())
                names.setdefault(symbol, _unused(usual[axis] if axis < len(usual) else f"axis_{axis}", names))
    if hasattr(onnx_program, "rename_axes"):  # torch 2.9 does not have it
        onnx_program.rename_axes(names)


def _unused(name: str, names: dict[str, str]) -> str:
    """Return the name, with a number if another axis has it."""
    count = sum(each == name or each.startswith(f"{name}_") for each in names.values())
    return f"{name}_{count + 1}" if count else name
