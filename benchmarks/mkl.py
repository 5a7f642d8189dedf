"""Steps as on a processor whose AVX-512 MKL uses, such as Intel's: `python -m benchmarks.mkl` prints a table.

MKL asks one of its functions whether the processor is Intel's. Here a preloaded library answers yes, so that MKL uses
its AVX-512 kernels on processors of AMD too. lorasc-fx then exchanges no products, as on Intel's. Needs a C compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from lorasc_fx.branch import products

from .measure import Turn, alternate, keep_freed, pin, ratio
from .models import WORKS
from .rivals import make_all

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
PAIRS = (("ours", "frozen"), ("peft", "frozen"), ("ours", "peft"))


def row(name: str, rounds: int, threads: int) -> None:
    """Print the ratios of the minima (median of the ratios within a round) of CPU seconds of a step of a model."""
    pin(threads)
    keep_freed()
    rivals = {key: rival for key, rival in make_all(WORKS[name]).items() if key in ("frozen", "peft", "ours")}
    times = alternate({key: Turn(rival.prepare, rival.step) for key, rival in rivals.items()}, rounds)
    ratios = [ratio(times[one], times[other]) for one, other in PAIRS]
    cells = [f"{each['minimum']:.2f} ({each['paired']:.2f})" for each in ratios]
    print("|", " | ".join((WORKS[name].title, *cells)), "|", flush=True)


def main() -> None:
    """Compile and preload the library, and print the table. Each model has a process of its own."""
    if names := sys.argv[1:]:
        with mock.patch.object(products, "onednn_is_faster", return_value=False):
            row(names[0], rounds=5, threads=2)
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(compiler, input=SOURCE, text=True, check=True)
        preload = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
        environment = {**os.environ, "LD_PRELOAD": preload, "HF_HUB_OFFLINE": "1"}
        print("| model | ours / frozen | peft / frozen | ours / peft |\n|---|---|---|---|", flush=True)
        for name in WORKS:
            if name != "tiny":
                subprocess.run([sys.executable, "-m", "benchmarks.mkl", name], env=environment, check=True)


if __name__ == "__main__":
    main()
