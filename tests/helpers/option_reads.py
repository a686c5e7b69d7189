"""Which options the source reads, resolved to the dataclass that each belongs to.

A name alone does not identify an option: more than half of the names are attributes of other classes too. So the type
of the expression before the dot is inferred from annotations, assignments, constructors and return types. That is less
than a type checker does, but enough for this code: a read whose type is not inferred does not count, and a test fails.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Types = frozenset[str]
NONE: Types = frozenset()
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Read(NamedTuple):
    """A place of the source that reads the attribute `name`, which the class `owner` defines."""

    owner: str
    name: str
    path: str
    node: ast.expr


class Classes:
    """Classes of the source: their bases, the types of their attributes, and what methods and functions return."""

    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.bases: dict[str, list[str]] = {}
        self.fields: dict[str, set[str]] = {}  # annotated in the class body
        self.attributes: dict[tuple[str, str], Types] = {}
        self.returns: dict[str, Types] = {}
        self.methods: dict[tuple[str, str], Types] = {}
        nodes = [node for tree in trees.values() for node in ast.walk(tree)]
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self.bases[node.name] = [name for base in node.bases for name in names_in(base)]
                self.fields[node.name] = set()
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self.read_body(node)
        methods = {id(item) for node in nodes if isinstance(node, ast.ClassDef) for item in node.body}
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and id(node) not in methods:
                self.returns[node.name] = self.returns.get(node.name, NONE) | self.annotated(node.returns)

    def read_body(self, node: ast.ClassDef) -> None:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if "ClassVar" not in names_in(item.annotation):
                    self.fields[node.name].add(item.target.id)
                self.attributes[node.name, item.target.id] = self.annotated(item.annotation)
            elif isinstance(item, ast.FunctionDef):
                self.methods[node.name, item.name] = self.annotated(item.returns)
                if any("property" in names_in(one) for one in item.decorator_list):
                    self.attributes[node.name, item.name] = self.annotated(item.returns)

    def annotated(self, annotation: ast.expr | None) -> Types:
        """The known classes that an annotation names."""
        return frozenset(name for name in names_in(annotation) if name in self.bases)

    def lineage(self, name: str) -> Iterator[str]:
        """The class and its bases, nearest first."""
        if name in self.bases:
            yield name
            for base in self.bases[name]:
                yield from self.lineage(base)

    def owner(self, name: str, attribute: str) -> str | None:
        """The class in the lineage of `name` that declares the attribute as a field."""
        return next((one for one in self.lineage(name) if attribute in self.fields[one]), None)

    def attribute(self, types: Types, name: str) -> Types:
        found = NONE
        for one in types:
            found |= next((self.attributes[c, name] for c in self.lineage(one) if (c, name) in self.attributes), NONE)
        return found

    def method(self, types: Types, name: str) -> Types:
        found = NONE
        for one in types:
            found |= next((self.methods[c, name] for c in self.lineage(one) if (c, name) in self.methods), NONE)
        return found


def names_in(annotation: ast.AST | None) -> list[str]:
    """Names in an annotation, which may be a string."""
    found = []
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"[A-Za-z_]\w*", node.value)
    return found


class Scope:
    """The types of the names in a function, and the attributes that it reads."""

    def __init__(self, classes: Classes, path: str, names: dict[str, Types], owner: str = "") -> None:
        self.classes, self.path, self.names, self.owner = classes, path, names, owner
        self.narrowed: set[str] = set()  # classes of isinstance(...) in the function
        self.reads: list[Read] = []

    def type_of(self, node: ast.expr | None) -> Types:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, NONE)
        if isinstance(node, ast.Attribute):
            return self.classes.attribute(self.type_of(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self.type_of_call(node)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) | self.type_of(node.orelse)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*map(self.type_of, node.values))
        if isinstance(node, ast.NamedExpr | ast.Await):
            return self.type_of(node.value)
        return NONE

    def type_of_call(self, node: ast.Call) -> Types:
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name == "replace" and node.args:  # dataclasses.replace
            return self.type_of(node.args[0])
        if name in self.classes.bases:
            return frozenset({name})
        if isinstance(function, ast.Attribute) and (types := self.type_of(function.value)):
            return self.classes.method(types, name)
        return self.classes.returns.get(name, NONE)

    def assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.assign(one, other)
        elif types := self.type_of(value):
            if isinstance(target, ast.Name):
                self.names[target.id] = self.names.get(target.id, NONE) | types
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                key = (self.owner, target.attr)
                self.classes.attributes[key] = self.classes.attributes.get(key, NONE) | types

    def note(self, node: ast.Attribute) -> None:
        for one in self.type_of(node.value):
            owner = self.classes.owner(one, node.attr)
            if owner is not None:
                self.reads.append(Read(owner, node.attr, self.path, node))
                continue
            for sub in self.narrowed:  # the attribute of a subclass that isinstance() has asked for
                if one in self.classes.lineage(sub) and (own := self.classes.owner(sub, node.attr)):
                    self.reads.append(Read(own, node.attr, self.path, node))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, Function):
            self.visit_function(node)
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "getattr"):
            self.look_up(node)
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.names[node.target.id] = self.classes.annotated(node.annotation)
        elif isinstance(node, ast.NamedExpr | ast.withitem):
            pair = (
                (node.optional_vars, node.context_expr) if isinstance(node, ast.withitem) else (node.target, node.value)
            )
            if pair[0] is not None:
                self.assign(pair[0], pair[1])
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            self.note(node)

    def look_up(self, node: ast.Call) -> None:
        """isinstance(x, Class) gives the type of x; getattr(x, "name", ...) reads it of x or of a subclass."""
        assert isinstance(node.func, ast.Name)
        first, second = node.args[:2]
        if node.func.id == "isinstance":
            self.narrowed |= set(names_in(second))
            if isinstance(first, ast.Name) and not self.names.get(first.id):
                self.names[first.id] = self.classes.annotated(second)
        elif isinstance(second, ast.Constant):
            for sub in self.classes.bases:
                if self.type_of(first) & set(self.classes.lineage(sub)) and second.value in self.classes.fields[sub]:
                    self.reads.append(Read(sub, second.value, self.path, node))

    def visit_function(self, node: Function) -> None:
        inner = Scope(self.classes, self.path, dict(self.names), self.owner)
        inner.narrowed = set(self.narrowed)
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            inner.names[argument.arg] = self.classes.annotated(argument.annotation)
            if argument.arg == "self" and self.owner:
                inner.names["self"] = frozenset({self.owner})
        for child in node.body if isinstance(node.body, list) else [node.body]:
            inner.visit(child)
        self.reads += inner.reads


def scan(classes: Classes, path: str, tree: ast.Module, skip: str) -> list[Read]:
    """The reads in a module. skip: name of methods that do not count."""
    scope = Scope(classes, path, {})
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inner = Scope(classes, path, {}, node.name)
            skipped = skip if "PREFIX" in fields_of(classes, node) else None
            for item in node.body:
                if getattr(item, "name", "") != skipped:
                    inner.visit(item)
            scope.reads += inner.reads
        else:
            scope.visit(node)
    return scope.reads


def fields_of(classes: Classes, node: ast.ClassDef) -> set[str]:
    """Names declared in the class and its bases, including class variables."""
    names = set()
    for one in classes.lineage(node.name):
        names |= {name for owner, name in classes.attributes if owner == one}
    return names


def option_reads(sources: dict[str, str]) -> list[Read]:
    """All reads of fields of known classes in the sources, path -> text. Checks of options do not count as reads."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    classes = Classes(trees)
    for _ in range(2):  # once for the types of self.attributes, once with them
        reads = [read for path, tree in trees.items() for read in scan(classes, path, tree, skip="check")]
    return reads


def unread(sources: dict[str, str], options: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The options (defining class, name) that nothing reads."""
    found = {(read.owner, read.name) for read in option_reads(sources)}
    return sorted(set(options) - found)


def without(sources: dict[str, str], reads: Iterable[Read]) -> dict[str, str]:
    """The sources, with these expressions replaced by 0."""
    result = dict(sources)
    for read in sorted(reads, key=lambda read: (read.node.lineno, read.node.col_offset), reverse=True):
        lines = result[read.path].encode().split(b"\n")
        node = read.node
        assert node.end_lineno is not None and node.end_col_offset is not None
        head, tail = lines[node.lineno - 1][: node.col_offset], lines[node.end_lineno - 1][node.end_col_offset :]
        lines[node.lineno - 1 : node.end_lineno] = [head + b"0" + tail]
        result[read.path] = b"\n".join(lines).decode()
    return result
