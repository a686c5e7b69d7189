"""Options of the training loop: trainer.*"""

from dataclasses import dataclass

from segtrain.config.options import option, require


@dataclass
class TrainerConfig:
    batch_size: int = option(16, "pictures per step, over all processes and accumulated parts")
    accumulation: int = option(1, "parts of a process's share of the batch that go through the network one by one")
    max_steps: int | None = option(None, "length of the training in steps")
    epochs: float | None = option(None, "length of the training in passes over the data, instead of max_steps")
    hours: float | None = option(None, "length of the training in hours of this machine's clock, instead of max_steps")
    patience: int | None = option(None, "end early after so many validations without a better mIoU")
    precision: str = option("fp32", "fp32 | bf16 | fp16: arithmetic of the network; weights and loss stay float32")
    compile: bool = option(False, "compile the network with torch.compile")
    deterministic: bool = option(False, "only algorithms that give the same bits every time, where they are slower too")
    ema_decay: float | None = option(None, "keep averaged weights too, e.g. 0.999; they are validated and used")
    parallel: str = option("ddp", "several processes: ddp | fsdp, which shares out weights and optimizer (FSDP2)")
    sync_group: str = option("all", "processes whose statistics are one: all | node | a number of neighbouring ranks")
    seed: int = option(0, "initial weights, order and augmentation follow from it")
    validate_every: int = option(500, "steps between validations; the last step is always followed by one")
    save_every: int = option(200, "steps between checkpoints")
    keep_last: int = option(2, "checkpoints step_<n>.pt to keep, the newest ones; besides last.pt and best.pt")
    check_data: bool = option(True, "before the first step, check every file and label id")
    overfit: int | None = option(None, "train and validate on so many training pictures: any network must learn them")
    on_bad_step: str = option("stop", "a loss or gradient that is no number: stop | skip the step")
    spike_factor: float = option(
        10.0, "report a loss so many times the median of the last 100 (and skip it, if so told); 0 = never"
    )

    def check(self) -> None:
        for key in ("accumulation", "max_steps", "validate_every", "save_every", "keep_last", "overfit", "patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}", value, "give 1 or more")
        require(
            self.batch_size >= 2, "trainer.batch_size", self.batch_size,
            "give 2 or more: the pooled branch of DeepLabV3 has one value per picture to normalise over",
        )  # fmt: skip
        require(self.seed >= 0, "trainer.seed", self.seed, "give 0 or more")
        for key in ("epochs", "hours"):
            value = getattr(self, key)
            require(value is None or value > 0, f"trainer.{key}", value, "give more than 0")
        lengths = {key: getattr(self, key) for key in ("max_steps", "epochs", "hours")}
        others = ", ".join(f"trainer.{key}={value}" for key, value in lengths.items() if key != "max_steps")
        require(
            sum(value is not None for value in lengths.values()) == 1, "trainer.max_steps", self.max_steps,
            f"set one of trainer.max_steps, trainer.epochs and trainer.hours, and the others to null ({others})",
        )  # fmt: skip
        for key, known in (
            ("precision", ("fp32", "bf16", "fp16")), ("parallel", ("ddp", "fsdp")), ("on_bad_step", ("stop", "skip")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"trainer.{key}", getattr(self, key), f"choose {', '.join(known)}")
        require(
            self.sync_group in ("all", "node") or (self.sync_group.isdigit() and int(self.sync_group) >= 1),
            "trainer.sync_group", self.sync_group, "choose all, node or a number of ranks, such as 4",
        )  # fmt: skip
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "trainer.ema_decay", self.ema_decay,
            "give more than 0 and less than 1, or null for none",
        )  # fmt: skip
        require(
            self.spike_factor == 0 or self.spike_factor > 1, "trainer.spike_factor", self.spike_factor,
            "give more than 1, or 0 for never",
        )  # fmt: skip
        fp16 = self.precision == "fp16"
        for key, on in (("ema_decay", self.ema_decay is not None), ("compile", self.compile), ("precision", fp16)):
            require(
                not (on and self.parallel == "fsdp"), f"trainer.{key}", getattr(self, key),
                "with trainer.parallel=fsdp it is not there; choose trainer.parallel=ddp",
            )  # fmt: skip

    def steps(self, samples: int) -> int | None:
        """Length of the training in steps for a data set of that many samples; None where the clock decides."""
        if self.max_steps is not None:
            return self.max_steps
        return None if self.epochs is None else max(1, round(self.epochs * samples / self.batch_size))
