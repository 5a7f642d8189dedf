"""Which way imports run and what they bring along; who makes nodes; nothing is fetched, or run from a file."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CORE = ("torch", "networkx", "safetensors")


def sources() -> list[Path]:
    """Every source file of both packages, once: the link lorasc_fx/passes is not followed."""
    linked = ROOT / "lorasc_fx" / "passes"
    files = [path for path in (ROOT / "lorasc_fx").rglob("*.py") if linked not in path.parents]
    return sorted([*files, *(ROOT / "passes").rglob("*.py")])


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_private_names_of_torch_are_in_one_module() -> None:
    """And there are at most 25 of them."""
    found: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("torch._"):
                found.setdefault(where(path), set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("torch._"):
                found.setdefault(where(path), set()).add(name)
                found[where(path)].discard("torch.__version__")
    found = {file: names for file, names in found.items() if names}
    assert list(found) == ["lorasc_fx/util/torch_private.py"]
    # `torch._C` in `torch._C._functions` is no name of its own.
    (names,) = found.values()
    assert len([name for name in names if not any(other.startswith(f"{name}.") for other in names)]) <= 25


def test_the_linter_sees_passes_through_the_link() -> None:
    """Or the contracts on passes would hold of nothing."""
    import grimp

    graph = grimp.build_graph("lorasc_fx", cache_dir=None)
    names = {"lorasc_fx.passes"} | {
        f"lorasc_fx.passes.{path.stem}" for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"
    }
    assert names <= graph.modules


def test_no_module_of_ours_is_imported_by_a_string() -> None:
    """Or the contracts would not see it."""
    found = [
        f"{where(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("module_of", "import_module")
        if any(isinstance(arg, ast.Constant) and str(arg.value).startswith("lorasc_fx") for arg in node.args)
    ]
    assert not found


def core_distributions() -> set[str]:
    """The core dependencies with all that they require in turn, by canonical name."""
    found: set[str] = set()
    left = list(CORE)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform only
        left += [
            req.name for req in map(Requirement, wanted) if req.marker is None or req.marker.evaluate({"extra": ""})
        ]
    return found


def loaded_by(*codes: str) -> list[set[str]]:
    """The top-level modules that stand in one fresh interpreter after each of these."""
    told = "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = python("\n".join(["import sys, json", *(f"{code}\n{told}" for code in codes)]))
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines()[-len(codes) :]]


def every_module_inside() -> str:
    """Code that imports each module but those of the edges, cli and integrations, which may want more."""
    edges = ("lorasc_fx.__main__", "lorasc_fx.cli", "lorasc_fx.integrations")
    names = [module_name(path) for path in sources()]
    return "\n".join(f"import {name}" for name in names if not name.startswith(edges))


def module_name(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("")
    parts = inside.parts if inside.parts[0] == "lorasc_fx" else ("lorasc_fx", *inside.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_import_brings_only_the_core_dependencies() -> None:
    # What torch itself picks up where it is installed (numpy, and a few more) is torch's own affair.
    torchs = "import torch, torch.export, torch.fx, torch._dynamo, networkx, safetensors.torch"
    alone, face, inside = loaded_by(torchs, "import lorasc_fx", every_module_inside())
    assert "lorasc_fx" in face - alone
    owners = importlib.metadata.packages_distributions()
    core = core_distributions()
    for ours in (face, inside):
        foreign = {
            name: owners[name]
            for name in ours - alone - set(sys.stdlib_module_names) - {"lorasc_fx"}
            if name in owners and not core & set(map(canonicalize_name, owners[name]))
        }
        assert not foreign, f"`import lorasc_fx` must do with {', '.join(CORE)}; it also imports {foreign}"


def test_import_leaves_to_later_what_takes_long_to_import() -> None:
    """Each of these takes longer to import than all modules of the package; what torch itself imports is its own."""
    names = ["networkx", "sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"]
    done = python(
        f"import sys, json, torch\nleft = [name for name in {names} if name not in sys.modules]\n"
        "import lorasc_fx\nprint(json.dumps([left, [name for name in left if name in sys.modules]]))"
    )
    assert done.returncode == 0, done.stderr
    left, imported = json.loads(done.stdout)
    assert {"networkx", "sympy"} <= set(left)
    assert not imported


def test_passes_is_not_importable_by_its_bare_name() -> None:
    """A top-level `passes` would be the user's own; ours says so, in one sentence."""
    done = python("import passes")
    assert done.returncode == 1, "`import passes` succeeded in the root of the checkout"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "lorasc_fx.passes" in last
    assert last.count(". ") == 0, f"one sentence, please: {last}"


# --- one surgeon ---------------------------------------------------------------------------------------------------

# Rewiring, whoever is asked for it.
SURGERY = {
    "create_node", "erase_node", "node_copy", "graph_copy", "inserting_before", "inserting_after",
    "replace_all_uses_with", "replace_input_with", "eliminate_dead_code", "update_arg", "update_kwarg",
}  # fmt: skip
# Names that other things have too: surgery where a graph is asked.
ON_A_GRAPH = {"call_function", "call_module", "call_method", "placeholder", "get_attr", "output"}
# Fields of a node: assigning them rewires it.
FIELDS = {"args", "kwargs", "target"}
# Where surgery is done. A front end that has to retarget what a tracer made (placeholder -> get_attr under `model.`)
# first asks graph/editor.py; if that cannot be, its file gets a row of its own here, with the few names it needs.
# A copy of a whole graph is no surgery, but its names are those of the copy.
SURGEONS: dict[str, set[str]] = {
    "lorasc_fx/graph/editor.py": SURGERY | ON_A_GRAPH | FIELDS,
    "lorasc_fx/graph/copies.py": {"graph_copy", "target"},
    "lorasc_fx/capture/uses.py": {"placeholder", "get_attr", "create_node", "output"},  # a new graph, for matching
    "passes/inlined.py": {"placeholder", "output"},  # a new graph, which the editor copies
    # of a copy, from which code is generated
    "lorasc_fx/graph/function.py": {"args", "call_function", "inserting_before", "kwargs", "target"},
}


CALL = re.compile(r"\b(\w+)\.(\w+)\(")
WRITE = re.compile(r"^\s*(?!self\.)\w[\w.]*\.(\w+)(?:, [\w.]+)*(?:: [^=\n]+)? [+|]?= ", re.MULTILINE)


def surgery(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of all that makes, erases or rewires nodes in `source`. Names that are annotated as the
    surgeon's GraphEditor, or called `editor`, may be asked: that is the way to do it.
    """
    allowed = {"editor", "_editor", *re.findall(r"(\w+): GraphEditor", source)}
    for match in CALL.finditer(source):
        asked, name = match.groups()
        graph_like = asked.lower().endswith("graph") or asked == "g"
        if asked not in allowed and (name in SURGERY or (name in ON_A_GRAPH and graph_like)):
            yield source.count("\n", 0, match.start()) + 1, name
    for match in WRITE.finditer(source):
        if match[1] in FIELDS:
            yield source.count("\n", 0, match.end()) + 1, match[1]


def test_only_the_surgeon_makes_or_erases_nodes() -> None:
    assert (ROOT / "lorasc_fx" / "graph" / "editor.py").exists(), "lorasc_fx/graph/editor.py is not there"
    found = [
        f"{where(path)}:{line}: {name}"
        for path in sources()
        for line, name in surgery(path.read_text(encoding="utf-8"))
        if name not in SURGEONS.get(where(path), set())
    ]
    assert not found, (
        "only lorasc_fx/graph/editor.py creates, erases or rewires nodes; ask its GraphEditor (a name annotated so, or "
        "called `editor`, is let through). Where capture/ must retarget what a tracer made, give the file a row in "
        f"SURGEONS ({where(Path(__file__))}) with the names that it needs:\n  " + "\n  ".join(found)
    )


def test_the_public_face_is_small() -> None:
    """Everything else is an attribute of the module where it belongs, and stands under one name only."""
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
for _ in range(2):
    cascade(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    cascade.transition(optimizer)
with tempfile.TemporaryDirectory() as folder:
    lx.save(cascade, folder, optimizer=optimizer)
    loaded = lx.load(folder, again, args=(x,))
    loaded.resume(torch.optim.AdamW(loaded.param_groups(lr=0.1)))
assert torch.equal(loaded(x), cascade(x))
loaded.release()
ours = list(seen)
socket.socket().close()  # or the watch would see nothing at all
print(json.dumps([ours, seen]))
"""


def test_nothing_is_fetched() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, seen = json.loads(done.stdout.splitlines()[-1])
    assert ours == []
    assert seen[0].startswith("socket.__new__")


def test_each_exception_tells_why() -> None:
    """A line that the rules above let through on request says what makes it safe."""
    for path in [*(ROOT / "lorasc_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            asked = line.partition("# noqa:")[2]
            if any(rule in asked for rule in ("TID251", "S102", "S301", "S302", "S307")):
                assert " - " in asked, f"{path.relative_to(ROOT)}:{number}: say after ' - ' why this is safe"
