"""`segtrain plan`: what a training needs on a GPU, and what would fit, without a GPU and without the data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from segtrain.commands.plan_picture import peak_bars
from segtrain.config import PlanCommandConfig, TrainConfig
from segtrain.config.plan import as_gigabytes, parse_bytes
from segtrain.console import say
from segtrain.engine.planning.advice import Advice, advise, image_size_of, number_of_classes
from segtrain.engine.planning.solve import Answer, Question, micro_batch, name_of, solve_all, ways
from segtrain.engine.planning.trace import PHASES
from segtrain.engine.planning.validation import Inference, validation_ways
from segtrain.errors import SegtrainError
from segtrain.files import write_atomically
from segtrain.scoring.figures import write_png

MODULES = 8  # lines of the table by module
ALIAS = {"inplace_abn_sync": "inplace_abn"}  # exchanges vectors, and keeps the same


def plan(config: PlanCommandConfig) -> dict[str, Any]:
    """Print what fits and what to type; write plan.json and plan.png. Returns the content of plan.json.

    SegtrainError (exit status 1) if nothing fits.
    """
    options, output = config.plan, Path(config.output or "segtrain-out/plan")
    classes, budget, devices = number_of_classes(config), options.budget, options.devices
    print_question(config, classes)
    possible, refused = ways(config)
    own = name_of(config)
    possible.setdefault(own, config)
    precise = other_precision(config)
    answers = solve_all(
        Question(name, way, classes, devices, budget, details=name == own)
        for name, way in [*possible.items(), *precise.items()]
    )
    precision = {name: answers.pop(name) for name in precise}
    size = image_size_of(config, options.image_size)
    there = sum(answers[own].now.static.values())
    validation = [] if size is None else validation_ways(config, classes, size, budget - there)
    advice = advise(config, possible, answers, own, devices, budget)
    print_configured(answers[own], budget, devices)
    print_ways(answers, own, config)
    print_precisions(precision, config)
    print_validation(validation, size, config.inference.together(), budget - there)
    print_advice(advice, answers[own].now.peak <= budget)
    result = as_result(config, classes, answers, own, refused, precision, validation, there, advice)
    write_atomically(output / "plan.json", json.dumps(result, indent=2).encode() + b"\n")
    write_png(output / "plan.png", peak_bars(answers, own, options.memory, budget))
    say(str(output / "plan.json"))
    if not any(answer.batch for answer in answers.values()):
        least = min(answers.values(), key=lambda answer: answer.now.peak)
        raise SegtrainError(
            f"nothing fits {as_gigabytes(options.memory)}: {least.name} needs least, {as_gigabytes(least.now.peak)} "
            f"beside the reserve for {least.now.images} crops of {list(least.now.crop)} a device; give a smaller "
            "augmentation.crop_size or model.backbone, or more plan.device_memory"
        )
    return result


def other_precision(config: PlanCommandConfig) -> dict[str, TrainConfig]:
    """The configured way in the other precision: half precision halves the maps, not the weights."""
    other = "bf16" if config.trainer.precision == "fp32" else "fp32"
    return {other: replace(config, trainer=replace(config.trainer, precision=other))}


# ------------------------------------------------------------------------------------------------ what is printed


def print_question(config: PlanCommandConfig, classes: int) -> None:
    options, trainer, model = config.plan, config.trainer, config.model
    share = micro_batch(config, options.devices)
    say(f"planning    {model.backbone} + {model.head}, stride {model.output_stride}, {name_of(config)}, {classes} "
        f"classes, {trainer.precision}, {config.optimizer.name}")  # fmt: skip
    say(f"batch       {trainer.batch_size} crops of {config.augmentation.crop_size}: {share} at a time on each of "
        f"{options.devices} devices, {trainer.accumulation} times a step")  # fmt: skip
    say(f"memory      {as_gigabytes(options.memory)} a device, of which context, workspace and fragments take "
        f"{as_gigabytes(parse_bytes(options.reserve, 'plan.reserve'))}")  # fmt: skip
    if trainer.parallel == "fsdp":
        say("note        trainer.parallel=fsdp is planned as ddp, which holds more")
    if trainer.compile:
        say("note        trainer.compile=true is planned as not compiled")


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def print_configured(answer: Answer, budget: int, devices: int) -> None:
    """Where the configured step's memory goes: by kind at the peak, by phase, kept maps by module."""
    now = answer.now
    say(f"\nas configured, GiB on one device: peak {gib(now.peak)} of {gib(budget)} without the reserve")
    held = [f"{name} {gib(size)}" for name, size in now.at_peak.items() if size]
    say(f"  at the peak     {', '.join(held)}" + (" (DDP's buckets)" if devices > 1 else ""))
    say(f"  peak by phase   {', '.join(f'{name} {gib(now.peaks[name])}' for name in PHASES)}")
    rows = sorted(now.kept_by.items(), key=lambda item: -item[1])
    say(f"  kept for backward {gib(now.kept)}, by module and kind")
    for (module, kind), size in rows[:MODULES]:
        say(f"    {module:<18} {kind:<26} {gib(size):>7}")
    rest = sum(size for _, size in rows[MODULES:])
    say(f"    {'all others':<45} {gib(rest):>7}")


def print_ways(answers: dict[str, Answer], own: str, config: PlanCommandConfig) -> None:
    say(f"\n{'GiB on one device':<30} {'kept':>7} {'forward':>8} {'backward':>9} {'optimizer':>10} "
        f"{'largest batch':>14} {'largest crop':>13}")  # fmt: skip
    for name, answer in sorted(answers.items(), key=lambda item: -item[1].now.peak):
        now, crop = answer.now, "none" if answer.crop is None else "x".join(map(str, answer.crop))
        mark = "* " if name == own else "  "
        say(f"{mark}{name:<28} {gib(now.kept):>7} {gib(max(now.peaks['forward'], now.peaks['loss'])):>8} "
            f"{gib(now.peaks['backward']):>9} {gib(now.peaks['optimizer']):>10} {answer.batch or 'none':>14} "
            f"{crop:>13}")  # fmt: skip
    say(f"  largest batch: for crops of {config.augmentation.crop_size}; largest crop: for a batch of "
        f"{config.trainer.batch_size}; * as configured")  # fmt: skip


def print_precisions(answers: dict[str, Answer], config: PlanCommandConfig) -> None:
    for name, answer in answers.items():
        crop = "none" if answer.crop is None else "x".join(map(str, answer.crop))
        say(f"  trainer.precision={name}: peak {gib(answer.now.peak)}, largest batch {answer.batch or 'none'}, largest "
            f"crop {crop}")  # fmt: skip


def print_validation(found: list[Inference], size: tuple[int, int] | None, together: int, memory: int) -> None:
    if size is None:
        say("\nvalidation is not planned: give plan.image_size=[height,width]")
        return
    images = "one image" if together == 1 else f"{together} images at a time"
    say(f"\nvalidation of {images} of {list(size)}, GiB beside weights, optimizer and gradients, of {gib(memory)}")
    for way in found:
        say(f"  {' '.join(way.overrides):<74} {gib(way.peak):>7}  {'fits' if way.peak <= memory else 'does not fit'}")


def print_advice(advice: list[Advice], fits: bool) -> None:
    say("\nfits as configured" if fits else "\ndoes not fit as configured")
    for one in advice:
        say(f"  {' '.join(one.overrides):<74} {one.effect}{'' if one.exact else ', the gradient is rounded'}")


# ------------------------------------------------------------------------------------------------ plan.json


def as_result(
    config: PlanCommandConfig, classes: int, answers: dict[str, Answer], own: str, refused: dict[str, str],
    precise: dict[str, Answer], validation: list[Inference], there: int, advice: list[Advice],
) -> dict[str, Any]:  # fmt: skip
    """The content of plan.json: sizes in bytes on one device, batches over all devices."""
    options = config.plan
    answers = answers | {
        name.replace(plain, other, 1): answer
        for other, plain in ALIAS.items()
        for name, answer in answers.items()
        if name.partition("+")[0] == plain and name.replace(plain, other, 1) not in answers
    }
    answers |= {
        name.replace(other, plain, 1): answer
        for other, plain in ALIAS.items()
        for name, answer in answers.items()
        if name.partition("+")[0] == other and name.replace(other, plain, 1) not in answers
    }
    return {
        "experiment": config.experiment,
        "device_memory": options.memory, "reserve": options.memory - options.budget, "devices": options.devices,
        "classes": classes, "batch_size": config.trainer.batch_size, "crop_size": config.augmentation.crop_size,
        "configured": own, "fits": answers[own].now.peak <= options.budget,
        "max_batch": {name: answer.batch for name, answer in answers.items()},
        "max_crop": {name: crop_figure(answer) for name, answer in answers.items()},
        "steps": {name: step_figures(answer) for name, answer in answers.items()},
        "kept_by_module": [[*key, size] for key, size in answers[own].now.kept_by.items()],
        "precision": {name: {"max_batch": a.batch, "max_crop": crop_figure(a), **step_figures(a)}
                      for name, a in precise.items()},
        "validation": {"beside": there, "ways": [way._asdict() for way in validation]},
        "not_possible": refused,
        "advice": [one._asdict() for one in advice],
    }  # fmt: skip


def crop_figure(answer: Answer) -> int | list[int]:
    """The side of a square crop, else [height, width]; 0 if none fits."""
    if answer.crop is None:
        return 0
    return answer.crop[0] if answer.crop[0] == answer.crop[1] else list(answer.crop)


def step_figures(answer: Answer) -> dict[str, Any]:
    """The traced step of a way as configured."""
    now = answer.now
    return {
        "images_per_device": now.images, "kept": now.kept, "peaks": now.peaks, "static": now.static,
        "at_peak": now.at_peak, "traces": answer.traces,
    }  # fmt: skip
