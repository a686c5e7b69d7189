"""Solve for what fits: the largest batch for a crop, the largest crop for a batch, for every way to save memory."""

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain.config import ModelConfig, TrainConfig, classifies, option_of
from segtrain.config.model import REBUILDING
from segtrain.engine.planning.trace import StepTrace, StepTracer
from segtrain.errors import UsageError
from segtrain.models import from_config
from segtrain.threads import begin_child, child_processes, cpus, undisturbed, unsignalled

LEAST = 2  # images of a micro-batch: DeepLabV3's pooled branch normalises over them
MOST = 256  # images of a micro-batch that are looked at: losses go through them one by one
MOST_WHOLE = 4096  # the same for image classification, whose loss does not
CLEAR = 0.01  # of the memory: a larger distance of a line from the limit needs no trace to be believed
CERTAIN = 0.001  # of the memory: the same for a lower bound; allocations are rounded
LARGEST_CROP = 8192  # pixels


class Line(NamedTuple):
    """Bytes of a step as a function of the pixels of its micro-batch."""

    base: float
    slope: float

    @classmethod
    def through(cls, first: tuple[float, int], second: tuple[float, int]) -> "Line":
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - slope * first[0], slope)

    def at(self, pixels: float) -> float:
        return self.base + self.slope * pixels


class Answer(NamedTuple):
    """What fits for one way to save memory.

    now: the step as configured, on one device. batch: most images per step over all devices and micro-batches, 0 if
    not even the smallest fits; crop: largest [height, width] for the configured batch, None likewise. line: of the two
    traces that the figures come from. traces: steps traced, 0 if those of the same form are taken.
    """

    name: str
    now: StepTrace
    batch: int
    crop: tuple[int, int] | None
    line: Line
    traces: int


class Question(NamedTuple):
    """What is asked: a way to train, and the memory that one device has for it (bytes, without the reserve)."""

    name: str
    config: TrainConfig
    num_classes: int
    devices: int
    memory: int
    most: int = 0  # images of a micro-batch; 0: MOST or MOST_WHOLE
    details: bool = False  # kept bytes by module

    @property
    def limits(self) -> tuple[int, int]:
        """Images of a micro-batch that are looked at."""
        usual = MOST_WHOLE if classifies(self.config.dataset) else MOST
        return LEAST, max(LEAST, min(self.most or usual, usual))


def micro_batch(config: TrainConfig, devices: int) -> int:
    """Images of the largest micro-batch of one device; the smallest one possible for trainer.batch_size=auto."""
    batch, parts = config.trainer.batch_size, devices * config.trainer.accumulation
    return LEAST if isinstance(batch, str) else max(LEAST, -(-batch // parts))


# ------------------------------------------------------------------------------------------------ ways to save memory


def ways(config: TrainConfig) -> tuple[dict[str, TrainConfig], dict[str, str]]:
    """The norms, alone and with each recompute and keep: name -> options; and name -> why it is not possible.

    Synchronised norms are left out unless configured: they exchange vectors and keep what In-Place ABN keeps.
    """
    choices = {item.name: option_of(item).choices for item in fields(ModelConfig)}
    norms = [norm for norm in choices["norm"] if not norm.endswith("_sync") or norm == config.model.norm]
    possible: dict[str, TrainConfig] = {}
    refused: dict[str, str] = {}
    without = {one: reason for one in choices["recompute"] if (reason := refused_by_backbone(config.model, str(one)))}
    for norm in norms:
        named = {norm: ("none", "exact")}
        named |= {f"{norm}+{one}": (one, "exact") for one in choices["recompute"] if one != "none"}
        named |= {f"{norm}+{one}": ("none", one) for one in choices["keep"] if one != "exact"}
        for name, (recompute, keep) in named.items():
            try:
                possible[name] = with_model(config, norm, recompute, keep)
            except UsageError as error:
                refused[name] = str(error)
            if name in possible and recompute in without:
                del possible[name]
                refused[name] = without[recompute]
    return possible, refused


def refused_by_backbone(model: ModelConfig, recompute: str) -> str:
    """Why the backbone has nothing to rebuild; '' if it has, or if that does not depend on it."""
    if recompute not in REBUILDING:
        return ""
    try:
        with torch.device("meta"):
            from_config(replace(model, norm="inplace_abn", scale="abs", recompute=recompute, keep="exact"), 2)
    except UsageError as error:
        return str(error)
    return ""


def with_model(config: TrainConfig, norm: str, recompute: str, keep: str) -> TrainConfig:
    """The options with another norm, recompute and keep. UsageError where these do not go together."""
    in_place = norm.startswith("inplace_abn")
    model = replace(
        config.model, norm=norm, recompute=recompute, keep=keep,
        norm_variant=config.model.norm_variant if in_place else "one",
        scale="abs" if norm.startswith("batch_norm") else config.model.scale,
    )  # fmt: skip
    model.check()
    return replace(config, model=model)


def name_of(config: TrainConfig) -> str:
    """The name of the configured way, as in `ways`; with both savings for both."""
    model = config.model
    return "+".join([model.norm, *[s for s in (model.recompute, model.keep) if s not in ("none", "exact")]])


# ------------------------------------------------------------------------------------------------ solving


def solve(question: Question, tracer: StepTracer, configured: StepTrace, crops: bool = True) -> Answer:
    """The largest batch and, if asked for, the largest crop that fit, each traced. configured: that step, traced."""
    config, memory = question.config, question.memory
    height, width = config.augmentation.crop_size
    images, area = micro_batch(config, question.devices), height * width
    seen = {(images, height, width): configured}

    def needs(count: int, high: int, wide: int) -> Needs:
        if (count, high, wide) not in seen:
            seen[count, high, wide] = tracer.trace(count, (high, wide))
        trace = seen[count, high, wide]
        return Needs(trace.peak, trace.growing)

    there = sum(tracer.static.values()) + configured.at_peak["gradients"] - tracer.static["gradients"]
    first = Line.through((0, there), (images * area, configured.peak))
    known = images * area, configured.peak
    found, line = largest(
        lambda n: needs(n, height, width), lambda n: n * area, memory, question.limits, first, known
    )  # fmt: skip
    step = config.model.output_stride
    limits = -(-32 // step), LARGEST_CROP // step  # whole cells

    def size(cells: int) -> tuple[int, int]:
        return step * cells, step * max(1, round(cells * width / height))

    cells = 0
    if crops:
        cells, _ = largest(
            lambda k: needs(images, *size(k)), lambda k: images * size(k)[0] * size(k)[1], memory, limits, line, known
        )
    parts = question.devices * config.trainer.accumulation
    crop = size(cells) if cells else None
    return Answer(question.name, configured, found * parts, crop, line, len(seen))


class Needs(NamedTuple):
    """Bytes at the peak of a step, and those of them that grow at least as the number of its pixels."""

    peak: int
    growing: float = 0.0


def largest(
    needs: Callable[[int], Needs], pixels: Callable[[int], int], memory: int, limits: tuple[int, int], line: Line,
    known: tuple[float, int] | None = None,
) -> tuple[int, Line]:  # fmt: skip
    """The largest number within the limits whose needs are at most `memory`, 0 if there is none; and the line that
    the last two traces gave.

    needs: traces, grows with the number. line: a first guess. known: pixels and peak of a step that has been traced.
    The answer itself is traced, and the next number too where neither what grows nor the line through what fits says
    that it does not fit.
    """
    fits, fails = 0, limits[1] + 1
    points: list[tuple[float, int]] = [] if known is None else [known]
    guess, traced = largest_below(line, pixels, memory, limits), 0
    while fails - fits > 1:
        guess = min(max(guess, fits + 1, limits[0]), fails - 1)
        (found, growing), size, traced = needs(guess), pixels(guess), traced + 1
        points = [point for point in points if point[0] != size] + [(size, found)]
        if found <= memory:
            fits = guess
            if found + growing * (pixels(fits + 1) / size - 1) > memory * (1 + CERTAIN):
                fails = fits + 1
        elif guess == limits[0]:
            return 0, line
        else:
            fails = guess
        if len(points) > 1:
            line = Line.through(points[-2], points[-1])
        elif found:
            line = Line(line.base, (found - line.base) / size)
        fitting = sorted(point for point in points if point[1] <= memory)[-2:]
        if len(fitting) == 2 and Line.through(*fitting).at(pixels(fits + 1)) > memory * (1 + CLEAR):
            break  # needs grow at least as the line through what fits
        guess = largest_below(line, pixels, memory, limits)
        if traced > 3:  # no line describes it: halve what is left, or double
            guess = (fits + fails) // 2 if fails <= limits[1] else max(guess, 2 * fits)
    return fits, line


def largest_below(line: Line, pixels: Callable[[int], int], memory: int, limits: tuple[int, int]) -> int:
    """The largest number within the limits that fits by the line, else the least one."""
    low, high = limits[0], limits[1] + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if line.at(pixels(middle)) <= memory else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------ many questions


def solve_all(questions: Iterable[Question]) -> dict[str, Answer]:
    """The answers by name. Of ways that hold the same bytes when traced as configured, one is solved for all.

    Several processes share the work where they can be forked.
    """
    groups: dict[tuple[object, ...], list[Question]] = defaultdict(list)
    names, asked, twins = without_twins(questions)
    for question in asked:
        model = question.config.model
        kind = model.norm if model.norm.startswith("inplace_abn") else ""
        groups[kind, model.recompute.partition("_")[0], model.keep, question.config.trainer.precision].append(question)
    work = sorted(groups.values(), key=len, reverse=True)
    count = min(cpus(), len(work))
    if count > 1 and "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized():
        import_fake_kernels()
        try:
            answers = solved_by(work, count)
        except RuntimeError as error:  # a backward has run here before, and autograd's threads are not forked
            if "fork" not in str(error):
                raise
            answers = [solve_group(group) for group in work]
    else:
        answers = [solve_group(group) for group in work]
    found = {answer.name: answer for group in answers for answer in group}
    found |= {name: found[other]._replace(name=name, traces=0) for name, other in twins.items()}
    return {name: found[name] for name in names}


def solved_by(work: list[list[Question]], processes: int) -> list[list[Answer]]:
    """The answers of each group, from forked processes, which end at once where a signal ends this one."""
    others, answers = child_processes(), []
    with (
        undisturbed() as came,
        ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), begin_child) as pool,
    ):
        with unsignalled():
            futures = [pool.submit(solve_group, group) for group in work]
        while wait(futures, timeout=0.2).not_done and not came:
            pass
        if came:
            for process in child_processes() - others:
                process.kill()
        else:
            answers = [future.result() for future in futures]
    return answers


def without_twins(questions: Iterable[Question]) -> tuple[list[str], list[Question], dict[str, str]]:
    """All names, the questions to solve, and name -> other name for those that have another's answer by construction.

    Synchronised In-Place ABN, which is asked about only where it is configured, exchanges vectors. Its step is traced
    without other processes, where it is that of plain In-Place ABN.
    """
    keys: dict[str, tuple[Question, str]] = {}
    for question in questions:
        model = question.config.model
        norm = "inplace_abn" if model.norm == "inplace_abn_sync" else model.norm
        plain = replace(question.config, model=replace(model, norm=norm))
        keys[question.name] = question, repr(question._replace(name="", config=plain, details=False))
    last = {key: name for name, (_, key) in keys.items()}
    twins = {name: last[key] for name, (_, key) in keys.items() if last[key] != name}
    return list(keys), [question for name, (question, _) in keys.items() if name not in twins], twins


def import_fake_kernels() -> None:
    """Import what the first operation on a fake tensor imports, once for all processes."""
    with FakeTensorMode():
        torch.nn.functional.conv2d(torch.empty(1, 1, 8, 8), torch.empty(1, 1, 3, 3)).relu().sum()


def solve_group(questions: list[Question]) -> list[Answer]:
    return list(answers_of(questions))


def answers_of(questions: list[Question]) -> Iterator[Answer]:
    """The answers to questions that may all have the same one."""
    known: list[Answer] = []
    for question in questions:
        tracer = StepTracer(question.config, question.num_classes, question.devices)
        height, width = question.config.augmentation.crop_size
        now = tracer.trace(micro_batch(question.config, question.devices), (height, width), question.details)
        same = next((one for one in known if alike(one.now, now)), None)
        if same is None:
            known.append(solve(question, tracer, now))
            yield known[-1]
        else:
            yield same._replace(name=question.name, now=now, traces=1)


def alike(one: StepTrace, other: StepTrace) -> bool:
    """Whether two steps hold the same maps; vectors may differ."""
    return abs(one.peak - other.peak) + abs(one.kept - other.kept) < 1e-3 * one.peak
