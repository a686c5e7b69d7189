"""The rules of the house: which room may import which, how long files and functions may be, one name for one thing.

The source is parsed, never imported. Each rule is a function of a root folder that yields its violations;
test_house.py applies them and lists the violations that are still there.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The floors, lowest first. A room imports from the floors below it, not from its own floor or from above.
FLOORS = (
    ("leaves",),
    ("config", "distributed"),
    ("native",),
    ("abn",),
    ("models", "losses", "data"),
    ("weights",),
    ("scoring",),
    ("tasks",),
    ("engine",),
    ("commands",),
    ("cli",),
)
LEAVES = ("segtrain", "errors", "files", "threads", "console", "device")  # modules at the root; "segtrain" is __init__
SIDEWAYS: dict[tuple[str, str], str] = {}  # (room, room of the same floor that it may import) -> reason
ONLY_ROOMS = {"abn": {"native", "leaves"}}  # a room that may import less than its floor allows
ONLY_LIBRARIES = {"abn": {"torch", "cupy", "numpy"}, "config": {"hydra", "omegaconf", "yaml"}}  # third-party, at most
# Libraries -> the number of modules that may import them, and the room of these modules.
IMPORTERS = {("hydra", "omegaconf"): (1, "config"), ("albumentations",): (2, "data"), ("cupy",): (1, "abn")}
# Import paths for users: a docstring, imports and __all__. They are in no room, and segtrain does not import them.
REEXPORTS = ("metrics", "data.datasets", "abn.functions")
MAX_FILE, MAX_FUNCTION, MAX_COMPLEXITY, MAX_ROOT, MAX_REEXPORT = 400, 60, 20, 8, 10
# Test files that may be longer -> reason.
LONG_TESTS = {"tests/abn/cuda_emulator/ptx.py": "one class that translates PTX, an instruction at a time"}
# Package -> functions that several of its modules provide under one name, because the caller chooses the module.
INTERFACES = {
    "abn": {  # every back end, and the operators
        "available",
        "backward",
        "coded_backward",
        "coded_gradient",
        "coded_sums",
        "decode",
        "encode",
        "forward",
        "gradient",
        "layer_backward",
        "layer_forward",
        "normalise",
        "statistics",
        "statistics_extremes",
        "sums",
    },
    "data": {"files", "identity", "table"},  # every dataset
}


class Module(NamedTuple):
    path: Path
    tree: ast.Module
    imports: tuple[tuple[str, int], ...]  # modules of segtrain without the "segtrain.", and the line
    libraries: frozenset[str]  # third-party packages


class Finding(NamedTuple):
    key: str
    size: int  # 0 where there is nothing to measure
    text: str


def imported(tree: ast.Module, package: str, known: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Full names of the modules imported anywhere in `tree`, also inside functions and by import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base), node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


@cache
def modules_of(root: Path) -> dict[str, Module]:
    """Module name without the "segtrain." -> module; the package itself is "segtrain"."""
    paths = {}
    for path in sorted((root / "segtrain").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    result = {}
    for full, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = full if path.name == "__init__.py" else full.rpartition(".")[0]
        found = sorted(set(imported(tree, package, paths)))
        ours = tuple((name.removeprefix("segtrain."), line) for name, line in found if name.split(".")[0] == "segtrain")
        others = {name.split(".")[0] for name, _ in found} - {"segtrain"} - set(sys.stdlib_module_names)
        result[full.removeprefix("segtrain.")] = Module(path, tree, ours, frozenset(others))
    return result


def housed(root: Path) -> dict[str, Module]:
    """All modules but the re-exports."""
    return {name: module for name, module in modules_of(root).items() if name not in REEXPORTS}


def room_of(name: str) -> str | None:
    first = name.partition(".")[0]
    if name in LEAVES or name == "__main__":
        return "leaves" if name in LEAVES else "cli"
    return first if any(first in floor for floor in FLOORS) else None


def level(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def upwards(root: Path) -> Iterator[Finding]:
    """Modules in no room, and imports that do not go downwards."""
    for name, module in housed(root).items():
        here = room_of(name)
        if here is None:
            yield Finding(f"{name}: no room", 0, f"segtrain.{name} is in no room: move it into one of {FLOORS}")
            continue
        for other, line in module.imports:
            there = room_of(other)
            if there is None or there == here or (here, there) in SIDEWAYS:
                continue
            if level(there) >= level(here) or there not in ONLY_ROOMS.get(here, {there}):
                place = f"{module.path.relative_to(root)}:{line}"
                yield Finding(f"{name} -> {other}", 0, f"{place}: {here} must not import segtrain.{other}, of {there}")


def shortest(graph: Mapping[str, Iterable[str]], start: str, end: str) -> list[str]:
    """The shortest path of at least one edge; empty if there is none."""
    paths = [[start, name] for name in sorted(graph.get(start, ()))]
    seen: set[str] = set()
    for path in paths:
        if path[-1] == end:
            return path
        if path[-1] not in seen:
            seen.add(path[-1])
            paths += [[*path, name] for name in sorted(graph.get(path[-1], ()))]
    return []


def circles(graph: Mapping[str, Iterable[str]]) -> Iterator[Finding]:
    """For each group of nodes that reach each other: its first node with every other one."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        reach[start], waiting = set(), [start]
        while waiting:
            new = set(graph.get(waiting.pop(), ())) - reach[start]
            reach[start] |= new
            waiting += new
    for start in sorted(graph):
        ring = sorted(name for name in reach[start] if start in reach.get(name, ()))
        for name in ring[1:] if ring[:1] == [start] else []:
            path = shortest(graph, start, name) + shortest(graph, name, start)[1:]
            yield Finding(f"{start} <-> {name}", 0, "import circle: " + " -> ".join(path))


def module_circles(root: Path) -> Iterator[Finding]:
    return circles({name: {other for other, _ in module.imports} for name, module in housed(root).items()})


def room_circles(root: Path) -> Iterator[Finding]:
    graph: dict[str, set[str]] = defaultdict(set)
    for name, module in housed(root).items():
        here = room_of(name)
        rooms = {room for room in (room_of(other) for other, _ in module.imports) if room and room != here}
        graph[here or name] |= rooms
    return circles(graph)


def long_files(root: Path) -> Iterator[Finding]:
    for path in sorted(path for folder in ("segtrain", "scripts", "tests") for path in (root / folder).rglob("*.py")):
        name, lines = path.relative_to(root).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE and name not in LONG_TESTS:
            yield Finding(name, lines, f"{name} has {lines} lines; at most {MAX_FILE}: split it")


Function = ast.FunctionDef | ast.AsyncFunctionDef
Branch = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case


def functions_of(node: ast.AST, prefix: str, nested: bool) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}.{child.name}", child
        if isinstance(child, Function | ast.ClassDef):
            if nested or isinstance(child, ast.ClassDef):
                yield from functions_of(child, f"{prefix}.{child.name}", nested)
        else:
            yield from functions_of(child, prefix, nested)


def long_functions(root: Path) -> Iterator[Finding]:
    """Lines from `def` to the end, without the decorators; nested functions too."""
    for name, module in modules_of(root).items():
        for key, node in functions_of(module.tree, name, nested=True):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield Finding(key, lines, f"{key} has {lines} lines; at most {MAX_FUNCTION}: split it")


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity as radon counts it, but nested functions count with the function around them.

    1, and 1 more for each if, elif, conditional expression, for, while, except, comprehension `for` and `if`, `and` or
    `or` between two operands, and match case. with, assert and the else of a loop or a try count nothing.
    """
    total = 1
    for node in ast.walk(function):
        if isinstance(node, Branch):
            total += 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def tangled_functions(root: Path) -> Iterator[Finding]:
    for name, module in modules_of(root).items():
        for key, node in functions_of(module.tree, name, nested=False):
            if (found := complexity(node)) > MAX_COMPLEXITY:
                yield Finding(key, found, f"{key} has complexity {found}; at most {MAX_COMPLEXITY}: split it")


def stray_importers(root: Path) -> Iterator[Finding]:
    """Third-party packages imported by too many modules or in another room than theirs."""
    modules = housed(root)
    for names, (limit, room) in IMPORTERS.items():
        importers = {name: module.libraries & set(names) for name, module in modules.items()}
        importers = {name: used for name, used in importers.items() if used}
        for name, used in importers.items():
            if len(importers) > limit or room_of(name) != room:
                rule = f"at most {limit} module(s) of {room} may; {', '.join(importers)} do"
                yield from (Finding(f"{name}: {library}", 0, f"{name} imports {library}: {rule}") for library in used)
    for name, module in modules.items():
        here = room_of(name) or ""
        for library in sorted(module.libraries - ONLY_LIBRARIES.get(here, module.libraries)):
            yield Finding(f"{name}: {library}", 0, f"{name} imports {library}, but {here} only {ONLY_LIBRARIES[here]}")


def crowded_root(root: Path) -> Iterator[Finding]:
    names = [name for name, module in housed(root).items() if module.path.parent == root / "segtrain"]
    if len(names) > MAX_ROOT:
        text = f"{len(names)} modules at the root, at most {MAX_ROOT}: {', '.join(names)}"
        yield Finding("segtrain", len(names), text)


def public_functions(module: Module) -> list[str]:
    return [node.name for node in module.tree.body if isinstance(node, Function) and not node.name.startswith("_")]


def owner(name: str, function: str) -> str:
    """The package whose interface `function` belongs to, or else the module."""
    package = name.partition(".")[0]
    return package if function in INTERFACES.get(package, ()) else name


def same_names(root: Path) -> Iterator[Finding]:
    """Public functions at module level that have one name in several modules."""
    places: dict[str, set[str]] = defaultdict(set)
    for name, module in housed(root).items():
        for function in public_functions(module):
            places[function].add(owner(name, function))
    for function, names in sorted(places.items()):
        for name in sorted(names) if len(names) > 1 else []:
            yield Finding(f"{function}: {name}", 0, f"{function}() is defined in {', '.join(sorted(names))}: rename it")


def impure_reexports(root: Path) -> Iterator[Finding]:
    """Re-exports that are missing, hold more than that, or are imported inside segtrain."""
    modules = modules_of(root)
    for name in REEXPORTS:
        if name not in modules:
            yield Finding(f"{name}: missing", 0, f"segtrain.{name} is listed as a re-export but missing")
            continue
        first, *rest = modules[name].tree.body
        is_docstring = isinstance(first, ast.Expr) and ast.get_docstring(modules[name].tree) is not None
        is_all = [isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in rest]
        is_plain = all(isinstance(node, ast.ImportFrom) or named for node, named in zip(rest, is_all, strict=True))
        lines = len(modules[name].path.read_text(encoding="utf-8").splitlines())
        if not is_docstring or sum(is_all) != 1 or not is_plain or lines > MAX_REEXPORT:
            rule = f"a docstring, imports and __all__ in at most {MAX_REEXPORT} lines"
            yield Finding(f"{name}: content", 0, f"segtrain.{name} is a re-export and may hold only {rule}")
        for other, module in modules.items():
            strings = {node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant)}
            by_name = {value.partition(":")[0] for value in strings if isinstance(value, str)}
            if name in dict(module.imports) or f"segtrain.{name}" in by_name:
                yield Finding(f"{other} -> {name}", 0, f"segtrain.{other} imports the re-export segtrain.{name}")
