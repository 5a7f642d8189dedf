"""What comes before the first step: the import, `adapt` and `load`, and what a call of a small model costs.

Models with graph breaks stand beside the first call that dynamo makes of them with its backend `eager`.

`adapt` runs the model and its graph, three forwards and where their autograd graphs differ two backwards, to see that
they do the same, and exports it; so it stands beside `torch.export.export` alone, for these sizes only, a forward and a
backward; `again` is that of another model of the same state, which uses the graph of the first, and `with noise` is
that again with noise, so that W0 is copied and noise drawn. `load` has no inputs: the first call makes the graph.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorasc_fx as lx
from benchmarks.coverage.entry import built
from benchmarks.coverage.zoo import ZOO
from lorasc_fx.capture import forget
from tests.kit.compare import seed

from .costs import clocked
from .measure import Turn, alternate, keep_freed, pin, ratio
from .models import STARTED, WORKS, Work
from .rivals import NOISE, adapted, wrapped
from .transitions import Seconds, train

__all__ = [
    "BROKEN",
    "CALLS",
    "LAYERS",
    "STARTS",
    "WIDTH",
    "apart",
    "call",
    "decoder",
    "graph_breaks",
    "import_seconds",
    "narrow",
    "start",
]

STARTS = ("forward", "backward", "export", "adapt", "again", "with noise", "load", "first call")
CALLS = ("forward", "forward and backward", "token of generate", "token inside weights('slow')")
BATCH = 2
"""Examples of the batch that a model starts with."""
WIDTH, LAYERS, TOKENS = 64, 12, 16
"""Of the model whose calls are measured: so narrow that Python is most of the time."""
REPEATS = 20
"""Calls in a round, and tokens that a call of `generate` makes."""
BROKEN = ("yoso", "hf_whisper")
"""Entries of `benchmarks.coverage.zoo` that have graph breaks."""

_IMPORT = """
import time
begun = time.process_time()
import torch
between = time.process_time()
import lorasc_fx
print(between - begun, time.process_time() - between)
"""


def import_seconds(repeats: int) -> dict[str, float]:
    """Return the least CPU seconds of `import torch`, and of `import lorasc_fx` after it, in processes of their own."""
    found = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        found.append([float(number) for number in done.stdout.split()])
    return {name: min(column) for name, column in zip(("torch", "lorasc_fx"), zip(*found, strict=True), strict=True)}


def start(work: Work, repeats: int) -> dict[str, Any]:
    """Return the least CPU seconds of each of STARTS over some repeats, as plain data."""
    found: dict[str, list[Seconds]] = {name: [] for name in STARTS}
    model = work.build()
    batch = {name: value[:BATCH] for name, value in work.batch().items()}
    work.loss(model(**batch)).backward()
    for _ in range(repeats):
        forget()
        loss = clocked(found["forward"], lambda: work.loss(model(**batch)))
        clocked(found["backward"], loss.backward)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            clocked(found["export"], lambda: torch.export.export(model, (), batch, strict=False))
        cascade = clocked(found["adapt"], partial(adapted, work, copy.deepcopy(model), batch))
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
        train(cascade, optimizer)
        cascade.transition(optimizer)
        with tempfile.TemporaryDirectory() as folder:
            lx.save(cascade, Path(folder))
            del cascade, optimizer
            gc.collect()  # what has no room in memory counts in the next
            clocked(found["again"], partial(adapted, work, copy.deepcopy(model), batch))
            gc.collect()
            noisy = partial(adapted, work, copy.deepcopy(model), batch, noise=lx.Noise(NOISE))
            clocked(found["with noise"], noisy)
            del noisy
            gc.collect()
            loaded = clocked(found["load"], partial(lx.load, folder, copy.deepcopy(model)))
        forget()
        clocked(found["first call"], partial(loaded, **batch))
        del loaded
        gc.collect()
    return {"title": work.title, **{name: min(each.cpu for each in found[name]) for name in STARTS}}


def apart(name: str, repeats: int) -> dict[str, Any]:
    """Return `start` of a model in a process of its own, on one thread: other threads wait for Python most of the time,
    which would count, and what a process has captured before makes it slower.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.start", name, str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def graph_breaks(name: str, repeats: int) -> dict[str, float]:
    """Return CPU seconds of `adapt` of a model with graph breaks, of dynamo's own first call of the frozen model, and
    of that where the weights that get branches are trained, as a branch needs their gradient.

    Layers that a model skips at random are not skipped: which these are would differ between the calls.

    Args:
        name: of an entry of the zoo.
        repeats: fresh models.
    """
    entry = ZOO[name]
    found: dict[str, list[Seconds]] = {"adapt": [], "dynamo": [], "dynamo, trained": []}

    def model() -> nn.Module:
        made = built(entry)
        for module in made.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0
        torch._dynamo.reset()
        forget()
        return made

    for _ in range(repeats + 1):  # the first has imports in it, and what is done once in a process
        seed(0)
        args, kwargs = entry.inputs(True)
        options = {"kwargs": kwargs, "spec": lx.CascadeSpec(rank=2), "frontend": "graph-breaks"}
        cascade = clocked(found["adapt"], partial(lx.adapt, model(), args, **options))
        for key, trained in (("dynamo", ()), ("dynamo, trained", [site.weight for site in cascade.sites])):
            plain = model().requires_grad_(False)
            for weight in trained:
                plain.get_parameter(weight).requires_grad_(True)
            clocked(found[key], partial(torch.compile(plain, backend="eager"), *args, **kwargs))
    return {key: min(each.cpu for each in times[1:]) for key, times in found.items()}


def narrow() -> nn.Module:
    """Return a BERT of 12 layers and width 64, without dropout."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        vocab_size=100,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config)


def decoder() -> nn.Module:
    """Return a Llama of 8 layers and width 64, in eval mode."""
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=8, vocab_size=100)).eval()


def call(rounds: int) -> dict[str, Any]:
    """Return CPU seconds of a call, or of a token, of a narrow model by rival, and the ratios of ours to both, as plain
    data.
    """
    x = torch.randint(0, 100, (2, TOKENS))
    leaves = ["query", "key", "value", "dense"]
    found = {}
    rivals = _narrow_rivals(narrow(), x, leaves)
    for name, backward in zip(CALLS[:2], (False, True), strict=True):
        found[name] = _compared(rivals, rounds, lambda rival, backward=backward: _calls(rival, x, backward))
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rivals = _narrow_rivals(decoder(), x, leaves)
    found[CALLS[2]] = _compared(rivals, rounds, lambda rival: _tokens(rival, x))
    cascade = rivals["ours"]
    assert isinstance(cascade, lx.Cascade)
    with cascade.weights("slow"):
        found[CALLS[3]] = _compared(rivals, rounds, lambda rival: _tokens(rival, x))
    return found


def _narrow_rivals(model: nn.Module, x: torch.Tensor, leaves: list[str]) -> dict[str, nn.Module]:
    targets = tuple(f"*.{leaf}" for leaf in leaves)
    work = Work("", lambda: model, dict, targets, {"target_modules": leaves})
    peft, ours = wrapped(work, copy.deepcopy(model)), adapted(work, copy.deepcopy(model), {"input_ids": x})
    return {"eager": model, "peft": peft.train(model.training), "ours": ours.train(model.training)}


def _calls(rival: nn.Module, x: torch.Tensor, backward: bool) -> None:
    for _ in range(REPEATS):
        output = rival(input_ids=x)
        if backward:
            output[0].sum().backward()


@torch.no_grad()
def _tokens(rival: nn.Module, x: torch.Tensor) -> None:
    generate: Any = rival.generate
    generate(input_ids=x, max_new_tokens=REPEATS, min_new_tokens=REPEATS, do_sample=False, pad_token_id=0)


def _compared(rivals: dict[str, nn.Module], rounds: int, run: Callable[[nn.Module], None]) -> dict[str, Any]:
    times = alternate({key: Turn(_nothing, partial(run, each)) for key, each in rivals.items()}, rounds)
    return {
        "seconds": {key: min(time.busy) / REPEATS for key, time in times.items()},
        "ratios": {f"ours/{other}": ratio(times["ours"], times[other]) for other in ("eager", "peft")},
    }


def _nothing() -> None:
    """Prepare nothing: gradients add up in place."""


if __name__ == "__main__":
    pin(1)
    keep_freed()
    start(WORKS["tiny"], 1)  # imports, and what is done once in a process
    print(json.dumps(start((WORKS | STARTED)[sys.argv[1]], int(sys.argv[2]))))
