"""Load weights of any known file into a network, with a report of every tensor.

report = load_weights(Path("resnet50-0676ba61.pth"), model, table)
print(report)  # what matched, what did not and why, what the change of norm and activation does
"""

from pathlib import Path

import torch

from segtrain.data.labels import LabelTable
from segtrain.data.taxonomy import RECOMMENDED
from segtrain.errors import DataError
from segtrain.models import HEADS, Segmenter
from segtrain.weights import checkpoint
from segtrain.weights.classifier_rows import copy_mapped_rows, same_classes
from segtrain.weights.compare import compare_outputs
from segtrain.weights.files import WeightsFile, read_weights
from segtrain.weights.identify import HEAD_OF, backbone_of
from segtrain.weights.layouts import LAYOUTS, num_rows
from segtrain.weights.matching import Network, Report, canonical, copy_, match
from segtrain.weights.notes import notes_on_file, notes_on_layout


def load_weights(
    path: Path,
    model: Network,
    table: LabelTable | None = None,
    minimum: float = 1.0,
    mapping: str | None = None,
    column: str = RECOMMENDED,
) -> Report:
    """Copy the tensors that file and network share into the network. Returns a report, to be printed and stored.

    table: the network's classes. If the file's classes differ, each class keeps the classifier rows that `mapping`
    leads to it (a published taxonomy or a YAML file; default: the published one that fits, else equal names); the
    other rows stay as initialised. Of an ImageNet classifier, a segmentation network takes the body only.
    minimum: fraction of tensors that must match; at 1 neither may the network lack one nor the file have one more.
    DataError below it, if a weight is NaN or infinite, or if the network's layers cannot represent the weights
    (negative ones with model.scale=abs); UsageError if there is no such file.
    """
    return load_into(read_weights(path), model, table, minimum, mapping, column)


def load_into(
    source: WeightsFile, model: Network, table: LabelTable | None = None, minimum: float = 1.0,
    mapping: str | None = None, column: str = RECOMMENDED,
) -> Report:  # fmt: skip
    """`load_weights` for a file that has been read."""
    matched, report = match(source, model)
    classifier = "cls." if isinstance(model, Segmenter) else "classifier.fc."
    rows = {key: matched.pop(key) for key in list(matched) if key.startswith(classifier)}
    if rows and f"{classifier}weight" not in rows:  # of another width than here: the biases mean nothing alone
        rows = {}
        report.rows = ["the classifier starts anew: the file's has another number of input channels"]
    if report.ratio < minimum:
        raise DataError(mismatch_message(report, model, minimum))
    checkpoint.require_finite({**matched, **rows}, source.path)
    own = canonical(model)
    copy_(model, matched, source.scale)
    if rows and not same_classes(source, rows[f"{classifier}weight"], own[f"{classifier}weight"], table):
        report.rows = copy_mapped_rows(rows, own, source.classes, table, classifier, mapping, column)
    elif rows:
        with torch.no_grad():
            for key, value in rows.items():
                own[key].copy_(value)
    report.notes += notes_on_file(source) + notes_on_layout(source, model)
    compare_outputs(report, model)
    return report


def mismatch_message(report: Report, model: Network, minimum: float) -> str:
    """Why the file does not fit the network, and the options of the network that it would fit."""
    source = report.source
    likely, hint = backbone_of(source.tensors, source.layout), ""
    if likely and likely != backbone_of(canonical(model), "segmenter"):
        hint += f" By its tensors it is a {likely}: model.backbone={likely}."
    head, channels = (
        HEAD_OF.get(source.layout),
        num_rows(source.tensors, LAYOUTS[source.layout], "head.red_conv.weight"),
    )
    if head and channels and isinstance(model, Segmenter):
        build = HEADS[head]
        if not (isinstance(build, type) and isinstance(model.head, build)) or channels != model.cls.in_channels:
            hint += f" Its head is model.head={head} model.head_channels={channels}."
    return (
        f"{source.path} ({source.title}) does not fit this network: {report.matched} tensors match, "
        f"{100 * report.ratio:.0f} %, where {100 * minimum:.0f} % are required; "
        f"{'; '.join(report.mismatches())}.{hint} model.weights_match=FRACTION takes what matches"
    )
