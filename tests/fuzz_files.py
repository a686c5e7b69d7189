"""Damaged files of every kind that a user may give: no traceback, no hang, exit status 0, 1 or 2.

What a training writes beside its checkpoint, and caches, must not stop it: there the exit status has to be 0.

    python -m tests.fuzz_files                     # 100 cases of every kind
    python -m tests.fuzz_files --kind checkpoint --cases 1000 --seed 3

Small valid files are damaged at random (bits flipped, cut, repeated, mixed with others), or on purpose: an entry of a
checkpoint is replaced by something of another type, a table nests too deeply. Each case is a command of its own.
"""

import argparse
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from segtrain.cli import entry
from tests.helpers.checkout import TINY
from tests.helpers.forked import fault_of, forked, load_everything
from tests.helpers.fuzz_data import Files, remove

run_words = entry.run
ABSURD: tuple[Any, ...] = (
    None, True, -1, 0, 255, 256, 7.5, float("nan"), float("inf"), 10**23, "", "x", "../../x", "\x1b[31m",
    "${oc.env:HOME}", "???", "\ud800", [], [[]], {}, {"a": 1}, [1, "a", None], {1: 2}, torch.zeros(0),
    torch.zeros(3, 3), torch.zeros(2).long(),
)  # fmt: skip
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
TEXTS = (
    "", "\n", "id", "id,name\n", "id,name\n7.5,a\n1,b\n", "id,name\n0,a\n0,b\n", "id,id\n1,2\n",
    "id,name\n0,\x00\n1,b\n", 'id,name\n0,"a\n', "id,name,color\n0,a,#12\n1,b,\n", "id,name\n0,\x1b[31m\n1,b\n",
    f"id,name\n0,{'x' * 200_000}\n1,b\n", "[" * 100_000, "{a: " * 5000, "- " * 3000, f"a0: &a0 [1]\n{BOMB}",
    "a: &a [*a]", "a: 1\na: 2\n", "1: 2\n3: 4\n", "&a a: *a", "<<: *x", "? [a]\n: b\n",
    "!!python/object/apply:os.system [ls]", "a: !!int x", "a: !!binary x", "--- 1\n--- 2\n", "\t- a",
    "name: folder\nsplits: 3\n", "name: [folder]\n", "name: folder\nroot: ${root}\n",
    "- {id: 7.5, name: a}\n- {id: 1, name: b}\n", "- {id: 0, name: {a: 1}}\n- {id: 1, name: b}\n",
    "classes: [1, 2]\n", "- id: 0\n  name: a\n  color: {a: 1}\n- id: 1\n  name: b\n", "a,b,c,d\n",
    "train/images/0.png\n", "../x.png,../y.png\n", "null", "NaN", '{"a": 1e999}', "[[[[]]]]", '"\\ud800"', "{}", "[]",
)  # fmt: skip


class Kind(NamedTuple):
    """source: a valid file below the folder. place: where the damaged one is put, in the folder of a case. words: the
    commands that meet it, of which one is chosen. damage: on purpose, beside what is done at random. heals: whether the
    command has to succeed."""

    source: str
    place: str
    words: list[list[str]]
    damage: Callable[[random.Random, bytes], bytes] | None = None
    heals: bool = False


def kinds(files: Files) -> dict[str, Kind]:
    make_more(files)
    root = files.root
    network, device = [f"run={root / 'run'}", f"plugins=[{TINY}]"], ["device=cpu"]
    folder = ["dataset=folder", "dataset.root=data", "dataset.classes=classes.csv"]
    splits = [
        "dataset.splits.train={images:images/*,labels:labels/*}",
        "dataset.splits.val={images:images/*,labels:labels/*}",
    ]
    yaml_table = [word.replace("classes.csv", "classes.yaml") for word in folder]
    pairs = ["dataset.splits.train={pairs:pairs.txt}", "dataset.splits.val={pairs:pairs.txt}"]
    use = [["info", "checkpoint=file"], ["convert", "input=file", "output=out.safetensors"], ["weights", "verify=file"]]
    given = [f"plugins=[{TINY}]", *device]
    scored = [["predict", "checkpoint=file.pt", f"input={root / 'photo.png'}", *given],
              ["info", "checkpoint=file.pt"], ["convert", "input=file.pt", "output=out.pth"],
              ["evaluate", "checkpoint=file.pt", *given, "loader.workers=0", "pictures=1"],
              [*["train", "run=new"], *files.words, "model.weights=file.pt"]]  # fmt: skip
    replayed = [["replay", "run=run", f"plugins=[{TINY}]"], ["runs", "root=."], ["runs", "root=.", "table=paper"]]
    return {
        "png": Kind(
            "photo.png",
            "data/images/0.png",
            [["check", *folder, *splits], ["predict", "input=data/images", *network, *device]],
        ),
        "label": Kind(
            "label.png",
            "data/labels/0.png",
            [["check", *folder, *splits], ["check", "write_config=guess.yaml", "dataset=folder", "dataset.root=data"]],
        ),
        "jpeg": Kind(
            "photo.jpg",
            "data/images/0.png",
            [["check", *folder, *splits], ["predict", "input=data/images", *network, *device]],
        ),
        "csv": Kind("classes.csv", "data/classes.csv", [["check", *folder, *splits]], text),
        "yaml": Kind("classes.yaml", "data/classes.yaml", [["check", *yaml_table, *splits]], text),
        "pairs": Kind("pairs.txt", "data/pairs.txt", [["check", *folder, *pairs]], text),
        "dataset": Kind("dataset.yaml", "mine.yaml", [["check", "dataset=mine.yaml"]], text),
        "taxonomy": Kind(
            "taxonomy.yaml",
            "taxonomy.yaml",
            [["check", *files.given("mixture"), "dataset.parts.cityscapes.taxonomy=taxonomy.yaml"]],
            text,
        ),
        "checkpoint": Kind("run/last.pt", "file.pt", scored, entries),
        "weights": Kind("weights.pth", "file", use, entries),
        "safetensors": Kind(
            "weights.safetensors",
            "file.safetensors",
            [[word.replace("=file", "=file.safetensors") for word in words] for words in use],
            header,
        ),
        "config": Kind("run/config.yaml", "run/config.yaml", replayed, text),
        "metrics": Kind("run/metrics.jsonl", "run/metrics.jsonl", replayed[1:], text),
        "evaluation": Kind("run/evaluation.json", "run/evaluation.json", replayed[1:], text),
        "state": Kind("run/state.json", "run/state.json", replayed[1:], text),
        "environment": Kind("run/environment.json", "run/environment.json", replayed[1:], text),
        **beside_a_training(files),
    }


def beside_a_training(files: Files) -> dict[str, Kind]:
    """The files of a run, which is gone on with, and of the caches that a new one uses."""
    go_on = [["train", *files.words, "run=run", "trainer.max_steps=2"]]
    kinds = {
        f"resume {name}": Kind(f"run/{name}", f"run/{name}", go_on, text, heals=True)
        for name in ("metrics.jsonl", "evaluation.json", "state.json", "environment.json", "summary.txt",
                     "blackbox/rank0.jsonl")
    }  # fmt: skip
    events = next((files.root / "run" / "tensorboard").iterdir()).name
    kinds["resume tensorboard"] = Kind(f"run/tensorboard/{events}", f"run/tensorboard/{events}", go_on, heals=True)
    cached = [*files.training("folder"), "dataset.cache=decoded", "augmentation.crop_size=[32,48]"]
    table = f"dataset.classes={files.root / 'folder' / 'classes.csv'}"
    cached = [table if word.startswith("dataset.classes=") else word for word in cached]
    begun = ["train", *cached, f"run={files.root / 'cached'}", f"dataset.cache_dir={files.root / 'caches'}"]
    status, printed = forked(lambda: run_words(begun), files.root)
    if status != 0:
        raise SystemExit(f"the caches that the cases use were not made: {printed}")
    for path in sorted((files.root / "caches").rglob("*.*")):
        place = str(path.relative_to(files.root))
        name = f"cache {path.suffix.removeprefix('.')}"
        own = text if path.suffix == ".json" else None
        again = ["train", *cached, "run=new", "dataset.cache_dir=caches"]
        # Another pixel is no damage that can be seen: there are no checksums, which would cost a whole read a crop.
        kinds[name] = Kind(place, place, [again], own, heals=path.suffix == ".json")
    return kinds


def make_more(files: Files) -> None:
    root = files.root
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(root / "photo.png")
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(root / "photo.jpg")
    Image.fromarray(rng.integers(0, 2, (64, 96), np.uint8)).save(root / "label.png")
    (root / "classes.csv").write_text("id,name,color,ignore\n0,water,#1040a0,\n1,land,200 60 40,false\n")
    (root / "classes.yaml").write_text(
        "- {id: 0, name: water, color: '#1040a0'}\n- {id: 1, name: land, ignore: false}\n"
    )
    (root / "pairs.txt").write_text("images/0.png,labels/0.png\n")
    (root / "dataset.yaml").write_text(
        "name: folder\nroot: data\nclasses: classes.csv\nsplits:\n"
        "  train: {images: images/*, labels: labels/*}\n  val: {images: images/*, labels: labels/*}\n"
    )
    (root / "taxonomy.yaml").write_text("road: road\nsidewalk: sidewalk\nsky: null\ncar: [car, truck]\n")
    (root / "weights.safetensors").write_bytes(
        save({key: value.contiguous() for key, value in torch.load(root / "weights.pth").items()})
    )


# ------------------------------------------------------------------------------------------------ damage


def at_random(rng: random.Random, data: bytes) -> bytes:
    """One to three damages of a disk, a transfer or an editor."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 4, 30, 1000)))
        how = rng.randrange(8)
        if how == 0 and data:
            place = min(start, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        else:
            data = (
                data[:start], data[:start] + bytes(end - start) + data[end:], data[:start] + data[end:],
                data[:end] + data[start:], data[:start] + rng.randbytes(end - start) + data[end:],
                data + rng.randbytes(3000), rng.choice((b"", b"\xef\xbb\xbf" + data, data[::-1], b"\x00" * 100)),
            )[how - 1]  # fmt: skip
    return data


def text(rng: random.Random, data: bytes) -> bytes:
    """Another text, in one of several encodings, or two lines exchanged."""
    if rng.random() < 0.3:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    return rng.choice(TEXTS).encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig")), "surrogatepass")


def entries(rng: random.Random, data: bytes) -> bytes:
    """A checkpoint with one to three of its entries replaced, removed or added, at any depth."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.randint(1, 3)):
        change(rng, content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def change(rng: random.Random, content: Any) -> None:
    inner = content
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
            inner = inner[key]
            continue
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[key]
        elif isinstance(inner, dict) and rng.random() < 0.1:
            inner[rng.choice(("x", 1, None, "\x1b[31m"))] = copy.deepcopy(rng.choice(ABSURD))
        else:
            inner[key] = copy.deepcopy(rng.choice(ABSURD))
        return


def header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + size])
    plain = [value for value in ABSURD if not isinstance(value, torch.Tensor | dict)]
    if rng.random() < 0.5:
        settings = {
            rng.choice(("activation", "negative_slope", "scale", "classes", "provenance", "model")): rng.choice(plain)
        }
        described["__metadata__"] = {"segtrain": json.dumps(rng.choice((settings, rng.choice(plain))))}
    else:
        described[rng.choice(list(described))] = rng.choice(plain)
    changed = json.dumps(described).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


# ------------------------------------------------------------------------------------------------ the cases


def run_case(files: Files, kind: Kind, rng: random.Random, folder: Path) -> tuple[str, str]:
    """('' or what is wrong, the command with what it printed)"""
    data = (files.root / kind.source).read_bytes()
    for name in ("images", "labels"):
        (folder / "data" / name).mkdir(parents=True)
    for name, beside in (("photo.png", "images/0.png"), ("label.png", "labels/0.png"), ("classes.csv", "classes.csv")):
        (folder / "data" / beside).write_bytes((files.root / name).read_bytes())
    if "/" in kind.place and (files.root / kind.place).exists():  # one of many files that belong together
        part = Path(kind.place).parts[0]
        shutil.copytree(files.root / part, folder / part, ignore=shutil.ignore_patterns("step_*.pt"))
    place = folder / kind.place
    place.unlink(missing_ok=True)
    on_purpose = kind.damage is not None and rng.random() < 0.7
    place.write_bytes(kind.damage(rng, data) if on_purpose and kind.damage else at_random(rng, data))
    words = rng.choice(kind.words)
    began = time.monotonic()
    status, printed = forked(lambda: run_words(words), folder)
    fault = fault_of(status, time.monotonic() - began, printed)
    if kind.heals and status != 0:
        fault = fault or f"exit status {status}"
    return fault, f"{' '.join(words)[:100]}\n{printed}"


def fuzz(names: list[str], cases: int, seed: int) -> list[str]:
    """What went wrong, a text each."""
    load_everything()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ.update(SEGTRAIN_CACHE=str(root / "cache"), PYTHONWARNINGS="ignore")
        files = Files(root / "files")
        known = kinds(files)
        for name in names or list(known):
            before = len(bad)
            for number in range(cases):
                folder = root / "case"
                folder.mkdir()
                fault, what = run_case(files, known[name], random.Random(f"{seed} {name} {number}"), folder)
                if fault:
                    bad.append(f"{name} {number}: {fault}: {what}")
                    lines = what.splitlines()
                    print(f"{name} {number}: {fault}: {' ... '.join([lines[0], *lines[-3:]])}", flush=True)
                remove(folder)
            print(f"{name}: {cases} cases, {len(bad) - before} went wrong", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bad = fuzz(asked.kind, asked.cases, asked.seed)
    print(f"{len(bad)} went wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
