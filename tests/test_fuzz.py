"""A sample of what the two fuzz scripts do; they are run whole by hand."""

import contextlib
import random

import pytest

from segtrain.cli.commands import COMMANDS
from segtrain.config.keys import known_options
from tests import fuzz_files, fuzz_options


@pytest.fixture
def apart(monkeypatch):
    """The scripts change the environment of their own process."""
    for name in ("SEGTRAIN_CACHE", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")
    with contextlib.chdir("."):
        yield


@pytest.mark.slow
def test_no_absurd_value_of_an_option_goes_wrong(apart):
    chosen = random.Random(11).sample(list(fuzz_options.cases(list(COMMANDS), [])), 25)
    bad = fuzz_options.fuzz(chosen, quick=False, show=False)
    assert not bad, "\n".join(f"{ending.case}: {ending.fault}\n{ending.text}" for ending in bad)


@pytest.mark.slow
def test_no_damaged_file_goes_wrong(apart):
    bad = fuzz_files.fuzz([], 2, seed=11, show=False)
    assert not bad, "\n".join(bad)


def test_every_option_of_every_command_is_tried():
    tried = {(case.command, case.key) for case in fuzz_options.cases(list(COMMANDS), [])}
    known = {(command, key) for command, row in COMMANDS.items() for key in known_options(row.schema)}
    assert known <= tried
    assert len(fuzz_options.VALUES) == len(set(fuzz_options.VALUES)) >= 31
    for command, dataset, key in (("train", "folder", "dataset.splits"), ("check", "mixture", "dataset.parts")):
        assert any(case[:3] == (command, dataset, key) for case in fuzz_options.cases([command], [key]))


def test_what_no_option_allows_is_called_nonsense():
    row = COMMANDS["evaluate"].schema
    for key, value in (
        ("pictures", 10**23), ("pictures", -1), ("device", "tpu"), ("boundary", None), ("checkpoint", None),
    ):  # fmt: skip
        options = row(checkpoint="a.pt")
        setattr(options, key, value)
        expected = "" if key == "checkpoint" else key
        assert fuzz_options.nonsense(row, options).partition("=")[0] == expected
    options = row(checkpoint="a.pt")
    options.inference.scales = [float("nan")]
    assert fuzz_options.nonsense(row, options) == "inference.scales=[nan]"
