"""Graphs: the table of forms, matching, the one surgeon, the verifier, canonical text."""

from lorasc_fx.graph.captured import call_instead, give_arguments, rename_inputs, retarget
from lorasc_fx.graph.chosen import chosen_by
from lorasc_fx.graph.copies import copy_graph, graph_module_like, own_copy
from lorasc_fx.graph.edit import GraphEditor, drop_nodes, regions_as_modules, weights_from_inputs
from lorasc_fx.graph.form import Form, FunctionForm, ModuleForm, Reading, WeightForm
from lorasc_fx.graph.forms import (
    ADDED_FIRST,
    CONTRACTIONS,
    FORMS,
    LIKE_ANOTHER,
    ON_CHOSEN,
    ON_WEIGHT,
    SCALES,
    branch_class,
    form_named,
    form_of,
    weighs,
)
from lorasc_fx.graph.marks import branch_nodes, calls_branches, made_by, use_of
from lorasc_fx.graph.matching import Matching, Placer, candidates, match, survey
from lorasc_fx.graph.memory import Memory, shared_memory
from lorasc_fx.graph.record import Record, Use, at_stage, record_of, set_record, strip
from lorasc_fx.graph.register import forms_missing, register_form
from lorasc_fx.graph.shared import shared_input
from lorasc_fx.graph.sizes import entries
from lorasc_fx.graph.spelling import spelling_of
from lorasc_fx.graph.targets import check_patterns, matches, rules_of, trained_by
from lorasc_fx.graph.text import text
from lorasc_fx.graph.verify import faults, verify
from lorasc_fx.graph.weights import BRANCHES, named_weights, owner_of
from lorasc_fx.graph.writes import written_between

__all__ = [
    "ADDED_FIRST",
    "BRANCHES",
    "CONTRACTIONS",
    "FORMS",
    "LIKE_ANOTHER",
    "ON_CHOSEN",
    "ON_WEIGHT",
    "SCALES",
    "Form",
    "FunctionForm",
    "GraphEditor",
    "Matching",
    "Memory",
    "ModuleForm",
    "Placer",
    "Reading",
    "Record",
    "Use",
    "WeightForm",
    "at_stage",
    "branch_class",
    "branch_nodes",
    "call_instead",
    "calls_branches",
    "candidates",
    "check_patterns",
    "chosen_by",
    "copy_graph",
    "drop_nodes",
    "entries",
    "faults",
    "form_named",
    "form_of",
    "forms_missing",
    "give_arguments",
    "graph_module_like",
    "made_by",
    "match",
    "matches",
    "named_weights",
    "own_copy",
    "owner_of",
    "record_of",
    "regions_as_modules",
    "register_form",
    "rename_inputs",
    "retarget",
    "rules_of",
    "set_record",
    "shared_input",
    "shared_memory",
    "spelling_of",
    "strip",
    "survey",
    "text",
    "trained_by",
    "use_of",
    "verify",
    "weighs",
    "weights_from_inputs",
    "written_between",
]
