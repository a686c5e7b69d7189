"""Labels in the formats of annotation tools, written from id masks to the published schemas.

A writer puts the images and the labels of all splits below a folder. The masks have 0 for the background, 1 for cat and
2 for dog; `truth` makes one. Each writer names the description that it follows.
"""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("background", "cat", "dog")
SHAPE = (40, 48)


def truth(seed):
    """A cat with a dog inside it, and a dog at the border: a later object covers an earlier one."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(SHAPE)
    mask = np.zeros(SHAPE, np.uint8)
    mask[(rows - 11) ** 2 + (columns - 12 - seed % 3) ** 2 < 80 + rng.integers(20)] = 1
    mask[8 + seed % 4 : 14, 10:15] = 2
    mask[15:, 28:][rows[15:, 28:] + columns[15:, 28:] > 45] = 2
    return mask


def outlines(mask):
    """The closed outlines of a bool mask along the edges of its pixels, clockwise; those of holes run the other way."""
    padded = np.pad(mask, 1)
    following = {}
    for y, x in np.argwhere(mask):
        for there, start, end in (
            (padded[y, x + 1], (x, y), (x + 1, y)), (padded[y + 1, x + 2], (x + 1, y), (x + 1, y + 1)),
            (padded[y + 2, x + 1], (x + 1, y + 1), (x, y + 1)), (padded[y + 1, x], (x, y + 1), (x, y)),
        ):  # fmt: skip
            if not there:
                following.setdefault(start, []).append(end)
    loops = []
    while following:
        start = point = next(iter(following))
        loop = []
        while not loop or point != start:
            loop.append([int(point[0]), int(point[1])])
            after = following[point].pop()
            if not following[point]:
                del following[point]
            point = after
        loops.append(loop)
    return loops


def objects(mask):
    """(name, outline) of each object in the order of painting: the cat, whose hole the dog fills, and the dogs."""
    filled = (mask == 1) | ((mask == 2) & (np.indices(mask.shape)[1] < 20))
    return [("cat", outlines(filled)[0]), *(("dog", loop) for loop in outlines(mask == 2))]


def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def photograph(path, seed, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)
    path.write_bytes(png(pixels))


def photographs(root, masks, pattern):
    for split, some in masks.items():
        for name, mask in some.items():
            photograph(root / pattern.format(split=split, name=name), zlib.crc32(name.encode()), mask.shape)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco(root, masks, rle=None):
    """https://cocodataset.org/#format-data. rle: None for polygons, or a function of a mask that gives segmentation."""
    photographs(root, masks, "{split}2017/{name}.png")
    for split, some in masks.items():
        images, annotations = [], []
        for number, (name, mask) in enumerate(some.items(), 1):
            images.append({"id": number, "file_name": f"{name}.png", "height": mask.shape[0], "width": mask.shape[1]})
            shapes = (
                [(label, [np.ravel(loop).tolist()], 0) for label, loop in objects(mask)] if rle is None else
                [(NAMES[label], rle(mask == label), 1) for label in (1, 2)]
            )  # fmt: skip
            for label, segmentation, crowd in shapes:
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": 17 if label == "cat" else 18,
                    "segmentation": segmentation, "area": 1.0, "bbox": [0, 0, 1, 1], "iscrowd": crowd,
                })  # fmt: skip
        categories = [{"id": 17, "name": "cat", "supercategory": "animal"},
                      {"id": 18, "name": "dog", "supercategory": "animal"}]  # fmt: skip
        write_json(root / "annotations" / f"instances_{split}2017.json",
                   {"info": {}, "licenses": [], "images": images, "annotations": annotations,
                    "categories": categories})  # fmt: skip


def counts(mask):
    """Uncompressed run lengths, down the columns, from 0 on (the COCO API's maskApi.h)."""
    runs, value = [0], False
    for pixel in np.asarray(mask).T.ravel():
        if pixel != value:
            runs.append(0)
            value = bool(pixel)
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def yolo(root, masks):
    """https://docs.ultralytics.com/datasets/segment/#ultralytics-yolo-format"""
    photographs(root, masks, "images/{split}/{name}.png")
    splits = "".join(f"{split}: images/{split}\n" for split in masks)
    (root / "data.yaml").write_text(f"path: .\n{splits}nc: 2\nnames:\n  0: cat\n  1: dog\n")
    for split, some in masks.items():
        for name, mask in some.items():
            lines = []
            for label, loop in objects(mask):
                numbers = (np.array(loop) / mask.shape[::-1]).ravel().tolist()
                lines.append(" ".join(map(repr, [NAMES.index(label) - 1, *numbers])))
            path = root / "labels" / split / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")


def labelme(root, masks):
    """https://github.com/wkentaro/labelme, docs of the annotation file; version 5 and later"""
    photographs(root, masks, "{split}/{name}.png")
    for split, some in masks.items():
        for name, mask in some.items():
            shapes = [{"label": label, "points": loop, "group_id": None, "description": "", "shape_type": "polygon",
                       "flags": {}, "mask": None} for label, loop in objects(mask)]  # fmt: skip
            write_json(root / split / f"{name}.json", {
                "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None,
                "imageHeight": mask.shape[0], "imageWidth": mask.shape[1],
            })  # fmt: skip


def brush(mask):
    """Run lengths as Label Studio's editor writes them, by the description of @thi.ng/rle-pack: here all runs are
    repeats with lengths of 16 bits."""
    values = np.repeat(np.where(mask, 255, 0).astype(np.uint8).ravel(), 4)
    bits = f"{values.size:032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    place = 0
    while place < values.size:
        different = np.flatnonzero(values[place:] != values[place])
        length = min(int(different[0]) if different.size else values.size - place, 1 << 16)
        bits += "1" + "11" + f"{length - 1:016b}" + f"{values[place]:08b}"
        place += length
    bits += "0" * (-len(bits) % 8)
    return list(int(bits, 2).to_bytes(len(bits) // 8, "big"))


def label_studio(root, masks, brushes=True):
    """https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks"""
    photographs(root, masks, "upload/{name}.png")
    for split, some in masks.items():
        tasks = []
        for number, (name, mask) in enumerate(some.items(), 1):
            height, width = mask.shape
            about = {"original_width": width, "original_height": height, "image_rotation": 0, "to_name": "image"}
            if brushes:
                results = [{"id": f"b{label}", "from_name": "brush", "type": "brushlabels", **about,
                            "value": {"format": "rle", "rle": brush(mask == label), "brushlabels": [NAMES[label]]}}
                           for label in (1, 2)]  # fmt: skip
            else:
                results = [{"id": f"p{n}", "from_name": "label", "type": "polygonlabels", **about,
                            "value": {"points": (np.array(loop) * 100 / (width, height)).tolist(), "closed": True,
                                      "polygonlabels": [label]}}
                           for n, (label, loop) in enumerate(objects(mask))]  # fmt: skip
            tasks.append({
                "id": number, "annotations": [{"id": number, "was_cancelled": False, "ground_truth": False,
                                               "result": results}],
                "file_upload": f"3f2a91bc-{name}.png", "data": {"image": f"/data/upload/1/3f2a91bc-{name}.png"},
                "predictions": [],
            })  # fmt: skip
        write_json(root / f"{split}.json", tasks)


def supervisely(root, masks):
    """https://developer.supervisely.com/getting-started/supervisely-annotation-format: objects, images, project"""
    photographs(root, masks, "{split}/img/{name}.png")
    classes = [{"title": "cat", "shape": "polygon", "color": "#FF0000"},
               {"title": "dog", "shape": "bitmap", "color": "#00FF00"}]  # fmt: skip
    write_json(root / "meta.json", {"classes": classes, "tags": []})
    for split, some in masks.items():
        for name, mask in some.items():
            loops = outlines(mask == 1)
            items = [{"classTitle": "cat", "geometryType": "polygon", "tags": [],
                      "points": {"exterior": loops[0], "interior": loops[1:]}}]  # fmt: skip
            for left in (0, 20):
                some_dog = (mask == 2) & ((np.indices(mask.shape)[1] < 20) == (left == 0))
                rows, columns = np.nonzero(some_dog)
                box = some_dog[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                data = base64.b64encode(zlib.compress(png(np.where(box, 255, 0).astype(np.uint8)))).decode()
                items.append({"classTitle": "dog", "geometryType": "bitmap", "tags": [],
                              "bitmap": {"data": data, "origin": [int(columns.min()), int(rows.min())]}})  # fmt: skip
            write_json(root / split / "ann" / f"{name}.png.json", {
                "description": "", "tags": [], "size": dict(zip(("height", "width"), mask.shape, strict=True)),
                "objects": items,
            })  # fmt: skip


PALETTE = [[0, 0, 0], *([i * 9 % 256, i * 70 % 256, (64 + i) % 256] for i in range(1, 256))]


def write_lists(root, masks):
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    for split, some in masks.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in some))


def voc(root, masks):
    """The development kit of VOC2012, section 3.3: palette PNGs of indices, lists in ImageSets/Segmentation."""
    photographs(root, masks, "JPEGImages/{name}.png")
    write_lists(root, masks)
    (root / "SegmentationClass").mkdir()
    for some in masks.values():
        for name, mask in some.items():
            image = Image.fromarray(np.array([0, 8, 12], np.uint8)[mask], "P")
            image.putpalette(np.array(PALETTE, np.uint8).tobytes())
            image.save(root / "SegmentationClass" / f"{name}.png")


COLORS = np.array([[0, 0, 0], [250, 50, 83], [36, 179, 83]], np.uint8)


def cvat(root, masks):
    """https://docs.cvat.ai/docs/dataset_management/formats/format-smask/: Segmentation mask 1.1"""
    photographs(root, masks, "JPEGImages/{name}.png")
    write_lists(root, masks)
    labels = "".join(f"{name}:{','.join(map(str, color))}::\n" for name, color in zip(NAMES, COLORS, strict=True))
    (root / "labelmap.txt").write_text(f"# label:color_rgb:parts:actions\n{labels}")
    for some in masks.values():
        for name, mask in some.items():
            path = root / "SegmentationClass" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(COLORS[mask]))


def colors(root, masks):
    """A table of colours with the header of CamVid's class_dict.csv (name,r,g,b), and RGB masks."""
    photographs(root, masks, "{split}/{name}.png")
    rows = "".join(f"{name}, {', '.join(map(str, color))}\n" for name, color in zip(NAMES, COLORS, strict=True))
    (root / "class_dict.csv").write_text(f"name, r, g, b\n{rows}")
    for split, some in masks.items():
        for name, mask in some.items():
            path = root / f"{split}_labels" / f"{name}_L.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(COLORS[mask]))


def class_masks(root, masks):
    """A folder for each class, with a mask of 0 and 255 for each image that shows it."""
    photographs(root, masks, "images/{name}.png")
    for some in masks.values():
        for name, mask in some.items():
            for label in (1, 2):
                path = root / "masks" / NAMES[label] / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(np.where(mask == label, 255, 0).astype(np.uint8)))


def parquet(root, masks):
    """https://huggingface.co/docs/datasets/en/image_dataset: a struct of bytes and path a cell."""
    import pyarrow
    from pyarrow import parquet as writer

    (root / "data").mkdir(parents=True)
    for split, some in masks.items():
        cells = {"image": [], "annotation": []}
        for name, mask in some.items():
            photograph(Path("one.png"), zlib.crc32(name.encode()), mask.shape)
            cells["image"].append({"bytes": Path("one.png").read_bytes(), "path": f"{name}.png"})
            cells["annotation"].append({"bytes": png(mask), "path": f"{name}_mask.png"})
        writer.write_table(pyarrow.table(cells), root / "data" / f"{split}-00000-of-00001.parquet")


def pairs(root, masks):
    """metadata.csv with a column of images and one of masks, as a folder for the Hugging Face hub has it."""
    photographs(root, masks, "images/{name}.png")
    lines = ["image,mask,split"]
    for split, some in masks.items():
        for name, mask in some.items():
            path = root / "truth" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(mask))
            lines.append(f"images/{name}.png,truth/{name}.png,{split}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")


WRITERS = {
    "coco": coco, "coco_rle": lambda root, masks: coco(root, masks, counts), "yolo": yolo, "labelme": labelme,
    "label_studio": label_studio, "label_studio_polygons": lambda root, masks: label_studio(root, masks, False),
    "supervisely": supervisely, "voc": voc, "cvat": cvat, "colors": colors, "class_masks": class_masks,
    "parquet": parquet, "pairs": pairs,
}  # fmt: skip


def write_annotations(form, root, train=3, val=2):
    """Write a folder in a format. Returns the masks by split and name."""
    masks = {
        "train": {f"train{i}": truth(i) for i in range(train)},
        "val": {f"val{i}": truth(7 + i) for i in range(val)},
    }
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[form](root, masks)
    return masks
