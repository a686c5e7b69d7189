#!/usr/bin/env python
"""Everything that only a GPU can show, in one command: correctness, speed, memory, and a training with its scores.

    python scripts/gpu_report.py --minutes 8 --output FOLDER     about eight minutes on one CUDA device
    python scripts/gpu_report.py --minutes 40                    more networks, crops and compiled forms
    python scripts/gpu_report.py --tiny                          the same on the CPU with toy sizes, to test the script
    python scripts/gpu_report.py --part layer --part steps       some parts

Needs the package or a checkout with PYTHONPATH, torch, and CuPy for the kernels; what else is missing is named, and the
parts that need it are left out. Each part is a process of its own with a budget of time: it measures what matters most
first, and what it has no time for is named. Every figure is printed, and stored in FOLDER/gpu.json, when it is known.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_layer import HERE, Budget, Row, command, layer, selftest
from gpu_steps import crops, profile, steps

LARGEST_LINES = 80
TOY = ["trainer.max_steps=4", "dataset.scenes=6", "dataset.val_scenes=2", "augmentation.crop_size=[64,96]",
       "augmentation.scale=[0.3,0.5]", "model.backbone=resnet18", "model.head_channels=8"]  # fmt: skip


# ------------------------------------------------------------------------------------------------ 5. the main job


def job(budget: Budget) -> Iterator[Row]:
    """Trainings by the command line on this device and on the CPU, resumed ones, and the scores of both."""
    for name in ("hydra", "albumentations"):
        importlib.import_module(name)
    output = Path(os.environ["GPU_REPORT"]) / "runs"
    size = TOY if budget.tiny else []
    runs = {}
    for where in dict.fromkeys((budget.device, "cpu")):
        run = output / f"toy-{where}"
        seconds, status, text = command(["train", "experiment=toy", f"run={run}", f"device={where}", *size], budget)
        if status:
            yield {"training": where, "failed": text.strip().splitlines()[-1] if text.strip() else f"status {status}"}
            return
        losses = [row["train/loss"] for row in log_of(run) if "train/loss" in row]
        runs[where] = run
        yield {"training": where, "seconds": seconds, "first loss": losses[0], "last loss": losses[-1],
               "mIoU %": 100 * json.loads((run / "evaluation.json").read_text())["miou"]}  # fmt: skip
    for where in runs:
        seconds, status, text = command(
            ["evaluate", f"run={runs[budget.device]}", f"device={where}", f"output={output / f'scores-{where}'}"],
            budget,
        )
        found = next((output / f"scores-{where}").rglob("evaluation.json"), None)
        score = json.loads(found.read_text())["miou"] if found else math.nan
        yield {"evaluation": where, "mIoU %": 100 * score, "seconds": seconds, **({"failed": text} if status else {})}
    seconds, status, text = command(
        ["verify-resume", "experiment=toy", f"device={budget.device}", "trainer.deterministic=true",
         f"output={output / 'resumed'}", *size], budget)  # fmt: skip
    last = text.strip().splitlines()[-1] if text.strip() else ""
    yield {"resumed on": budget.device, "seconds": seconds, "status": status, "verdict": last}


def log_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the report


# In order of value, with their shares of the time.
PARTS: dict[str, tuple[Callable[[Budget], Iterator[Row]], float]] = {
    "selftest": (selftest, 0.2), "layer": (layer, 0.17), "steps": (steps, 0.3), "job": (job, 0.15),
    "crops": (crops, 0.14), "profile": (profile, 0.04),
}  # fmt: skip


def in_words(row: Row) -> str:
    """The row as one line."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return " | ".join(f"{key} {shown(value)}" for key, value in row.items() if value not in ("", []))


def run_part(name: str, options: argparse.Namespace) -> None:
    """In a process of its own: print each row, and add it to the part's file."""
    budget = Budget(options.device, options.tiny, options.minutes > 20, time.monotonic() + options.seconds)
    try:
        for row in PARTS[name][0](budget):
            add_row(options.output / f"{name}.jsonl", name, row)
    except ModuleNotFoundError as error:
        add_row(options.output / f"{name}.jsonl", name, {"left out": f"{error.name} is not installed"})


def add_row(path: Path, name: str, row: Row) -> None:
    print(f"{name:9s} {in_words(row)}", flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def machine(device: str) -> Row:
    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    with contextlib.suppress(ImportError):
        found["cupy"] = importlib.import_module("cupy").__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda,
                  "processors": properties.multi_processor_count}  # fmt: skip
    return found


def gather(output: Path, parts: list[str], about: Row) -> dict[str, Any]:
    """All rows so far, which gpu.json then holds."""
    content: dict[str, Any] = {"machine": about}
    for name in parts:
        path = output / f"{name}.jsonl"
        content[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    temporary = output / ".gpu.json.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(output / "gpu.json")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", type=Path, default=Path("segtrain-out/gpu-report"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--part", action="append", choices=list(PARTS), default=[])
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of a part, in its own process
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    options.output = options.output.absolute()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu_report: torch sees no CUDA device here; --tiny runs every part on the CPU with toy sizes\n")
    if options.seconds is not None:
        run_part(options.part[0], options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    parts = options.part or list(PARTS)
    about = machine(options.device)
    print(f"machine   {in_words(about)}", flush=True)
    ends = time.monotonic() + 60 * options.minutes
    for number, name in enumerate(parts):
        (options.output / f"{name}.jsonl").unlink(missing_ok=True)
        left = max(0.0, ends - time.monotonic())
        seconds = left if options.tiny else left * PARTS[name][1] / sum(PARTS[other][1] for other in parts[number:])
        run_in_process(name, seconds, options)
        gather(options.output, parts, about)
    summary(gather(options.output, parts, about), parts)
    print(f"stored    {options.output / 'gpu.json'}", flush=True)


def run_in_process(name: str, seconds: float, options: argparse.Namespace) -> None:
    """A failing part, also one that breaks the device for its process, is named and passed over."""
    words = [sys.executable, __file__, "--part", name, "--seconds", f"{seconds:.0f}", "--minutes", str(options.minutes),
             "--output", str(options.output), *(["--tiny"] if options.tiny else [])]  # fmt: skip
    environment = {**os.environ, "GPU_REPORT": str(options.output)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    try:
        answer = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, timeout=seconds + 60)
        fault = f"exit status {answer.returncode}: {answer.stderr.strip()[-300:]}" if answer.returncode else ""
    except subprocess.TimeoutExpired:
        fault = f"ended after {seconds + 60:.0f} s"
    if fault:
        add_row(options.output / f"{name}.jsonl", name, {"failed": fault})


def summary(content: dict[str, Any], parts: list[str]) -> None:
    """At most 80 lines, the first rows of each part, what failed before all else."""
    rows = [(name, row) for name in parts for row in content[name]]
    bad = [(name, row) for name, row in rows if row.get("failed") or row.get("good") is False]
    share = max(3, (LARGEST_LINES - 4 - min(len(bad), 20)) // len(parts))
    print(f"\n{'=' * 40} {len(rows)} rows, {len(bad)} failed", flush=True)
    for name, row in bad[:20]:
        print(f"FAILED {name}: {in_words(row)[:200]}")
    for name in parts:
        for row in [row for row in content[name] if "left out" not in row][:share]:
            print(f"{name:9s} {in_words(row)[:200]}", flush=True)


if __name__ == "__main__":
    main()
