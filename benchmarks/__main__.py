"""Measure, print the table, and write it as JSON: `python -m benchmarks [--rounds N] [--out FILE] [names]`."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from .measure import measure, pin, rivals
from .models import WORKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*WORKS, []], help="models; all of them by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    options = parser.parse_args()
    pin(options.threads)
    results = {}
    print("CPU seconds of a step (forward and backward), over the frozen model's; minimum (median)\n")
    print("| model | ours / frozen | peft / frozen | full / frozen | ours / peft |\n|---|---|---|---|---|")
    for name in options.names or WORKS:
        times = measure(rivals(WORKS[name]), options.rounds)

        def ratio(one: str, other: str, times: dict = times) -> str:
            a, b = times[one], times[other]
            return f"{a.minimum / b.minimum:.2f} ({a.median / b.median:.2f})"

        cells = [ratio(one, "frozen") for one in ("ours", "peft", "full")] + [ratio("ours", "peft")]
        print(f"| {WORKS[name].name} | {' | '.join(cells)} |", flush=True)
        results[name] = {rival: asdict(each) for rival, each in times.items()}
    about = {"torch": torch.__version__, "cpu": platform.processor()}
    about |= {"threads": options.threads, "rounds": options.rounds}
    options.out.write_text(json.dumps({"about": about, "cpu_seconds": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
