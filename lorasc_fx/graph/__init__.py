"""Read, edit and verify torch.fx graphs.

`forms` is the table of ops whose weight can be adapted, `matching` finds their uses, `editor` changes graphs and
`verifier` checks them. Import other names from the file that defines them.
"""

from lorasc_fx.graph.branch_calls import branch_nodes, call_template
from lorasc_fx.graph.copies import copy_graph, graph_module_like
from lorasc_fx.graph.editor import GraphEditor
from lorasc_fx.graph.forms import FORMS, FunctionForm, ModuleForm, WeightForm, register_form
from lorasc_fx.graph.patterns import matches, trained_by
from lorasc_fx.graph.printer import text
from lorasc_fx.graph.record import Record, record_of, set_record
from lorasc_fx.graph.verifier import faults, verify
from lorasc_fx.graph.weights import named_weights, shared_memory

__all__ = [
    "FORMS",
    "FunctionForm",
    "GraphEditor",
    "ModuleForm",
    "Record",
    "WeightForm",
    "branch_nodes",
    "call_template",
    "copy_graph",
    "faults",
    "graph_module_like",
    "matches",
    "named_weights",
    "record_of",
    "register_form",
    "set_record",
    "shared_memory",
    "text",
    "trained_by",
    "verify",
]
