"""Networks between BatchNorm and In-Place ABN, with the difference that it makes on a probe input.

    conversion = to_inplace(torchvision.models.resnet50(weights="DEFAULT"), probe, replace_relu=0.01)
    print(conversion)  # what was converted, what was left and why, near-zero scales, differences
    train(conversion.model)
    fold(conversion.model, probe).model  # convolutions with bias and activations, for export

All three return a converted copy and leave the given model as it is. Each runs a copy of the network on the probe, in
eval mode and in training mode, to see what follows a norm layer and who else uses its input; so any network can be
converted, provided that the probe takes every path that matters. A norm whose surroundings are not understood is left
unchanged and listed.
"""

from segtrain.abn.convert.conversion import Conversion
from segtrain.abn.convert.fold import fold
from segtrain.abn.convert.to_batch_norm import BatchNormAddAct, to_batch_norm
from segtrain.abn.convert.to_inplace import to_inplace

__all__ = ["BatchNormAddAct", "Conversion", "fold", "to_batch_norm", "to_inplace"]
