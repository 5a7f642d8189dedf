"""`python -m tests.compose.page` writes docs/composing.md from the rows that the tests run."""

from __future__ import annotations

from pathlib import Path

from tests.compose.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "composing.md"
ABOUT = """\
# Other people's passes

Any callable that takes a GraphModule may stand in a `Pipeline`, before, between and after our passes; it returns a
GraphModule, a PassResult, or None when it has worked in place:

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

The Pipeline runs on a copy and commits at the end. The copy has modules of its own and shares the tensors: a pass that
writes into a tensor in place writes into yours. After each pass the verifier holds the graph against its plan. What was
renamed, cloned, merged or moved is followed; what a fold could not follow is a `VerifyError` that names the node, the
weight and the reason, and the input stays as it was. Weights under a branch may not change: a fold starts from W0.

The insertion freezes all weights of its result, as peft does, but for those under `spec.train`: of
`adapted.parameters()` only the branches require a gradient, and `[p for p in adapted.parameters() if p.requires_grad]`
is what an optimizer takes. The Parameters of the model that was traced keep their flags; the frozen ones are new and
share their memory. A fold makes what was frozen trainable again.

A pass that makes a new graph module drops what we noted of the old one. Inside a Pipeline it is handed on; in torch's
PassManager, put such a pass in as `Pipeline([it])`. A Pipeline runs passes in the given order;
`Pipeline(passes, order="solved")` sorts them by what they require, provide and remove.

Each cell is run by `tests/compose/test_table.py`. *yes*: outputs equal those of the same pass on the plain model in
which `W + s B A` is written for W by hand (fp64: 1e-10 of their scale; quantization in fp32: 1e-5), and the pass has
left its trace in the graph. *before*: the pass, our insertion, our fold. *between*: our insertion, the pass, our fold.
*after*: `cascade.folded_graph()` or `release()`, then the pass. `python -m tests.compose.page` writes this page from
the rows that the test runs.

"""


def text() -> str:
    """The page."""
    head = ["| pass | before the insertion | between insertion and fold | after the fold |", "|---|---|---|---|"]
    rows = [f"| {row.name} (`{row.source}`) | {row.before} | {row.between} | {row.after} |" for row in ROWS]
    return ABOUT + "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
