"""The table of odd models, one row each."""

from __future__ import annotations

import torch

from lorasc_fx.plan import Reason
from tests.forms.odd_mechanisms import (
    ControlFlow,
    Droppers,
    Nested,
    Norms,
    Raw,
    Sparse,
    Spectral,
    adjacency,
)
from tests.forms.odd_networks import (
    AdaptiveSoftmax,
    Decoder,
    Detector,
    Generator,
    GraphNetwork,
    Loose,
    Quantized,
    graph,
)
from tests.kit.operators.case import Case, linear, rand


def convs(*names: str) -> dict[str, str]:
    return {f"{name}.weight": "conv" for name in names}


def lin(*names: str) -> dict[str, str]:
    return linear(*(f"{name}.weight" for name in names))


X = rand((4, 5))
ORIGINAL = "parametrizations.weight.original"
NOT = ("export", "dynamo", "symbolic")

# fmt: off
ODD: list[Case] = [
    Case("generator", Generator, rand((3, 5)), linear(f'start.{ORIGINAL}') | {f'up.{ORIGINAL}': "conv"} | convs("out"),
        {"strength": (Reason.NO_FORM, Reason.VECTOR)}, refuses=("symbolic",)),
    Case("graph_network", GraphNetwork, graph, {"embed.weight": "embedding", "update.weight_ih": "recurrent",
        "update.weight_hh": "recurrent"} | lin("message", "read"), refuses=("symbolic",)),
    Case("quantized", Quantized, rand((4, 6)), lin("encode", "decode"), refuses=("symbolic",)),
    Case("decoder", Decoder, rand((3, 5)),
        {"table.weight": "embedding", "cell.weight_ih": "recurrent", "cell.weight_hh": "recurrent"} | lin("head"),
        refuses=NOT),
    Case("detector", Detector, rand((2, 3, 6, 7)), convs("levels.p3", "levels.p4", "boxes", "scores"),
        refuses=("export", "dynamo")),
    Case("loose", Loose, lambda: (rand((4, 3), (4, 3))(), {"scale": 2.0, "image": X()[0], "text": X()[0]}),
        lin("layers.text", "layers.image"), unreached=("layers.sound.weight",), refuses=("symbolic",)),
    Case("adaptive_softmax", AdaptiveSoftmax, lambda: (*X(), torch.tensor([1, 7, 4, 8])),
        lin("body", "loss.head", "loss.tail.0.0", "loss.tail.0.1", "loss.tail.1.0", "loss.tail.1.1"),
        opaque=tuple(f'loss.{name}.weight' for name in ("head", "tail.0.0", "tail.0.1", "tail.1.0", "tail.1.1")),
        refuses=("export", "dynamo")),
    Case("spectral", Spectral, rand((2, 8)), lin("lift", "lower") | convs("local") | linear("pair"),
        refuses=("symbolic",)),
    Case("sparse", Sparse, adjacency, linear("first") | lin("second")),
    Case("control_flow", ControlFlow, X, lin("either", "head"), refuses=("symbolic",), modes=(True,)),
    Case("weight_data", Raw, X, lin("body", "head"), refuses=("export", "dynamo"),
        opaque=("body.weight", "head.weight")),
    Case("nested", Nested, rand((2, 4, 5)), lin("body", "head"), refuses=NOT),
    Case("droppers", Droppers, rand((3, 3, 4, 5)), convs("conv") | lin("head")),
    Case("norms", Norms, rand((4, 3, 6)), convs(*(f'convs.{index}' for index in range(4))),
        refuses=("export", "dynamo")),
]
# fmt: on
