"""Training: build, loop, validate, save."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segtrain import checkpoint, pictures
from segtrain.abn import describe_backend
from segtrain.abn.diagnosis import is_overwritten_error, overwritten_outputs
from segtrain.config import MixtureConfig, TrainConfig
from segtrain.data.cache import Decoded
from segtrain.data.check import Seen, check_samples
from segtrain.data.datasets import described, label_table, split_samples, training_mixture
from segtrain.data.labels import LabelTable
from segtrain.data.loader import Batch, TrainingData, read_pixels, training_batches
from segtrain.data.mixture import Mixture, parts
from segtrain.data.sample import Sample
from segtrain.data.sampling import class_index
from segtrain.data.transforms import Augmentation
from segtrain.device import describe_device, resolve
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.evaluation import Trained, describe, position_prior, predictions, score
from segtrain.inference import normalise
from segtrain.log import RunLog, duration, memory, process_count, say
from segtrain.losses import upsampled_cross_entropy
from segtrain.metrics import Scores
from segtrain.models import from_config
from segtrain.optim import build_optimizer, poly
from segtrain.protocol import fingerprints, print_table, protocol, seen_in_training, summarised, write_result
from segtrain.run import Interruption, Run
from segtrain.weights import load_weights


def train(config: TrainConfig) -> Path:
    """Train as the configuration says, or go on where the same run stopped. Returns the run folder."""
    if process_count() > 1:
        raise UsageError("this version trains in one process: start it without torchrun")
    with torch.device("meta"):  # a name or a combination that does not exist stops here, before any data is touched
        from_config(config.model, num_classes=2)
    on = resolve(config.device)
    table = label_table(config.dataset)
    run = Run(config)
    state = run.resume()
    mixture = training_mixture(config.dataset)
    samples = mixture.samples
    max_steps = config.trainer.steps(len(samples))
    if state is not None and state["step"] >= max_steps and run.evaluation is not None:
        say(f"{run.folder} is finished ({state['step']} steps): nothing to do. restart=true trains it anew.")
        print_table(run.evaluation)
        return run.folder
    val_samples = split_samples(config.dataset, config.dataset.val_split)
    check_data(config, samples, val_samples, table)
    run.begin()

    torch.manual_seed(config.trainer.seed)
    model = from_config(config.model, table.num_classes).to(on)
    if config.model.weights != "none" and state is None:
        options = config.model
        say(str(load_weights(Path(options.weights), model, table, options.weights_match, options.weights_taxonomy)))
    optimizer = build_optimizer(model, config.optimizer)
    start, validated, best = 0, 0, {"miou": -1.0, "step": 0}
    if state is not None:
        checkpoint.load_weights(model, state["model"], run.last)
        optimizer.load_state_dict(state["optimizer"])
        start, validated, best = state["step"], state["validated"], state["best"]
    introduce(config, run, model, samples, val_samples, table, on, start, max_steps)
    trained = Trained(model, table, config.model, on)
    prior = position_prior(samples, table)
    data = training_data(config, mixture, table)
    workers = config.loader.count()
    batches = training_batches(data, config.trainer.batch_size, start, max_steps, workers, pin_memory=on.type == "cuda")
    log = RunLog(run.folder, start)
    trained_on = fingerprints(mixture.pictures)

    def save(path: Path, step: int) -> None:
        content = {"config": asdict(config), "classes": table.as_dict(), "step": step, "trained_on": trained_on}
        content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(path, content | {"validated": validated, "best": best})

    def validate(step: int) -> tuple[dict[str, Any], Scores]:
        nonlocal validated, best
        answers = predictions(trained, val_samples, config.inference, min(workers, len(val_samples)))
        watched = interruption.watch(answers, run.last, step)
        counted = Scores(table, described(config.dataset).rules)
        of_prior, panels = score(watched, len(val_samples), counted, prior, config.logging.pictures)
        result = summarised(counted, of_prior)
        per_class = {f"val_iou/{name}": value for name, value in result["per_class"].items()}
        log.scalars(step, {"val/miou": result["miou"], "val/pixel_accuracy": result["pixel_accuracy"], **per_class})
        if panels:
            picture = pictures.sheet(panels, table)
            log.picture(step, "val/image-target-prediction", picture)
            pictures.write(run.pictures / f"val_{step:07d}.png", picture)
        validated = step
        if result["miou"] > best["miou"]:
            best = {"miou": result["miou"], "step": step}
            save(run.folder / "best.pt", step)
        save(run.last, step)  # now with what was found
        found, top = 100 * result["miou"], 100 * best["miou"]
        say(f"validation at step {step}: mIoU {found:.1f} %, best {top:.1f} % (step {best['step']})")
        data, split = config.dataset, config.dataset.val_split
        result |= describe(data.name, split, config.inference, str(run.last), step)
        how = {"inference": result["inference"], "precision": "float32", "step": step}
        warnings = seen_in_training(trained_on, data, val_samples)
        return result | {"protocol": protocol(counted, data, split, val_samples, warnings, how)}, counted

    progress = TrainingProgress(config, start, max_steps)
    with Interruption() as interruption:
        if 0 < start < max_steps and start % config.trainer.validate_every == 0 and validated < start:
            validate(start)  # the run was stopped between this step and its validation
            progress.restart()
        for step, batch in enumerate(progress.waiting(batches), start):
            lr = poly(config.optimizer.lr, step, max_steps, config.schedule.power)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout too is a function of (seed, step): a resumed run draws what an uninterrupted one would.
            torch.manual_seed(int(np.random.SeedSequence((config.trainer.seed, step)).generate_state(1)[0]))
            loss = train_step(model, batch, optimizer, config, on, mixture.groups)
            done = step + 1
            progress.step(done, loss, lr, log)
            due = done % config.trainer.validate_every == 0 or done == max_steps
            if due or done % config.trainer.save_every == 0 or interruption.status:
                check_finite(loss.item(), done, config)
                save(run.last, done)
            if interruption.status:
                raise interruption.error(run.last, done)
            if due and done < max_steps:
                validate(done)
                progress.restart()
        result, counted = validate(max_steps)
        write_result(run.folder, result, [], table, counted.evaluated())
    log.close()
    print_table(result)
    say(f"checkpoints   {run.last} and best.pt (selected on {config.dataset.val_split}, step {best['step']})")
    say(f"pictures      {run.pictures}")
    say(f"TensorBoard   tensorboard --logdir {run.folder}")
    return run.folder


def training_data(config: TrainConfig, mixture: Mixture, table: LabelTable) -> TrainingData:
    """What the loader reads, with the cache and the index of classes that the options ask for."""
    samples = mixture.samples
    folder, share = config.dataset.cache_folder(), config.sampling.class_uniform
    seen = Seen(folder, samples)
    read: Callable[[Sample], tuple[np.ndarray, np.ndarray]] = read_pixels
    if config.dataset.cache == "decoded":
        read = Decoded(folder / "decoded")
        read.build(samples, seen, say)
    index = class_index(samples, table, seen) if share > 0 else None
    augmentation = Augmentation(config.augmentation)
    return TrainingData(samples, table, augmentation, config.trainer.seed, read, index, share, mixture.weights)


def train_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, config: TrainConfig, on: torch.device,
    groups: Sequence[Sequence[int]] = (),
) -> Tensor:  # fmt: skip
    """One step of gradient descent. Returns the loss, a scalar on the device. groups: as the loss has them."""
    model.train()
    images = normalise(batch.images.to(on, non_blocking=True), config.model.mean, config.model.std)
    logits = model(images, upsample=False)
    target = batch.targets.to(on, non_blocking=True).long()
    loss = upsampled_cross_entropy(logits, target, config.loss.hardest, groups)
    optimizer.zero_grad(set_to_none=True)
    try:
        loss.backward()
    except RuntimeError as error:
        if not is_overwritten_error(error):
            raise
        names = ", ".join(overwritten_outputs(model, images)) or "no module's (a tensor made between modules)"
        raise SegtrainError(
            f"backward needs a tensor that a later operation has overwritten; the output of: {names}. If an In-Place "
            f"ABN layer comes next, give it overwrite=False ({error})"
        ) from error
    optimizer.step()
    return loss.detach()


def check_finite(loss: float, step: int, config: TrainConfig) -> None:
    """Stops a run that has diverged, before its checkpoint is overwritten."""
    if not math.isfinite(loss):
        raise DataError(
            f"the loss is {loss} at step {step}: training has diverged; the last checkpoint is from before. "
            f"Begin again with a lower optimizer.lr (now {config.optimizer.lr}) and restart=true"
        )


def check_data(config: TrainConfig, samples: list[Sample], val_samples: list[Sample], table: LabelTable) -> None:
    """DataError for damaged files, wrong sizes or ids, pictures without labels, and a crop that no picture can fill."""
    for split, some in ((config.dataset.train_split, samples), (config.dataset.val_split, val_samples)):
        unlabelled = [sample for sample in some if sample.label is None]
        if unlabelled:
            raise DataError(f"the split {split!r} has pictures without labels, such as {unlabelled[0].image}")
    if not config.trainer.check_data:
        return
    cache = config.dataset.cache_folder()
    if isinstance(config.dataset, MixtureConfig):  # each part by its own table
        sizes = []
        for part in parts(config.dataset):
            if part.weight != 0:
                own = split_samples(part.config, part.split)
                sizes.append(check_samples(own, label_table(part.config), cache, say, part.config.name))
        largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    else:
        largest = check_samples(samples, table, cache, say, config.dataset.name)
    check_samples(val_samples, table, cache, say, config.dataset.name)
    enlarged = [math.ceil(extent * config.augmentation.scale[1]) for extent in largest]
    crop = config.augmentation.crop_size
    if crop[0] > enlarged[0] or crop[1] > enlarged[1]:
        raise UsageError(
            f"augmentation.crop_size={crop} is not possible: the largest picture is {list(largest)} [height,width] "
            f"and is enlarged at most {config.augmentation.scale[1]} times, so at most {enlarged} can be filled"
        )


def introduce(
    config: TrainConfig, run: Run, model: nn.Module, samples: list[Sample], val_samples: list[Sample],
    table: LabelTable, on: torch.device, start: int, max_steps: int,
) -> None:  # fmt: skip
    """Says once what was chosen."""
    options = config.model
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    backend = f" (kernels: {describe_backend(on.type)})" if options.norm.startswith("inplace_abn") else ""
    say(f"run        {run.folder}" + (f", going on at step {start}" if start else ""))
    say(f"device     {describe_device(on)}, float32")
    say(f"model      {options.backbone} + {options.head}, stride {options.output_stride}, {options.norm}{backend}, "
        f"{parameters:.1f} M parameters, initial weights {options.weights.replace('none', 'random')}")  # fmt: skip
    say(f"data       {config.dataset.name}: {len(samples)} {config.dataset.train_split} and {len(val_samples)} "
        f"{config.dataset.val_split} pictures, {table.num_classes} classes")  # fmt: skip
    say(f"training   {max_steps} steps of {config.trainer.batch_size} crops {config.augmentation.crop_size}, "
        f"seed {config.trainer.seed}, {config.loader.count()} loader processes")  # fmt: skip


class TrainingProgress:
    """A line every `logging.every` steps: loss (mean since the last line), rate, speed, wait for data, time left."""

    def __init__(self, config: TrainConfig, start: int, max_steps: int) -> None:
        self.config = config
        self.max_steps = max_steps
        self.losses: list[Tensor] = []
        self.busy = 0.0  # seconds of training so far, and the steps they took: the basis of the time left
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last line: it went into something else, such as a validation."""
        self.told = time.monotonic()
        self.waited = 0.0
        self.since = 0

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them noted."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def step(self, done: int, loss: Tensor, lr: float, log: RunLog) -> None:
        self.losses.append(loss)
        self.since += 1
        if done % self.config.logging.every and done != self.max_steps:
            return
        mean = torch.stack(self.losses).mean().item()
        check_finite(mean, done, self.config)
        spent = time.monotonic() - self.told
        self.busy += spent
        self.steps += self.since
        rate = self.since * self.config.trainer.batch_size / spent
        left = duration(self.busy / self.steps * (self.max_steps - done))
        wait = self.waited / spent
        say(
            f"step {done}/{self.max_steps}  loss {mean:.4f}  lr {lr:.2g}  {rate:.1f} images/s  "
            f"waiting for data {100 * wait:.0f} %  {memory()}  {left} left"
        )
        log.scalars(done, {"train/loss": mean, "train/lr": lr, "train/images_per_s": rate, "train/data_wait": wait})
        self.losses = []
        self.restart()
