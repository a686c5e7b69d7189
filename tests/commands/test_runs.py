"""`segtrain runs`: a line for every run, from its small files."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from segtrain.commands.runs import runs
from segtrain.config import RunsConfig
from tests.helpers.checkout import environment
from tests.helpers.runs import refused, small_run

DAY = 24 * 3600


def make(folder, name, max_steps=40, scores=(), steps=0, age=DAY, state=None, evaluation=None, seed=None, **options):
    """The files that a training leaves; scores: (step, mIoU). options: further ones of config.yaml, by group."""
    run = folder / name
    run.mkdir(parents=True)
    trainer = {"max_steps": max_steps} | ({} if seed is None else {"seed": seed})
    (run / "config.yaml").write_text(json.dumps({"name": name, "trainer": trainer, **options}))
    lines = [{"step": step, "train/loss": 1.0} for step in range(1, steps + 1)]
    lines += [{"step": step, "val/miou": miou} for step, miou in scores]
    lines.sort(key=lambda line: line["step"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (run / "evaluation.json").write_text(json.dumps({"step": evaluation, "miou": 0.1}))
    if state is not None:
        (run / "state.json").write_text(json.dumps(state))
    then = time.time() - age
    for path in run.iterdir():
        os.utime(path, (then, then))
    return run


def listed(tmp_path):
    return {row.name: row for row in runs(RunsConfig(str(tmp_path / "runs")))}


def test_a_line_for_every_run_the_newest_last(segtrain, tmp_path):
    root = tmp_path / "runs"
    make(root, "done", scores=[(20, 0.5), (40, 0.4)], steps=40, evaluation=40, age=3 * DAY)
    make(root, "cut", scores=[(20, 0.25)], steps=31, age=2 * DAY)
    make(root, "at_work", steps=7, age=5)
    make(root, "by_epochs", max_steps=None, steps=3, age=DAY)
    answer = segtrain("runs")
    assert answer.status == 0, answer
    lines = [line.split("  ") for line in answer.out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [row[0] for row in cells] == ["run", "done", "cut", "by_epochs", "at_work"]
    assert cells[1][1:6] == ["40 of 40", "finished", "40.0", "50.0", "20"]
    assert cells[2][1:6] == ["31 of 40", "stopped", "25.0", "25.0", "20"]
    assert cells[3][1:6] == ["3 of ?", "stopped", "-", "-", "-"]
    assert cells[4][1:3] == ["7 of 40", "running?"]
    ends = {answer.out.splitlines()[i].index(word) + len(word) for i, word in ((0, "mIoU %"), (1, "40.0"), (2, "25.0"))}
    assert len(ends) == 1  # aligned


def test_the_state_file_has_the_last_word(tmp_path):
    root = tmp_path / "runs"
    status = {"step": 12, "max_steps": 900, "reason": ""}
    now = time.time()
    make(root, "alive", max_steps=None, steps=9, state=status | {"state": "running", "heartbeat": now - 30})
    make(root, "dead", steps=9, age=1, state=status | {"state": "running", "heartbeat": now - 900})
    make(root, "ill", steps=9, state=status | {"state": "failed", "heartbeat": now, "reason": "the loss is nan"})
    make(root, "done", evaluation=900, steps=9, state=status | {"step": 900, "state": "finished", "heartbeat": 0})
    found = listed(tmp_path)
    assert {name: row.state for name, row in found.items()} == {
        "alive": "running", "dead": "stopped", "ill": "failed", "done": "finished",
    }  # fmt: skip
    assert (found["alive"].step, found["alive"].max_steps) == (12, 900)
    assert found["done"].step == 900
    assert found["ill"].note == "the loss is nan"


def test_what_is_no_run_is_skipped_and_what_is_broken_is_named(tmp_path, segtrain):
    root = tmp_path / "runs"
    (root / "notes").mkdir(parents=True)
    (root / "file").touch()
    (root / "other").mkdir()
    (root / "other" / "config.yaml").write_text("services: {}\n")
    good = make(root, "good", scores=[(20, 0.5)], steps=20)
    with (good / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "trai')  # killed while it wrote
    (make(root, "a", steps=3) / "config.yaml").write_text("a: [\n")
    (make(root, "b", steps=3, evaluation=3) / "evaluation.json").write_text('{"miou": ')
    (make(root, "c", steps=3) / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n{"step": 3}\n')
    (make(root, "d", steps=3) / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    (make(root, "e", steps=3) / "state.json").write_text("[]")
    found = listed(tmp_path)
    assert {name: row.note for name, row in found.items()} == {
        "good": "", "a": "config.yaml is broken", "b": "evaluation.json is broken",
        "c": "metrics.jsonl, line 2 is broken", "d": "metrics.jsonl, line 1 is broken", "e": "state.json is broken",
    }  # fmt: skip
    assert (found["good"].step, found["c"].step) == (20, 3)
    assert "config.yaml is broken" in segtrain("runs").out


def test_other_folders(segtrain, tmp_path):
    refused(segtrain("runs"), "root=runs", "no such folder")
    (tmp_path / "runs").mkdir()
    assert segtrain("runs").out == "no runs in runs\n"
    make(tmp_path / "my (runs)", "one")
    for words in (["my (runs)"], ["root=my (runs)"]):
        assert "one" in segtrain("runs", *words).out


def test_hundreds_of_runs_are_quick_and_need_no_torch(tmp_path):
    for i in range(300):
        make(tmp_path / "runs", f"run{i}", steps=200, scores=[(100, 0.3), (200, 0.4)])
    program = (
        "import sys, time; from segtrain.cli.entry import run; begun = time.process_time(); run(['runs']); "
        "print(time.process_time() - begun, 'torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    seconds, torch = answer.stdout.splitlines()[-1].split()
    assert torch == "False"
    assert float(seconds) < 3  # of the processor; about 0.6 when nothing else runs


def test_what_a_real_run_leaves_is_understood(segtrain, scenes, tmp_path):
    assert segtrain("train", *small_run(scenes, "name=real", "model.backend=aten")).status == 0
    row = listed(tmp_path)["real"]
    assert (row.step, row.max_steps, row.state, row.best_step) == (4, 4, "finished", 4)
    assert row.miou == json.loads((tmp_path / "runs/real/evaluation.json").read_text())["miou"]


# ------------------------------------------------------------------------------------------------ sweeps


def sweep(root, **more):
    """Two rates with three seeds each, scored 0.1 to 0.6, and one run of the third rate that has failed."""
    for number, (rate, seed) in enumerate([(rate, seed) for rate in (0.1, 0.2) for seed in (0, 1, 2)]):
        score = (number + 1) / 10
        loader = {"workers": number}
        make(root, f"toy-lr={rate}-seed={seed}", scores=[(20, score + 0.01), (40, score)], evaluation=40, seed=seed,
             optimizer={"name": "sgd", "lr": rate}, loader=loader, **more)  # fmt: skip
    failed = {"state": "failed", "step": 3, "max_steps": 40, "reason": f"the loss is nan\nat {'x' * 200}"}
    make(root, "toy-lr=9-seed=0", seed=0, optimizer={"name": "sgd", "lr": 9}, state=failed, loader={}, **more)


def rows_of(text):
    return [line.split() for line in text.splitlines()]


def test_seeds_of_a_sweep_become_one_line_with_mean_and_spread(segtrain, tmp_path):
    sweep(tmp_path / "runs")
    answer = segtrain("runs", "sort=miou")
    table = rows_of(answer.out)
    assert " ".join(table[0]) == "run step state mIoU % +- best % +- at step lr seed last written"
    assert " ".join(table[1][:12]) == "toy-lr=0.2 40 of 40 finished 50.0 10.0 51.0 10.0 - 0.2 0,1,2"  # 40, 50, 60 %
    assert " ".join(table[2][:12]) == "toy-lr=0.1 40 of 40 finished 20.0 10.0 21.0 10.0 - 0.1 0,1,2"
    assert " ".join(table[3][:12]) == "toy-lr=9-seed=0 3 of 40 failed - - - - - 9 0"
    line = answer.out.splitlines()[3]
    assert "the loss is nan\\nat xxx" in line and line.endswith("...") and len(line) < 200
    assert "mean and standard deviation" in answer.out.splitlines()[4]
    assert len(table) == 5


def test_every_run_of_a_sweep(segtrain, tmp_path):
    sweep(tmp_path / "runs")
    table = rows_of(segtrain("runs", "seeds=each", "sort=name").out)
    assert [row[0] for row in table[1:]] == sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert " ".join(table[0]) == "run step state mIoU % best % at step lr seed last written"
    assert [row[0] for row in rows_of(segtrain("runs", "seeds=each", "sort=best").out)[1:]][:2] == [
        "toy-lr=0.2-seed=2", "toy-lr=0.2-seed=1",
    ]  # fmt: skip


def test_seeds_without_a_best_score_are_listed(segtrain, tmp_path):
    """Every validation of the second one was by another inference than it has now."""
    common = {"evaluation": 40, "steps": 40}
    make(tmp_path / "runs", "toy-seed=0", seed=0, scores=[(20, 0.5), (40, 0.4)], **common)
    run = make(tmp_path / "runs", "toy-seed=1", seed=1, scores=[(40, 0.6)], **common)
    (run / "environment.json").write_text('[{"other_inference_until": 40}]')
    answer = segtrain("runs")
    assert answer.status == 0, answer
    assert " ".join(rows_of(answer.out)[1][:11]) == "toy 40 of 40 finished 50.0 14.1 - - - 0,1"


def test_runs_that_differ_in_more_than_the_seed_are_no_group(tmp_path, segtrain):
    root = tmp_path / "runs"
    common = {"evaluation": 40, "scores": [(40, 0.5)]}
    make(root, "a", seed=0, inference={"flip": True}, **common)
    make(root, "b", seed=1, inference={"flip": False}, **common)
    make(root, "c", seed=2, inference={"flip": False}, steps=30, scores=[(30, 0.9)])  # is not finished
    assert [row[0] for row in rows_of(segtrain("runs", "sort=name").out)] == ["run", "a", "b", "c"]


def test_a_file_has_every_run_and_every_option_that_differs(segtrain, tmp_path):
    sweep(tmp_path / "runs", model={"std": [0.1, 0.2]})
    answer = segtrain("runs", "output=runs (1).csv", "sort=miou")
    assert answer.out.splitlines()[-1] == "runs (1).csv"
    with Path("runs (1).csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "state", "step", "max_steps", "miou", "best_miou", "best_step", "optimizer.lr",
                             "loader.workers", "trainer.seed", "last_written", "note"]  # fmt: skip
    assert [row["miou"] for row in rows] == ["0.6", "0.5", "0.4", "0.3", "0.2", "0.1", ""]
    assert [row["optimizer.lr"] for row in rows] == ["0.2"] * 3 + ["0.1"] * 3 + ["9"]
    assert rows[-1]["note"].endswith("x" * 200) and rows[-1]["loader.workers"] == "null"


def test_an_option_that_came_later_is_no_difference(segtrain, tmp_path):
    make(tmp_path / "runs", "old", model={"backbone": "resnet18"})
    make(tmp_path / "runs", "new", model={"backbone": "resnet18", "frozen": [], "keep": "exact"})
    make(tmp_path / "runs", "other", model={"backbone": "resnet18", "frozen": ["backbone"]})
    lines = rows_of(segtrain("runs", "sort=name").out)
    assert " ".join(lines[0]) == "run step state mIoU % best % at step frozen last written"
    assert ["[]" in line for line in lines[1:]] == [True, True, False]


def test_the_papers_table_takes_no_options_of_the_list(segtrain):
    for word in ("sort=miou", "seeds=each", "output=a.csv"):
        refused(segtrain("runs", "table=paper", word), word, "table=paper is not the list of runs")


def test_what_a_recipe_or_a_choice_brings_along_has_no_column(segtrain, tmp_path):
    root = tmp_path / "runs"
    for number in range(4):
        first = number < 2
        make(
            root, f"run{number}", experiment="toy" if first else "streets", seed=None,
            model={"stride": 16 if first else 8}, optimizer={"name": "sgd" if number % 2 else "adamw",
            "momentum": 0.9 if number % 2 else 0, "lr": number},
        )  # fmt: skip
    lines = segtrain("runs", "sort=name").out.splitlines()
    assert " ".join(lines[0].split()) == "run step state mIoU % best % at step experiment optimizer lr last written"
    assert lines[-1] == "2 more options differ (model.stride, optimizer.momentum): output=runs.csv has all"
