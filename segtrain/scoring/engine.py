"""Engines: networks that `segtrain export` wrote, run without the code that trained them."""

import hashlib
import importlib.util
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segtrain.config import ENGINES, InferenceConfig
from segtrain.config.inference import ONLY_SPEED
from segtrain.config.options import as_written
from segtrain.data.labels import LabelTable
from segtrain.errors import DataError, UsageError
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.inference import Prediction, segment

METADATA = "segtrain"  # the entry of a file that describes the engine, as JSON
CHANGED = 1e-3  # share of pixels that may differ from the network that an engine was made of


class Engine(NamedTuple):
    """A network of a file. run: images (N, 3, H, W) -> labels or logits, as `metadata` describes both."""

    path: Path
    metadata: dict[str, Any]
    run: Callable[[Tensor], Tensor]

    @property
    def table(self) -> LabelTable:
        return LabelTable.from_dict(self.metadata["classes"])

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) -> what the engine returns; UsageError for a size that it does not take."""
        height, width = images.shape[2:]
        given, least = self.metadata["input"]["size"], self.metadata["input"]["minimum"]
        if given is not None and [height, width] != given:
            raise UsageError(
                f"{self.path} takes images of {given[0]}x{given[1]} [height x width], got {height}x{width}: export it "
                "without size="
            )
        if min(height, width) < least:
            raise UsageError(f"{self.path} takes images of at least {least} pixels a side, got {height}x{width}")
        if "normalise" not in self.metadata["include"]:
            images = normalise_images(images, self.metadata["mean"], self.metadata["std"]).contiguous()
        return self.run(images)

    def segment(self, image: np.ndarray, inference: InferenceConfig) -> Prediction:
        """RGB uint8 (H, W, 3) -> train ids uint8 (H, W). UsageError for an inference that the engine cannot do."""
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        if "argmax" not in self.metadata["include"]:
            return segment(self.__call__, tensor, inference)
        return Prediction(self(tensor)[0].numpy(), None)

    def takes(self, inference: InferenceConfig) -> bool:
        """Whether this engine can do it."""
        try:
            self.refuse(inference)
        except UsageError:
            return False
        return True

    def refuse(self, inference: InferenceConfig) -> None:
        """UsageError for an inference that this engine cannot do."""
        plain = InferenceConfig(name=inference.name)
        unread = [key for key, value in vars(plain).items() if value != getattr(inference, key)]
        if "precision" in unread:
            raise UsageError(
                f"inference.precision={inference.precision} is not possible with {self.path}, which computes in the "
                "float32 that it was exported in: give inference.precision=fp32"
            )
        for key in ONLY_SPEED.intersection(unread):
            raise UsageError(
                f"inference.{key}={as_written(getattr(inference, key))} is not possible with {self.path}, which is "
                "given an image or a tile at a time, as it was exported: leave it out"
            )
        has_labels = "argmax" in self.metadata["include"]
        impossible = [key for key in unread if has_labels or key == "longest_side"]
        if impossible:
            key = "longest_side" if "longest_side" in impossible else impossible[0]
            raise UsageError(
                f"inference.{key}={as_written(getattr(inference, key))} is not possible with {self.path}, "
                + ("which sees images as they are: leave it out" if key == "longest_side"
                   else "whose arg-max is inside: add inference=whole, or export it with include=[normalise]")
            )  # fmt: skip


def read_engine(path: Path) -> Engine:
    """Read a file that `segtrain export` wrote, to be run on the CPU.

    UsageError for a missing file or package, DataError for any other content.
    """
    readers = {suffix: READERS[kind] for kind, suffix in ENGINES.items()}
    if path.suffix not in readers:
        raise UsageError(f"engine={path}: expected a file that `segtrain export` wrote: {', '.join(readers)}")
    if not path.is_file():
        raise UsageError(f"engine={path}: no such file; `segtrain export CHECKPOINT output={path}` writes it")
    try:
        text, run = readers[path.suffix](path)
        metadata = json.loads(text)
    except (OSError, RuntimeError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile) as error:
        raise DataError(
            f"engine={path} is damaged or was not written by `segtrain export`: {str(error).splitlines()[0][:200]}"
        ) from error
    if not isinstance(metadata, Mapping) or not {"include", "classes", "input", "mean", "std"} <= metadata.keys():
        raise DataError(f"engine={path} was not written by `segtrain export`: it has no description of its classes")
    return Engine(path, dict(metadata), run)


def optional_package(name: str) -> ModuleType:
    """Import a package of the extra `export`. UsageError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"the package {name} is missing: pip install onnx onnxruntime onnxscript, or in a checkout pip install "
            "'.[export]'"
        ) from error


Read = tuple[str, Callable[[Tensor], Tensor]]


def read_onnx(path: Path) -> Read:
    runtime = optional_package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base but this
        raise ValueError(str(error)) from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return session.get_modelmeta().custom_metadata_map.get(METADATA, "null"), run


def read_program(path: Path) -> Read:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive of torch.export")
    extra, log = {METADATA: ""}, logging.getLogger("torch.export")
    log.disabled = True  # it prints tracebacks of what is raised anyway
    try:
        program = torch.export.load(path, extra_files=extra)
    finally:
        log.disabled = False
    return extra[METADATA] or "null", inference_of(program.module())


def read_tensors(path: Path) -> Read:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA, "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    source = path.with_suffix(".py")
    if not source.is_file():
        raise UsageError(f"engine={path}: the network is in {source.name} beside it, which is missing")
    if hashlib.sha256(source.read_bytes()).hexdigest() != (json.loads(text) or {}).get("source_sha256"):
        raise ValueError(f"{source.name} is not the file that was written beside it")
    spec = importlib.util.spec_from_file_location("exported_network", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text, inference_of(lambda images: module.forward(tensors, images))


def inference_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return function(images)

    return run


READERS = {"onnx": read_onnx, "torch_export": read_program, "state_dict": read_tensors}
