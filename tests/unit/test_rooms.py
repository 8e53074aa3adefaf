"""The rooms of `src/graft`: imports go down one list, without circles; few private names.

The files of `bench` have no order, and no circles either.
"""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
BENCH = SRC.parent / "bench"
ROOMS = (
    "cli", "commands", "choose", "sweeps", "compare", "deploy", "runs", "evaluation", "training",
    "reporting", "features", "plan", "tasks", "models", "data", "transforms", "storage", "config",
)  # fmt: skip
# Private names of other libraries: each costs a fork its next upgrade. Lower a number when one
# goes; before you raise one, look for a public way.
PRIVATE = {
    "graft/features/prefix.py": 2,
    "graft/plan/freeze.py": 1,
    "graft/plan/lora.py": 1,
    "graft/reporting/loggers.py": 2,
    "graft/sweeps/compose.py": 1,
    "graft/sweeps/study.py": 1,
    "graft/training/last_checkpoint.py": 2,
    "graft/training/module.py": 3,
    "graft/training/sharded.py": 1,
    "graft/training/signals.py": 5,
    "graft/training/steps.py": 2,
    "graft/training/sync_norm.py": 5,
    "hydra_plugins/graft.py": 1,
}
PUBLIC = ("_exit", "_replace")  # of os and of named tuples: documented


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of graft by its dotted name."""
    return {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in (SRC / "graft").rglob("*.py")
    }


def imports(module: str, tree: ast.Module) -> set[str]:
    """Modules of graft that a module imports, anywhere in it, also for annotations alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports are not followed here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("graft.")}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_is_a_room() -> None:
    folders = {room(module) for module in modules() if module.count(".") > 1}
    assert folders | {"cli"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_from_those_below_it_alone(name: str) -> None:
    allowed = ROOMS[ROOMS.index(name) :]
    upward = {
        f"{module} imports {other}"
        for module, tree in modules().items()
        if module.count(".") and room(module) == name
        for other in imports(module, tree)
        if room(other) not in allowed
    }
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: imports(module, tree) - {module}
        for module, tree in modules().items()
        if module.count(".")
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_no_file_of_the_benchmark_imports_itself_by_way_of_others() -> None:
    files = {path.stem: ast.parse(path.read_text()) for path in BENCH.glob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, tree in files.items():
        nodes = [*ast.walk(tree)]
        found = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        found |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        graph[name] = found & files.keys()
    assert graph["bench"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_what_only_computes_knows_neither_lightning_nor_hydra() -> None:
    for module, tree in modules().items():
        if module.count(".") and room(module) in ("models", "plan", "transforms", "storage"):
            named = {
                alias.name if isinstance(node, ast.Import) else str(node.module)
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not {name.split(".")[0] for name in named} & {"lightning", "hydra"}, module


def test_private_names_of_other_libraries_do_not_grow_in_number() -> None:
    files = {path: ast.parse(path.read_text()) for path in SRC.rglob("*.py")}
    own = {name for tree in files.values() for node in ast.walk(tree) for name in _defined(node)}
    counted = {
        str(path.relative_to(SRC)): count
        for path, tree in files.items()
        if (count := sum(_private(node, own) for node in ast.walk(tree)))
    }
    assert Counter(counted) == Counter(PRIVATE)


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if getattr(node.value, "id", "") == "self" else []
    return []


def _private(node: ast.AST, own: set[str]) -> int:
    """How many private names a node takes from elsewhere."""
    names: list[str] = []
    if isinstance(node, ast.Attribute) and node.attr not in own:
        names = [node.attr]
    elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("graft"):
        names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
    private = [name for name in names if name.startswith("_") and not name.endswith("_")]
    return sum(name not in PUBLIC for name in private)
