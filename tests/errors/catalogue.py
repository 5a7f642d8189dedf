"""Every public error with the calls that raise it, the remedy and examples. docs/errors.md is generated from this list.

An example is a function. The page shows its body and the message that it raised. `model` is `mlp()`, and `x` its
input. Examples run in an empty folder.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline
from lorasc_fx.util.extras import module_of

Example = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Entry:
    """One class of errors.

    Args:
        raised: the class. by: the calls that raise it.
        remedy: advice in addition to the message.
        examples: each raises it.
    """

    raised: type[lx.LorascError]
    by: tuple[str, ...]
    remedy: str
    examples: tuple[Example, ...]

    @property
    def bases(self) -> list[str]:
        """The base classes that catch it, too."""
        return [each.__name__ for each in self.raised.__mro__[1:] if each not in (BaseException, Exception, object)]


def body(example: Example) -> str:
    """The lines of an example."""
    lines = inspect.getsource(example).splitlines()
    return textwrap.dedent("\n".join(lines[1:]))


def a_rank(model: nn.Module, x: Tensor) -> None:
    lx.CascadeSpec(rank=0)


def a_field(model: nn.Module, x: Tensor) -> None:
    lx.CascadeSpec.from_dict({"noise": {"strenght": 0.1}})


def a_target(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model, args=(x,), spec=lx.CascadeSpec(targets=("2.wieght",)))


def all_excluded(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model, args=(x,), spec=lx.CascadeSpec(exclude=("*.weight",)))


def no_model(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model.state_dict(), args=(x,))


def before_its_time(model: nn.Module, x: Tensor) -> None:
    InsertBranches()(fx.symbolic_trace(model))


def a_wrong_order(model: nn.Module, x: Tensor) -> None:
    Pipeline([InsertBranches(), MatchSites(lx.CascadeSpec())])(fx.symbolic_trace(model))


def an_edited_graph(model: nn.Module, x: Tensor) -> None:
    adapted = Pipeline([MatchSites(lx.CascadeSpec()), InsertBranches()])(fx.symbolic_trace(model)).graph_module
    branch = next(node for node in adapted.graph.nodes if node.name.endswith("_lora"))
    branch.replace_all_uses_with(branch.args[0], delete_user_cb=lambda user: user is not branch)
    FoldBranches()(adapted)


def released(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,), frontend="symbolic")
    cascade.release()
    cascade(x)


def unused_gradients(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,), frontend="symbolic")
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    cascade(x).square().mean().backward()
    cascade.transition(optimizer)


def twice(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,), frontend="symbolic")
    lx.adapt(cascade.model, args=(x,), frontend="symbolic")


def diverged(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,), frontend="symbolic")
    torch.nn.init.constant_(cascade.branches["2/weight"].lora_B, float("nan"))
    cascade.transition(torch.optim.AdamW(cascade.param_groups(lr=1e-3)))


def another_base(model: nn.Module, x: Tensor) -> None:
    lx.save(lx.adapt(model, args=(x,), frontend="symbolic"), "run")
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Linear(6, 2))
    lx.load("run", other, args=(x,))


def no_adapter(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(
        model, args=(x,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1, keep=True)), frontend="symbolic"
    )
    cascade.transition(None)
    lx.export.peft(cascade, "adapter")


def not_installed(model: nn.Module, x: Tensor) -> None:
    module_of("vision", "absent_package")


ENTRIES = (
    Entry(
        lx.LorascError,
        ("all functions of the package",),
        "`except lx.LorascError as error:` catches every error of this page. `error.code` is its code.",
        (),
    ),
    Entry(
        lx.SpecError,
        ("CascadeSpec", "Noise", "Rule", "adapt", "stages", "save", "lorasc-fx"),
        "Use a value that the message lists. For a configuration file, the message has the line.",
        (a_rank, a_field),
    ),
    Entry(
        lx.UnknownTarget,
        ("adapt", "MatchSites", "lorasc-fx"),
        "`lorasc-fx sites MODEL` lists the weights of a model, by the names that a spec takes.",
        (a_target,),
    ),
    Entry(
        lx.passes.NoSites,
        ("adapt", "InsertBranches"),
        "Widen `targets`, or remove patterns from `exclude` and `train`. The message has the reason for each weight.",
        (all_excluded,),
    ),
    Entry(
        lx.CaptureError,
        ("adapt", "load", "a call of the cascade", "folded_graph"),
        "Check that the model runs on the example inputs. If every front end fails, the message has the reason of each "
        "one: change the model there, or adapt a part of it.",
        (no_model,),
    ),
    Entry(
        lx.PassError,
        ("passes",),
        "Run the passes that the message names first.",
        (before_its_time,),
    ),
    Entry(
        lx.passes.PassOrderError,
        ("Pipeline",),
        "Put each pass after the passes that provide its requirements. The message names them.",
        (a_wrong_order,),
    ),
    Entry(
        lx.passes.VerifyError,
        ("passes", "load"),
        "Other code edited the graph, or the plan belongs to another model. Fold the branches before you edit a graph, "
        "then adapt it again.",
        (an_edited_graph,),
    ),
    Entry(
        lx.StateError,
        ("every call of a cascade", "adapt", "save"),
        "The call is not possible in the current state. First do what the message says.",
        (released, unused_gradients, twice),
    ),
    Entry(
        lx.NonFiniteBranch,
        ("transition", "stages", "release", "folded_state_dict", "folded_graph", "passes"),
        "Nothing was folded: the slow weights and the last checkpoint are still finite.",
        (diverged,),
    ),
    Entry(
        lx.CheckpointError,
        ("load", "save", "resume", "adapt(base=...)", "Plan.from_json"),
        "Delete a damaged version: `load` reads the newest one that exists, and `save(keep=N)` keeps several.",
        (another_base,),
    ),
    Entry(
        lx.export.ExportError,
        ("export.peft",),
        "Exclude the weights that the message names from the run, or export all folded weights with "
        "`export.safetensors`. Nothing was written.",
        (no_adapter,),
    ),
    Entry(
        lx.errors.MissingExtra,
        ("lorasc-fx",),
        "Run the pip command in the message.",
        (not_installed,),
    ),
)
