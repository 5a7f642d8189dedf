"""Write docs/composing.md from the rows that the tests run: `python -m tests.compose.page`."""

from __future__ import annotations

from pathlib import Path

from tests.compose.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "composing.md"
ABOUT = """\
# Other people's passes

A `Pipeline` accepts any callable that takes a GraphModule, before, between and after the passes of lorasc-fx. The
callable returns a GraphModule or a PassResult, or None if it changed the module in place:

```python
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import lorasc_fx as lx
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline


def shapes(graph_module):
    ShapeProp(graph_module).propagate(torch.zeros(2, 6))


plain = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)))
adapted = Pipeline([MatchSites(lx.CascadeSpec(rank=2)), InsertBranches(), shapes])(plain).graph_module

folded = PassManager(passes=[Pipeline([shapes]), FoldBranches()])(adapted).graph_module  # torch's own manager
```

The Pipeline runs on a copy of the graph and commits at the end. The copy has its own modules but shares the tensors,
so a pass that writes into a tensor in place also changes your tensor. After each pass the verifier checks the graph
against its plan. Nodes that were renamed, cloned, merged or moved are followed. If a fold could not follow a change, a
`VerifyError` names the node, the weight and the reason, and the input does not change. Passes must not change weights
under a branch, because a fold starts from W0.

The insertion freezes all weights of its result, as peft does, except those under `spec.train`. Pass
`[p for p in adapted.parameters() if p.requires_grad]` to the optimizer. The Parameters of the traced model keep their
flags; the frozen ones are new and share their memory. A fold makes them trainable again.

A pass that builds a new graph module loses the metadata of lorasc-fx. A Pipeline restores it; in torch's PassManager,
wrap the pass: `Pipeline([it])`. A Pipeline runs passes in the given order;
`Pipeline(passes, order="solved")` sorts them by what they require, provide and remove.

The table shows three orders. *Before*: the pass, the insertion, the fold. *Between*: the insertion, the pass, the fold.
*After*: `cascade.folded_graph()` or `release()`, then the pass. *Yes* means that the pass changed the graph, and
that outputs agree with the same pass on the plain model with `W + s B A` for W (fp64: 1e-10 of their scale;
quantization in fp32: 1e-5). `tests/compose/test_table.py` runs every cell, and `python -m tests.compose.page` writes
this page.

"""


def text() -> str:
    """Return the whole page."""
    head = ["| pass | before the insertion | between insertion and fold | after the fold |", "|---|---|---|---|"]
    rows = [f"| {row.name} (`{row.source}`) | {row.before} | {row.between} | {row.after} |" for row in ROWS]
    return ABOUT + "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
