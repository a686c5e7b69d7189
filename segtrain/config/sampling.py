"""Options of how training crops are drawn: sampling.*"""

from dataclasses import dataclass
from typing import ClassVar

from segtrain.config.options import Group, option


@dataclass
class SamplingConfig(Group):
    PREFIX: ClassVar[str] = "sampling."

    class_uniform: float = option(
        0.0, "fraction of crops drawn by class: a class, an image with it, a pixel of it", low=0, high=1
    )
