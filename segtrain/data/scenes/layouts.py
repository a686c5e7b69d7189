"""Street scenes as files, in the layouts in which the real datasets are downloaded.

A folder holds a manifest, scenes.json, and the files of its scenes. An interrupted call goes on where it stopped, and
asking for more scenes adds to those that are there.
"""

import base64
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segtrain.data.labels import read_json_table
from segtrain.data.scenes import draw as streets
from segtrain.data.scenes.draw import Scene
from segtrain.errors import DataError, UsageError
from segtrain.files import write_atomically
from segtrain.threads import begin_child, undisturbed, unsignalled

MANIFEST = "scenes.json"
DEFAULT_SCENES: Mapping[str, int] = {"train": 240, "val": 60, "night": 30}
Size = tuple[int, int]
Progress = Callable[[int, int], None]

VISTAS_NAMES = {
    0: "void--unlabeled", 1: "void--ego-vehicle", 4: "object--trash-can", 5: "object--vehicle--wheeled-slow",
    7: "construction--flat--road", 8: "construction--flat--sidewalk", 10: "construction--flat--rail-track",
    11: "construction--structure--building", 12: "construction--barrier--wall", 13: "construction--barrier--fence",
    17: "object--support--pole", 19: "object--traffic-light", 20: "object--traffic-sign--front",
    21: "nature--vegetation", 22: "nature--terrain", 23: "nature--sky", 24: "human--person",
    25: "human--rider--bicyclist", 26: "object--vehicle--car", 27: "object--vehicle--truck", 28: "object--vehicle--bus",
    31: "object--vehicle--on-rails", 32: "object--vehicle--motorcycle", 33: "object--vehicle--bicycle",
}  # fmt: skip
COCOSTUFF_NAMES = {
    0: "unlabeled", 1: "unlabeled", 4: "unlabeled", 5: "unlabeled", 7: "road", 8: "pavement", 10: "railroad",
    11: "building-other", 12: "wall-stone", 13: "fence", 17: "metal", 19: "traffic light", 20: "stop sign", 21: "tree",
    22: "grass", 23: "sky-other", 24: "person", 25: "person", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip


class Job(NamedTuple):
    seed: int
    split: str
    number: int
    size: Size


class Layout(NamedTuple):
    """How one dataset stores scenes.

    folders: our split -> its folder; splits that are not listed are not written. files(job): paths below the root,
    labels first. encode(job): the contents of those files. extras(): further files of the whole dataset.
    """

    folders: Mapping[str, str]
    files: Callable[[Job], list[str]]
    encode: Callable[[Job], list[bytes]]
    extras: Callable[[], dict[str, bytes]] = dict


def write_scenes(
    root: Path,
    layout: str = "cityscapes",
    scenes: Mapping[str, int] = DEFAULT_SCENES,
    seed: int = 0,
    size: Size = (256, 512),
    workers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Draw the scenes that are not there yet, in `workers` processes; return how many those were.

    scenes: number per split; splits which the layout does not have (night outside of cityscapes and vistas) are left
    out. progress(done, to be drawn) is called before the first scene and after every one, unless all are there.
    DataError if the folder holds anything else.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout={layout} is not a layout of street scenes: choose {', '.join(LAYOUTS)}")
    if size[0] < 256 or size[1] != 2 * size[0]:
        raise UsageError(f"size={list(size)} cannot be drawn: give [height,width], width = 2 x height, height >= 256")
    form = LAYOUTS[layout]
    wanted = {split: number for split, number in scenes.items() if split in form.folders}
    identity = _identity(layout, seed, size)
    complete = scenes_there(root, layout, seed, size)
    _write_manifest(root, identity, complete)
    for name, data in form.extras().items():
        if not (root / name).is_file():
            write_atomically(root / name, data)
    jobs = [Job(seed, split, index, size) for split, number in wanted.items() for index in range(number)]
    missing = [job for job in jobs if not all((root / name).is_file() for name in form.files(job))]
    _draw_all(root, layout, missing, workers, progress)
    reached = {split: max(number, complete.get(split, 0)) for split, number in wanted.items()}
    _write_manifest(root, identity, {**complete, **reached})
    return len(missing)


def _identity(layout: str, seed: int, size: Sequence[int]) -> dict[str, Any]:
    return {"version": streets.VERSION, "seed": seed, "size": list(size), "layout": layout}


def scenes_there(root: Path, layout: str, seed: int, size: Sequence[int]) -> dict[str, int]:
    """Scenes per split that the manifest says are there. DataError if the folder is not one for these scenes."""
    identity = _identity(layout, seed, size)
    remedy = "choose another folder (output=FOLDER, or dataset.root=FOLDER where it is read), or delete this one"
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return {}
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        scenes = {str(split): int(number) for split, number in manifest.pop("scenes").items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{root} holds something, but no readable {MANIFEST}, so not street scenes to add to; {remedy}"
        ) from error
    if manifest != identity:
        asked = _described({key: value for key, value in identity.items() if manifest.get(key) != value})
        found = _described({key: manifest.get(key) for key in identity if manifest.get(key) != identity[key]})
        raise DataError(f"{root} holds street scenes with {found}, but {asked} was asked for; {remedy}")
    return scenes


def _described(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _write_manifest(root: Path, identity: Mapping[str, Any], scenes: Mapping[str, int]) -> None:
    data = json.dumps({**identity, "scenes": scenes}, indent=1).encode() + b"\n"
    if not (root / MANIFEST).is_file() or (root / MANIFEST).read_bytes() != data:
        write_atomically(root / MANIFEST, data)


def _draw_all(root: Path, layout: str, jobs: list[Job], workers: int | None, progress: Progress | None) -> None:
    if not jobs:
        return
    report = progress or (lambda done, total: None)
    report(0, len(jobs))
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    draw_one = partial(_draw_files, root, layout)
    if workers == 1 or len(jobs) < 2:
        for done, job in enumerate(jobs, 1):
            draw_one(job)
            report(done, len(jobs))
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process that runs threads may hang
    with undisturbed() as came, ProcessPoolExecutor(min(workers, len(jobs)), spawn, _start_worker) as pool:
        try:
            with _without_main_file(), unsignalled():
                drawn = pool.map(draw_one, jobs, chunksize=4)  # starts the processes
            for done, _ in enumerate(drawn, 1):
                report(done, len(jobs))
                if came:
                    pool.shutdown(cancel_futures=True)
                    break
        except BrokenProcessPool as error:
            raise DataError(
                "a process that draws street scenes died; give fewer workers if memory ran out, or draw with "
                "`segtrain streets workers=1` first"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _without_main_file() -> Iterator[None]:
    """Inside, processes start without running the user's script again, which may have no main guard: none needs it."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main[name] for name in list(main) if name in ("__file__", "__spec__")}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def _start_worker() -> None:
    begin_child()  # a signal waits for the scene, which takes a moment only
    cv2.setNumThreads(0)


def _draw_files(root: Path, layout: str, job: Job) -> None:
    form = LAYOUTS[layout]
    for name, data in zip(form.files(job), form.encode(job), strict=True):
        write_atomically(root / name, data)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def _png(pixels: NDArray[np.integer]) -> bytes:
    """uint8 (H, W, 3) RGB, or uint8 or uint16 (H, W)."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    return cv2.imencode(".png", stored, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()


def _pillow(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def _draw(job: Job) -> Scene:
    return streets.draw(job.seed, job.split, job.number, job.size)


def _instances_256(instance_ids: NDArray[np.uint16], class_ids: NDArray[np.integer], first: int) -> NDArray[np.uint16]:
    """Cityscapes' instances as class_ids[id] * 256 + k, k counting from `first`; 0 for what has no instances."""
    single = instance_ids >= 1000
    label_ids = np.where(single, instance_ids // 1000, instance_ids)
    return (class_ids[label_ids] * 256 + np.where(single, instance_ids % 1000 + first, 0)).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def _cityscapes_files(job: Job) -> list[str]:
    stem = f"{job.split}/streets/streets_{job.number:06d}_000019_"
    labels = [f"gtFine/{stem}gtFine_labelIds.png", f"gtFine/{stem}gtFine_instanceIds.png"]
    return [*labels, f"leftImg8bit/{stem}leftImg8bit.png"]


def _cityscapes_encode(job: Job) -> list[bytes]:
    scene = _draw(job)
    return [_png(scene.label_ids), _png(scene.instance_ids), _png(scene.image)]


KITTI_FOLDERS = {"train": "training", "val": "testing"}
KITTI_SIZES = ((188, 621), (188, 620), (185, 613))  # half of KITTI's own, for scenes of 256 x 512


def _kitti_files(job: Job) -> list[str]:
    contents = ("semantic", "instance", "image_2") if job.split == "train" else ("image_2",)
    return [f"{KITTI_FOLDERS[job.split]}/{content}/{job.number:06d}_10.png" for content in contents]


def _kitti_encode(job: Job) -> list[bytes]:
    """Wide cuts out of a scene drawn a quarter larger; nothing is resized."""
    scene = _draw(job._replace(size=(job.size[0] * 5 // 4, job.size[1] * 5 // 4)))
    height, width = (side * job.size[0] // 256 for side in KITTI_SIZES[job.number % len(KITTI_SIZES)])
    top, left = (scene.label_ids.shape[0] - height) // 2, (scene.label_ids.shape[1] - width) // 2
    box = np.s_[top : top + height, left : left + width]
    image = _png(scene.image[box])
    if job.split != "train":
        return [image]
    instances = _instances_256(scene.instance_ids[box], np.arange(34), first=1)
    return [_png(scene.label_ids[box]), _png(instances), image]


VISTAS_FOLDERS = {"train": "training", "val": "validation", "night": "testing"}


def vistas_key(job: Job) -> str:
    """22 characters of [A-Za-z0-9_-]; like real ones, some begin with - or _."""
    digest = hashlib.sha256(f"{job.seed} {job.split} {job.number}".encode()).digest()
    key = base64.urlsafe_b64encode(digest).decode()[:22]
    return {3: "-", 5: "_"}.get(job.number % 8, key[0]) + key[1:]


def _vistas_files(job: Job) -> list[str]:
    folder, key = VISTAS_FOLDERS[job.split], vistas_key(job)
    labels = [f"{folder}/labels/{key}.png", f"{folder}/instances/{key}.png"] if job.split != "night" else []
    return [*labels, f"{folder}/images/{key}.jpg"]


@cache
def _vistas_ids() -> NDArray[np.uint8]:
    """Vistas id of every Cityscapes id, (34,)."""
    ids = {row["name"]: row["id"] for row in read_json_table("vistas_v1.2")}
    return np.array([ids[VISTAS_NAMES.get(label, "void--unlabeled")] for label in range(34)], np.uint8)


def _vistas_encode(job: Job) -> list[bytes]:
    scene = _draw(job)
    image = _pillow(Image.fromarray(scene.image), "JPEG", quality=95)
    if job.split == "night":
        return [image]
    labels = Image.fromarray(_vistas_ids()[scene.label_ids]).convert("L")
    labels.putpalette([value for row in read_json_table("vistas_v1.2") for value in row["color"]] + [0, 0, 0] * 190)
    instances = _instances_256(scene.instance_ids, _vistas_ids().astype(np.int64), first=0)
    return [_pillow(labels, "PNG"), _png(instances), image]


def _vistas_extras() -> dict[str, bytes]:
    labels = [
        {"name": row["name"], "readable": row["readable"], "instances": row["has_instances"],
         "evaluate": not row["ignore_in_eval"], "color": row["color"]}
        for row in read_json_table("vistas_v1.2")
    ]  # fmt: skip
    config = {"folder_structure": "{split}/{content}/{key:.{22}}.{ext}", "labels": labels}
    return {"config.json": json.dumps(config, indent=1).encode()}


COCOSTUFF_FOLDERS = {"train": "train2017", "val": "val2017"}


def _cocostuff_files(job: Job) -> list[str]:
    number = job.number + (500_000 if job.split == "val" else 0)
    stem = f"{COCOSTUFF_FOLDERS[job.split]}/{number:012d}"
    return [f"annotations/{stem}.png", f"images/{stem}.jpg"]


@cache
def _cocostuff_values() -> NDArray[np.uint8]:
    """COCO-Stuff pixel value of every Cityscapes id, (34,)."""
    values = {row["name"]: row["pixelmap_value"] for row in read_json_table("cocostuff")}
    return np.array([values[COCOSTUFF_NAMES.get(label, "unlabeled")] for label in range(34)], np.uint8)


def _cocostuff_encode(job: Job) -> list[bytes]:
    scene = _draw(job)
    picture = Image.fromarray(scene.image)
    if job.number % 10 == 7:  # the real set has grey images too
        picture = picture.convert("L")
    return [_png(_cocostuff_values()[scene.label_ids]), _pillow(picture, "JPEG", quality=95)]


IMAGENET_CLASSES = {"building": 11, "car": 26, "road": 7, "sky": 23, "tree": 21}


def _imagenet_files(job: Job) -> list[str]:
    return [f"{job.split}/{name}/{name}_{job.number:06d}.JPEG" for name in IMAGENET_CLASSES]


def _imagenet_encode(job: Job) -> list[bytes]:
    """Of each class the window, a quarter of the scene high and up to half as wide again, that shows most of it."""
    scene = _draw(job)
    side = job.size[0] // 4
    width, height = side + side // 2 * (job.number % 2), side
    answer = []
    for label in IMAGENET_CLASSES.values():
        share = cv2.boxFilter((scene.label_ids == label).astype(np.float32), -1, (width, height), anchor=(0, 0))
        allowed = share[: -height + 1, : -width + 1]
        top, left = np.unravel_index(int(allowed.argmax()), allowed.shape)
        window = scene.image[top : top + height, left : left + width]
        answer.append(_pillow(Image.fromarray(np.ascontiguousarray(window)), "JPEG", quality=95))
    return answer


LAYOUTS: dict[str, Layout] = {
    "cityscapes": Layout({split: split for split in DEFAULT_SCENES}, _cityscapes_files, _cityscapes_encode),
    "kitti": Layout(KITTI_FOLDERS, _kitti_files, _kitti_encode),
    "vistas": Layout(VISTAS_FOLDERS, _vistas_files, _vistas_encode, _vistas_extras),
    "cocostuff": Layout(COCOSTUFF_FOLDERS, _cocostuff_files, _cocostuff_encode),
    "imagenet": Layout({"train": "train", "val": "val"}, _imagenet_files, _imagenet_encode),
}
