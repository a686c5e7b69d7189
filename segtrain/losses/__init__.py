"""The training losses.

The loss of a step is the sum over all images of the global batch divided by the sum of their counts, so it does not
depend on how images are distributed over processes and micro-batches. The built-in losses take logits at the network's
own stride and never hold an upsampled batch: they upsample a tile of rows, compute its loss and gradient, and keep only
the gradient at the network's stride for backward.
"""

from segtrain.losses.base import Groups, Loss
from segtrain.losses.build import LOSSES, build_loss
from segtrain.losses.pixelwise import CrossEntropy

__all__ = ["LOSSES", "CrossEntropy", "Groups", "Loss", "build_loss"]
