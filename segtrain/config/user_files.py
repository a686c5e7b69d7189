"""The one reader of text, YAML and CSV files that users write."""

import csv
import io
import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

from segtrain.errors import DataError

LARGEST = 64 << 20  # bytes
DEEPEST = 40  # levels of nesting
MOST = 1_000_000  # values, those that aliases repeat counted again


def read_text(path: Path, what: str = "the file", largest: int = LARGEST) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. DataError, which calls it `what`, for any other."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read {what} {path}: it is no regular file")
        if path.stat().st_size > largest:
            raise DataError(f"cannot read {what} {path}: it has {path.stat().st_size} bytes, at most {largest} work")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"cannot read {what} {path}: line {line} is not UTF-8; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        text = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {what} {path}: {text}") from error


def read_csv(path: Path, what: str = "the file") -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header: (line, column -> cell). DataError for a row that does not fit it."""
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), skipinitialspace=True, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise DataError(f"{path}, line {reader.line_num}: the column {twice[0]!r} occurs twice")
                continue
            if len(cells) > len(header):
                raise DataError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            rows.append((reader.line_num, dict(zip_longest(header, cells, fillvalue=""))))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def read_json(path: Path, what: str = "the file", largest: int = LARGEST) -> Any:
    """The content of a JSON file of at most so many bytes. DataError for anything else."""
    try:
        return json.loads(read_text(path, what, largest))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON: {error}") from error


def read_yaml(path: Path, what: str = "the file") -> Any:
    """The content of a YAML file: mappings with text as keys (`no` and `0` too), lists, and plain values.

    DataError for what is no YAML, and for a key that occurs twice, with its line; for a file that is nested too deeply,
    includes itself, or grows too large by its aliases.
    """
    import yaml

    text = read_text(path, what)
    kind = reader_class(text)
    loader = kind(text)
    try:
        require_shallow(text, kind, path)
        node = loader.get_single_node()
        if node is None:
            return None
        count_values(node, path, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise DataError(f"{path}{where}: no valid YAML: {problem}") from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: no valid YAML: {error}") from error  # a value that its own tag does not fit
    finally:
        loader.dispose()


def reader_class(text: str) -> Any:
    """PyYAML's safe loader without dates: a name such as 2024-01-01 is text. The one in C, where there is one, reads
    everything but the bytes of a file name that is no UTF-8."""
    import yaml

    base: Any = (
        yaml.SafeLoader if re.search(r"\\u[dD][89a-fA-F]", text) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )

    class Reader(base):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in some if tag != "tag:yaml.org,2002:timestamp"]
            for first, some in base.yaml_implicit_resolvers.items()
        }

    return Reader


def require_shallow(text: str, kind: Any, path: Path) -> None:
    """DataError for text that is nested too deeply, which would be too deep for the reader as well."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=kind):
        opens = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
        depth += opens - isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
        if depth > DEEPEST:
            line = event.start_mark.line + 1
            raise DataError(f"{path}, line {line}: nested more than {DEEPEST} levels deep")


def count_values(node: Any, path: Path, known: dict[int, int], open_nodes: set[int]) -> int:
    """The number of values below a node, and keys made text; `known` and `open_nodes` are of the nodes seen before."""
    import yaml

    line = node.start_mark.line + 1
    if id(node) in open_nodes:
        raise DataError(f"{path}, line {line}: the value includes itself")
    if id(node) in known:
        return known[id(node)]
    open_nodes.add(id(node))
    count = 1
    if isinstance(node, yaml.SequenceNode):
        count += sum(count_values(inner, path, known, open_nodes) for inner in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
                if key.value in seen:
                    raise DataError(f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} occurs twice")
                seen.add(key.value)
            count += count_values(key, path, known, open_nodes) + count_values(value, path, known, open_nodes)
    if count > MOST:
        raise DataError(f"{path}, line {line}: more than {MOST} values, by aliases of aliases")
    open_nodes.discard(id(node))
    known[id(node)] = count
    return count
