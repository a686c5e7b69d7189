"""Training: build, loop, validate, save."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from segtrain.abn import describe_backend
from segtrain.config import TrainConfig, TrainerConfig, classifies
from segtrain.console import Progress, duration, say
from segtrain.data.loader import Batch, training_batches
from segtrain.data.order import MicroBatches
from segtrain.device import describe_device, memory, peak_memory, resolve_device
from segtrain.distributed.group import PeerDied, World, init_distributed
from segtrain.engine.blackbox import BlackBox
from segtrain.engine.learner import Learner, StepResult, smallest_part
from segtrain.engine.run import REQUEUE, Preempted, Preemption, Run, environment, flat
from segtrain.engine.sinks import RunLog
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.files import write_atomically
from segtrain.models import from_config, not_compilable
from segtrain.scoring import figures as pictures
from segtrain.scoring.report import Evaluation, fingerprints, print_table, table_lines
from segtrain.tasks.base import NetworkFacts
from segtrain.tasks.classification import Classification
from segtrain.tasks.segmentation import Segmentation
from segtrain.weights import checkpoint
from segtrain.weights.files import existing
from segtrain.weights.provenance import data_names, provenance
from segtrain.weights.transfer import load_weights

SKIPPED_AT_MOST = 100  # bad steps in a row, after which nothing is learnt any more
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
T = TypeVar("T")
Task = Segmentation | Classification


def train(config: TrainConfig) -> Path:
    """Train as the configuration says, or go on where the same run stopped. Returns the run folder.

    Started by torchrun, each process does its share of every batch, and the first one writes.
    """
    with torch.device("meta"):  # a name or a combination that does not exist stops here, before any data is touched
        from_config(config.model, num_classes=2)
    task_of(config).check_options(config)
    with Preemption() as preemption, init_distributed() as world:
        run = Run(config)
        try:
            return train_share(config, run, world, preemption)
        except Exception as error:
            with beside_training():  # a full disk must not hide what the run ends of
                if world.main and run.mine:
                    state = "stopped" if isinstance(error, Preempted) else "failed"
                    run.tell(state, run.step, run.max_steps, str(error) or type(error).__name__)
                if world.main and getattr(error, "exit_status", 1) == REQUEUE and run.folder.is_dir():
                    write_atomically(run.folder / "requeue", f"step {run.step}\n".encode())
            if getattr(error, "everywhere", False):
                world.all_reduce(0.0)  # a launcher ends all processes as soon as one has left
            raise
        finally:
            torch.use_deterministic_algorithms(False)
            run.release()


def task_of(config: TrainConfig) -> type[Task]:
    """What is learnt, by the data set: everything in this file is the same for both."""
    return Classification if classifies(config.dataset) else Segmentation


def train_share(config: TrainConfig, run: Run, world: World, preemption: Preemption) -> Path:
    """What one process of a training does."""
    on = device(config, world)
    options = config.trainer
    with world.main_process_first():
        if world.main and config.restart:
            if any(int(os.environ.get(count) or 0) for count in RESTARTS):
                say("restart=true is of the first start of this job; a requeued one goes on")
            else:
                run.move_aside()
        state = run.resume()
        if state is None and config.model.weights != "none":
            existing(Path(config.model.weights))  # before the data, which take longer to get and to look at
        task = task_of(config)(config)
    if len(set(steps := world.all_gather(0 if state is None else state["step"]))) > 1:
        raise DataError(
            f"the processes find different checkpoints in {run.folder} (steps {steps}): give run=FOLDER on a disk that "
            "all machines share"
        )
    length = Length(options, task.num_train, 0.0 if state is None else state.get("elapsed", 0.0))
    if state is not None and run.evaluation is not None and length.reached(state):
        say(f"{run.folder} is finished ({state['step']} steps): nothing to do. restart=true trains it anew.")
        print_table(run.evaluation)
        return run.folder
    ended = state is not None and length.reached(state)
    loss = task.loss()
    smallest_part(config, world, loss)
    trained_on = fingerprints(task.image_ids)
    if state is not None:
        refuse_other_pictures(state, trained_on, run)
    with world.main_process_first():
        task.check()
        data = task.data()  # fills the cache
    here = environment(world) | {"seed": options.seed, "accumulation": options.accumulation}
    if world.main:
        run.claim()
        run.begin(here)

    torch.manual_seed(options.seed)
    network = from_config(config.model, task.num_classes).to(on)
    began_with = None
    if config.model.weights != "none" and state is None:
        chosen = config.model
        path, match = Path(chosen.weights), chosen.weights_match
        began_with = load_weights(path, network, task.table, match, chosen.weights_taxonomy)
        say(str(began_with))
        if (usual := began_with.normalised) and usual != (chosen.mean, chosen.std):
            say(f"its pictures were normalised otherwise: add model.mean={usual[0]} model.std={usual[1]}")
    origin = provenance(data_names(asdict(config.dataset)), began_with)
    start, validated, best = 0, 0, {task.metric: -1.0, "step": 0, "since": 0}
    if state is not None:
        checkpoint.load_strict(network, state["model"], run.last)
        start, validated, best = state["step"], state["validated"], {"since": 0} | state["best"]
        origin = state.get("provenance", origin)
    learner = Learner(network, loss, config, world, on)
    if state is not None:
        learner.load(state)
        say_other_parts(state.get("environment", {}), here, config)
        state = None  # it is as large as the weights
    run.step, run.max_steps = start, length.max_steps or 0
    introduce(config, run, network, task, on, world, start, length)
    workers = config.loader.count()
    share = MicroBatches(options.batch_size, start, length.max_steps, world.rank, world.size, options.accumulation)
    batches = training_batches(data, share, workers, on.type == "cuda", config.loader.prefetch)
    log = RunLog(run.folder, start, config.logging, flat(asdict(config))) if world.main else None
    box = BlackBox(run.folder, world.rank, world.size, start)
    evaluator = task.evaluator()
    progress = TrainingProgress(config, start, length)

    def save(step: int, is_best: bool = False) -> None:
        content = learner.state() if world.main or learner.sharded else {}
        if world.main:
            content |= {"config": asdict(config), "classes": task.classes, "step": step, "trained_on": trained_on}
            content |= {"validated": validated, "best": best, "elapsed": length.elapsed()}
            content |= {"environment": here, "provenance": origin}
            keeper.save(content, is_best)

    def stop(status: int, step: int) -> Preempted:
        """Everything is saved: the error that ends this session."""
        keeper.close()
        return Preempted(f"stopped; {run.last} holds step {step}, and the same command goes on from there", status)

    def judge(outcome: StepResult) -> None:
        """What all processes found in a step: into the log and the black box. DataError for one that is no number."""
        total = world.all_reduce(outcome.loss)[0]
        box.add(outcome, total)
        wrong = learner.bad(total, outcome.norm)
        if wrong:
            where = worst(world.all_gather((outcome.losses, [n for b in outcome.batches for n in b.names])))
            text = (
                f"{wrong} at step {outcome.step + 1} ({where}); "
                f"`segtrain replay run={run.folder} step={outcome.step + 1}` shows the batch"
            )
            scaled = learner.scaler.is_enabled()  # an infinite gradient was its trial, and was not applied
            if not outcome.skipped and not (math.isfinite(total) and (scaled or math.isfinite(outcome.norm))):
                raise diverged(text, config)
            say(f"WARNING    {text}{'. The step is skipped.' if outcome.skipped else ''}")
        learner.skipped = learner.skipped + 1 if outcome.skipped else 0
        if learner.skipped >= SKIPPED_AT_MOST:
            raise diverged(f"{learner.skipped} steps in a row were skipped", config)
        if not outcome.skipped:
            learner.recent.append(total)
        if world.main:
            progress.add(None if outcome.skipped else total, outcome.norm, outcome.rate)

    def alive(items: Iterator[T]) -> Iterator[T]:
        for item in items:
            if world.main:
                run.tell("running", run.step, run.max_steps)
            yield item

    def validate(step: int) -> Evaluation:
        nonlocal validated, best

        def watch(answers: Iterator[T], rounds: int) -> Iterator[T]:
            return preemption.watch(alive(answers), rounds, world, lambda status: stop(status, step))

        used = {"step": step, "weights": "averaged" if learner.average is not None else "raw"}
        found = evaluator.run(
            learner.evaluation_model(), on, world, workers, watch, config.logging.pictures if world.main else 0,
            facts=NetworkFacts(str(run.last), step, trained_on, used),
        )  # fmt: skip
        score = found.result[task.metric]
        again, validated = validated == step, step
        is_best = score > best[task.metric]
        worse = best | {"since": best["since"] + (not again)}
        best = {task.metric: score, "step": step, "since": 0} if is_best else worse
        save(step, is_best)  # now with what was found
        if log is not None:
            log.scalars(step, found.scalars)
            for name, drawing in found.figures.items():
                log.picture(step, name, drawing)
            if found.examples is not None:
                pictures.write_png(run.pictures / f"val_{step:07d}.png", found.examples)
        top = 100 * best[task.metric]
        say(f"validation at step {step}: {task.describe(found.result)}, best {top:.1f} % (step {best['step']})")
        progress.restart()
        return found

    keeper = checkpoint.CheckpointWriter(run.folder, options.keep_last)
    done, status = start, 0
    outcome: StepResult | None = None
    result: Evaluation | None = None
    final: dict[str, float] | None = None
    with contextlib.ExitStack() as stack:
        if log is not None:
            stack.callback(lambda: log.close(final))
        stack.callback(progress.close)
        stack.enter_context(keeper.open())
        preemption.stepping = True
        if start > 0 and validated < start and (length.over(start) or start % options.validate_every == 0):
            result = validate(start)  # the run was stopped between this step and its validation
            ended = ended or stalled(best, options)
        for step, batch in enumerate(() if ended else progress.waiting(batches), start):
            result = None
            divisor = math.fsum(loss.count(part.targets) for part in batch)
            divisor, so_far = world.all_reduce(divisor, length.share(step) if world.main else 0.0)
            status = preemption.agreed(world)
            if status or so_far >= 1:
                break
            previous = outcome
            with named(step, batch, world, box):
                outcome = learner.step(batch, divisor or 1.0, step, so_far)
            if previous is not None:
                judge(previous)  # only now, so that a card always has work
            run.step = done = step + 1
            due = done % options.validate_every == 0 or length.over(done)
            saving = due or done % options.save_every == 0
            if saving or done % config.logging.every == 0 or options.on_bad_step == "skip":
                judge(outcome)
                outcome = None
            if log is not None:
                with beside_training():
                    if progress.due(done):
                        log.scalars(done, progress.line(done))
                    run.tell("running", done, run.max_steps)
            if saving:
                save(done)
            if due:
                keeper.wait_or_warn()  # a validation starts processes, which must not inherit a half-written file
                result = validate(done)
                if stalled(best, options):
                    break
        if stalled(best, options):
            say(f"ending early: {best['since']} validations no better than that of step {best['step']}")
        if outcome is not None:
            judge(outcome)
        if status:
            save(done)
            raise stop(status, done)
        if result is None:
            save(done)
            keeper.close()
            result = validate(done)
        if world.main:
            result.write(run.folder)
            finish(run, result.result, best, config, done, length)
            final = {key: result.result[key] for key in task.final_scores} | {f"best_{task.metric}": best[task.metric]}
    return run.folder


# ------------------------------------------------------------------------------------------------ before the first step


def device(config: TrainConfig, world: World) -> torch.device:
    """Where this process computes, with what the options ask of it set up."""
    on = resolve_device(config.device)
    if config.trainer.compile and (reason := not_compilable(config.model, on)):
        raise UsageError(f"trainer.compile=true is not possible: {reason}")
    if on.type == "cuda":
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > count:
            raise UsageError(f"{here} processes on this machine, which has {count} cards: --nproc-per-node={count}")
        on = torch.device("cuda", world.local_rank)
        torch.backends.cudnn.benchmark = not config.trainer.deterministic
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cards = torch.cuda.device_count() if on.type == "cuda" else 0
    if cards > 1 and world.size == 1:
        torchrun = f"torchrun --standalone --nproc-per-node={cards} -m segtrain train ..."
        say(f"cards      one of {cards} is used; all of them: {torchrun}")
    return on


def say_other_parts(before: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    """Statistics are those of a part of the batch, so that other parts are other statistics."""
    if "accumulation" not in before or config.model.norm.endswith("_sync"):
        return
    was, parts_now = (where["processes"] * where["accumulation"] for where in (before, now))
    if was != parts_now:
        size = config.trainer.batch_size
        say(f"WARNING    norms see {size / parts_now:g} crops at a time from here on, and saw {size / was:g} before")


def refuse_other_pictures(state: dict[str, Any], trained_on: torch.Tensor, run: Run) -> None:
    """DataError if the training pictures are not those that the run began with: order and crops would be others."""
    before = state.get("trained_on")
    if before is not None and not torch.equal(before, trained_on):
        raise DataError(
            f"{run.folder} was trained on {len(before)} pictures, and these are {len(trained_on)} others: the run "
            "cannot go on with them. Give dataset.root of the same data, or name=ANOTHER_NAME for a run of its own"
        )


def introduce(
    config: TrainConfig, run: Run, model: nn.Module, task: Task, on: torch.device, world: World, start: int,
    length: "Length",
) -> None:  # fmt: skip
    """Says once what was chosen."""
    options, how = config.model, config.trainer
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    backend = f" (kernels: {describe_backend(on.type)})" if options.norm.startswith("inplace_abn") else ""
    chosen = [name for name, on_ in (("compiled", how.compile), ("deterministic", how.deterministic)) if on_]
    chosen += [f"averaged weights {how.ema_decay}"] if how.ema_decay is not None else []
    say(f"run        {run.folder}" + (f", going on at step {start}" if start else ""))
    say(f"device     {describe_device(on)}, {', '.join([how.precision.replace('fp32', 'float32'), *chosen])}")
    if world.size == 1 and how.parallel == "fsdp":
        say("processes  1: trainer.parallel=fsdp has nobody to share weights with")
    if world.size > 1:
        shared = f"statistics over {how.sync_group}" if options.norm.endswith("_sync") else "statistics of each its own"
        say(f"processes  {world.size}, {how.parallel}, {shared}")
    say(f"model      {options.backbone} + {options.head}, stride {options.output_stride}, {options.norm}{backend}, "
        f"{parameters:.1f} M parameters, initial weights {options.weights.replace('none', 'random')}")  # fmt: skip
    say(f"data       {config.dataset.name}: {task.num_train} {config.dataset.train_split} and "
        f"{task.num_val} {config.dataset.val_split} pictures, {task.num_classes} classes")  # fmt: skip
    share = (
        f" ({how.batch_size / world.size / how.accumulation:g} at a time x {how.accumulation} in each of {world.size})"
    )
    say(f"training   {length} of {how.batch_size} {task.batch_of}{share if world.size * how.accumulation > 1 else ''} "
        f"{config.augmentation.crop_size}, seed {how.seed}, {config.loader.count()} loader processes")  # fmt: skip


# ------------------------------------------------------------------------------------------------ how far it is


def stalled(best: dict[str, Any], options: TrainerConfig) -> bool:
    """Whether so many validations were no better that the training ends early."""
    return options.patience is not None and best.get("since", 0) >= options.patience


class Length:
    """How long a training is, in steps or by the clock. max_steps: None where the clock decides."""

    def __init__(self, options: TrainerConfig, samples: int, elapsed: float) -> None:
        """elapsed: seconds of earlier sessions."""
        self.max_steps = options.steps(samples)
        self.seconds = None if options.hours is None else 3600 * options.hours
        self.options = options
        self.before = elapsed
        self.began = time.monotonic()

    def __str__(self) -> str:
        return f"{self.max_steps} steps" if self.seconds is None else f"{self.seconds / 3600:g} hours in steps"

    def elapsed(self) -> float:
        """Seconds of this run, all sessions together."""
        return self.before + time.monotonic() - self.began

    def share(self, step: int) -> float:
        """Which share of the training is done after `step` steps; from 1 on it is over."""
        return step / self.max_steps if self.max_steps is not None else self.elapsed() / (self.seconds or 1)

    def over(self, step: int) -> bool:
        return self.max_steps is not None and step >= self.max_steps

    def reached(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint is the end of its training."""
        return (
            stalled(state["best"], self.options)
            or self.over(state["step"])
            or (self.seconds is not None and self.before >= self.seconds)
        )


class TrainingProgress:
    """A line every `logging.every` steps: loss (mean since the last line), rate, speed, wait for data, time left."""

    def __init__(self, config: TrainConfig, start: int, length: Length) -> None:
        self.config = config
        self.length = length
        self.losses: list[float] = []
        self.norm = self.lr = 0.0
        self.busy = 0.0  # seconds of training so far, and the steps they took: the basis of the time left
        self.steps = 0
        self.done = start
        self.starved = 0  # lines in a row with much waiting
        self.bar = None if length.max_steps is None else Progress("training", length.max_steps, terminal_only=True)
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last line: it went into something else, such as a validation."""
        self.told = time.monotonic()
        self.waited = 0.0
        self.since = 0

    def waiting(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The batches, with the time spent waiting for them noted."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self.since += 1
            yield batch
            self.done += 1
            if self.bar is not None:
                self.bar.show(self.done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, loss: float | None, norm: float, lr: float) -> None:
        """loss: None for a step that was skipped."""
        if loss is not None:
            self.losses.append(loss)
        self.norm, self.lr = norm, lr

    def due(self, done: int) -> bool:
        return done % self.config.logging.every == 0 or self.length.over(done)

    def line(self, done: int) -> dict[str, float | None]:
        """Says the line, and returns its figures for the log."""
        spent = max(time.monotonic() - self.told, 1e-9)
        self.busy += spent
        self.steps += self.since
        rate = self.since * self.config.trainer.batch_size / spent
        wait = self.waited / spent
        mean = math.fsum(self.losses) / len(self.losses) if self.losses else None
        if self.length.max_steps is not None:
            left = self.busy / self.steps * (self.length.max_steps - done)
            of = f"/{self.length.max_steps}"
        else:
            left = max((self.length.seconds or 0) - self.length.elapsed(), 0)
            of = ""
        end = time.strftime("%H:%M" if left < 20 * 3600 else "%d %b %H:%M", time.localtime(time.time() + left))
        shown = "none" if mean is None else f"{mean:.4f}"
        say(
            f"step {done}{of}  loss {shown}  lr {self.lr:.2g}  {rate:.1f} images/s  "
            f"waiting for data {100 * wait:.0f} %  {memory()}  {duration(left)} left, until {end}"
        )
        self.starved = self.starved + 1 if wait > 0.3 else 0
        if self.starved == 3:
            loader = self.config.loader
            say(
                f"hint       the network waits for data: give more loader.workers (now {loader.count()}), "
                "dataset.cache=decoded, or pictures of less than full size"
            )
        scalars: dict[str, float | None] = {
            "train/loss": mean, "train/lr": self.lr, "train/images_per_s": rate, "train/data_wait": wait,
            "train/gradient_norm": self.norm if math.isfinite(self.norm) else None,
        }  # fmt: skip
        if (factor := self.config.optimizer.backbone_lr_factor) != 1:
            scalars["train/lr_backbone"] = self.lr * factor
        if (peak := peak_memory()) is not None:
            scalars["train/memory_gb"] = peak / 1e9
        self.losses = []
        self.restart()
        return scalars


# ------------------------------------------------------------------------------------------------ what went wrong


@contextlib.contextmanager
def beside_training() -> Iterator[None]:
    """What is told beside the training does not end it: a full disk is said."""
    try:
        yield
    except OSError as error:
        say(f"WARNING    cannot write {error.filename or 'the log'}: {error.strerror or error}")


def worst(found: list[tuple[list[float], list[str]]]) -> str:
    """'rank 1: a.png nan, b.png nan': the pictures whose loss is no number, else those of the highest loss."""
    rows = [
        (rank, name, value)
        for rank, (losses, names) in enumerate(found)
        for name, value in zip(names, losses, strict=True)
    ]
    wrong = [row for row in rows if not math.isfinite(row[2])] or sorted(rows, key=lambda row: -row[2])
    told = [f"rank {rank}: {name} {value:.4g}" for rank, name, value in wrong[:3]]
    return ", ".join(told) + (
        f" and {len(wrong) - 3} more" if len(wrong) > 3 and not math.isfinite(wrong[3][2]) else ""
    )


@contextlib.contextmanager
def named(step: int, batch: list[Batch], world: World, box: BlackBox) -> Iterator[None]:
    """Whatever goes wrong inside is told with the step and the pictures of this process."""
    try:
        yield
    except PeerDied:
        raise
    except Exception as error:
        world.raise_if_peer_died(error)
        names = ", ".join(name for part in batch for name in part.names)
        where = f"step {step + 1}, rank {world.rank}, pictures {names}"
        box.crash(step, batch, f"{type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError):
            raise SegtrainError(
                f"out of memory at {where}. The same run goes on with trainer.accumulation={2 * len(batch)} or on more "
                "cards; another one fits with model.recompute=blocks, trainer.precision=bf16 or a smaller "
                "augmentation.crop_size"
            ) from error
        print(f"segtrain: at {where}:", file=sys.stderr, flush=True)
        raise


def diverged(text: str, config: TrainConfig) -> DataError:
    """Stops a run before its checkpoint is overwritten."""
    error = DataError(
        f"{text}. Training has diverged; the last checkpoint is from before. Go on with trainer.on_bad_step=skip, or "
        f"begin again with a lower optimizer.lr (now {config.optimizer.lr}) and restart=true"
    )
    error.everywhere = True
    return error


def finish(
    run: Run, result: dict[str, Any], best: dict[str, Any], config: TrainConfig, done: int, length: Length
) -> None:
    """The last words of a run, on the screen and in summary.txt."""
    lines = [
        *table_lines(result),
        f"training      {done} steps in {duration(length.elapsed())}, seed {config.trainer.seed}",
        f"checkpoints   {run.last} and best.pt (selected on {config.dataset.val_split}, step {best['step']})",
        f"pictures      {run.pictures}",
        f"TensorBoard   tensorboard --logdir {run.folder}",
    ]
    for line in lines:
        say(line)
    write_atomically(run.folder / "summary.txt", "\n".join([*lines, ""]).encode())
    run.tell("finished", done, length.max_steps or done)
