"""The house: imports go down, from room to room, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parents[2] / "prunelab"
FLOORS = (
    "errors",
    "options",
    "runtime files",
    "batches",
    "distributed",
    "tracing",
    "cost plans",
    "kept",
    "curvature",
    "surgery",
    "sparsity",
    "criteria",
    "planning regularizers",
    "factorization",
    "io",
    "data networks drawing",
    "zoo",
    "training",
    "pruning",
    "course",
    "experiments",
)
"""Rooms, from the ground up; one imports from those below it."""
DOORS = {("tracing/trace.py", "drawing"), ("pruning/report.py", "drawing")}
"""``graph.draw`` and ``report.plot``, which need matplotlib only when they are called."""
FRONTS = ("__init__.py", "__main__.py")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of prunelab that a file imports, at its top or later; not those for types alone."""
    for node in ast.walk(untyped(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prunelab":
            for name in node.names:
                inner = HOME.joinpath(*node.module.split(".")[1:], name.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{node.module}.{name.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "prunelab")


def untyped(tree: ast.Module) -> ast.Module:
    """Return code without its ``if TYPE_CHECKING``."""
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return tree


def files() -> dict[str, list[str]]:
    """Return for every file of the package the files that it imports from."""
    found = {}
    for path in sorted(HOME.rglob("*.py")):
        targets = []
        for module in imports(path):
            place = HOME.joinpath(*module.split(".")[1:])
            targets.append(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
        found[name(path)] = sorted({name(target) for target in targets} - {name(path)})
    return found


def name(path: Path) -> str:
    return path.relative_to(HOME).as_posix()


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def test_every_room_has_its_floor():
    rooms = {room(file) for file in files() if file not in FRONTS}
    assert rooms == {name for floor in FLOORS for name in floor.split()}


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    upward = [
        f"{file} imports {target}"
        for file, targets in files().items()
        for target in targets
        if file not in FRONTS and target != "__init__.py" and (file, room(target)) not in DOORS
        if room(file) != room(target) and floor[room(file)] <= floor[room(target)]
    ]
    assert not upward, "\n".join(upward)


def test_the_library_stands_without_course_and_experiments():
    for file, targets in files().items():
        if file not in FRONTS and room(file) not in ("course", "experiments"):
            assert not [target for target in targets if room(target) in ("course", "experiments")], file


def test_no_circle_of_files():
    graph, path, done = files(), [], set()

    def visit(file: str) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done or file in FRONTS:
            return []
        path.append(file)
        circle = next((found for target in graph[file] if (found := visit(target))), [])
        path.pop()
        done.add(file)
        return circle

    circles = [circle for file in graph if (circle := visit(file))]
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)
