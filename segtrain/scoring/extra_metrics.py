"""Metrics of plugins: METRICS["name"] = function of the confusion matrix.

A metric is shown in the printed table, in evaluation.json under "metrics" and in the log as val/<name>.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from segtrain.errors import UsageError

# Confusion matrix -> a number, or a dict of numbers by name; NaN: not defined for these images. The matrix is int64
# (C, C + 1), ground truth x prediction in train ids; the last column counts predictions outside the classes.
Metric = Callable[[np.ndarray], float | Mapping[str, float]]

METRICS: dict[str, Metric] = {}
BUILT_IN = ("miou", "pixel_accuracy", "top1", "top5")  # in the log as val/<name>


def apply_metrics(confusion: np.ndarray) -> dict[str, Any]:
    """{"metrics": {name: value or {name: value}}} for evaluation.json, None for NaN; {} without metrics of plugins.

    UsageError, naming the metric, if it fails, returns anything but numbers, or has the name of a built-in score.
    """
    if not METRICS:
        return {}
    if taken := [name for name in BUILT_IN if name in METRICS]:
        raise UsageError(f"METRICS[{taken[0]!r}] has the name of a built-in score: give the plugin's another name")
    return {"metrics": {name: metric_values(name, metric, confusion.copy()) for name, metric in METRICS.items()}}


def metric_values(name: str, metric: Metric, confusion: np.ndarray) -> Any:
    try:
        value = metric(confusion)
        if isinstance(value, Mapping):
            return {str(key): finite(item) for key, item in value.items()}
        return finite(value)
    except Exception as error:  # a plugin's code
        raise UsageError(
            f"METRICS[{name!r}] fails: {type(error).__name__}: {error}; it takes the confusion matrix, int64 "
            f"{confusion.shape}, and returns a number or a dict of numbers"
        ) from error


def finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def flat_metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """(metric, "" or the name of one of its values, value) of all metrics in the content of an evaluation.json."""
    for name, value in result.get("metrics", {}).items():
        for key, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            yield name, key, item


def metric_scalars(result: Mapping[str, Any]) -> dict[str, float | None]:
    """{"val/<metric>": value, "val/<metric>/<name>": value} for the log."""
    return {f"val/{name}/{key}" if key else f"val/{name}": value for name, key, value in flat_metrics(result)}


def metric_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of the printed table, with the values as the metric returned them."""
    return [
        f"{' '.join(filter(None, (name, key))):<14}  {'-' if value is None else f'{value:.4g}'}"
        for name, key, value in flat_metrics(result)
    ]
