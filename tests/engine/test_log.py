"""What a run logs: TensorBoard read back, fakes of wandb and MLflow, a bar on a terminal and lines in a file."""

import io
import itertools
import json
import sys
import time
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import segtrain
from segtrain import console as log
from segtrain.config import LoggingConfig, TrainerConfig
from segtrain.console import Progress
from segtrain.engine import progress_line
from segtrain.engine.sinks import RunLog
from segtrain.engine.start import chosen_options
from segtrain.engine.state import TrainState
from segtrain.errors import UsageError
from tests.helpers.runs import refused

HYPERPARAMETERS = {"optimizer.lr": 0.01, "model.weights": "none", "model.pooling_size": None, "loader.workers": 2,
                   "augmentation.extra": [{"name": "Blur"}], "inference.flip": True}  # fmt: skip
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def written(folder, **options):
    """A run of 5 steps that was stopped at step 4, after its checkpoint of step 3, and resumed."""
    config = LoggingConfig(**options)
    first = RunLog(folder, 0, config, HYPERPARAMETERS)
    for step in range(1, 5):
        first.scalars(step, {"train/loss": 1 / step, "lr/backbone": 0.1, "lr/head": 1.0, "train/gradient_norm": 2.0})
    first.image(3, "val/confusion", PICTURE)
    first.close()
    second = RunLog(folder, 3, config, HYPERPARAMETERS)
    for step in (4, 5):
        second.scalars(step, {"train/loss": 10 + step, "val/miou": None})
    second.close({"miou": 0.5})
    return folder


def test_metrics_and_tensorboard(tmp_path):
    written(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["train/loss"] for line in lines] == [1, 1 / 2, 1 / 3, 14, 15]
    assert lines[-1]["val/miou"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, round(point.value, 6)) for point in events.Scalars("train/loss")] == [
        (1, 1), (2, 0.5), (3, 0.333333), (4, 14), (5, 15),
    ]  # fmt: skip
    assert "val/miou" not in events.Tags()["scalars"]
    assert events.Scalars("lr/head")[0].value == 1.0
    assert (events.Images("val/confusion")[0].width, events.Images("val/confusion")[0].height) == (6, 4)
    assert events.Scalars("final/miou")[0].value == 0.5
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["optimizer.lr"].number_value == 0.01
    assert told["inference.flip"].number_value == 1
    assert told["model.pooling_size"].string_value == "None"
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]  # which would be other runs


# ------------------------------------------------------------------------------------------------ wandb and MLflow


def fake(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class FakeWandb:
    """Stores what is logged by run id, as the server does."""

    def __init__(self, monkeypatch):
        self.runs = {}
        self.calls = []
        fake(monkeypatch, "wandb", init=self.init, Image=lambda array: ("image", array.shape))

    def init(self, project, id, name, dir, resume, config):
        assert resume == "allow"
        self.calls.append((project, id, name, config))
        run = types.SimpleNamespace(rows=self.runs.setdefault(id, []), summary={}, ended=[], defined={})
        run.define_metric = lambda metric, step_metric=None: run.defined.update({metric: step_metric})
        run.log = run.rows.append
        run.finish = lambda exit_code: run.ended.append(exit_code)
        self.last = run
        return run


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    server = FakeWandb(monkeypatch)
    written(tmp_path / "mine", wandb=True, project="streets")
    (project, first, name, config), (_, second, *_) = server.calls
    assert (project, name) == ("streets", "mine")
    assert first == second
    assert config == HYPERPARAMETERS
    assert server.runs[first][0] == {"step": 1, "train/loss": 1.0, "lr/backbone": 0.1, "lr/head": 1.0,
                                     "train/gradient_norm": 2.0}  # fmt: skip
    assert server.runs[first][4] == {"step": 3, "val/confusion": ("image", (4, 6, 3))}
    assert server.runs[first][-1] == {"step": 5, "train/loss": 15}
    assert server.last.defined == {"step": None, "*": "step"}
    assert server.last.summary == {"final/miou": 0.5}
    assert server.last.ended == [0]
    written(tmp_path / "other", wandb=True)
    assert len(server.runs) == 2


class FakeMLflow:
    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        names = ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "log_image", "end_run")
        functions = {
            name: lambda *args, _name=name, **options: self.calls.append((_name, args, options)) for name in names
        }
        fake(monkeypatch, "mlflow", start_run=self.start_run, **functions)

    def start_run(self, run_id, run_name):
        self.calls.append(("start_run", (run_id, run_name), {}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "abc"))

    def of(self, name):
        return [(args, options) for called, args, options in self.calls if called == name]


def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
    server = FakeMLflow(monkeypatch)
    written(tmp_path / "mine", mlflow=True)
    assert server.of("set_tracking_uri")[0] == ((f"{(tmp_path / 'mlruns').as_uri()}",), {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    RunLog(tmp_path / "mine", 5, LoggingConfig(mlflow=True), {})
    assert len(server.of("set_tracking_uri")) == 2
    del server.calls[-2:]
    assert server.of("set_experiment")[0] == (("segtrain",), {})
    assert [args for args, _ in server.of("start_run")] == [(None, "mine"), ("abc", None)]
    assert server.of("log_params") == [((HYPERPARAMETERS,), {})]  # once: they cannot change
    metrics = server.of("log_metrics")
    assert metrics[0][1] == {"step": 1}
    assert metrics[-2] == (({"train/loss": 15},), {"step": 5})
    assert metrics[-1] == (({"final/miou": 0.5},), {})
    assert server.of("log_image")[0][0][1] == "val/confusion_0000003.png"
    assert [args for args, _ in server.of("end_run")] == [("KILLED",), ("FINISHED",)]


def test_names_that_mlflow_would_refuse(tmp_path, monkeypatch):
    server = FakeMLflow(monkeypatch)
    record = RunLog(tmp_path, 0, LoggingConfig(mlflow=True), {})
    record.scalars(1, {"val_iou/car (parked)": 0.5})
    assert server.of("log_metrics")[0][0] == ({"val_iou/car _parked_": 0.5},)


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_stops_before_the_run(segtrain, monkeypatch, name, package, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    refused(
        segtrain("train", "experiment=toy", f"logging.{name}=true"), f"logging.{name}=true", f"pip install {package}"
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError):
        LoggingConfig(**{name: True}).check()
    fake(monkeypatch, name)
    LoggingConfig(**{name: True}).check()


# ------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress("reading", 4)
    assert progress.bar is not None
    for done in (1, 3, 4):
        progress.show(done)
    shown = sys.stderr.getvalue()
    assert "reading:" in shown
    assert "\r" in shown
    assert progress.bar.n == 4
    assert progress.bar.disable  # closed
    assert capsys.readouterr().out == ""


def test_plain_lines_in_a_log(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    progress = Progress("reading", 40)
    for done in (2, 20, 30, 40):
        progress.show(done)
    answer = capsys.readouterr()
    assert answer.out.splitlines() == ["reading: 20 of 40, 10 s left", "reading: 40 of 40, 0 s left"]
    assert answer.err == ""


def test_one_of_several_processes_draws_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert Progress("reading", 4).bar is None
    monkeypatch.setenv("RANK", "0")
    progress = Progress("reading", 4)
    assert progress.bar is not None
    progress.close()
    assert log.bars == []


def test_bars_close_on_their_own(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Terminal())
        first, second = Progress("reading", 4), Progress("reading", 4)
    Progress("reading", 4).close()  # has none, and leaves those of others
    assert len(log.bars) == 2
    second.close()
    second.close()
    assert [bar is first.bar for bar in log.bars] == [True]
    first.close()
    assert log.bars == []


def test_the_header_names_loss_optimizer_rate_schedule_and_augmentation(finished):
    lines = (finished.parent / "output.txt").read_text().splitlines()
    assert "loss       bootstrapped, hardest=0.25" in lines
    assert "optimizer  sgd, lr=0.0025, schedule poly" in lines
    assert "augmented  segmentation, scale=[0.3, 0.5] flip=0.5" in lines


@pytest.mark.parametrize(
    ("words", "loss", "optimizer", "schedule", "augmentation"),
    [
        (["loss=focal", "loss.gamma=3"], "focal, gamma=3.0", "sgd, lr=0.0025", "poly", "segmentation, "),
        (["optimizer=adamw", "schedule=cosine", "schedule.warmup_steps=9"], "bootstrapped, hardest=0.25",
         "adamw, lr=0.0001 weight_decay=0.01", "cosine, warmup_steps=9", "segmentation, "),
        (["optimizer.nesterov=true", "optimizer.lr=0.1", "schedule=step", "augmentation=colour"],
         "bootstrapped, hardest=0.25", "sgd, lr=0.1 nesterov=true", "step, milestones=[",
         "segmentation, scale=[0.7, 2.0] flip=0.5 color=0.25"),
    ],
)  # fmt: skip
def test_what_a_group_is_called(words, loss, optimizer, schedule, augmentation):
    made = segtrain.compose(*words)
    assert chosen_options(made.loss) == loss
    assert chosen_options(made.optimizer, "lr") == optimizer
    assert chosen_options(made.schedule).startswith(schedule)
    assert chosen_options(made.augmentation, "scale", "flip").startswith(augmentation)


class Clock:
    """Time that only a test moves on."""

    now = 100.0

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def steps(monkeypatch, capsys):
    """steps([12, 3, 3], max_steps=100): the line after each of the steps, which take so many seconds; "" for none."""
    clock = Clock()
    monkeypatch.setattr(progress_line, "time", clock)

    def run(seconds, on_cpu=True, every=20, **trainer):
        config = segtrain.compose("experiment=toy", f"logging.every={every}")
        state = TrainState(TrainerConfig(**{"epochs": None, **trainer}), 100, "miou")
        line = progress_line.ProgressLine(config, state, on_cpu)
        lines = []
        for _, spent in zip(line.timed(itertools.repeat([])), seconds, strict=False):
            clock.now += spent
            state.step += 1
            line.print() if line.due else line.show_first()
            lines.append(capsys.readouterr().out)
        return lines

    return run


def test_a_slow_first_step_is_a_sign_of_life(steps):
    first, *others = steps([12, 3, 3], max_steps=11)
    assert first.startswith("step 1/11  12.0 s a step  ") and "about 2:00 min left, until " in first
    assert others == ["", ""]


def test_ten_seconds_are_a_sign_of_life_without_the_first_steps_preparations(steps):
    lines = steps([6, 2, 2, 2], max_steps=103)
    assert [bool(line) for line in lines] == [False, False, True, False]
    assert lines[2].startswith("step 3/103  2.0 s a step  ") and "about 3:20 min left" in lines[2]


def test_quick_steps_have_only_their_usual_lines(steps):
    lines = steps([1] * 7, every=5, max_steps=100)
    assert [bool(line) for line in lines] == [False] * 4 + [True] + [False] * 2
    assert "loss none" in lines[4] and "hint" not in lines[4]
    assert [bool(line) for line in steps([4] * 7, every=2, max_steps=100)] == [False, True] * 3 + [False]


def test_hours_on_the_cpu_are_worth_a_hint_once(steps):
    lines = steps([20] * 3, max_steps=1001)
    assert lines[0].count("hint") == 1 and "5:33 h on this CPU" in lines[0] and lines[1:] == ["", ""]
    for word in ("augmentation.crop_size (now [128, 256])", "trainer.batch_size (now 4)", "GPU"):
        assert word in lines[0]
    assert "hint" in steps([20] * 3, every=1, max_steps=1001)[0]
    assert "hint" not in steps([20], max_steps=1001, on_cpu=False)[0]
    assert "hint" not in steps([20], max_steps=300)[0]
