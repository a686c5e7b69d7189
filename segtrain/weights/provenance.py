"""Provenance of weights: the files and datasets that a network comes from, with their licences.

A provenance is a plain dict, stored in checkpoints:
weights: dicts of file, known (name of the published file or None), licence, noncommercial (True, or None: not known);
data: dataset name -> licence; noncommercial: lines about those that may not be used commercially;
start, optional: the file that training started from, its sha256, the number of matched tensors and their fraction.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from segtrain.data.labels import read_json_table
from segtrain.data.sets.mixture import dataset_names


class Start(Protocol):
    """What training started from: a weights.transfer.Report."""

    @property
    def provenance(self) -> dict[str, Any]: ...

    @property
    def start(self) -> dict[str, Any]: ...


def provenance(trained_on: Iterable[str], start: Start | None) -> dict[str, Any]:
    """The provenance of a network trained on these datasets, which inherits that of the weights it started from."""
    if start is None:
        return with_terms([], trained_on)
    before = start.provenance
    return with_terms(before["weights"], [*before["data"], *trained_on]) | {"start": start.start}


def with_terms(weights: list[dict[str, Any]], data: Iterable[str]) -> dict[str, Any]:
    """A provenance, with the licences of the datasets looked up by name."""
    terms = read_json_table("weights")["data"]
    unknown = {"licence": "not known", "noncommercial": None}
    used = {name: terms.get(name, unknown) for name in dict.fromkeys(data)}
    lines = [f"weights {entry['file']} ({entry['licence']})" for entry in weights if entry["noncommercial"]]
    lines += [f"data {name} ({entry['licence']})" for name, entry in used.items() if entry["noncommercial"]]
    return {
        "weights": [dict(entry) for entry in weights],
        "data": {name: entry["licence"] for name, entry in used.items()},
        "noncommercial": lines,
    }


def of_foreign_file(path: Path, known: dict[str, Any] | None, alike: list[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of a file that does not state its own.

    known: the published file that it is. alike: else the published files with the same tensors. It may be a rewritten
    copy of any of them, so a restriction that all of them share is assumed to hold.
    """
    licence, names = "not known", ", ".join(one["name"] for one in alike)
    if known is not None:
        licence, alike = known["licence"], [known]
    elif alike and len({one["licence"] for one in alike}) == 1:
        licence = f"not known; its tensors are those of {names}: {alike[0]['licence']}"
    entry = {"file": path.name, "known": known["name"] if known else None, "licence": licence}
    entry["noncommercial"] = True if alike and all(one["noncommercial"] for one in alike) else None
    data = [name for name in (alike[0]["data"] if alike else []) if all(name in one["data"] for one in alike)]
    return with_terms([entry], data)


def origin(provenance: Mapping[str, Any]) -> list[str]:
    """Format a provenance, one line per file and dataset."""
    lines = [f"weights {entry['file']} ({entry['licence']})" for entry in provenance["weights"]]
    lines += [f"data {name} ({licence})" for name, licence in provenance["data"].items()]
    return [
        f"not for commercial use: {line}" if line in provenance["noncommercial"] else f"from {line}" for line in lines
    ]


def data_names(data: Mapping[str, Any]) -> list[str]:
    """Names of the datasets that the `dataset` options describe; of a mixture, those of its parts."""
    return dataset_names(data)
