"""Options of the training loop: trainer.*"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from segtrain.config.options import LARGEST_SEED, MOST_STEPS, Group, as_written, option, require


@dataclass
class TrainerConfig(Group):
    PREFIX: ClassVar[str] = "trainer."

    batch_size: int | str = option(
        16, "images per step, over all processes and micro-batches; auto: the most that fits", low=2,
        limit=65536, choices=("auto",), other="number",
        why="in training, DeepLabV3's pooled branch has one value per image and channel to normalise over",
    )  # fmt: skip
    auto_fit: bool = option(False, "choice of what saves memory, where a step does not fit the device")
    accumulation: int = option(1, "micro-batches per step in each process", low=1, limit=65536, resume=True)
    max_steps: int | None = option(None, "duration of the training [steps]", low=1, limit=MOST_STEPS, resume="longer")
    epochs: float | None = option(
        None,
        "duration of the training [passes over the data], instead of max_steps",
        above=0,
        limit=1e6,
        resume="longer",
    )
    hours: float | None = option(
        None,
        "duration of the training [hours of wall time], instead of max_steps",
        above=0,
        limit=1e6,
        resume="longer",
    )
    patience: int | None = option(
        None, "validations without improvement after which training ends early", low=1, limit=MOST_STEPS, resume=True
    )
    precision: str = option(
        "fp32", "precision of the network; weights and loss stay float32", choices=("fp32", "bf16", "fp16")
    )
    compile: bool = option(False, "compilation of the network with torch.compile")
    memory_budget: float | None = option(
        None, "fraction of the activations that the compiled step keeps; null: as torch chooses", low=0, high=1
    )
    cuda_graphs: bool = option(False, "capture of forward and backward in a CUDA graph for each shape", resume=True)
    deterministic: bool = option(False, "deterministic algorithms only, even where they are slower")
    ema_decay: float | None = option(
        None, "decay of averaged weights, which are then validated and used; null: none", above=0, below=1
    )
    parallel: str = option(
        "ddp", "kind of data parallelism; fsdp shards weights and optimizer", choices=("ddp", "fsdp"), resume=True
    )
    sync_group: str = option(
        "all", "processes that share normalisation statistics", choices=("all", "node"), other="number of ranks"
    )
    seed: int = option(0, "seed of initial weights, order and augmentation", low=0, limit=LARGEST_SEED)
    validate_every: int = option(
        500, "steps between validations; the last step is always validated", low=1, limit=MOST_STEPS, resume=True
    )
    save_every: int = option(200, "steps between checkpoints", low=1, limit=MOST_STEPS, resume=True)
    keep_last: int = option(
        2, "newest checkpoints step_<n>.pt to keep, besides last.pt and best.pt", low=1, limit=1e6, resume=True
    )
    check_data: bool = option(True, "check of every file and label id before the first step", resume=True)
    overfit: int | None = option(
        None, "number of training images to train and validate on, as a test", low=1, limit=MOST_STEPS
    )
    on_bad_step: str = option(
        "stop", "response to a loss or gradient that is not finite", choices=("stop", "skip"), resume=True
    )
    spike_factor: float = option(
        10.0, "loss relative to the median of the last 100 that counts as bad; 0: never", low=0, below=inf, resume=True
    )

    def check(self) -> None:
        super().check()
        lengths = {key: getattr(self, key) for key in ("max_steps", "epochs", "hours")}
        others = ", ".join(f"trainer.{key}={value}" for key, value in lengths.items() if key != "max_steps")
        require(
            sum(value is not None for value in lengths.values()) == 1, "trainer.max_steps", self.max_steps,
            f"set one of trainer.max_steps, trainer.epochs and trainer.hours, and the others to null ({others})",
        )  # fmt: skip
        require(
            self.sync_group in ("all", "node") or (self.sync_group.isdigit() and int(self.sync_group) >= 1),
            "trainer.sync_group", self.sync_group, "choose all, node or a number of ranks, such as 4",
        )  # fmt: skip
        require(
            self.spike_factor == 0 or self.spike_factor > 1, "trainer.spike_factor", self.spike_factor,
            "give more than 1, or 0 for never",
        )  # fmt: skip
        require(
            self.memory_budget is None or self.compile, "trainer.memory_budget", self.memory_budget,
            "it is the compiler's; add trainer.compile=true, or choose null",
        )  # fmt: skip
        fp16 = self.precision == "fp16"
        for key, on in (("ema_decay", self.ema_decay is not None), ("compile", self.compile), ("precision", fp16)):
            why = ": FSDP gathers weights between the blocks, outside of a graph" if key == "compile" else ""
            require(
                not (on and self.parallel == "fsdp"), f"trainer.{key}", as_written(getattr(self, key)),
                f"trainer.parallel=fsdp does not support it{why}; choose trainer.parallel=ddp",
            )  # fmt: skip

    @property
    def images(self) -> int:
        """Images per step. trainer.batch_size=auto is a number by the time that a training reads it."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

    def steps(self, samples: int) -> int | None:
        """Length of the training in steps for a dataset of that many samples; None where the clock decides."""
        if self.max_steps is not None:
            return self.max_steps
        return None if self.epochs is None else max(1, round(self.epochs * samples / self.images))
