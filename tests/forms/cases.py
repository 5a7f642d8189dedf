"""The table of spellings, one row each, by name."""

from __future__ import annotations

from dataclasses import replace

from tests.forms.cases_attention import ATTENTION
from tests.forms.cases_convs import PLAIN
from tests.forms.cases_kernels import CODED
from tests.forms.cases_layers import EMBEDDINGS, RECURRENT, SHARED
from tests.forms.cases_products import EXPERTS, PRODUCTS
from tests.forms.cases_weights import COMPUTED
from tests.forms.kit import Case


def once(cases: list[Case]) -> list[Case]:
    """Return rows whose models hold no dropout, statistics or state: one mode tells, in turn the one and the other."""
    return [replace(case, modes=(index % 2 == 0,)) for index, case in enumerate(cases)]


STATED = ("conv_residual", "conv_lazy", "conv_standardized_by_norm")
CASES: list[Case] = [
    *once([*PRODUCTS, *PLAIN, *EMBEDDINGS, *EXPERTS, *(case for case in CODED if case.name not in STATED)]),
    *(case for case in CODED if case.name in STATED),
    *ATTENTION,
    *RECURRENT,
    *SHARED,
    *COMPUTED,
]
