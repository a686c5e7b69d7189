"""Apply the rules of house.py to this repository.

The violations that are still there are listed as debts. The lists only shrink: a new violation fails, and so does an
entry that is no longer needed. `python -m tests.test_house` prints the lists as they should read now.
"""

import ast
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.helpers import house
from tests.helpers.house import Finding

ROOT = Path(__file__).resolve().parents[1]
# Every dependency but torch: segtrain.abn needs none of them.
OTHERS = {
    "PIL", "albumentations", "cupy", "cv2", "hydra", "mlflow", "numpy", "omegaconf", "safetensors", "scipy",
    "tensorboard", "torchvision", "tqdm", "wandb", "yaml",
}  # fmt: skip

# Debts: key of a violation, with its size where it has one, which may not grow.
Debts = set[str] | dict[str, int]
UPWARDS: Debts = set()
CIRCLES: Debts = set()
ROOM_CIRCLES: Debts = set()
LONG_FILES: Debts = set()
LONG_FUNCTIONS: Debts = set()
TANGLED_FUNCTIONS: Debts = set()
STRAY_IMPORTERS: Debts = set()
CROWDED_ROOT: Debts = set()
SAME_NAMES: Debts = set()
IMPURE_REEXPORTS: Debts = set()

RULES: dict[str, tuple[Callable[[Path], Iterator[Finding]], Debts]] = {  # name of the debts -> rule, debts
    "UPWARDS": (house.upwards, UPWARDS),
    "CIRCLES": (house.module_circles, CIRCLES),
    "ROOM_CIRCLES": (house.room_circles, ROOM_CIRCLES),
    "LONG_FILES": (house.long_files, LONG_FILES),
    "LONG_FUNCTIONS": (house.long_functions, LONG_FUNCTIONS),
    "TANGLED_FUNCTIONS": (house.tangled_functions, TANGLED_FUNCTIONS),
    "STRAY_IMPORTERS": (house.stray_importers, STRAY_IMPORTERS),
    "CROWDED_ROOT": (house.crowded_root, CROWDED_ROOT),
    "SAME_NAMES": (house.same_names, SAME_NAMES),
    "IMPURE_REEXPORTS": (house.impure_reexports, IMPURE_REEXPORTS),
}


def compare(findings: Iterable[Finding], debts: Debts) -> tuple[list[str], list[str]]:
    """(Violations that no debt covers, debts that nothing needs any more)."""
    allowed = debts if isinstance(debts, dict) else dict.fromkeys(debts, 0)
    found = {finding.key: finding for finding in findings}
    new = [finding.text for finding in found.values() if finding.size > allowed.get(finding.key, -1)]
    return new, sorted(allowed.keys() - found.keys())


def as_source(root: Path) -> str:
    """The debts of `root` as Python source."""
    text = ""
    for name, (rule, _) in RULES.items():
        sizes = {finding.key: finding.size for finding in rule(root)}
        items = [f'"{key}"' + (f": {size}" if size else "") for key, size in sorted(sizes.items())]
        packed = textwrap.fill(", ".join(item.replace(" ", "\0") for item in items), 115, break_on_hyphens=False)
        lines = textwrap.indent(packed.replace("\0", " "), "    ")
        text += f"{name}: Debts = {{\n{lines},\n}}  # fmt: skip\n" if items else f"{name}: Debts = set()\n"
    return text


@pytest.mark.parametrize("name", RULES)
def test_no_violation_is_new(name):
    rule, debts = RULES[name]
    new, _ = compare(rule(ROOT), debts)
    assert not new, "\n".join([f"{name}:", *sorted(set(new), key=len)])


@pytest.mark.parametrize("name", RULES)
def test_every_debt_is_still_owed(name):
    rule, debts = RULES[name]
    _, paid = compare(rule(ROOT), debts)
    assert not paid, f"{name} lists what no longer breaks the rule; remove {paid}"


def test_every_exception_is_still_needed():
    modules = house.modules_of(ROOT)
    edges = [(name, other) for name, module in modules.items() for other, _ in module.imports]
    pairs = {(house.room_of(name), house.room_of(other)) for name, other in edges}
    sharing = defaultdict(set)
    for name, module in modules.items():
        for function in house.public_functions(module):
            sharing[house.owner(name, function), function].add(name)
    unneeded = [f"{here} -> {there}" for here, there in house.SIDEWAYS if (here, there) not in pairs]
    unneeded += [name for name in house.LONG_TESTS if len((ROOT / name).read_text().splitlines()) <= house.MAX_FILE]
    interfaces = [(package, function) for package, shared in house.INTERFACES.items() for function in shared]
    unneeded += [f"{package}: {function}" for package, function in interfaces if len(sharing[package, function]) < 2]
    assert not unneeded, f"no longer needed: {unneeded}"


def run_without(libraries: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process in which `libraries` are not installed."""
    start = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {set(libraries)!r} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
    command = [sys.executable, "-W", "ignore", "-c", start + code]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_layer_needs_torch_alone():
    names = [f"segtrain.{name}" for name in house.modules_of(ROOT) if name.split(".")[0] == "abn"]
    result = run_without(OTHERS, f"import {', '.join(names)}; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    assert {"torch", *names} <= set(result.stdout.split()) and not OTHERS & set(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [(["--help"], "usage: segtrain COMMAND"), (["train", "--help"], "segtrain train: train a ")],
    ids=["segtrain", "train"],
)
def test_help_needs_no_torch(words, line):
    code = f"sys.argv = ['segtrain', *{words}]; runpy.run_module('segtrain', run_name='__main__')"
    result = run_without(["torch"], code)
    assert result.returncode == 0, result.stderr
    assert line in result.stdout


def test_a_blocked_library_is_not_found():
    result = run_without(["yaml"], "import yaml")
    assert result.returncode == 1 and "No module named 'yaml'" in result.stderr


LONG = "def f():\n" + 60 * "    pass\n"
BRANCHES = "def f(x):\n    def g():\n" + 20 * "        x or 1\n"
# Rule, files of a made-up segtrain, keys of what the rule finds there.
MADE_UP: list[tuple[str, dict[str, str], list[str]]] = [
    ("UPWARDS", {"files.py": "def f():\n    from segtrain.engine import run", "engine/run.py": "import segtrain.files"},
     ["files -> engine.run"]),
    ("UPWARDS", {"models/a.py": "import segtrain.data.b", "data/b.py": "from ..errors import E"},
     ["models.a -> data.b"]),
    ("UPWARDS", {"abn/a.py": "from segtrain import config, native", "config.py": "", "native.py": ""},
     ["abn.a -> config"]),
    ("UPWARDS", {"helpers.py": "", "cli.py": ""}, ["helpers: no room"]),
    ("CIRCLES", {"data/a.py": "from . import b", "data/b.py": "import segtrain.data.c", "data/d.py": "from . import a",
                 "data/c.py": "def f():\n    import_module('segtrain.data.a')"},
     ["data.a <-> data.b", "data.a <-> data.c"]),
    ("ROOM_CIRCLES", {"data/a.py": "import segtrain.models.b", "models/b.py": "import segtrain.abn", "abn.py": "",
                      "models/c.py": "import segtrain.data.d", "data/d.py": ""}, ["data <-> models"]),
    ("LONG_FILES", {"a.py": 401 * "\n", "b.py": 400 * "\n"}, ["segtrain/a.py"]),
    ("LONG_FUNCTIONS", {"a.py": f"{LONG}@a\n{LONG[:-9]}", "b.py": "class A:\n" + textwrap.indent(LONG, "  ")},
     ["a.f", "b.A.f"]),
    ("TANGLED_FUNCTIONS", {"a.py": BRANCHES, "b.py": BRANCHES.replace("x or 1", "x", 1)}, ["a.f"]),
    ("STRAY_IMPORTERS", {"config.py": "import hydra.core, torch", "cli.py": "def f():\n    import omegaconf"},
     ["cli: omegaconf", "config: hydra", "config: torch"]),
    ("STRAY_IMPORTERS", {"abn.py": "importlib.import_module('cupy')", "info.py": "import_module('cupy')",
                         "data/a.py": "import albumentations.core"}, ["abn: cupy", "info: cupy"]),
    ("CROWDED_ROOT", {f"{letter}.py": "" for letter in "abcdefgh"}, ["segtrain"]),
    ("CROWDED_ROOT", {f"{letter}.py": "" for letter in "abcdefg"}, []),
    ("SAME_NAMES", {"data/a.py": "def load(): 1\ndef table(): 1", "data/b.py": "def load(): 1\ndef table(): 1",
                    "data/c.py": "def _load(): 1\nclass A:\n    def load(self): 1"}, ["load: data.a", "load: data.b"]),
    ("IMPURE_REEXPORTS", {"metrics.py": "'''Old.'''\nfrom os import path\n__all__ = ['path']"}, []),
    ("IMPURE_REEXPORTS", {"metrics.py": "'''Old.'''\nfrom os import path\n__all__ = ['path']\nx = 1"},
     ["metrics: content"]),
    ("IMPURE_REEXPORTS", {"metrics.py": "'''Old.'''\n__all__ = []", "a.py": "import segtrain.metrics",
                          "b.py": "TABLE = 'segtrain.metrics:Scores'"}, ["a -> metrics", "b -> metrics"]),
    ("IMPURE_REEXPORTS", {}, ["metrics: missing"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "files", "keys"), MADE_UP)
def test_each_rule_finds_a_made_up_violation(rule, files, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(house, "REEXPORTS", ("metrics",) if rule == "IMPURE_REEXPORTS" else ())
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "segtrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    assert sorted(finding.key for finding in RULES[rule][0](tmp_path)) == keys


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 1), ("if a: 1\nelif b: 2\nelse: 3", 3), ("for x in y: 1\nelse: 2", 2), ("while a: 1", 2),
        ("try: 1\nexcept A: 2\nexcept B: 3\nfinally: 4", 3), ("with a: assert b", 1), ("a and b and c or d", 4),
        ("[x for y in z if y for x in y if x if y]", 6), ("a if b else c", 2), ("def g():\n  if a: 1", 2),
        ("match a:\n  case 1: 2\n  case _: 3", 3), ("f = lambda: a or b", 2),
    ],
)  # fmt: skip
def test_complexity_counts_branches(code, expected):
    assert house.complexity(ast.parse("def f():\n" + textwrap.indent(code, "  ")).body[0]) == expected


def test_debts_only_shrink():
    findings = [Finding("a", 70, "a grew"), Finding("b", 70, "b shrank"), Finding("c", 61, "c is new")]
    assert compare(findings, {"a": 69, "b": 71, "d": 99}) == (["a grew", "c is new"], ["d"])
    assert compare([Finding("a -> b", 0, "new")], {"a -> c"}) == (["new"], ["a -> c"])


def test_the_printed_debts_are_those_of_the_source():
    lists = {}
    exec(as_source(ROOT).replace(": Debts", ""), lists)
    for name, (rule, _) in RULES.items():
        assert compare(rule(ROOT), lists[name]) == ([], [])


if __name__ == "__main__":
    print(as_source(ROOT), end="")
