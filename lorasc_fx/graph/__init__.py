"""Graphs: the table of forms, matching, the one surgeon, the verifier, canonical text."""

from lorasc_fx.graph.edit import (
    GraphEditor,
    branch_nodes,
    copy_graph,
    drop_nodes,
    graph_module_like,
    made_by,
    own_copy,
    rename_inputs,
    retarget,
    use_of,
)
from lorasc_fx.graph.forms import BRANCH_OF, FORMS, Form, FunctionForm, ModuleForm, Reading, form_named, form_of
from lorasc_fx.graph.matching import Matching, match
from lorasc_fx.graph.record import Record, Use, record_of, set_record, strip
from lorasc_fx.graph.targets import check_patterns, matches
from lorasc_fx.graph.text import text
from lorasc_fx.graph.verify import faults, verify
from lorasc_fx.graph.weights import BRANCHES, named_weights, owner_of

__all__ = [
    "BRANCHES",
    "BRANCH_OF",
    "FORMS",
    "Form",
    "FunctionForm",
    "GraphEditor",
    "Matching",
    "ModuleForm",
    "Reading",
    "Record",
    "Use",
    "branch_nodes",
    "check_patterns",
    "copy_graph",
    "drop_nodes",
    "faults",
    "form_named",
    "form_of",
    "graph_module_like",
    "made_by",
    "match",
    "matches",
    "named_weights",
    "own_copy",
    "owner_of",
    "record_of",
    "rename_inputs",
    "retarget",
    "set_record",
    "strip",
    "text",
    "use_of",
    "verify",
]
