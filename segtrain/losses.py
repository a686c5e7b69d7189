"""The training loss. It is defined on the batch, not per picture, so that it does not depend on how pictures group."""

import math

from torch import Tensor
from torch.nn import functional as F

from segtrain.data.labels import IGNORE


def cross_entropy(logits: Tensor, target: Tensor, hardest: float = 1.0) -> Tensor:
    """Mean cross-entropy over the hardest pixels of each picture: a scalar.

    logits: float (N, C, H, W). target: int64 (N, H, W), IGNORE where there is no label. hardest: share of a picture's
    labelled pixels that counts, rounded up; 1 is the ordinary loss. The sum over all chosen pixels of the batch is
    divided by their number; a batch without any label gives 0 (with gradient 0).
    Source of the selection: In-Place ABN paper, section 4.2 (online bootstrapping, p = 1, m = 25 %); ignored pixels
    do not count towards the share.
    """
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none").flatten(1)
    valid = (target != IGNORE).flatten(1)
    if hardest == 1:
        return losses.sum() / valid.sum().clamp(min=1)
    total, chosen = losses.sum() * 0, 0
    for picture, count in zip(losses, valid.sum(1).tolist(), strict=True):
        # An ignored pixel has loss 0, so it can only be chosen beside a pixel that adds nothing either.
        hard = math.ceil(count * hardest)
        total = total + picture.topk(hard).values.sum()
        chosen += hard
    return total / max(chosen, 1)
