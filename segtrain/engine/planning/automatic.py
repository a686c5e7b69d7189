"""The planner in use: trainer.batch_size=auto, trainer.auto_fit, and the answer to running out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from segtrain.config import InferenceConfig, ModelConfig, TrainConfig
from segtrain.config.plan import RESERVE, as_gigabytes, parse_bytes
from segtrain.console import say
from segtrain.device import free_memory
from segtrain.engine.planning.advice import divided, model_words
from segtrain.engine.planning.solve import LEAST, Answer, Question, micro_batch, solve, ways
from segtrain.engine.planning.trace import StepTracer
from segtrain.engine.planning.validation import InferenceTracer, fitted_size, largest_tile
from segtrain.errors import ImageTooLarge, SegtrainError

CPU_SHARE = 0.8  # of the free memory: the loader's processes and other programs need some


def device_budget(device: torch.device) -> int:
    """Bytes that the tensors of this process may take on its device, by what is free now."""
    free = free_memory(device)
    return free - parse_bytes(RESERVE, "plan.reserve") if device.type == "cuda" else int(CPU_SHARE * free)


def choose(
    config: TrainConfig, num_classes: int, devices: int, budget: int, device: torch.device, images: int
) -> dict[str, Any]:
    """{option: value} that makes the training fit `budget` bytes of each of several devices. Prints what and why.

    images: in an epoch, which is the largest batch. SegtrainError if nothing fits.
    """
    config = replace(config, device=device.type)
    parts = devices * config.trainer.accumulation
    where = f"{as_gigabytes(budget)} of {device.type} memory" + (f" on each of {devices} devices" * (devices > 1))
    if config.trainer.batch_size == "auto":
        for name, way in own_ways(config).items():
            answer = answer_for(name, way, num_classes, devices, budget, images // parts)
            most = min(answer.batch, images // parts * parts)
            if most >= max(LEAST, parts):
                words = model_words(config, way)
                saving = f", with {' '.join(words)} (trainer.auto_fit)" if words else ""
                say(f"batch      trainer.batch_size=auto is {most}: that fits {where}{saving}")
                return {"trainer.batch_size": most} | chosen_model(way)
            if not config.trainer.auto_fit:
                break
        raise SegtrainError(f"trainer.batch_size=auto: not even {LEAST} crops at a time fit {where}; {smaller()}")
    for way in own_ways(config).values():
        now = traced_now(way, num_classes, devices)
        if now <= budget:
            words = model_words(config, way)
            how = " ".join(words) or "as configured"
            say(f"memory     trainer.auto_fit: {how}, a step takes {as_gigabytes(now)} of {where}")
            return chosen_model(way)
    first = answer_for("as configured", config, num_classes, devices, budget)
    micro = divided(config, first, devices, budget)
    if micro is None:
        raise SegtrainError(f"trainer.auto_fit: nothing makes a step fit {where}; {smaller()}")
    say(f"memory     trainer.auto_fit: trainer.accumulation={micro}, so that a step fits {where}; statistics of norms "
        "are per micro-batch")  # fmt: skip
    return {"trainer.accumulation": micro}


def smaller() -> str:
    return "give a smaller augmentation.crop_size or model.backbone; `segtrain plan` lists what fits"


def chosen_model(way: TrainConfig) -> dict[str, Any]:
    return {"model.recompute": way.model.recompute, "model.keep": way.model.keep}


def own_ways(config: TrainConfig) -> dict[str, TrainConfig]:
    """As configured, then what the same norm can recompute, then what it can round; neither of a compiled one."""
    if config.trainer.compile:
        return {"as configured": config}
    possible = {name: way for name, way in ways(config)[0].items() if way.model.norm == config.model.norm}
    exact = {name: way for name, way in possible.items() if way.model.keep == "exact"}
    return {"as configured": config} | exact | possible


def traced_now(config: TrainConfig, num_classes: int, devices: int) -> int:
    height, width = config.augmentation.crop_size
    return StepTracer(config, num_classes, devices).trace(micro_batch(config, devices), (height, width)).peak


def answer_for(name: str, config: TrainConfig, num_classes: int, devices: int, budget: int, most: int = 0) -> Answer:
    """The largest batch of one way. most: images of a micro-batch that are looked at, 0: as many as usual."""
    question = Question(name, config, num_classes, devices, budget, most)
    tracer = StepTracer(config, num_classes, devices)
    height, width = config.augmentation.crop_size
    return solve(question, tracer, tracer.trace(micro_batch(config, devices), (height, width)), crops=False)


# ------------------------------------------------------------------------------------------------ out of memory


def whole_memory(device: torch.device) -> int:
    """Bytes that the tensors of a process of its own may take on the device."""
    if device.type != "cuda":
        return device_budget(device)
    return int(torch.cuda.get_device_properties(device).total_memory) - parse_bytes(RESERVE, "plan.reserve")


def training_advice(config: TrainConfig, num_classes: int, devices: int, device: torch.device) -> str:
    """What would make a training step fit, after it did not. One sentence; the planner's own failure is named."""
    try:
        config, budget = replace(config, device=device.type), whole_memory(device)
        answer = answer_for("as configured", config, num_classes, devices, budget)
        micro = divided(config, answer, devices, budget)
        fitting = [
            " ".join(model_words(config, way))
            for name, way in own_ways(config).items()
            if name != "as configured" and traced_now(way, num_classes, devices) <= budget
        ]
    except Exception as error:  # noqa: BLE001 (it must not hide what happened)
        return f"the plan failed ({type(error).__name__}: {error}); `segtrain plan` says what fits"
    fits = answer.now.peak <= budget
    text = f"a step is planned with {as_gigabytes(answer.now.peak)} of {as_gigabytes(budget)}"
    text += ", so that other programs or fragments took the rest" if fits else ""
    goes_on = f"; the same run goes on with trainer.accumulation={micro}" if micro is not None else ""
    batch = f"; the largest batch is trainer.batch_size={answer.batch}" if answer.batch else ""
    others = f"; another run fits with {' or '.join(dict.fromkeys(fitting))}" if any(fitting) else ""
    return f"{text}{goes_on}{batch}{others}"


@contextmanager
def advising(model: ModelConfig, num_classes: int, inference: InferenceConfig, device: torch.device) -> Iterator[None]:
    """Inside, an image that is too large for the device is answered with a tile that fits."""
    try:
        yield
    except ImageTooLarge as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        config = replace(TrainConfig(model=model), device=device.type)
        advice = inference_advice(config, num_classes, error.size, inference, device_budget(device))
        raise SegtrainError(f"{error}. By the plan, {advice}") from error


def inference_advice(
    config: TrainConfig, num_classes: int, size: tuple[int, int], inference: InferenceConfig, budget: int
) -> str:
    """The batch or tile that makes the prediction of an image [height, width] fit, after it did not. One sentence."""
    try:
        tracer, seen = InferenceTracer(config, num_classes), fitted_size(size, inference.longest_side)
        batch = fitting_batch(tracer, seen, inference, budget)
        one = replace(inference, batch_size=1)
        tile = None if batch else largest_tile(tracer, seen, one, budget)
    except Exception as error:  # noqa: BLE001 (it must not hide what happened)
        return f"nothing is known, it failed ({type(error).__name__}: {error}); try inference.tile=[512,512]"
    if batch:
        return f"inference.batch_size={batch} fits {as_gigabytes(budget)}, which is free beside the network"
    if tile is None:
        return f"not even inference.tile=[32,32] fits {as_gigabytes(budget)}: give fewer or smaller inference.scales"
    words = "inference.batch_size=1 " * (inference.together() > 1) + f"inference.tile=[{tile[0]},{tile[1]}]"
    return f"{words} fits {as_gigabytes(budget)}, which is free beside the network"


def fitting_batch(tracer: InferenceTracer, size: tuple[int, int], inference: InferenceConfig, budget: int) -> int:
    """Of half the configured batch, a quarter and so on, the largest that fits; 0 if none does."""
    batch = inference.together() // 2
    while batch and tracer.peak(size, replace(inference, batch_size=batch)) > budget:
        batch //= 2
    return batch
