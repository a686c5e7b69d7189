#!/usr/bin/env python
"""Memory, FLOPs and time of a training step in every form, those of the compiler included: one table, one picture.

    python scripts/bench_memory.py                             kept bytes, peak and FLOPs, counted on fake tensors
    python scripts/bench_memory.py --peak --time 5             also the measured peak and time of a step on the CPU
    python scripts/bench_memory.py --networks resnet50 --forms standard,compiled,4bit
    python scripts/bench_memory.py --tiny                      a ResNet-18 at 64 pixels, in three forms

The step is forward, loss and backward of DeepLabV3 at stride 8 with 19 classes in float32. "kept" is alive between
forward and backward; "peak" is the most that is alive in backward, gradients of weights included. A compiled network is
BatchNorm under torch.compile with trainer.memory_budget: its kept bytes and FLOPs are those of the graphs that the
compiler makes. Their peak is given twice: "peak" has every operation of a graph make its result, and "plan" is what
Inductor itself computes for its code, whose operations are fused and sorted.

--peak: resident memory of one step above what is there before it, measured by the kernel, each form in a process of
its own (Linux). --time: seconds of a step, medians of that many rounds in which the forms take turns: by the clock on
the wall, and of the processor, which other programs disturb less.

Figures go to memory.json and memory.png in --output. Those that memory.json has already are not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_plan import RandomStep, peak_of_step
from PIL import Image, ImageDraw, ImageFont

import segtrain
from segtrain.abn.benchmark import Clock, medians
from segtrain.commands.plan_picture import COLORS, INK
from segtrain.config import TrainConfig
from segtrain.errors import UsageError
from segtrain.losses import CrossEntropy
from segtrain.models.execution import run_as_graph
from segtrain.models.memory import Saving, training_step_costs

BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1)
FORMS = (
    Saving("standard", "batch_norm", pooling=False, loss=False),
    Saving("standard + own loss", "batch_norm"),
    *(Saving(f"compiled {budget}", "batch_norm", budget=budget) for budget in BUDGETS),
    Saving("blocks", "batch_norm", recompute="blocks"),
    Saving("in place"),
    Saving("in place + blocks", recompute="blocks"),
    Saving("grouped", recompute="grouped"),
    Saving("identity_input", recompute="identity_input"),
    Saving("both", recompute="both"),
    Saving("8bit", keep="8bit"),
    Saving("4bit", keep="4bit"),
)
NETWORKS = ("resnet50", "resnext101", "wider_resnet38")
TINY = ("standard", "compiled 0.3", "8bit")
Figures = dict[str, float]

# ---------------------------------------------------------------------------------------------------- counted


class Planned(Exception):
    """Ends a compilation once Inductor has planned its memory."""


def planned_peak(graph: torch.fx.GraphModule, inputs: Any, options: dict[str, Any]) -> int:
    """Bytes at the peak of the code that Inductor would make of a graph: what it may free, and what it returns."""
    from torch._inductor import memory
    from torch._inductor.compile_fx import compile_fx_inner

    found: list[int] = []
    reorder = memory.reorder_for_peak_memory

    def last_order(nodes: Any, *names: Any) -> Any:
        found.append(memory.prepare_planning_info(reorder(nodes, *names), *names)[0])
        raise Planned

    with mock.patch.object(memory, "reorder_for_peak_memory", last_order):
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:
            if not found:
                raise
    return found[0]


def counted(network: str, form: Saving, batch: int, side: int, plan: bool) -> Figures:
    """Kept bytes, peak and FLOPs; empty where the network has no such form."""
    plans: list[int] = []

    def make_code(graph: Any, inputs: Any, around: Any, **options: Any) -> Any:
        run = run_as_graph(torch.fx.GraphModule(graph, graph.graph.__deepcopy__({})), around=around)
        if plan and options.get("is_backward"):
            plans.append(planned_peak(graph, inputs, options))
        return run

    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        try:
            costs = training_step_costs(form, network, CrossEntropy(), batch, (side, side), make_code=make_code)
        except UsageError:  # the network has no such blocks
            return {}
    return {"kept": costs.kept, "peak": costs.peak, "flops": costs.flops} | ({"plan": max(plans)} if plans else {})


# ---------------------------------------------------------------------------------------------------- measured


def step_config(network: str, form: Saving, side: int) -> TrainConfig:
    words = [f"model={network}", f"model.norm={form.norm}", f"model.keep={form.keep}"]
    words += [f"model.recompute={form.recompute}", f"augmentation.crop_size=[{side},{side}]"]
    if form.budget is not None:
        words += ["trainer.compile=true", f"trainer.memory_budget={form.budget}"]
    return segtrain.compose(*words, "dataset=cityscapes", "device=cpu", "trainer.max_steps=9", "loss=cross_entropy")


def measured_peak(network: str, form: Saving, batch: int, side: int) -> float:
    command = [sys.executable, __file__, "--networks", network, "--batch", str(batch), "--crop", str(side)]
    output = subprocess.run([*command, "--one-peak", form.name], capture_output=True, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def measured_times(network: str, forms: list[Saving], batch: int, side: int, rounds: int) -> dict[str, Figures]:
    """Seconds of a step of each form: "time", and "cpu" of all threads."""

    def timed(step: RandomStep) -> tuple[float, ...]:
        with Clock("cpu") as clock:
            step(batch, side)
        return clock.seconds, clock.processor

    steps = {form.name: partial(timed, RandomStep(step_config(network, form, side))) for form in forms}
    return {name: {"time": wall, "cpu": cpu} for name, (wall, cpu) in medians(steps, rounds).items()}


# ---------------------------------------------------------------------------------------------------- shown

COLUMNS = ("form", "kept MiB", "", "peak MiB", "", "plan MiB", "FLOPs", "measured MiB", "time", "CPU")


def table(network: str, rows: dict[str, Figures]) -> list[str]:
    """Lines: bytes with their ratio to the first form, FLOPs and time over the second."""
    first = next(iter(rows.values()))
    second = rows.get(FORMS[1].name, first)
    lines = [network, "{:20}{:>10}{:>7}{:>10}{:>7}{:>10}{:>9}{:>14}{:>8}{:>8}".format(*COLUMNS)]
    for name, row in rows.items():
        cells = [f"{row['kept'] / 2**20:.0f}", f"{row['kept'] / first['kept']:.3f}"]
        cells += [f"{row['peak'] / 2**20:.0f}", f"{row['peak'] / first['peak']:.3f}"]
        cells += [f"{row['plan'] / 2**20:.0f}" if "plan" in row else "", f"{row['flops'] / second['flops'] - 1:+.1%}"]
        cells += [f"{row['measured'] / 2**20:.0f}" if "measured" in row else ""]
        cells += [f"{row[key] / second[key]:.3f}" if key in row and key in second else "" for key in ("time", "cpu")]
        lines.append("{:20}{:>10}{:>7}{:>10}{:>7}{:>10}{:>9}{:>14}{:>8}{:>8}".format(name, *cells))
    return lines


LEFT, PANEL, ROW, TOP = 150, 330, 30, 44
BARS = {"kept": COLORS["kept maps"], "peak": COLORS["working set"]}


def picture(results: dict[str, dict[str, Figures]]) -> np.ndarray:
    """Kept bytes and peak of every form over standard, a panel for each network: RGB uint8 (H, W, 3).

    results: network -> form -> figures, none where the network has no such form. The peak of a compiled network is
    Inductor's plan where it is known.
    """
    names = [form.name for form in FORMS if any(rows.get(form.name) for rows in results.values())]
    image = Image.new("RGB", (LEFT + PANEL * len(results), TOP + ROW * len(names) + 8), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, (key, color) in enumerate(BARS.items()):
        draw.rectangle((10, 8 + 16 * number, 20, 18 + 16 * number), fill=color)
        draw.text((26, 5 + 16 * number), f"{key}, of standard", INK, font)
    for column, (network, rows) in enumerate(results.items()):
        x, first = LEFT + PANEL * column, rows[FORMS[0].name]
        draw.text((x, 5), network, INK, ImageFont.load_default(14))
        second = rows.get(FORMS[1].name, first)
        for line, name in enumerate(names):
            y = TOP + ROW * line
            if column == 0:
                draw.text((10, y + 4), name, INK, font)
            row = rows.get(name)
            if not row:
                draw.text((x, y + 4), "not counted" if row is None else "not possible", COLORS["optimizer"], font)
                continue
            shares = (row["kept"] / first["kept"], row.get("plan", row["peak"]) / first["peak"])
            for bar, (share, color) in enumerate(zip(shares, BARS.values(), strict=True)):
                draw.rectangle(
                    (x, y + 11 * bar, x + max(1, round(140 * min(share, 1.3))), y + 11 * bar + 9), fill=color
                )
            extra = row["flops"] / second["flops"] - 1
            text = f"{shares[0]:.3f}  {shares[1]:.2f}  {extra:+.1%} FLOPs" if name != FORMS[0].name else "1"
            draw.text((x + 8 + round(140 * min(max(shares), 1.3)), y + 4), text, INK, font)
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------------- the command


def chosen_forms(words: str | None) -> list[Saving]:
    """Those whose names begin with one of the words, and the first two, to which all are compared."""
    wanted = () if words is None else tuple(word.strip() for word in words.split(",") if word.strip())
    unknown = [word for word in wanted if not any(form.name.startswith(word) for form in FORMS)]
    if unknown:
        raise SystemExit(f"no form begins with {unknown[0]!r}: {', '.join(form.name for form in FORMS)}")
    return [form for form in FORMS if not wanted or form in FORMS[:2] or form.name.startswith(wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="backbones, divided by commas")
    parser.add_argument("--forms", help="forms, or beginnings of their names, divided by commas (default: all)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=256, help="height and width of the crops in pixels")
    parser.add_argument("--no-plan", action="store_true", help="leave out Inductor's plan, half of the time")
    parser.add_argument("--peak", action="store_true", help="measure the peak of each form")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="measure the time of a step")
    parser.add_argument("--output", type=Path, default=Path("segtrain-out/memory"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one-peak", choices=[form.name for form in FORMS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    networks, forms, batch, side = options.networks.split(","), chosen_forms(options.forms), options.batch, options.crop
    if options.one_peak:
        form = next(form for form in FORMS if form.name == options.one_peak)
        config = step_config(networks[0], form, side)
        print(json.dumps(peak_of_step(config, batch, side, (2, 64) if form.budget is None else (batch, side))))
        return
    if options.tiny:
        networks, forms, side = ["resnet18"], [form for form in FORMS if form.name in TINY], 64
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "memory.json"
    size = f"{batch} x {side}^2"
    content = json.loads(path.read_text()) if path.exists() else {}
    print(f"training step, {size}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for network in networks:
        rows = content.setdefault(size, {}).setdefault(network, {})
        for form in forms:
            if not rows.get(form.name):
                rows[form.name] = counted(network, form, batch, side, not (options.no_plan or options.tiny))
            if options.peak and form.loss and rows[form.name] and "measured" not in rows[form.name]:
                rows[form.name]["measured"] = measured_peak(network, form, batch, side)
            path.write_text(json.dumps(content, indent=1))
        if options.time:
            possible = [form for form in forms if form.loss and rows[form.name]]
            load = os.getloadavg()[0]
            for name, times in measured_times(network, possible, batch, side, options.time).items():
                rows[name] |= times
            print(f"load of the machine before and after timing: {load:.1f} and {os.getloadavg()[0]:.1f}")
            path.write_text(json.dumps(content, indent=1))
        shown = {form.name: rows[form.name] for form in FORMS if rows.get(form.name)}
        print("\n".join(["", *table(network, shown)]), flush=True)
    Image.fromarray(picture(content[size])).save(options.output / "memory.png", optimize=True)
    print(options.output / "memory.png")


if __name__ == "__main__":
    main()
