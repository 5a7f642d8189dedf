"""The linter refuses each way to run what a file holds: shown on a line that does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUFF = Path(sys.executable).with_name("ruff")
LINES = {
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "import cloudpickle": "TID251",
    "import dill": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "import joblib": "TID251",
    "import yaml": "TID251",
    "import runpy": "TID251",
    "import torch; torch.load('x')": "TID251",
    "from torch import load": "TID251",
    "import torch; torch.serialization.load('x')": "TID251",
    "import torch; torch.jit.load('x')": "TID251",
    "import torch; torch.hub.load('x', 'y')": "TID251",
    "import torch; torch.package.PackageImporter('x')": "TID251",
    "import numpy; numpy.load('x')": "TID251",
    "import numpy as np; np.load('x', allow_pickle=True)": "TID251",
    "import importlib; importlib.import_module('x')": "TID251",
    "from importlib import import_module": "TID251",
    "import builtins; builtins.__import__('x')": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
}


def found(path: Path, code: str) -> dict[int, set[str]]:
    """Return the rules that the linter names, by line."""
    path.write_text(f"{code}\n")
    command = [RUFF, "check", "--no-cache", "--config", ROOT / "pyproject.toml", "--output-format", "json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    rules: dict[int, set[str]] = {}
    for each in json.loads(done.stdout):
        rules.setdefault(each["location"]["row"], set()).add(each["code"])
    return rules


def test_each_is_refused(tmp_path: Path) -> None:
    rules = found(tmp_path / "each.py", "\n".join(LINES))
    for number, (line, rule) in enumerate(LINES.items(), start=1):
        assert rule in rules[number], line


def test_what_is_meant_is_let_through(tmp_path: Path) -> None:
    code = '"""A file."""\n\nimport json\n\nfrom safetensors.torch import load\n\nprint(json.loads("1"), load(b""))'
    assert not found(tmp_path / "each.py", code)


def test_each_exception_tells_why() -> None:
    """A line that the rules above let through on request says what makes it safe."""
    for path in [*(ROOT / "lorasc_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            asked = line.partition("# noqa:")[2]
            if any(rule in asked for rule in ("TID251", "S102", "S301", "S302", "S307")):
                assert " - " in asked, f"{path.relative_to(ROOT)}:{number}: say after ' - ' why this is safe"
