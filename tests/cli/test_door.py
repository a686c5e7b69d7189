"""Every error leaves by one door: one sentence, the right exit status, and no job of a sweep is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segtrain.cli import entry
from segtrain.console import printable
from segtrain.engine.preemption import Preempted
from segtrain.errors import REQUEUE, DataError, UsageError
from tests.helpers.checkout import TINY, environment
from tests.helpers.runs import refused

# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr=${oc.env:NO_SUCH}", "optimizer.lr: the environment has no variable NO_SUCH"),
        ("optimizer.lr=???", "optimizer.lr has no value (???): give optimizer.lr=number"),
        ("model.weights=null", "model.weights must not be null: give a value, such as model.weights=none (initial"),
        ("optimizer.lr=null", "optimizer.lr must not be null: give a value, such as optimizer.lr=0.0025 ("),
        ("optimizer.lr=${x}", "optimizer.lr: interpolation key 'x' not found"),
        ("device=${trainer}", "device"),
        ("dataset.name=x", "dataset.name=x: write dataset=x, which sets all options of the dataset"),
        ("experiment=1", "experiment=1 does not exist. Available: "),
        ("experiment=[1]", "experiment=1 does not exist. Available: "),
        ("experiment=", "experiment= does not exist"),
        ("dataset=[]", "dataset=[] does not exist"),
        ("dataset=[kitti,streets]", "dataset=['kitti', 'streets'] does not exist"),
        ("augmentation.extra=${trainer}", "augmentation.extra must be a list of values, got "),
        ("model.backbone_options=${trainer}", "model.backbone_options must be a mapping, got "),
        ("inference.scales=[[1]]", "inference.scales"),
        ("trainer.batch_size=100000000000000000000000", "trainer.batch_size must be at least 2 and at most 65536, got"),
        ("trainer.epochs=inf", "trainer.epochs must be greater than 0 and at most 1000000.0 or null, got inf"),
        ("optimizer.clip_norm=1e-300", "optimizer.clip_norm must be greater than 0 and at least 1e-12 or null, got 1e"),
        ("schedule.power=inf", "schedule.power must be at least 0 and at most 100, got inf"),
        ("augmentation.scale=[1e99,1e99]", "each greater than 0 and at most 100, in ascending order, got [1e+99"),
        ("logging.pictures=100000000000000000000000", "at most 10000"),
        ("model.weights_taxonomy=vistas_to_cityscapes", "without model.weights=FILE there is nothing to map"),
        ("inference.name=/../../ESCAPED", "inference.name must be a name for a file"),
        ("inference.name='a\x1bb'", "inference.name must be a name for a file"),
        ("optimizer.lr=caf\udce9", "optimizer.lr=caf"),
        ("trainer.compile=-1", "trainer.compile must be true or false, got '-1'"),
        ("optimizer.fused=7", "optimizer.fused must be true or false, got '7'"),
    ],
)  # fmt: skip
def test_what_no_option_allows_is_one_sentence(segtrain, tmp_path, word, message):
    refused(segtrain("train", "trainer.epochs=null", "trainer.max_steps=9", word), message)
    assert not list(tmp_path.glob("*"))


def test_a_folder_name_is_taken_as_typed(segtrain):
    name = "runs of ${USER} \\${x}"
    assert segtrain("train", f"run={name}", "--print-run").out == f"{name}\n"
    answer = segtrain("evaluate", "checkpoint=${oc.env:HOME}/x.pt")
    refused(answer, "no checkpoint file ${oc.env:HOME}/x.pt")


def test_a_recipe_of_none_is_no_recipe(segtrain):
    plain, none = (segtrain("train", *words, "--print-run") for words in ([], ["experiment=null"]))
    assert plain.status == none.status == 0
    assert plain.out == none.out


# ------------------------------------------------------------------------------------------------ sweeps


@pytest.fixture
def jobs(monkeypatch):
    """What the jobs of a sweep do, by their seed: raise it, or be noted."""
    done, planned = [], {}

    def start(command, options):
        done.append(options.trainer.seed)
        if options.trainer.seed in planned:
            raise planned[options.trainer.seed]

    monkeypatch.setattr(entry, "start", start)
    return done, planned


def test_a_failed_job_of_a_sweep_does_not_stop_the_others(segtrain, jobs):
    done, planned = jobs
    planned |= {1: DataError("this one is bad"), 2: OSError(28, "No space left on device", "here")}
    answer = segtrain("train", "-m", "trainer.seed=1,2,3", "experiment=toy")
    assert done == [1, 2, 3]
    refused(answer, "this one is bad", "cannot write or read here: No space left", status=1)
    assert answer.err.splitlines()[-3:] == [
        "segtrain: 2 of 3 jobs of the sweep failed:",
        "  trainer.seed=1 experiment=toy",
        "  trainer.seed=2 experiment=toy",
    ]


def test_a_sweep_ends_with_the_status_of_its_first_failure(segtrain, jobs):
    _, planned = jobs
    planned |= {2: UsageError("an option that only its start refuses"), 3: DataError("this one is bad")}
    assert segtrain("train", "-m", "trainer.seed=1,2,3", "experiment=toy").status == 2


def test_a_stop_request_ends_a_sweep_with_its_status(segtrain, jobs):
    done, planned = jobs
    planned[2] = Preempted("saved", REQUEUE)
    answer = segtrain("train", "-m", "trainer.seed=1,2,3", "experiment=toy")
    refused(answer, "segtrain: saved", status=REQUEUE)
    assert done == [1, 2]
    assert "1 of 3 jobs have not begun: start the same command again" in answer.out


def test_a_wrong_option_ends_a_sweep_before_its_first_job(segtrain, jobs):
    answer = segtrain("train", "-m", "trainer.seed=1,x", "experiment=toy")
    refused(answer, "trainer.seed must be a whole number, got 'x'")
    assert not jobs[0]


def test_a_sweep_shows_the_options_and_folders_of_all_jobs(segtrain):
    words = ["train", "-m", "trainer.seed=1,2", "experiment=toy"]
    shown = list(yaml.safe_load_all(segtrain(*words, "--cfg", "job").out))
    assert [options["trainer"]["seed"] for options in shown] == [1, 2]
    assert segtrain(*words, "--print-run").out == "runs/toy-trainer.seed=1\nruns/toy-trainer.seed=2\n"


def test_a_sweep_by_a_launcher_of_hydra_ends_by_the_same_door(segtrain):
    words = ["evaluate", "-m", "hydra/launcher=basic", "checkpoint=a.pt", "pictures=1,2"]
    refused(segtrain(*words), "no checkpoint file a.pt")
    answer = segtrain("train", "-m", "hydra/launcher=basic", "optimizer.lr=-1,-2")
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == "segtrain: optimizer.lr must be greater than 0, got -1.0"
    assert "Traceback" not in answer.err


# ------------------------------------------------------------------------------------------------ names and launchers


def test_file_names_that_are_no_utf8(scenes, tmp_path):
    """Train, list and check, with one as data folder and run folder."""
    odd = b"caf\xe9"
    (tmp_path / "data").symlink_to(scenes)
    Path("data").rename(odd.decode(errors="surrogateescape"))
    data = [b"dataset.root=" + odd, b"dataset.scenes=6", b"dataset.val_scenes=3"]
    small = [word.encode() for word in (
        "model.output_stride=16", "model.head_channels=8", "augmentation.crop_size=[64,96]", "trainer.epochs=null",
        "augmentation.scale=[0.3,0.5]", "trainer.max_steps=1", "trainer.batch_size=2", "loader.workers=0",
        "device=cpu", f"plugins=[{TINY}]", "model.backbone=tiny",
    )]  # fmt: skip
    for words, end in (
        ([b"train", *data, *small, b"run=r" + odd], b"tensorboard --logdir r" + odd),
        ([b"check", b"dataset=streets", *data, b"output=c" + odd], b"c" + odd + b"/report.json"),
        ([b"runs", b"root=."], b"1 of 1  finished"),
        ([b"train", *data, b"run=r" + odd, b"--print-run"], b"r" + odd),
    ):
        strict = environment() | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
        answer = subprocess.run([sys.executable, "-m", "segtrain", *words], env=strict, capture_output=True)
        assert answer.returncode == 0, answer.stderr
        assert b"Traceback" not in answer.stderr
        assert end in answer.stdout.splitlines()[-1]
    assert b"broken" not in answer.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2, but no RANK and no MASTER_ADDR and no MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "the environment has WORLD_SIZE=two, which is no number: start several processes with"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_half_a_launcher_is_refused(segtrain, monkeypatch, variables, message):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(segtrain("train", "experiment=toy"), message)


def test_what_is_printed_commands_no_terminal(segtrain):
    answer = segtrain("evaluate", "checkpoint=a\x1b]0;owned\x07\u202eb.pt")
    refused(answer, "a\\x1b]0;owned\\x07\\u202eb.pt")
    assert printable("a\n\tb\x9b1m ä日\udce9") == "a\n\tb\\x9b1m ä日\udce9"
    assert printable("a\nb", inline=True) == "a\\nb"


def test_too_little_memory_is_one_sentence(segtrain, monkeypatch):
    def start(command, options):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(entry, "start", start)
    refused(segtrain("train", "experiment=toy"), "too little memory (Unable to allocate 9 TiB)", status=1)


def test_what_torchrun_prints_is_announced(segtrain, monkeypatch):
    assert "torchrun" not in segtrain("nonsense").err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "torchrun itself ends with status 1; the traceback that follows" in segtrain("nonsense").err
    assert "torchrun" not in segtrain("--version").err


@pytest.mark.parametrize("folder", [".", "there"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["runs"], "runs.csv"), (["weights", "fetch=torchvision:resnet18"], "resnet18-f37072fd.pth"),
        (["convert", "input=x.pth", "form=official"], "weights.safetensors"), (["report", "run=r"], "report.html"),
    ],
)  # fmt: skip
def test_a_folder_in_place_of_a_file_to_write_is_refused_before_anything_else(segtrain, words, name, folder):
    Path("there").mkdir()
    Path("runs").mkdir()
    refused(segtrain(*words, f"output={folder}"), f"output={folder} is a folder: give the ", str(Path(folder) / name))
