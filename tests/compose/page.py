"""Write the table in docs/passes.md from the rows that the tests run: `python -m tests.compose.page`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from tests.compose.kinds import rows as kinds
from tests.compose.models import calls

Run = Callable[[Any, tuple[Tensor, ...]], Any]


@dataclass(frozen=True)
class Yes:
    """Outputs equal the outputs of the same pass on the plain model with `W + s B A` for W."""

    note: str = ""

    def __str__(self) -> str:
        return f"yes{'; ' if self.note else ''}{self.note}"


@dataclass(frozen=True)
class Refused:
    """A PassError with this in its message; nothing is changed. `note` says what to do."""

    message: str
    note: str = ""

    def __str__(self) -> str:
        return f"refused{'; ' if self.note else ''}{self.note}"


Cell = Yes | Refused
DIALECTS = {"modules": "`torch.fx.symbolic_trace`", "aten": "`torch.export`", "eager": "no graph: a model"}


@dataclass(frozen=True)
class Row:
    """A pass.

    Args:
        name: on the page.
        source: its full name.
        dialect: `modules` (torch.fx.symbolic_trace), `aten` (torch.export) or `eager`.
        run: applies the pass to a graph module and example inputs, and returns its result.
        did: whether the pass has changed a graph, so that no cell says yes for a pass that found nothing.
        before, between, after: the cells.
        inlined: the cell of the pass between `InlineBranches` and the fold. None if there is no graph.
        tolerance: of outputs, relative to their scale.
        dtype: of the model; fp64 if the pass allows it.
        loss: tolerance of inlined branches, if the pass quantizes them.
    """

    name: str
    source: str
    dialect: str
    run: Run
    did: Callable[[Any], bool]
    before: Cell
    between: Cell
    after: Cell
    inlined: Cell | None = Yes()
    tolerance: float = 1e-10
    dtype: torch.dtype = torch.float64
    loss: float = 0.0


def fuse(module: fx.GraphModule, args: Any) -> Any:
    with warnings.catch_warnings():  # torch.jit's, at its own import
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse

    return fuse(module)


def fold_constants(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.experimental.const_fold import split_const_subgraphs

    folded = split_const_subgraphs(module)
    folded.run_folding()
    return folded


def freeze(module: fx.GraphModule, args: Any) -> Any:
    from torch._inductor.constant_folding import constant_fold

    constant_fold(module)
    return module


def drop_dead(module: fx.GraphModule, args: Any) -> Any:
    changed = module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, changed)


def share_equal(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

    return CSEPass(banned_ops=get_CSE_banned_ops())(module).graph_module


def split(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.passes.split_module import split_module

    half = len(module.graph.nodes) // 2
    part = {node: int(index >= half) for index, node in enumerate(module.graph.nodes)}
    return split_module(module, module, part.__getitem__)


def shapes(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.passes.shape_prop import ShapeProp

    ShapeProp(module).propagate(*args)


def rewrite(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.subgraph_rewriter import replace_pattern

    def pattern(x: Tensor) -> Tensor:
        return F.gelu(x)

    def replacement(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))

    assert replace_pattern(module, pattern, replacement)


def decompose(module: fx.GraphModule, args: Any) -> Any:
    with warnings.catch_warnings():  # of torch's own use of pytree, in 2.13
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
        return torch.export.export(module, args).run_decompositions().module(check_guards=False)


def manage(module: fx.GraphModule, args: Any) -> Any:
    from torch.fx.passes.infra.pass_manager import PassManager

    return PassManager(passes=[lambda graph_module: drop_dead(graph_module, args)])(module)


def quantize_graph(module: fx.GraphModule, args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(torch.export.export(module, args).module(check_guards=False), quantizer)
        prepared(*args)  # calibrates
        return convert_pt2e(prepared)


def quantize_weights(module: nn.Module, args: Any) -> Any:
    import torchao.quantization as torchao

    torchao.quantize_(module, torchao.Int8WeightOnlyConfig(), filter_fn=lambda layer, name: type(layer) is nn.Linear)
    return module


class Compiled:
    """A compiled program: a function of the inputs, and the number of changes of the graph."""

    def __init__(self, call: Callable[..., Any], changes: int) -> None:
        self.call, self.changes = call, changes

    def __call__(self, *args: Tensor) -> Any:
        return self.call(*args)


def to_onnx(module: fx.GraphModule, args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnxscript.optimizer

        program = torch.onnx.export(module, args, dynamo=True, optimize=False, verbose=False)
        assert program is not None
        before = len(program.model.graph)
        onnxscript.optimizer.optimize(program.model)
    return Compiled(lambda *args: program(*args)[0], before - len(program.model.graph))


def compile_with_own_pass(module: fx.GraphModule, args: Any) -> Any:
    seen: list[int] = []

    def own(graph: fx.Graph) -> None:
        seen.append(len(graph.nodes))

    torch._dynamo.reset()
    compiled = torch.compile(module, options={"post_grad_custom_pre_pass": own, "fx_graph_cache": False})
    with torch.no_grad():
        compiled(*args)
    return Compiled(compiled, len(seen))


OTHER_USE = "with 0 branches instead of one"
CHANGED = Refused("nodes of inlined branches were changed", "computes the same; fold first")
NO_GRAPH = Refused("must return a GraphModule", "returns no graph; run it last")
# fmt: off
ROWS: tuple[Row, ...] = (
    Row("conv-bn fusion", "torch.fx.experimental.optimization.fuse", "modules", fuse,
        lambda module: not calls(module, "BatchNorm2d"), Yes("the fused weights are W0"),
        Yes("it fuses no site, because a branch is in between"), Yes()),
    Row("constant folding", "torch.fx.experimental.const_fold.split_const_subgraphs", "modules", fold_constants,
        lambda module: not calls(module, "exp"), Yes(), Yes("branches are not folded"), Yes()),
    Row("Inductor's constant folding", "torch._inductor.constant_folding.constant_fold", "aten", freeze,
        lambda module: not calls(module, "exp"), Yes(), Yes("branches are not folded"), Yes()),
    Row("dead code", "torch.fx.Graph.eliminate_dead_code", "modules", drop_dead,
        lambda module: not calls(module, "sin"), Yes(), Yes(), Yes()),
    Row("common subexpressions", "torch.fx.passes.dialect.common.cse_pass.CSEPass", "aten", share_equal,
        lambda module: calls(module, "tanh") == 1, Yes(), Yes("equal uses of a site become one, with one branch"),
        Yes()),
    Row("splitting", "torch.fx.passes.split_module.split_module", "modules", split,
        lambda module: hasattr(module, "submod_1"), Refused("is called as one node", "adapt first"),
        Refused("no node of it calls the branch any more", "fold first"), Yes(), inlined=CHANGED),
    Row("shapes", "torch.fx.passes.shape_prop.ShapeProp", "modules", shapes,
        lambda module: all("tensor_meta" in node.meta for node in module.graph.nodes if node.op == "call_module"),
        Yes(), Yes("branches included"), Yes()),
    Row("subgraph rewriting", "torch.fx.subgraph_rewriter.replace_pattern", "modules", rewrite,
        lambda module: calls(module, "erf") == 1 and not calls(module, "gelu"), Yes(),
        Yes("for patterns without a site"), Yes()),
    Row("decompositions", "torch.export.ExportedProgram.run_decompositions", "aten", decompose,
        lambda module: not calls(module, "linear"), Yes(),
        Refused(OTHER_USE, "branches are decomposed too, and compute the same; fold first"), Yes(),
        inlined=CHANGED),
    Row("torch.fx's PassManager", "torch.fx.passes.infra.pass_manager.PassManager", "modules", manage,
        lambda module: not calls(module, "sin"), Yes("either manager inside the other"), Yes("either way"),
        Yes("either way")),
    Row("PT2E quantization", "torchao.quantization.pt2e.quantize_pt2e: prepare_pt2e, calibrate, convert_pt2e", "aten",
        quantize_graph, lambda module: calls(module, "quantize_per_tensor") > 0,
        Refused("the spec leaves no site to adapt", "the quantized weights are integers, not parameters"),
        Refused("no node of it calls the branch any more", "fold first"), Yes(), tolerance=1e-5, dtype=torch.float32,
        inlined=Refused(CHANGED.message, "branches are quantized too; fold first"), loss=0.05),
    Row("ONNX", "torch.onnx.export, then onnxscript.optimizer.optimize", "aten", to_onnx,
        lambda result: result.changes > 0, NO_GRAPH, NO_GRAPH, Yes(), tolerance=1e-5, dtype=torch.float32,
        inlined=NO_GRAPH),
    Row("Inductor with a pass of yours", "torch._inductor.config.post_grad_custom_pre_pass", "aten",
        compile_with_own_pass, lambda result: result.changes == 1, NO_GRAPH, NO_GRAPH, Yes(),
        inlined=NO_GRAPH),
    Row("int8 weights", "torchao.quantization.quantize_ by Int8WeightOnlyConfig", "eager", quantize_weights,
        lambda module: any(type(e) is nn.Linear and type(e.weight) is not nn.Parameter for e in module.modules()),
        Yes("adapt the quantized model; `release(quantized=...)` chooses the result"),
        Refused("was changed after stage 1 started", "quantize first"), Yes(), tolerance=1e-5,
        dtype=torch.float32, inlined=None),
)
# fmt: on


PAGE = Path(__file__).parents[2] / "docs" / "passes.md"
START, END = "<!-- composing -->\n", "<!-- /composing -->\n"


def text() -> str:
    """Return the whole page: the text that it has, with a new table. After the fold every pass works."""
    head = "|pass|graph|before the insertion|between|between, plain nodes|\n|---|---|---|---|---|"
    rows = [
        f"|{row.name} (`{row.source}`)|{DIALECTS[row.dialect]}|{row.before}|{row.between}|"
        f"{row.inlined or 'there is no graph'}|"
        for row in ROWS
    ]
    if any(isinstance(row.after, Refused) for row in ROWS):
        raise ValueError("the page says that every pass works after the fold")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + "\n".join([*kinds(), "", head, *rows, END]) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
