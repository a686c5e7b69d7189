"""Notes for the report on a file of weights: doubts about what it is, and differences of its kind of network."""

from typing import Any

from torch import nn

from segtrain.models import Segmenter
from segtrain.weights.files import WeightsFile
from segtrain.weights.matching import Network
from segtrain.weights.published import has_hash, known_by_name


def notes_on_file(source: WeightsFile) -> list[str]:
    """What identifies the file as a published one or speaks against it, and what its norm layers are assumed to be."""
    notes = []
    namesake = known_by_name(source.path)
    if source.known is not None and not has_hash(source.known):
        notes.append(f"taken for the published {source.known['name']} by its name and tensors: no hash is published")
    if source.known is None and namesake is not None and has_hash(namesake):
        wanted = namesake["md5"] or f"sha256 {namesake['sha256']}..."
        notes.append(
            f"WARNING: it has the name of the published {namesake['name']} but not its hash, {wanted}: its md5 is "
            f"{source.md5}. It is damaged, or another file"
        )
    if source.scale_is_assumed():
        notes.append(
            "some of its norm layers' weights are negative, and it does not state their kind: they are taken as "
            "In-Place ABN's, |weight| + eps; for BatchNorm's, run `segtrain convert input_scale=signed` first"
        )
    return notes


def notes_on_layout(source: WeightsFile, model: Network) -> list[str]:
    """How the outputs of the file's kind of network differ from ours by construction."""
    if source.layout == "torchvision_deeplabv3" and isinstance(model, Segmenter) and not dilates_as_torchvision(model):
        return [
            "torchvision's DeepLabV3 has other dilations, so that outputs differ: add model.output_stride=8 "
            "'model.backbone_options={first_dilation:previous}'"
        ]
    if source.layout == "nvidia_deeplabv3plus":
        return ["its authors upsample the logits with corners aligned, we do not: a shift of up to half a pixel"]
    return []


def dilates_as_torchvision(model: Segmenter) -> bool:
    """Strides turned into dilations of 2 and 4, where the first 3x3 convolution still has the dilation before."""
    modules = [getattr(model.body, name, None) for name in ("mod4", "mod5")]
    blocks: list[Any] = [module[0] for module in modules if isinstance(module, nn.Sequential)]
    return [block.convs.conv2.dilation[0] for block in blocks] == [1, 2]
