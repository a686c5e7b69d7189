"""The one reader of text, YAML, CSV and JSON: what is wrong with a file, and in which line."""

import os

import pytest

from segtrain.config.user_files import read_csv, read_json, read_text, read_yaml
from segtrain.errors import DataError

BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "file, line 3: the key 'a' occurs twice"),
        ("a: {b: 1,\n  b: 2}\n", "file, line 2: the key 'b' occurs twice"),
        ("[" * 100_000, "file, line 1: nested more than 40 levels deep"),
        ("- " * 3000 + "a", "file, line 1: nested more than 40 levels deep"),
        ("a:\n  - &a [*a]\n", "file, line 2: the value includes itself"),
        (f"a0: &a0 [1, 2]\n{BOMB}", "more than 1000000 values, by aliases of aliases"),
        ("a: [1\nb: 2\n", "no valid YAML: "),
        ("a: *x\n", "file, line 1: no valid YAML: "),
        ("a: !!int x\n", "file: no valid YAML: invalid literal for int"),
        ("!!python/object/apply:os.system [ls]", "no valid YAML: could not determine a constructor"),
        ("--- 1\n--- 2\n", "no valid YAML: but found another document"),
        ("a: \x1b\n", "no valid YAML: "),
    ],
)
def test_yaml_that_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_yaml(path)
    assert message in str(caught.value)


def test_keys_are_text_and_dates_too(tmp_path):
    (tmp_path / "a").write_text("no: 1\n0: 2\n2024-01-01: 2024-01-01\nbase: &b {x: 1}\nmore: {<<: *b, y: [*b, *b]}\n")
    content = read_yaml(tmp_path / "a")
    assert content == {
        "no": 1, "0": 2, "2024-01-01": "2024-01-01", "base": {"x": 1}, "more": {"x": 1, "y": [{"x": 1}, {"x": 1}]},
    }  # fmt: skip
    (tmp_path / "b").write_text('a: "caf\\uDCE9"\n')  # as PyYAML writes a file name that is no UTF-8
    assert read_yaml(tmp_path / "b") == {"a": "caf\udce9"}
    (tmp_path / "c").write_text("")
    assert read_yaml(tmp_path / "c") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,name\n0,caf\xe9\n", "cannot read the table {}: line 2 is not UTF-8; save it as UTF-8"),
        ("id,name\n".encode("utf-16"), "cannot read the table {}: line 1 is not UTF-8"),
        (b"id,name,id\n", "{}, line 1: the column 'id' occurs twice"),
        (b"id,name\n1,2,3\n", "{}, line 2: 3 cells, the header has 2"),
        (b'id,name\n0,"a\n1,b', "{}, line 3: unexpected end of data"),
    ],
)
def test_csv_that_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_csv(path, "the table")
    assert str(caught.value).startswith(message.format(path))


def test_csv_with_lines_in_cells_and_short_rows(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'\xef\xbb\xbfid, name\r\n\r\n0, "two\nlines"\r\n1\r\n')
    assert read_csv(path) == [(4, {"id": "0", "name": "two\nlines"}), (5, {"id": "1", "name": ""})]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(DataError, match="it is no regular file"):
            read_text(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "none")


def test_json_that_is_refused(tmp_path):
    path = tmp_path / "file"
    for content in ("{", "[" * 100_000, ""):
        path.write_text(content)
        with pytest.raises(DataError, match="no valid JSON"):
            read_json(path)
