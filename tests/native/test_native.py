"""The compiled CPU back end: building, caching, and sharing torch's threads."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from segtrain import abn
from segtrain.abn.backends import native as native_ops
from segtrain.native import compile as compiling
from segtrain.native import folders
from tests.helpers.checkout import environment

pytestmark = pytest.mark.skipif(not compiling.compiler(), reason="no C++ compiler")

# Prints the back end, and the largest difference of a forward and backward pass from ordinary autograd.
PROGRAM = """
import os, torch
from segtrain import abn
print(abn.describe_backend("cpu"))
worst = 0.0
for dtype in (torch.float32, torch.bfloat16)[: int(os.environ.get("DTYPES", 2))]:
    for shape in ((3, 7, 9, 11), (2, 33, 40, 40)):
        torch.manual_seed(0)
        x = torch.randn(shape).to(dtype)
        grads = []
        for layer, leaf in ((abn.InPlaceABN(shape[1]), x.clone()), (abn.ScaledABN(shape[1]).double(), x.double())):
            leaf.requires_grad_()
            layer(leaf * 1).pow(2).sum().backward()
            grads.append(leaf.grad.double())
        error = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
        worst = max(worst, error if dtype == torch.float32 else error * 1e-5)
print("error", worst)
"""


def python(program, **variables):
    result = subprocess.run(
        [sys.executable, "-c", program], env={**environment(), **variables}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("instructions", ["native", "avx2", "baseline"])
def test_every_choice_of_instructions(instructions):
    if instructions == "avx2" and "avx2" not in compiling.cpu_features():
        pytest.skip("this CPU has no AVX2")
    result = python(PROGRAM, SEGTRAIN_NATIVE=instructions)
    name, error = result.stdout.splitlines()
    assert name == "native"
    assert float(error.split()[1]) < 1e-6


def test_off_and_unknown_choices():
    assert python(PROGRAM, SEGTRAIN_NATIVE="off").stdout.startswith("aten (native cannot run: SEGTRAIN_NATIVE=off)")
    assert "SEGTRAIN_NATIVE=sse9 is not one of native, avx2, baseline, off" in (
        python(PROGRAM, SEGTRAIN_NATIVE="sse9").stdout
    )


def test_without_a_compiler_torchs_kernels_are_used(tmp_path):
    result = python(PROGRAM, PATH=str(tmp_path), CXX="", SEGTRAIN_CACHE=str(tmp_path / "empty"))
    assert "aten (native cannot run: no C++ compiler was found" in result.stdout


def test_a_compiler_that_fails_is_reported(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'fatal error: disk full' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = python(PROGRAM, CXX=str(broken), SEGTRAIN_CACHE=str(tmp_path / "empty"))
    assert result.stdout.startswith("aten (native cannot run: its library could not be built: ")
    assert "disk full" in result.stdout


def test_it_is_built_once_and_said(tmp_path):
    cache = tmp_path / "cache"
    first = python("import torch; from segtrain import abn; abn.use_backend('native')", SEGTRAIN_CACHE=str(cache))
    assert "compiling the In-Place ABN kernels for this CPU" in first.stderr
    (library,) = (cache / "abn").iterdir()
    made = library.stat().st_mtime_ns
    second = python("import torch; from segtrain import abn; abn.use_backend('native')", SEGTRAIN_CACHE=str(cache))
    assert second.stderr == ""
    assert library.stat().st_mtime_ns == made


def test_several_processes_build_at_once(tmp_path):
    variables = {**environment(), "SEGTRAIN_CACHE": str(tmp_path / "cache"), "DTYPES": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=120)[0].startswith("native\n")
        assert process.returncode == 0
    left = [path.name for path in (tmp_path / "cache" / "abn").iterdir()]
    assert len(left) == 1, left  # no unfinished builds
    assert left[0].startswith("abn-float-")


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = python(PROGRAM, SEGTRAIN_CACHE=str(tmp_path / "file"), TMPDIR=str(tmp_path), DTYPES="1")
    assert result.stdout.startswith("native\n")
    assert f"{tmp_path / 'file'}" in result.stderr
    assert "SEGTRAIN_CACHE=FOLDER chooses another place" in result.stderr
    assert f"go to {tmp_path}/segtrain-" in result.stderr
    assert not list(tmp_path.glob("segtrain-*"))  # a folder of that process alone


def test_the_key_tells_cpu_compiler_and_text_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "cache"))
    built = []
    monkeypatch.setattr(compiling, "build", lambda command, *_: (built.append(command), _[-1] / "abn.so")[1])
    monkeypatch.setattr(compiling.Path, "replace", lambda self, to: to.touch())
    first = native_ops.build_library(torch.float32)
    assert native_ops.build_library(torch.float32) == first
    assert len(built) == 1
    others = {native_ops.build_library(torch.float64)}
    monkeypatch.setenv("SEGTRAIN_NATIVE", "baseline")
    others.add(native_ops.build_library(torch.float32))
    monkeypatch.setattr(compiling, "cpu_features", lambda: "flags: another machine")
    others.add(native_ops.build_library(torch.float32))
    assert len({first, *others}) == 4


def test_one_pool_of_threads_and_forked_workers_live():
    """The library uses torch's OpenMP; a second one would kill forked loader processes."""
    program = """
import os, torch
from torch.utils.data import DataLoader
from segtrain import abn
abn.use_backend("native")
torch.set_num_threads(2)
layer = abn.InPlaceABN(64)
x = torch.randn(4, 64, 64, 64)
torch.randn(300, 300) @ torch.randn(300, 300)
threads = lambda: len(os.listdir("/proc/self/task"))
layer(x.clone())
before = threads()
for _ in range(3):
    layer(x.clone()); x.mul_(1.0)
assert threads() == before
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return abn.InPlaceABN(64)(torch.randn(4, 64, 64, 64)).sum().detach()
print(len(list(DataLoader(Data(), num_workers=2, multiprocessing_context="fork"))))
maps = open("/proc/self/maps").read()
print(len({line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}))
"""
    assert python(program).stdout.split() == ["8", "1"]


def test_float64_and_other_types_are_served_by_something():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 4, 4).to(dtype)
        assert abn.InPlaceABN(3).to(torch.float64 if dtype == torch.float64 else torch.float32)(x).dtype == dtype


# ------------------------------------------------------------------------------------------- whose code is loaded


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that only copies files."""
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def build(command, source, what, work):
        (work / "built.so").write_text("ours")
        return work / "built.so"

    monkeypatch.setattr(compiling, "build", build)
    return tmp_path / "cache"


def refused(cache, reason):
    """The library goes to a private folder, and the warning gives the reason."""
    with pytest.warns(UserWarning, match=reason) as found:
        library = native_ops.build_library(torch.float32)
    assert "SEGTRAIN_CACHE=FOLDER chooses another place" in str(found[0].message)
    assert cache not in library.parents
    assert library.read_text() == "ours"
    assert stat.S_IMODE(library.parent.stat().st_mode) == stat.S_IMODE(library.parents[1].stat().st_mode) == 0o700
    return library


def test_a_cache_is_made_for_its_user_only(cache):
    library = native_ops.build_library(torch.float32)
    assert library.parent == cache / "abn"
    assert stat.S_IMODE(cache.stat().st_mode) == stat.S_IMODE(library.parent.stat().st_mode) == 0o700


def test_no_predictable_folder_under_the_temporary_one_is_looked_at(cache, tmp_path):
    first = native_ops.build_library(torch.float32)
    planted = tmp_path / f"segtrain-{os.getuid()}" / "abn" / first.name
    planted.parent.mkdir(parents=True)
    planted.write_text("theirs")
    first.unlink()
    assert native_ops.build_library(torch.float32) == first
    assert first.read_text() == "ours"
    shutil.rmtree(cache)
    cache.write_text("not a folder")
    assert refused(cache, "cannot be written") != planted


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o720, 0o1777])
def test_a_folder_that_others_write_to_is_not_used(cache, mode):
    first = native_ops.build_library(torch.float32)
    first.write_text("theirs")
    first.parent.chmod(mode)
    refused(cache, rf"others can write to {first.parent} \(mode {mode:04o}\): chmod go-w")
    with pytest.raises(OSError, match="is not loaded: others can write"):
        compiling.open_library(first)


def test_a_cache_that_others_write_to_is_not_used(cache):
    native_ops.build_library(torch.float32)
    cache.chmod(0o775)
    refused(cache, rf"others can write to {cache} \(mode 0775\)")


def test_the_default_cache_is_closed_to_others(monkeypatch, tmp_path):
    monkeypatch.delenv("SEGTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache" / "segtrain"
    default.mkdir(parents=True)
    default.chmod(0o775)
    assert folders.folder_for("abn") == default / "abn"
    assert stat.S_IMODE(default.stat().st_mode) == 0o700


def test_links_are_not_followed(cache, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    cache.mkdir(mode=0o700)
    (cache / "abn").symlink_to(tmp_path / "theirs")
    refused(cache, "is a symbolic link")
    (cache / "abn").unlink()
    library = native_ops.build_library(torch.float32)
    library.rename(tmp_path / "elsewhere")
    library.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not a regular file"):
        compiling.open_library(library)
    assert native_ops.build_library(torch.float32) == library  # built again, over the link
    assert not library.is_symlink()


@pytest.mark.parametrize("whose", ["abn", "cache", "library"])
def test_what_belongs_to_another_user_is_not_used(cache, whose, monkeypatch):
    library = native_ops.build_library(torch.float32)
    foreign = {"abn": library.parent, "cache": cache, "library": library}[whose]
    lstat = Path.lstat

    def other(self):
        found = list(lstat(self))
        if self == foreign:
            found[stat.ST_UID] = 4711
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", other)
    with pytest.raises(OSError, match=r"belongs to another user \(uid 4711\)"):
        compiling.open_library(library)
    if whose != "library":
        refused(cache, rf"{foreign} belongs to another user \(uid 4711\)")
    else:
        library.write_text("theirs")
        assert native_ops.build_library(torch.float32).read_text() == "ours"


def test_a_file_that_others_write_to_is_built_again(cache):
    library = native_ops.build_library(torch.float32)
    library.write_text("theirs")
    library.chmod(0o666)
    with pytest.raises(OSError, match=r"others can write to it \(mode 0666\)"):
        compiling.open_library(library)
    assert native_ops.build_library(torch.float32).read_text() == "ours"


def test_the_cupy_cache_is_a_checked_folder(cache, monkeypatch, tmp_path):
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    cache.mkdir()
    (cache / "cupy").mkdir()
    (cache / "cupy").chmod(0o777)
    with pytest.warns(UserWarning, match="others can write"):
        assert folders.folder_for("cupy").parent.parent == tmp_path
