"""`lorasc-fx compare`: trains several methods with the same steps, seeds and examples, and compares their accuracies.

The accuracy of a language model is the share of completions that greedy decoding gives exactly. With a file of general
text, the rise of its loss shows what a method forgets.

Each run (a method, a seed, a learning rate) writes one small file, so that a stopped comparison can continue. Paired
differences have two 95 % intervals. The interval over seeds (Student's t) answers whether other training runs would
show the difference on these test examples. The interval over examples (bootstrap) answers whether other test examples
would show it with these runs. A difference is reliable only if both intervals exclude 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from tyro.conf import Positional

from lorasc_fx.cli.config import METHODS, Config, DataConfig, load_config, write_config
from lorasc_fx.cli.data import read_dialogues
from lorasc_fx.cli.task import Task
from lorasc_fx.cli.train import CONFIG, Overrides, check_output, check_same
from lorasc_fx.cli.trainer import arguments_of, trainer_of
from lorasc_fx.errors import NonFiniteBranch, SpecError, StateError
from lorasc_fx.spec import Noise
from lorasc_fx.util.environment import module_of


class Trial(NamedTuple):
    """One training of the comparison: a method with a seed and a learning rate."""

    method: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Name of its file in `results/`, without the suffix."""
        return f"{self.method}-seed{self.seed}-lr{self.lr:g}"


class Result(TypedDict):
    """The content of a run's file.

    `loss` and `accuracy` are measured on the validation examples. `correct` has 1 or 0 for each test example, and is
    empty if the run diverged. `forgetting` is the rise of the loss on general text, nan if it is not measured.
    """

    lr: float
    parameters: int
    seconds: float
    loss: float
    accuracy: float
    correct: list[int]
    forgetting: float


Results = dict[Trial, Result]


def compare(config: Positional[Path], overrides: Overrides = (), /) -> int:
    """Train several methods and compare their accuracies. The same command continues a stopped comparison.

    Args:
        config: TOML file (docs/llm.md).
        overrides: keys of the file with other values, such as compare.seeds=[0,1].
    """
    settings = load_config(config, overrides)
    folder = Path(settings.output)
    check_output(folder, folder=True)
    if (folder / CONFIG).is_file():
        check_same(folder, settings)
    task = Task(settings)
    if settings.compare.text and task.kind != "language":
        raise SpecError("compare.text measures what a language model forgets, but the model is a classifier; remove it")
    if task.kind == "language" and (settings.train.get("packing") or settings.train.get("padding_free")):
        raise SpecError("compare counts exact completions of separate examples; remove train.packing and padding_free")
    if settings.compare.text:
        task.data["text"] = read_dialogues(DataConfig(path=settings.compare.text))
    write_config(settings, folder / CONFIG)
    (folder / "results").mkdir(exist_ok=True)
    results: Results = {}
    for trial in planned(settings):
        file = folder / "results" / f"{trial.name}.json"
        if not file.is_file():
            result = _make(trial, settings, task)
            if result is None:
                print(f"Stopped after {len(results)} runs. Run the same command again to continue.")
                return 130
            file.write_text(json.dumps(result) + "\n", encoding="utf-8")
        results[trial] = json.loads(file.read_text(encoding="utf-8"))
    text = "\n\n".join(tables(settings, results))
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def planned(config: Config) -> list[Trial]:
    """Return the runs of a comparison, in the order in which they are trained."""
    return [
        Trial(method, seed, lr)
        for seed in config.compare.seeds
        for method in sorted(config.compare.methods, key=METHODS.index)
        for lr in config.compare.rates.get(method, config.compare.lrs)
    ]


def configured(trial: Trial, config: Config) -> Config:
    """Return the configuration of a trial."""
    spec = replace(config.spec, seed=config.spec.seed + trial.seed)
    if trial.method != "lorasc":
        spec = replace(spec, pace=1.0, restart="slow", noise=Noise(), average=False)
    stages = replace(config.stages, count=1) if trial.method == "lora" else config.stages
    train = config.train | {"seed": config.train.get("seed", 0) + trial.seed, "learning_rate": trial.lr}
    return replace(config, spec=spec, stages=stages, train=train)


def _make(trial: Trial, config: Config, task: Task) -> Result | None:
    """Train and evaluate one trial. Return None if Ctrl-C has stopped it."""
    task.config = configured(trial, config)
    arguments = arguments_of(task.config, task, eval_strategy="no", save_strategy="no")
    evaluated, text = {name: data for name, data in task.data.items() if name != "train"}, config.compare.text
    trainer, cascade, callback = trainer_of(task, arguments, evaluated)
    before = trainer.evaluate("text")["eval_loss"] if text else math.nan
    trained = sum(value.numel() for value in cascade.parameters() if value.requires_grad)
    result: Result = {
        "lr": trial.lr, "parameters": trained, "seconds": 0.0, "loss": math.inf, "accuracy": 0.0, "correct": [],
        "forgetting": math.nan,
    }  # fmt: skip
    try:
        with callback.catching():
            result["seconds"] = trainer.train().metrics["train_runtime"]
    except (StateError, NonFiniteBranch) as fault:
        print(f"{trial.name}: diverged ({fault})")
        return result
    if callback.stopped:
        return None
    metrics = trainer.evaluate("validation")
    if task.kind == "language":
        exact = {name: _exact(cascade, trainer.get_eval_dataloader(name)) for name in ("validation", "test")}
        result |= {"accuracy": statistics.fmean(exact["validation"]), "correct": exact["test"]}
    else:
        prediction = trainer.predict(task.data["test"])
        correct = (prediction.predictions.argmax(-1) == prediction.label_ids).astype(int).tolist()
        result |= {"accuracy": metrics["eval_accuracy"], "correct": correct}
    result["loss"] = metrics["eval_loss"]
    if text:
        result["forgetting"] = trainer.evaluate("text")["eval_loss"] - before
    print(f"{trial.name}: validation {result['accuracy']:.3f}, {result['seconds']:.0f} s", flush=True)
    return result


def _exact(cascade: Any, batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """Return for each example 1 if every token of its completion is the most likely one, else 0."""
    right: list[int] = []
    with torch.no_grad(), cascade.eval().weights("slow"):
        for batch in batches:
            labels = batch.pop("labels")[:, 1:]
            predicted = cascade(**batch, use_cache=False).logits[:, :-1].argmax(-1)
            right += ((predicted == labels) | (labels == -100)).all(-1).int().tolist()
    return right


def best_rates(results: Results) -> dict[str, list[Result]]:
    """Return {method: its runs, one per seed}, at the learning rate with the lowest mean validation loss.

    Of equally good rates, the smallest one is selected. The loss of a diverged run is infinite.
    """
    runs: dict[str, dict[float, list[Result]]] = {}
    for trial in sorted(results):
        runs.setdefault(trial.method, {}).setdefault(trial.lr, []).append(results[trial])
    return {name: min(runs[name].values(), key=lambda group: _mean(group, "loss")) for name in METHODS if name in runs}


def tables(config: Config, results: Results) -> Iterator[str]:
    """Yield the table of accuracies, and the table of differences to the first method, in Markdown."""
    best, reference = best_rates(results), config.compare.methods[0]
    head = ["method", "lr", "trained", "train s", "validation", "test", *["forgetting"] * bool(config.compare.text)]
    rows = [
        [
            *(name, f"{runs[0]['lr']:g}", f"{runs[0]['parameters']:,}", f"{_mean(runs, 'seconds'):.1f}"),
            _percent([run["accuracy"] for run in runs]),
            _percent([statistics.fmean(run["correct"]) for run in runs if run["correct"]]),
            f"{_mean(runs, 'forgetting'):+.3f}".replace("+nan", "diverged"),
        ][: len(head)]
        for name, runs in best.items()
    ]
    yield _markdown(head, rows)
    rows = [
        [name, *_difference(runs, best[reference])]
        for name, runs in best.items()
        if name != reference and all(run["correct"] for run in (*runs, *best[reference]))
    ]
    if rows:
        head = [f"points over {reference}", "95 % over seeds (t)", "95 % over examples (bootstrap)"]
        yield _markdown(["method", *head], rows)


def _mean(runs: Sequence[Any], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _difference(runs: Sequence[Result], reference: Sequence[Result]) -> tuple[str, str, str]:
    """Return the mean difference in points, and its intervals over seeds and over examples."""
    stats = module_of("cli", "scipy.stats")
    ours, theirs = (100 * torch.tensor([run["correct"] for run in group]).double() for group in (runs, reference))
    over_seeds = "one seed"
    if len(runs) > 1:
        over_seeds = _interval(stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval())
    drawn = stats.bootstrap(
        ((ours - theirs).mean(0).numpy(),), lambda sample, axis: sample.mean(axis), n_resamples=2000, batch=100,
        method="percentile", rng=0,
    )  # fmt: skip
    return f"{(ours - theirs).mean():+.1f}", over_seeds, _interval(drawn.confidence_interval)


def _interval(interval: Any) -> str:
    return f"{interval.low:+.1f} to {interval.high:+.1f}"


def _percent(values: Sequence[float]) -> str:
    """Return the mean in percent, with the standard deviation if there are several values."""
    if not values:
        return "diverged"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
