"""Augmentation: a window of the picture becomes a training sample. The only importer of albumentations.

Only the window that is shown is resized, image and label on one grid. albumentations 2.0.8, which changes colours,
gives every loader worker the same random numbers and repeats them every epoch; so its generator is set anew for every
sample here. Its transforms are named in augmentation.extra; what they do to labels is checked (see `Extra`).
"""

import difflib
import inspect
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np

from segtrain.config import IGNORE_INDEX, AugmentationConfig
from segtrain.errors import DataError, UsageError

FILL = (124, 116, 104)  # the ImageNet mean in grey levels: padding that normalises to about 0
# Transforms of transforms, which the mapping lists under `transforms`.
CONTAINERS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
# Base classes, Lambda, whose arguments are functions, and what leaves a picture as it is.
NOT_BY_NAME = ("BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda", "ToTensor3D")
MASK_FILLS = ("fill_mask", "mask_drop_value")  # arguments that write one value into the label
TRIALS = 4  # how often a transform is tried before the training


class Span(NamedTuple):
    """One axis: pixels start .. start + length - 1 of the picture become place .. place + size - 1 of the crop."""

    start: int
    length: int
    place: int
    size: int


class Augmentation:
    """Random scale, crop, flip, colours and `extra`: image uint8 (H, W, 3), labels uint8 (H, W) -> the same at
    crop_size.

    A pure function of the inputs and `seed`. Pictures smaller than the window are padded, on random sides: images with
    FILL, labels with IGNORE_INDEX. UsageError for an entry of `extra` that albumentations or the labels cannot bear.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        self.colors: Any = None  # built where it runs: importing it takes a second
        self.extra = [Extra(entry, config.crop_size) for entry in config.extra]

    def __call__(
        self, image: np.ndarray, labels: np.ndarray, seed: tuple[int, ...],
        encode: Callable[[np.ndarray], np.ndarray] | None = None, focus: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """encode: turns the labels in the window into train ids. focus: (row, column) that the window must contain."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows, columns, flip = self.draw(image.shape, rng, focus)
        window = np.s_[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
        target = np.ascontiguousarray(labels[window])
        sample = resized(image[window], rows, columns, self.config.crop_size, cv2.INTER_LINEAR, FILL)
        if encode is not None:
            target = encode(target)
        target = resized(target, rows, columns, self.config.crop_size, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)
        if flip:
            sample, target = cv2.flip(sample, 1), cv2.flip(target, 1)
        if self.config.color > 0:
            sample = self.recolored(sample, rng)
        for extra in self.extra:
            sample, target = extra(sample, target, rng)
        return sample, target

    def draw(
        self, shape: tuple[int, ...], rng: np.random.Generator, focus: tuple[int, int] | None
    ) -> tuple[Span, Span, bool]:
        """(rows, columns, mirrored?): what is shown of a picture of that shape."""
        scale = rng.uniform(self.config.scale[0], self.config.scale[1])
        rows, columns = (
            draw_span(shape[axis], self.config.crop_size[axis], scale, rng, None if focus is None else focus[axis])
            for axis in (0, 1)
        )
        return rows, columns, bool(rng.random() < self.config.flip)

    def window(self, shape: tuple[int, ...], seed: tuple[int, ...], focus: tuple[int, int] | None) -> list[int]:
        """[top, left, height, width, mirrored?] in pixels of the picture: what a call with the same arguments shows."""
        rows, columns, flip = self.draw(shape, np.random.default_rng(np.random.SeedSequence(seed)), focus)
        return [rows.start, columns.start, rows.length, columns.length, int(flip)]

    def recolored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.colors is None:
            import albumentations

            most = self.config.color
            jitter = albumentations.ColorJitter(
                (1 - most, 1 + most), (1 - most, 1 + most), (1 - most, 1 + most), (0, 0), p=1
            )
            self.colors = albumentations.Compose([jitter])
        self.colors.set_random_state(rng, random.Random(int(rng.integers(1 << 62))))
        result: np.ndarray = self.colors(image=image)["image"]
        return result


def draw_span(extent: int, crop: int, scale: float, rng: np.random.Generator, focus: int | None) -> Span:
    """A window that is `crop` pixels when enlarged by `scale`, anywhere in 0 .. extent - 1, or around `focus`."""
    length = max(1, round(crop / scale))
    if length <= extent:
        first, last = 0, extent - length
        if focus is not None:
            first, last = max(first, focus - length + 1), min(last, focus)
        return Span(int(rng.integers(first, last + 1)), length, 0, crop)
    size = min(crop, max(1, round(crop * extent / length)))
    return Span(0, extent, int(rng.integers(0, crop - size + 1)), size)


def resized(
    window: np.ndarray, rows: Span, columns: Span, crop: list[int], interpolation: int, fill: int | tuple[int, ...]
) -> np.ndarray:
    """The window at the size of the crop, or on a ground of `fill` where it is smaller."""
    size = (columns.size, rows.size)
    content = cv2.resize(window, size, interpolation=interpolation)
    if [rows.size, columns.size] == crop:
        return content
    result = np.full((*crop, *content.shape[2:]), fill, np.uint8)
    result[rows.place : rows.place + rows.size, columns.place : columns.place + columns.size] = content
    return result


# ---------------------------------------------------------------------------------------------------- by name


class Extra:
    """A transform of albumentations by name and arguments: {"name": "GaussianBlur", "p": 0.3, "blur_limit": [3, 7]}.

    What it moves into the picture from outside is FILL in the image and IGNORE_INDEX in the label, unless told
    otherwise. It is tried on a made-up image at once: UsageError where it changes the size or the type of image or
    label, or gives labels that were not there. A real image on which it does is a DataError.
    """

    def __init__(self, entry: Mapping[str, Any], crop_size: list[int]) -> None:
        self.name = str(entry["name"])
        self.transform = build(entry, crop_size)

    def __call__(
        self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """image uint8 (h, w, 3) and target uint8 (h, w) -> the same, drawn from rng."""
        set_random(self.transform, rng)
        result = self.transform(image=image, mask=target)
        image, changed = result["image"], result["mask"]
        fault = violation((*target.shape, 3), image, target, changed)
        if fault:
            raise DataError(f"augmentation.extra: {self.name} {fault}; take it out or change its arguments")
        return np.ascontiguousarray(image), np.ascontiguousarray(changed)


def set_random(transform: Any, rng: np.random.Generator) -> None:
    transform.set_random_state(rng, random.Random(int(rng.integers(1 << 62))))


def violation(shape: tuple[int, ...], image: Any, target: np.ndarray, changed: Any) -> str:
    """How a transform broke the rules for image and label, or ''."""
    for what, array, wanted in (("an image", image, shape), ("a label", changed, shape[:2])):
        if not isinstance(array, np.ndarray):
            return f"gives {what} that is no array but {type(array).__name__}"
        if array.dtype != np.uint8:
            return f"gives {what} of type {array.dtype}, where uint8 is needed: normalisation comes later"
        if array.shape != wanted:
            return f"gives {what} of shape {array.shape} for one of {wanted}: augmentation.crop_size sets the size"
    if changed is target:
        return ""
    present = np.bincount(target.ravel(), minlength=256) > 0
    present[IGNORE_INDEX] = True
    new = np.flatnonzero((np.bincount(changed.ravel(), minlength=256) > 0) & ~present)
    if len(new):
        values = ", ".join(map(str, new[:5]))
        return f"gives labels that were not there: {values} (allowed are the old ones and {IGNORE_INDEX})"
    return ""


def build(entry: Mapping[str, Any], crop_size: list[int]) -> Any:
    """The transform of an entry, tried. UsageError naming the transform, the argument and what is allowed."""
    import albumentations

    name = entry["name"]
    classes = {
        key: value
        for key, value in vars(albumentations).items()
        if inspect.isclass(value)
        and (key in CONTAINERS or issubclass(value, albumentations.BasicTransform) and key not in NOT_BY_NAME)
    }
    if name not in classes:
        near = difflib.get_close_matches(str(name), classes, 3, 0.5)
        known = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(sorted(classes))}"
        raise UsageError(f"augmentation.extra: albumentations has no transform {name}: {known}")
    kind = classes[name]
    arguments = {key: value for key, value in entry.items() if key != "name"}
    check_arguments(name, kind, arguments)
    if name in CONTAINERS:
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not all(isinstance(one, Mapping) and "name" in one for one in inner):
            raise UsageError(
                f"augmentation.extra: {name}.transforms={inner} is not possible: list mappings with a name"
            )
        arguments["transforms"] = [build(one, crop_size) for one in inner]
        return made(name, kind, arguments)
    return tried(name, made(name, kind, arguments), crop_size)


def check_arguments(name: str, kind: type, arguments: Mapping[str, Any]) -> None:
    """albumentations only warns of names it does not know, and leaves them out."""
    known = parameters(kind)
    for key, value in arguments.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"augmentation.extra: {name} has no argument {key}: {hint}There is {', '.join(known)}")
        if key == "mask_interpolation" and value not in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT):
            raise UsageError(
                f"augmentation.extra: {name}.{key}={value} is not possible: it would mix labels; "
                f"give {cv2.INTER_NEAREST} (nearest) or leave it out"
            )
        if key in MASK_FILLS and value not in (None, IGNORE_INDEX):
            raise UsageError(
                f"augmentation.extra: {name}.{key}={value} is not possible: it would be taken for a class; "
                f"give {IGNORE_INDEX} (ignored) or leave it out"
            )
    p = arguments.get("p", 0.5)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UsageError(f"augmentation.extra: {name}.p={p} is not possible: give a probability")


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """What the transform takes, but for what would set its random numbers."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    left_out = ("self", "seed", "strict", "save_applied_params")
    return {key: value for key, value in signature.parameters.items() if key not in left_out}


def with_defaults(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With our fills in place of albumentations' 0, which is black, and a class in the label."""
    known = parameters(kind)
    arguments = dict(arguments)
    if "fill_mask" in known and known["fill_mask"].default is not None:  # None leaves the label alone
        arguments = {"fill_mask": IGNORE_INDEX} | arguments
        if "fill" in known and known["fill"].default == 0 and "tuple" in str(known["fill"].annotation):
            arguments = {"fill": FILL} | arguments
    return arguments


def made(name: str, kind: type, arguments: Mapping[str, Any]) -> Any:
    """The object; UsageError for a value that it does not take, or takes in another way than it was given."""
    complete = with_defaults(kind, arguments)
    if "InitSchema" in vars(kind) and "__init__" in vars(kind):
        complete["strict"] = True  # else some faults are only warned of, and all arguments left out
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            transform = nearest_exact(kind, complete) or kind(**complete)
        except (ValueError, TypeError) as error:
            raise UsageError(f"augmentation.extra: {refusal(name, kind, arguments, error)}") from error
    for warning in told:  # others say that a transform is slow, or has younger siblings
        if any(key in str(warning.message) for key in arguments):
            raise UsageError(f"augmentation.extra: {name}: {warning.message}")
    return transform


def nearest_exact(kind: type, arguments: dict[str, Any]) -> Any:
    """The object with the interpolation that does not shift labels against the image; None where it takes no such."""
    if "mask_interpolation" in parameters(kind) and "mask_interpolation" not in arguments:
        try:
            return kind(**arguments, mask_interpolation=cv2.INTER_NEAREST_EXACT)
        except ValueError:
            return None
    return None


def refusal(name: str, kind: type, arguments: Mapping[str, Any], error: Exception) -> str:
    """What pydantic, which checks most arguments, has against them."""
    cause: Any = error.__cause__
    errors = cause.errors() if hasattr(cause, "errors") else []
    texts = [item["msg"].removeprefix("Value error, ") for item in errors]
    key = str(errors[0]["loc"][0]) if errors and errors[0]["loc"] else None
    if key is None:
        given = ", ".join(f"{argument}={value}" for argument, value in arguments.items())
        return f"{name}({given}) is not possible: {'; '.join(dict.fromkeys(texts)) or error}"
    mine = [text for text, item in zip(texts, errors, strict=True) if item["loc"][:1] == (key,)]
    text = " or ".join(dict.fromkeys(mine))
    allowed = str(parameters(kind)[key]).replace("'", "") if key in parameters(kind) else key
    if key not in arguments:
        return f"{name} needs {key}: {text} ({allowed})"
    return f"{name}.{key}={arguments[key]} is not possible: {text} ({allowed})"


def tried(name: str, transform: Any, crop_size: list[int]) -> Any:
    """The transform, after it has been applied to a made-up picture a few times."""
    if "image" not in transform.available_keys:
        raise UsageError(
            f"augmentation.extra: {name} is not for pictures ({', '.join(sorted(transform.available_keys))})"
        )
    height, width = crop_size
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (width, height))
    cells = np.array([3, 90, 91, IGNORE_INDEX], np.uint8)[rng.integers(0, 4, (8, 8))]
    target = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
    for _ in range(TRIALS):
        set_random(transform, rng)
        try:
            result = transform(image=image.copy(), mask=target, force_apply=True)
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise UsageError(
                f"augmentation.extra: {name} fails on a picture of {crop_size} [height,width]: {text}"
            ) from error
        fault = violation(image.shape, result["image"], target, result["mask"])
        if fault:
            raise UsageError(f"augmentation.extra: {name} {fault}")
    return transform
