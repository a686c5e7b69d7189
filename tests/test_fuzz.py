"""A sample of what the two fuzz scripts do; they are run whole by hand."""

import subprocess
import sys

import pytest

from segtrain.cli.commands import COMMANDS
from segtrain.config.keys import known_options
from tests import fuzz_options
from tests.helpers.checkout import ROOT


def run(script, *arguments):
    """In a process that has run nothing else: once autograd has threads, it does not work in what is forked."""
    command = [sys.executable, "-m", f"tests.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10000:]


@pytest.mark.slow
def test_no_absurd_value_of_an_option_goes_wrong():
    run("fuzz_options", "--sample", "25", "--seed", "11")


@pytest.mark.slow
def test_no_damaged_file_goes_wrong():
    run("fuzz_files", "--cases", "2", "--seed", "11")


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
