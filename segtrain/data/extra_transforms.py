"""augmentation.extra: transforms of albumentations by name, checked and tried before the training."""

import difflib
import inspect
import random
import warnings
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from segtrain.config import IGNORE_INDEX
from segtrain.errors import DataError, UsageError, with_available

FILL = (124, 116, 104)  # the ImageNet mean in grey levels: padding that normalises to about 0
# Transforms that contain others, listed under `transforms`.
CONTAINERS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")
# Base classes, Lambda, whose arguments are functions, and what does not change an image.
NOT_BY_NAME = ("BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda", "ToTensor3D")
MASK_FILLS = ("fill_mask", "mask_drop_value")  # arguments that write one value into the label
TRIALS = 4  # how often a transform is applied to a synthetic image before the training


class Extra:
    """A transform of albumentations by name and arguments: {"name": "GaussianBlur", "p": 0.3, "blur_limit": [3, 7]}.

    Pixels that it moves in from outside are FILL in the image and IGNORE_INDEX in the label by default. It is applied
    to a synthetic image at once: UsageError if it changes the size or the type of image or label, or adds labels. A
    real image on which it does so is a DataError.
    """

    def __init__(self, entry: Mapping[str, Any], crop_size: list[int]) -> None:
        self.name = str(entry["name"])
        self.transform = make_transform(entry, crop_size)

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
    """How a transform breaks the rules for image and label, or ''."""
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


def make_transform(entry: Mapping[str, Any], crop_size: list[int]) -> Any:
    """The transform of an entry, tried out. UsageError naming the transform, the argument and what is allowed."""
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
    check_transform_arguments(name, kind, arguments)
    if name in CONTAINERS:
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not all(isinstance(one, Mapping) and "name" in one for one in inner):
            raise UsageError(
                f"augmentation.extra: {name}.transforms={inner} is not possible: list mappings with a name"
            )
        arguments["transforms"] = [make_transform(one, crop_size) for one in inner]
        return construct(name, kind, arguments)
    return try_out(name, construct(name, kind, arguments), crop_size)


def check_transform_arguments(name: str, kind: type, arguments: Mapping[str, Any]) -> None:
    """Reject unknown arguments: albumentations only warns about them, and ignores them."""
    known = parameters(kind)
    for key, value in arguments.items():
        if key not in known:
            raise UsageError(f"augmentation.extra: {name} has no argument {key}{with_available(key, known)}")
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
    """The transform's arguments, except those that set its random numbers."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    left_out = ("self", "seed", "strict", "save_applied_params")
    return {key: value for key, value in signature.parameters.items() if key not in left_out}


def with_our_fills(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with FILL and IGNORE_INDEX in place of albumentations' 0, which is black, and a class in labels."""
    known = parameters(kind)
    arguments = dict(arguments)
    if "fill_mask" in known and known["fill_mask"].default is not None:  # None leaves the label alone
        arguments = {"fill_mask": IGNORE_INDEX} | arguments
        if "fill" in known and known["fill"].default == 0 and "tuple" in str(known["fill"].annotation):
            arguments = {"fill": FILL} | arguments
    return arguments


def construct(name: str, kind: type, arguments: Mapping[str, Any]) -> Any:
    """The object; UsageError for a value that it does not accept, or that it changes."""
    complete = with_our_fills(kind, arguments)
    if "InitSchema" in vars(kind) and "__init__" in vars(kind):
        complete["strict"] = True  # else some errors are only warnings, and all arguments are ignored
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            transform = nearest_exact(kind, complete) or kind(**complete)
        except (ValueError, TypeError) as error:
            raise UsageError(f"augmentation.extra: {explain_refusal(name, kind, arguments, error)}") from error
    for warning in caught:  # others say that a transform is slow or deprecated
        if any(key in str(warning.message) for key in arguments):
            raise UsageError(f"augmentation.extra: {name}: {warning.message}")
    return transform


def nearest_exact(kind: type, arguments: dict[str, Any]) -> Any:
    """The object with the interpolation that does not shift labels against the image; None if it has no such option."""
    if "mask_interpolation" in parameters(kind) and "mask_interpolation" not in arguments:
        try:
            return kind(**arguments, mask_interpolation=cv2.INTER_NEAREST_EXACT)
        except ValueError:
            return None
    return None


def explain_refusal(name: str, kind: type, arguments: Mapping[str, Any], error: Exception) -> str:
    """What pydantic, which checks most arguments, says about them."""
    cause: Any = error.__cause__
    errors = cause.errors() if hasattr(cause, "errors") else []
    texts = [item["msg"].removeprefix("Value error, ") for item in errors]
    key = str(errors[0]["loc"][0]) if errors and errors[0]["loc"] else None
    if key is None:
        values = ", ".join(f"{argument}={value}" for argument, value in arguments.items())
        return f"{name}({values}) is not possible: {'; '.join(dict.fromkeys(texts)) or error}"
    mine = [text for text, item in zip(texts, errors, strict=True) if item["loc"][:1] == (key,)]
    text = " or ".join(dict.fromkeys(mine))
    allowed = str(parameters(kind)[key]).replace("'", "") if key in parameters(kind) else key
    if key not in arguments:
        return f"{name} needs {key}: {text} ({allowed})"
    return f"{name}.{key}={arguments[key]} is not possible: {text} ({allowed})"


def try_out(name: str, transform: Any, crop_size: list[int]) -> Any:
    """The transform, after it has been applied to a synthetic image a few times."""
    if "image" not in transform.available_keys:
        raise UsageError(
            f"augmentation.extra: {name} is not for images ({', '.join(sorted(transform.available_keys))})"
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
                f"augmentation.extra: {name} fails on an image of {crop_size} [height,width]: {text}"
            ) from error
        fault = violation(image.shape, result["image"], target, result["mask"])
        if fault:
            raise UsageError(f"augmentation.extra: {name} {fault}")
    return transform
