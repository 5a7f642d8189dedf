"""The package imports only its core dependencies, one file edits graphs, and nothing is fetched or run from a file."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    """Return every source file of both packages once. The link lorasc_fx/passes is not followed."""
    linked = ROOT / "lorasc_fx" / "passes"
    files = [path for path in (ROOT / "lorasc_fx").rglob("*.py") if linked not in path.parents]
    return sorted([*files, *(ROOT / "passes").rglob("*.py")])


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_private_names_of_torch_are_in_one_module() -> None:
    """There are at most 25 of them."""
    uses: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("torch._"):
                uses.setdefault(where(path), set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("torch._"):
                uses.setdefault(where(path), set()).add(name)
                uses[where(path)].discard("torch.__version__")
    uses = {file: names for file, names in uses.items() if names}
    assert list(uses) == ["lorasc_fx/util/torch_private.py"]
    # `torch._C` in `torch._C._functions` is not counted.
    (names,) = uses.values()
    assert len([name for name in names if not any(longer.startswith(f"{name}.") for longer in names)]) <= 25


def test_the_linter_sees_passes_through_the_link() -> None:
    """Otherwise the contracts on passes check nothing."""
    import grimp

    graph = grimp.build_graph("lorasc_fx", cache_dir=None)
    names = {"lorasc_fx.passes"} | {
        f"lorasc_fx.passes.{path.stem}" for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"
    }
    assert names <= graph.modules


def module_name(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("")
    parts = inside.parts if inside.parts[0] == "lorasc_fx" else ("lorasc_fx", *inside.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_modules_import_without_the_extras() -> None:
    """All modules except cli and integrations import if no package of an extra can be imported. The package itself
    leaves to later what takes longer to import than all its modules; torch may import that."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = {canonicalize_name(Requirement(line).name) for lines in extras.values() for line in lines}
    wanted -= {"numpy", "packaging", "lorasc-fx"}  # torch imports the first two if they are installed
    owners = importlib.metadata.packages_distributions()
    blocked = [name for name, dists in owners.items() if wanted & set(map(canonicalize_name, dists))]
    assert {"peft", "transformers"} <= set(blocked)
    edges = ("lorasc_fx.__main__", "lorasc_fx.cli", "lorasc_fx.integrations")
    modules = [name for name in map(module_name, sources()) if not name.startswith(edges)]
    slow = ["networkx", "sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"]
    done = python(
        f"import sys, json, torch\nsys.modules.update(dict.fromkeys({blocked}))\n"
        f"absent = [name for name in {slow} if name not in sys.modules]\nimport lorasc_fx\n"
        f"print(json.dumps([absent, [name for name in absent if name in sys.modules]]))\nimport {', '.join(modules)}"
    )
    assert done.returncode == 0, done.stderr
    absent, imported = json.loads(done.stdout)
    assert {"networkx", "sympy"} <= set(absent)
    assert not imported


def test_passes_is_not_importable_by_its_bare_name() -> None:
    done = python("import passes")
    assert done.returncode == 1, "`import passes` succeeded in the root of the checkout"
    assert re.search(r"^ImportError: .*lorasc_fx\.passes", done.stderr, re.MULTILINE)


EDITS = re.compile(
    r"(\w+)\.(create_node|erase_node|node_copy|graph_copy|inserting_before|inserting_after|replace_all_uses_with|"
    r"replace_input_with|eliminate_dead_code|update_arg|update_kwarg)\("
)
EDITORS = {
    "lorasc_fx/graph/editor.py",
    "lorasc_fx/graph/copies.py",  # copies whole graphs
    "lorasc_fx/capture/uses.py",  # a new graph, for matching
    "lorasc_fx/graph/function.py",  # a copy, from which code is generated
}
"""The editor, and files that create new graphs."""


def test_only_the_editor_creates_or_erases_nodes() -> None:
    edits = [
        f"{where(path)}: {match[0]}"
        for path in sources()
        if where(path) not in EDITORS
        for match in EDITS.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not edits, "use GraphEditor of lorasc_fx/graph/editor.py"


def test_the_public_face_is_small() -> None:
    """All other names are attributes of their modules."""
    import lorasc_fx

    assert lorasc_fx.__all__ == [
        "AdapterBank",
        "CaptureError", "Cascade", "CascadeSpec", "CheckpointError", "LorascError", "Noise", "NonFiniteBranch",
        "PassError", "Plan", "Refusal", "Rule", "Site", "SpecError", "StageSchedule", "StateError",
        "UnknownTarget", "adapt", "backend", "export", "from_peft", "integrations", "load", "merge",
        "parallel", "passes", "recipes", "register_branch", "register_form", "register_grid", "save",
    ]  # fmt: skip
    public = {name for name, value in vars(lorasc_fx).items() if not name.startswith("_") and callable(value)}
    assert public <= set(lorasc_fx.__all__)


WATCHED = """
import json, socket, sys, tempfile

import torch, safetensors.torch, torch.export, torch._dynamo

seen = []
outside = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.", "http.", "ftplib.")
sys.addaudithook(lambda event, args: seen.append(f"{event} {args[:2]}") if event.startswith(outside) else None)

import lorasc_fx as lx
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
again = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
again.load_state_dict(model.state_dict())
x = torch.randn(3, 5)
cascade = lx.adapt(model, args=(x,))
optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
for _ in cascade.stages(2, optimizer):
    cascade(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
with tempfile.TemporaryDirectory() as folder:
    lx.save(cascade, folder, optimizer=optimizer)
    loaded = lx.load(folder, again, args=(x,))
assert torch.equal(loaded(x), cascade(x))
loaded.release()
ours = list(seen)
socket.socket().close()  # shows that the hook works
print(json.dumps([ours, seen]))
"""


def test_nothing_is_fetched() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, seen = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    assert seen[0].startswith("socket.__new__")


def test_values_are_immutable_and_no_zip_drops_items() -> None:
    """Five dataclasses collect what is found while a graph is read. A zip that may drop items is in this list."""
    text = [(path.stem, path.read_text(encoding="utf-8")) for path in sources()]
    mutable = [stem for stem, code in text for _ in re.findall(r"@dataclass(?!\(frozen=True)", code)]
    loose = [stem for stem, code in text for _ in range(code.count("strict=False"))]
    assert mutable == ["__init__", "preflight", "variants", "matching", "change"]
    assert loose[:5] == ["captured", "captured", "torch_export", "guards", "isolation"]
    assert loose[5:] == ["graph_files", "flow", "quantized", "weights_as_attributes"]


def test_each_exception_tells_why() -> None:
    """A line with an exception of the linter for unsafe loading says why it is safe."""
    for path in [*(ROOT / "lorasc_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            exception = line.partition("# noqa:")[2]
            if any(rule in exception for rule in ("TID251", "S102", "S301", "S302", "S307")):
                assert " - " in exception, f"{path.relative_to(ROOT)}:{number}: say after ' - ' why this is safe"
