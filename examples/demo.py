"""`python -m examples.demo [--text | CONFIG.toml]`: compare methods, then prove that folded weights are plain.

The comparison is `lorasc-fx compare examples/demo.toml`. It keeps the folded weights of LoRASC as safetensors; a new
process, which knows nothing of the cascade, loads them with strict=True into the original class and has to predict the
same class for every test example.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from lorasc_fx.cli.cells import Cell
from lorasc_fx.cli.compare import compare
from lorasc_fx.cli.compare_table import print_tables
from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.run_folder import RunFolder
from lorasc_fx.errors import LorascError

HERE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    files = [Path(argument) for argument in arguments if argument != "--text"]
    path = files[0] if files else HERE / ("demo_text.toml" if "--text" in arguments else "demo.toml")
    try:
        config = load_config(path)
        folder = RunFolder(Path(config.output))
        if folder.config.exists():
            print(f"{folder.path} is there: finished runs are shown again (delete the folder to make them anew).")
        results = compare(config)
    except LorascError as fault:
        print(f"demo: {fault}", file=sys.stderr)
        return 2
    if results is None:
        return 130
    print_tables(config, results)
    kept = Cell("lorasc", config.compare.seeds[0], config.compare.rates("lorasc")[0])
    weights = folder.cells / f"{kept.name}.safetensors"
    print(f"\nLoRASC's folded weights: {weights}. A new process loads them into the original class:", flush=True)
    proven = [str(each.resolve()) for each in (path, weights, weights.with_suffix(".json"))]
    proof = [sys.executable, "-m", "examples.folded_proof", *proven]
    code = subprocess.run(proof, check=False, cwd=HERE.parent).returncode
    print(f"{time.monotonic() - began:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
