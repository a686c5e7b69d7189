"""What happens before the first step: early checks, the network and its first weights, what is printed."""

from collections.abc import Generator
from dataclasses import asdict, fields
from typing import Any

import torch
from torch.utils.data import Dataset

from segtrain.abn import describe_backend
from segtrain.abn.coded_operators import describe_coder
from segtrain.config import ModelConfig, TrainConfig, TrainerConfig, classifies, option_of, require
from segtrain.config.options import Group, as_written, default_of
from segtrain.console import say
from segtrain.data.labels import LabelTable
from segtrain.data.loader import Batch, training_batches
from segtrain.data.order import MicroBatches
from segtrain.device import describe_device
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.engine.normalisation import take_normalisation
from segtrain.engine.preemption import Preemption
from segtrain.engine.run import Run
from segtrain.engine.state import TrainState
from segtrain.errors import UsageError
from segtrain.losses import Loss
from segtrain.models import Classifier, Segmenter, from_config
from segtrain.models.frozen import describe_frozen
from segtrain.models.timm_encoder import TimmEncoder
from segtrain.tasks.base import Task
from segtrain.tasks.classification import Classification
from segtrain.tasks.segmentation import Segmentation
from segtrain.threads import describe_load
from segtrain.weights.download import weights_file
from segtrain.weights.matching import Report
from segtrain.weights.provenance import data_names, provenance
from segtrain.weights.timm_weights import TimmReport, is_of_timm, load_timm
from segtrain.weights.transfer import load_weights


def task_of(config: TrainConfig) -> type[Task]:
    """What the configured dataset is for: segmentation, or classification of whole images."""
    return Classification if classifies(config.dataset) else Segmentation


def check_before_data(config: TrainConfig) -> None:
    """Raise UsageError for an unknown name or an impossible combination before any data is touched."""
    if not isinstance(config, TrainConfig):
        raise UsageError(f"segtrain.train takes what segtrain.compose(...) returns, got {type(config).__name__}")
    with torch.device("meta"):
        from_config(config.model, num_classes=2)
    task_of(config).check_options(config)


def prepare_task(config: TrainConfig, saved: dict[str, Any] | None) -> Task:
    """List the images of the configured dataset. saved: the checkpoint of the run, None for a new one.

    UsageError if the file of initial weights is missing: it is checked before the data, which take longer.
    """
    if saved is None and config.model.weights not in ("none", "timm"):
        weights_file(config.model.weights)
    task = task_of(config)(config)
    if saved is None:
        task.count_classes()
    if isinstance(config.trainer.batch_size, int):  # else it is known later
        require_warm_up(config, task.num_train)
    return task


def require_warm_up(config: TrainConfig, images: int) -> None:
    """UsageError if the learning rate would rise until the training on that many images ends."""
    warm_up, steps = config.schedule.warmup_steps, config.trainer.steps(images)
    require(
        steps is None or warm_up == 0 or warm_up < steps, "schedule.warmup_steps", warm_up,
        f"the training has {steps} steps: give fewer, or 0",
    )  # fmt: skip


def fit_to_memory(
    config: TrainConfig, task: Task, dist: World, device: torch.device, run: Run, saved: dict[str, Any] | None
) -> None:
    """Set trainer.batch_size=auto to a number, and with trainer.auto_fit choose what saves memory, for a new run.

    A resumed run has taken over what was chosen. A collective call; DataError if the processes have restored different
    checkpoints.
    """
    run.require_same_step((saved or {}).get("step", 0))
    options = config.trainer
    if saved is not None or (options.batch_size != "auto" and not options.auto_fit):
        return
    from segtrain.engine.planning.automatic import choose, device_budget

    budget = int(min(dist.all_gather(device_budget(device))))
    chosen = choose(config, task.num_classes, dist.size, budget, device, task.num_train) if dist.main else None
    chosen = dist.all_gather(chosen)[0]
    for key, value in chosen.items():
        group, _, name = key.partition(".")
        setattr(getattr(config, group), name, value)
    require_warm_up(config, task.num_train)


def build_learner(
    config: TrainConfig, task: Task, loss: Loss, dist: World, device: torch.device, run: Run,
    saved: dict[str, Any] | None,
) -> Learner:  # fmt: skip
    """The network and its optimizer as they were saved, or with their initial weights for a new run.

    Sets run.provenance.
    """
    torch.manual_seed(config.trainer.seed)
    network = from_config(config.model, task.num_classes).to(device)
    transfer: Report | TimmReport | None = None
    body = getattr(network, "body", None)
    if isinstance(body, TimmEncoder) and (saved is not None or config.model.weights == "none"):
        say(f"encoder    {body.certificate}")
    if saved is None and config.model.weights != "none":
        model = config.model
        transfer = initial_weights(model, network, task.table)
        say(str(transfer))
        if take_normalisation(config, transfer.normalised):
            run.write_config()
    run.provenance = provenance(data_names(asdict(config.dataset)), transfer)
    learner = Learner(network, loss, config, dist, device)
    if saved is not None:
        learner.load_state_dict(saved, run.last)
        run.provenance = saved.get("provenance", run.provenance)
        warn_of_other_statistics(saved.get("environment", {}), run.session, config)
    return learner


def initial_weights(options: ModelConfig, network: Segmenter | Classifier, table: LabelTable | None) -> Any:
    """Load what model.weights names into the network, and return the report."""
    if options.weights == "timm":
        assert isinstance(network, Segmenter)
        return load_timm(options, network)
    path = weights_file(options.weights)
    if options.is_timm() and isinstance(network, Segmenter) and is_of_timm(path):
        return load_timm(options, network, path)
    return load_weights(path, network, table, options.weights_match, options.weights_taxonomy)


def step_batches(
    config: TrainConfig, data: Dataset[Any], state: TrainState, dist: World, device: torch.device,
    preemption: Preemption,
) -> Generator[list[Batch], None, None]:  # fmt: skip
    """This process's micro-batches of every step from `state.step` on; an empty list where a signal ends the waiting.

    Closing ends the loader processes.
    """
    options, loader = config.trainer, config.loader
    order = MicroBatches(options.images, state.step, state.max_steps, dist.rank, dist.size, options.accumulation)
    pinned = device.type == "cuda"
    return training_batches(data, order, loader.count(), pinned, loader.prefetch, preemption.asked)


def warn_of_other_statistics(before: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    """Warn if micro-batches have another size than before: normalisation statistics are per micro-batch."""
    if "accumulation" not in before or config.model.norm.endswith("_sync"):
        return
    parts_before, parts = (session["processes"] * session["accumulation"] for session in (before, now))
    if parts_before != parts:
        crops, before_crops = (config.trainer.images / number for number in (parts, parts_before))
        say(f"WARNING    norms see {crops:g} crops at a time from here on, and saw {before_crops:g} before")


def chosen_options(options: Group, *always: str) -> str:
    """The name of a group's part, and those of its options that are not at their defaults: "sgd, lr=0.1 nesterov=true".

    always: options that are named at their defaults too, if the part reads them.
    """
    name, shown = getattr(options, "name", ""), []
    for item in fields(options):
        value, only = getattr(options, item.name), option_of(item).only
        is_read = only is None or name in only or value != default_of(item)
        if item.name not in ("name", "crop_size") and is_read and (item.name in always or value != default_of(item)):
            shown.append(f"{item.name}={as_written(value)}")
    return ", ".join([name, *([" ".join(shown)] if shown else [])])


def describe_compiled(options: TrainerConfig) -> str:
    budget = options.memory_budget
    return "compiled" if budget is None else f"compiled with a memory budget of {budget:g}"


def print_start(config: TrainConfig, run: Run, learner: Learner, task: Task, state: TrainState) -> None:
    """Print what was chosen: run, device, model, data, length."""
    options, trainer, dist, device = config.model, config.trainer, learner.dist, learner.device
    parameters = sum(parameter.numel() for parameter in learner.network.parameters()) / 1e6
    backend = f" (kernels: {describe_backend(device.type)})" if options.norm.startswith("inplace_abn") else ""
    named = {
        describe_compiled(trainer): trainer.compile, "CUDA graphs": trainer.cuda_graphs,
        "deterministic": trainer.deterministic,
    }  # fmt: skip
    chosen = [name for name, is_on in named.items() if is_on]
    chosen += [f"averaged weights {trainer.ema_decay}"] if trainer.ema_decay is not None else []
    say(f"run        {run.folder}" + (f", going on at step {state.step}" if state.step else ""))
    say(f"device     {describe_device(device)}, {', '.join([trainer.precision.replace('fp32', 'float32'), *chosen])}")
    if str(config.inference) != f"inference {config.inference.name} in fp32":
        say(f"validated  {config.inference}")
    if (load := describe_load()) is not None:
        say(f"machine    {load}")
    if options.keep != "exact":
        say(f"kept maps  in {options.keep.replace('bit', ' bits')}, by {describe_coder(device.type)}")
    if learner.network.rebuilding is not None:
        say(f"rebuilt    {learner.network.rebuilding}")
    if dist.size == 1 and trainer.parallel == "fsdp":
        say("processes  1: trainer.parallel=fsdp needs several processes to shard weights")
    if dist.size > 1:
        synchronised = options.norm.endswith("_sync")
        statistics = f"statistics over {trainer.sync_group}" if synchronised else "statistics of each its own"
        say(f"processes  {dist.size}, {trainer.parallel}, {statistics}")
    say(f"model      {options.backbone} + {options.head}, stride {options.output_stride}, {options.norm}{backend}, "
        f"{parameters:.1f} M parameters, initial weights {options.weights.replace('none', 'random')}")  # fmt: skip
    if options.frozen:
        say(f"frozen     {describe_frozen(learner.network)}")
        if options.weights == "none":
            say("WARNING    the frozen parts have random weights: model.weights=none")
    say(f"data       {config.dataset.name}: {task.num_train} {config.dataset.train_split} and "
        f"{task.num_val} {config.dataset.val_split} images, {task.num_classes} classes")  # fmt: skip
    if task.num_shared:
        say(f"WARNING    {task.num_shared} of these {task.num_val} validation images are trained on: their score says "
            "nothing about other images")  # fmt: skip
    say(f"loss       {chosen_options(config.loss)}")
    say(f"optimizer  {chosen_options(config.optimizer, 'lr')}, schedule {chosen_options(config.schedule)}")
    say(f"augmented  {chosen_options(config.augmentation, 'scale', 'flip')}")
    parts = dist.size * trainer.accumulation
    divided = f" ({trainer.images / parts:g} at a time x {trainer.accumulation} in each of {dist.size})"
    say(f"training   {state} of {trainer.images} {task.batch_of}{divided if parts > 1 else ''} "
        f"{config.augmentation.crop_size}, seed {trainer.seed}, {config.loader.count()} loader processes")  # fmt: skip
