"""The self-test's cases with the CUDA kernels, where there is a CUDA device, as in `segtrain info gpu_test=true`.

Everywhere: what this command refuses, reports and saves."""

import importlib.util

import pytest
import torch

from segtrain.abn import coded_selftest, device_checks, selftest
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_codes
from segtrain.abn.backends import native as native_ops
from segtrain.commands import info
from segtrain.errors import SegtrainError
from segtrain.native import compile as compiling

on_a_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="cupy is not installed"),
]


def marked(*values):
    return [pytest.param(value, marks=on_a_device, id=str(value)) for value in values]


@pytest.mark.parametrize("case", marked(*selftest.cases()) if torch.cuda.is_available() else marked("every case"))
def test_case_on_the_device(case):
    failed = [str(result) for result in selftest.check_backend(cupy_ops, "cuda", [case]) if not result.good]
    assert not failed


@pytest.mark.parametrize(
    "case", marked(*coded_selftest.coded_cases()) if torch.cuda.is_available() else marked("every case")
)
def test_coded_case_on_the_device(case):
    failed = [str(result) for result in coded_selftest.check_coder(cupy_codes, "cuda", [case]) if not result.good]
    assert not failed


@pytest.mark.parametrize("what", marked("constants, nan and infinity"))
def test_degenerate_maps_on_the_device(what):
    assert not [str(result) for result in coded_selftest.check_degenerate(cupy_codes, "cuda") if not result.good]


@pytest.mark.parametrize("what", marked("streams, graphs, devices, sizes"))
def test_what_only_a_device_can_show(what):
    assert not [str(result) for result in device_checks.check_device() if not result.good]


@pytest.mark.skipif(not compiling.compiler(), reason="no C++ compiler")
def test_results_are_reported_and_remembered(segtrain):
    """With the CPU's kernels, which share the per-element maths of the CUDA kernels."""
    results = info.run_cases(native_ops, "cpu")
    info.report(results, "the CPU")
    assert len(results) > 1000
    assert f"tested       the CPU: {len(results)} of {len(results)} checks passed" in segtrain("info").out


def test_wrong_kernels_are_reported():
    good = selftest.Result("a case", "z", 0.0, 0.0)
    with pytest.raises(SegtrainError, match=r"1 of 2 checks failed.*model\.backend=aten(.|\n)*a case: dx off by nan"):
        info.report([good, selftest.Result("a case", "dx", float("nan"), 1e-6)], "a card")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device(segtrain):
    answer = segtrain("info", "gpu_test=true")
    assert answer.status == 2
    assert "gpu_test=true needs a CUDA device" in answer.err
    assert "segtrain info gpu_test=true" in segtrain("info").out
