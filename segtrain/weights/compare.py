"""What a change of norm layers or activation does to a network's outputs, measured on a random image."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from segtrain.abn import ABN, BatchNormAct
from segtrain.models import Classifier, Segmenter
from segtrain.weights.files import WeightsFile
from segtrain.weights.matching import Network, Report, copy_, match, norm_layers, scale_kind


def compare_outputs(report: Report, model: Network) -> None:
    """Note in the report how norm layers and activation of the network differ from the file's, and measure it."""
    source = report.source
    layer = next(layer for layer in norm_layers(model).values() if layer.activation != "identity")
    activation, slope, kind = layer.activation, layer.activation_param, scale_kind(layer)
    same = activation == source.activation and (activation in ("relu", "identity") or slope == source.negative_slope)
    if kind != source.scale:
        factors = {"abs": "|weight| + eps", "signed": "the weight"}
        report.notes.append(
            f"norm layers multiplied with {factors[source.scale]}, here with {factors[kind]}: converted"
        )
    if not same:
        ours = f"{activation}({slope:g})" if activation in ("leaky_relu", "elu") else activation
        report.notes.append(
            f"its activation {source.activation} is {ours} here, a real change: train or evaluate again"
        )
    if not same or kind != source.scale:
        report.rounding, report.as_published = output_differences(model, source, activation, slope)


def output_differences(model: Network, source: WeightsFile, activation: str, slope: float) -> tuple[float, float]:
    """Largest |difference| over largest |output|, on one random image, between the network and the file's weights
    under torch's BatchNorm: with the network's activation, and with the file's."""
    matched, _ = match(source, model)
    rows = [key for key in matched if key.startswith(("cls.", "classifier.fc."))]
    for key in rows:
        del matched[key]
    device = next(model.parameters()).device
    probe = torch.randn(1, model.in_channels, 96, 96, generator=torch.Generator().manual_seed(0)).to(device)
    mode = model.training
    outputs = probe_outputs(model, probe, bool(rows))
    model.train(mode)
    largest = max(t.abs().max().item() for t in outputs) or 1.0

    def difference(kind: str, param: float) -> float:
        others = probe_outputs(with_batch_norm(model, matched, source.scale, kind, param), probe, bool(rows))
        return max((a - b).abs().max().item() for a, b in zip(outputs, others, strict=True)) / largest

    return difference(activation, slope), difference(source.activation, source.negative_slope)


@torch.no_grad()
def probe_outputs(model: Network, probe: Tensor, through_head: bool) -> list[Tensor]:
    """Outputs in eval mode: of the head if the file has one, else of the backbone."""
    model.eval()
    if isinstance(model, Classifier):
        return [model(probe)]
    out = model.body(probe)
    if through_head:
        out = model.head(out)
    return list(out) if isinstance(out, tuple) else [out]


def with_batch_norm(
    model: Network, tensors: Mapping[str, Tensor], scale: str, activation: str, slope: float
) -> Network:
    """A copy of the network with torch's BatchNorm and the activation in each norm layer, and the tensors copied in."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Segmenter):
        twin.recompute = "none"
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, ABN):
                kind = "identity" if layer.activation == "identity" else activation
                norm = BatchNormAct(layer.num_features, layer.eps, layer.momentum, activation=kind)
                norm.activation_param = slope
                setattr(parent, name, norm.to(next(model.parameters()).device))
    copy_(twin, tensors, scale)
    return twin
