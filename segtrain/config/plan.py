"""Options of the planner: plan.*"""

import re
from dataclasses import dataclass
from typing import ClassVar

from segtrain.config.dataset import SIZE
from segtrain.config.options import LARGEST_SIZE, Group, option
from segtrain.errors import UsageError

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
# For CUDA's context, cuDNN's workspace and fragments. Chosen so that ResNeXt-101 gives the paper's 16 and 28 crops on
# four GPUs of 12 GB; scripts/bench_plan.py --paper prints what the other rows say.
RESERVE = "1.2GB"


@dataclass
class PlanConfig(Group):
    PREFIX: ClassVar[str] = "plan."

    device_memory: str = option("12GB", "memory of one device; 12GB is 12e9 bytes, 12GiB is 12 x 2^30")
    devices: int = option(1, "number of devices, one process each", low=1, limit=65536)
    reserve: str = option(RESERVE, "part of it that context, workspace and fragments take")
    image_size: list[int] | None = option(
        None, "largest validation image [pixels]; null: the dataset's", items=SIZE, low=32, limit=LARGEST_SIZE
    )

    def check(self) -> None:
        super().check()
        for key in ("device_memory", "reserve"):
            parse_bytes(getattr(self, key), f"plan.{key}")
        if self.budget <= 0:
            raise UsageError(
                f"plan.reserve={self.reserve} leaves nothing of plan.device_memory={self.device_memory}: give less"
            )

    @property
    def memory(self) -> int:
        """plan.device_memory in bytes."""
        return parse_bytes(self.device_memory, "plan.device_memory")

    @property
    def budget(self) -> int:
        """What tensors may take of it, in bytes."""
        return self.memory - parse_bytes(self.reserve, "plan.reserve")


def parse_bytes(text: str, key: str) -> int:
    """'12GB' -> 12000000000. UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(GB|GiB|MB|MiB)", text)
    if found is None:
        raise UsageError(f"{key} must be a number with a unit, {', '.join(UNITS)}, such as 12GB, got {text}")
    return round(float(found[1]) * UNITS[found[2]])


def as_gigabytes(size: float) -> str:
    """12000000000 -> '12.00 GB (11.18 GiB)'; in MB below a tenth of that unit."""
    if size < 10**8:
        return f"{size / 10**6:.2f} MB ({size / 2**20:.2f} MiB)"
    return f"{size / 10**9:.2f} GB ({size / 2**30:.2f} GiB)"
