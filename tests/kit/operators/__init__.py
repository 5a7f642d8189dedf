"""The table of operators: every way of reading a weight, one small model each."""

from __future__ import annotations

from dataclasses import replace

from tests.kit.operators.attention import ATTENTION
from tests.kit.operators.case import Case
from tests.kit.operators.convs import CONVS
from tests.kit.operators.graphs import GRAPHS
from tests.kit.operators.kernels import CODED
from tests.kit.operators.layers import EMBEDDINGS, RECURRENT, SHARED
from tests.kit.operators.products import EXPERTS, PRODUCTS
from tests.kit.operators.weights import COMPUTED

STATED = ("conv_residual", "conv_lazy")
PLAIN = [*GRAPHS, *PRODUCTS, *CONVS, *EMBEDDINGS, *EXPERTS, *(case for case in CODED if case.name not in STATED)]
OPERATORS: list[Case] = [
    # Models without dropout, statistics or state are compared in one mode, alternately in train and eval mode.
    *(replace(case, modes=case.modes and (index % 2 == 0,)) for index, case in enumerate(PLAIN)),
    *(case for case in CODED if case.name in STATED),
    *ATTENTION,
    *RECURRENT,
    *SHARED,
    *COMPUTED,
]
