"""Graphs: the table of forms, matching, the one surgeon, the verifier, canonical text."""

from lorasc_fx.graph.copies import copy_graph, graph_module_like, own_copy
from lorasc_fx.graph.edit import (
    GraphEditor,
    branch_nodes,
    call_instead,
    drop_nodes,
    made_by,
    rename_inputs,
    retarget,
    use_of,
    weights_from_inputs,
)
from lorasc_fx.graph.forms import (
    ADDED_FIRST,
    BRANCH_OF,
    CONTRACTIONS,
    FORMS,
    LIKE_ANOTHER,
    ON_WEIGHT,
    SCALES,
    Form,
    FunctionForm,
    ModuleForm,
    Reading,
    form_named,
    form_of,
    weighs,
)
from lorasc_fx.graph.matching import Matching, match, survey
from lorasc_fx.graph.record import Record, Use, record_of, set_record, strip
from lorasc_fx.graph.targets import check_patterns, matches
from lorasc_fx.graph.text import text
from lorasc_fx.graph.verify import faults, verify
from lorasc_fx.graph.weights import BRANCHES, named_weights, owner_of

__all__ = [
    "ADDED_FIRST",
    "BRANCHES",
    "BRANCH_OF",
    "CONTRACTIONS",
    "FORMS",
    "LIKE_ANOTHER",
    "ON_WEIGHT",
    "SCALES",
    "Form",
    "FunctionForm",
    "GraphEditor",
    "Matching",
    "ModuleForm",
    "Reading",
    "Record",
    "Use",
    "branch_nodes",
    "call_instead",
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
    "survey",
    "text",
    "use_of",
    "verify",
    "weighs",
    "weights_from_inputs",
]
