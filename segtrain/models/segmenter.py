"""Backbone, head and classifier put together: one class for every pixel."""

from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.models.blocks import Stage, interception
from segtrain.models.densenet import DenseModule
from segtrain.models.frozen import Freezable
from segtrain.models.rebuilding import rebuilding_of


class Segmenter(Freezable):
    """(N, in_channels, H, W) normalised images -> (N, num_classes, H, W) logits, upsampled bilinearly from the stride.

    `upsample=False` returns the logits at that stride. The submodules are named body, head and cls, as in the released
    checkpoints. recompute, keep: as in ModelConfig.
    """

    in_channels = 3

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        head_channels: int,
        num_classes: int,
        recompute: str = "none",
        keep: str = "exact",
    ) -> None:
        super().__init__()
        self.recompute, self.keep = recompute, keep
        recompute_blocks(body, recompute)
        self.rebuilding = rebuilding_of(body, recompute)
        self.body = body
        self.head = head
        self.num_classes = num_classes
        self.cls = nn.Conv2d(head_channels, num_classes, 1, bias=getattr(head, "classifier_bias", True))

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor:
        with interception(self.recompute, self.keep, self.rebuilding):
            logits: Tensor = self.cls(self.head(self.body(x)))
        if not upsample:
            return logits
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def recompute_blocks(body: nn.Module, recompute: str) -> None:
    """Have every stage run its blocks again in backward if `recompute` is "blocks"."""
    for part in body.modules():
        if isinstance(part, Stage | DenseModule):
            part.recompute = recompute == "blocks"
