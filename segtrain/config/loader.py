"""Options of the loader processes: loader.*"""

import os
from dataclasses import dataclass
from typing import ClassVar

from segtrain.config.options import Group, option
from segtrain.threads import cpus


@dataclass
class LoaderConfig(Group):
    PREFIX: ClassVar[str] = "loader."

    workers: int | None = option(
        None, "loader processes per training process, 0: none (default: one per CPU, shared)", low=0, limit=1024
    )
    prefetch: int = option(4, "batches that each loader process prepares ahead", low=1, limit=1024)

    def count(self) -> int:
        """Processes to start."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cpus() // here) if self.workers is None else self.workers
