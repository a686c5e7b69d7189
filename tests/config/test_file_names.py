"""Names of files made of text that came from elsewhere, and names that no other process has."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segtrain.files import as_component, temporary_beside


@pytest.mark.parametrize(
    ("text", "name"),
    [("/../../../../ESCAPED", "_.._.._.._.._ESCAPED"), ("..", "_"), (".", "_"), ("", "_"), ("a\\b", "a_b"),
     ("a\x1b[31m\n", "a_[31m_"), ("caf\udce9", "caf\udce9"), ("\ud800", "_"), ("Straße (1).png", "Straße (1).png")],
)  # fmt: skip
def test_text_as_one_component(text, name):
    assert as_component(text) == name


@given(st.text(st.characters(codec=None), max_size=20))
def test_no_text_leads_elsewhere(text):
    name = as_component(text)
    assert (
        Path("folder", name).parent == Path("folder")
        and Path(os.path.normpath(f"folder/{name}")).parent.name == "folder"
    )
    assert not any(ord(one) < 32 or 127 <= ord(one) < 160 for one in name)


def test_names_of_temporary_files_are_no_other_processes(monkeypatch):
    """Also where containers, which count their processes from 1 each, share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = {temporary_beside(Path("a", "b.json")) for _ in range(100)}
    assert len(names) == 100 and {name.parent for name in names} == {Path("a")}
    assert all(name.name.startswith(".b.json.") and name.suffix == ".tmp" for name in names)
