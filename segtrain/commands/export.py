"""`segtrain export`: a network as a file that other programs run, and the proof that it predicts the same."""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from segtrain.abn.convert import fold
from segtrain.config import ENGINES, ExportConfig, InferenceConfig, checkpoint_line
from segtrain.console import say
from segtrain.data.bands import read_channels
from segtrain.data.registry import split_samples
from segtrain.errors import DataError, SegtrainError, UsageError
from segtrain.models.deployed import Deployed, trace
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.engine import CHANGED, METADATA, Engine, optional_package, read_engine
from segtrain.scoring.predictor import Predictor, load_predictor
from segtrain.scoring.report import file_hash

LARGEST = 1e-3  # difference of logits that is allowed, as a fraction of the largest logit
IMAGES = 6  # of the validation split, or drawn, that the proof takes
PROBED = (129, 193)  # height and width of the image that shows which layer is next to which


def export(config: ExportConfig) -> Path:
    """Write the network of a checkpoint to `output`, after it has proved to predict the same. Returns the file.

    DataError, and no file, if more than `CHANGED` of the pixels differ.
    """
    if config.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            optional_package(package)
    path = Path(config.checkpoint or "")
    predictor = load_predictor(path, "cpu", config.checkpoint_weights)
    output = Path(config.output or Path("segtrain-out/export") / (path.stem + ENGINES[config.format]))
    say(f"checkpoint  {checkpoint_line(path, config.run, predictor.metadata)}")
    network, options = folded(predictor), predictor.options
    ends = "normalise" in config.include, "argmax" in config.include
    deployed = Deployed(network, options.mean, options.std, *ends)
    say(f"takes       {described_input(config, options.in_channels)}; returns {described_output(config, predictor)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecated calls
        program = trace(deployed, options.in_channels, config.size, options.output_stride)
    described = description(config, path, predictor)
    refuse_other_source(output, config.format)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        made = Path(folder) / output.name
        WRITERS[config.format](program, made, described)
        images = list(proving_images(config, predictor))
        engine = read_engine(made)
        say(f"proof       {prove(engine, predictor, images, deployed)}")
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.suffix == output.suffix):
            part.replace(output.with_name(part.name))  # the file itself last
    words = f"engine={output} checkpoint={path}"  # whose dataset is taken
    say(f"use         segtrain evaluate {words}{'' if engine.takes(predictor.inference) else ' inference=whole'}")
    say(str(output))
    return output


def folded(predictor: Predictor) -> torch.nn.Module:
    """A copy of the network with its norms in its convolutions, where that is exact."""
    probe = torch.zeros(1, predictor.options.in_channels, *PROBED)
    probe.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    conversion = fold(predictor.network, probe)
    left = len(conversion.left)
    say(
        f"norms       {len(conversion.converted)} folded into convolutions"
        + (f", {left} left as BatchNorm and activation" if left else "")
        + f"; the logits move by {conversion.relative_difference:.1e} of the largest"
    )
    return conversion.model.eval()


def described_input(config: ExportConfig, channels: int) -> str:
    size = "any size" if config.size is None else f"{config.size[0]}x{config.size[1]} pixels (height x width)"
    seen = channels_in_words(channels)
    kind = f"uint8 {seen}" if "normalise" in config.include else f"float32 {seen}, (x / 255 - mean) / std,"
    return f"images {kind} (N, {channels}, H, W) of {size}"


def channels_in_words(channels: int) -> str:
    return "RGB" if channels == 3 else f"{channels} channels"


def described_output(config: ExportConfig, predictor: Predictor) -> str:
    if "argmax" in config.include:
        return "classes uint8 (N, H, W)"
    return f"logits float32 (N, {predictor.table.num_classes}, h, w), a {predictor.options.output_stride}th of H and W"


def description(config: ExportConfig, path: Path, predictor: Predictor) -> dict[str, Any]:
    """What the file says of itself, as JSON."""
    options, metadata = predictor.options, predictor.metadata
    return {
        "format": config.format, "include": sorted(config.include), "classes": predictor.table.as_dict(),
        "mean": list(options.mean), "std": list(options.std), "output_stride": options.output_stride,
        "input": {
            "name": "images", "layout": f"NCHW, {channels_in_words(options.in_channels)}",
            "size": config.size, "minimum": options.output_stride + 1,
            "dtype": "uint8" if "normalise" in config.include else "float32",
        },
        "output": described_output(config, predictor), "backbone": options.backbone, "head": options.head,
        "checkpoint": path.name, "checkpoint_sha256": file_hash(path), "step": metadata["step"],
        "weights": config.checkpoint_weights, "provenance": metadata.get("provenance"), "torch": torch.__version__,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- formats


def write_onnx(program: Any, path: Path, described: dict[str, Any]) -> None:
    result = "labels" if "argmax" in described["include"] else "logits"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, external_data=False, input_names=["images"], output_names=[result]
        )
    assert written is not None
    written.model.metadata_props[METADATA] = json.dumps(described)
    written.save(str(path), external_data=False)


def write_program(program: Any, path: Path, described: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={METADATA: json.dumps(described)})


HEADER = '''"""The network of {name}, by torch alone: forward(safetensors.torch.load_file({name!r}), images)."""

import torch
from torch import device, inf, nan

NAMES = (
{names}
)


def forward(tensors, images):
    {arguments} = (tensors[name] for name in NAMES)
{body}'''


def refuse_other_source(output: Path, format: str) -> None:
    """UsageError where the Python file beside the tensors would replace one that is not its predecessor."""
    source = output.with_suffix(".py")
    if format == "state_dict" and source.exists():
        first = HEADER.partition("{")[0]
        if not source.read_text(encoding="utf-8", errors="replace").startswith(first):
            raise UsageError(f"output={output}: {source} beside it is not of an export, and would be replaced")


def write_tensors(program: Any, path: Path, described: dict[str, Any]) -> None:
    """Tensors by name, and beside them a Python file with the network as a function of them."""
    from safetensors.torch import save

    state = {**program.state_dict, **program.constants}
    specs = [spec for spec in program.graph_signature.input_specs if spec.target is not None]
    names = [spec.target for spec in specs]
    code = program.graph_module.graph.python_code("self").src
    body = re.sub(r"^.*?\n\s*def forward\([^\n]*\n", "", code, flags=re.DOTALL)
    body = re.sub(r"return \((\w+),\)", r"return \1", body)
    source = HEADER.format(
        name=path.name, names="\n".join(f"    {name!r}," for name in names), body=body,
        arguments=", ".join(spec.arg.name for spec in specs) + ",",
    )  # fmt: skip
    path.with_suffix(".py").write_text(source, encoding="utf-8")
    described = {**described, "source_sha256": hashlib.sha256(source.encode()).hexdigest()}
    tensors = {name: state[name].detach().contiguous().clone() for name in names}
    path.write_bytes(save(tensors, {METADATA: json.dumps(described)}))


WRITERS = {"onnx": write_onnx, "torch_export": write_program, "state_dict": write_tensors}


# ---------------------------------------------------------------------------------------------------------- proof


def proving_images(config: ExportConfig, predictor: Predictor) -> Iterator[np.ndarray]:
    """Images uint8 (H, W, C): of the validation split if it is there, else drawn."""
    found: list[np.ndarray] = []
    here = config.dataset.folder().is_dir()  # the street scenes would be drawn
    try:
        for sample in split_samples(config.dataset, config.dataset.val_split)[: IMAGES if here else 0]:
            found.append(read_channels(sample.image, predictor.channels, predictor.value_range))
    except SegtrainError:
        found = []
    if not found:
        random, depth = np.random.default_rng(0), predictor.options.in_channels
        blocks = [random.integers(0, 256, (h, w, depth), dtype=np.uint8) for h, w in ((9, 13), (12, 8), (16, 16))]
        found = [np.kron(block, np.ones((12, 12, 1), np.uint8)) for block in blocks]
        say(f"proof       with {len(found)} drawn images: {config.dataset.name} {config.dataset.val_split} is not here")
    else:
        say(f"proof       with {len(found)} images of {config.dataset.name} {config.dataset.val_split}")
    for image in found:
        yield image if config.size is None else fitted_to(image, config.size)


def fitted_to(image: np.ndarray, size: list[int]) -> np.ndarray:
    """The image repeated and cut to (height, width)."""
    repeats = [-(-wanted // extent) for wanted, extent in zip(size, image.shape, strict=False)]
    return np.tile(image, (*repeats, 1))[: size[0], : size[1]]


class Proof(NamedTuple):
    """pixels: how many were compared. changed: of these, by the engine. batched: by a batch of two instead of one.
    logits: largest difference, as a fraction of the largest logit."""

    pixels: int
    changed: int
    batched: int
    logits: float

    def __str__(self) -> str:
        return (
            f"{self.changed} of {self.pixels} pixels changed, {self.batched} by a batch of two"
            + ("" if self.logits < 0 else f"; logits differ by {self.logits:.1e} of the largest")
            + f" (allowed: {CHANGED:.1%} of the pixels, {LARGEST:g})"
        )


def prove(engine: Engine, predictor: Predictor, images: list[np.ndarray], deployed: Deployed) -> Proof:
    """Compare engine and network on these images. DataError if they differ by more than is allowed."""
    plain, pixels, changed, batched, largest = InferenceConfig(), 0, 0, 0, -1.0
    for image in images:
        expected, found = predictor.segment(image, plain).train_ids, engine.segment(image, plain).train_ids
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        once, twice = engine(tensor), engine(torch.cat([tensor.flip(3), tensor]))[1:]
        pixels, changed = pixels + expected.size, changed + int((expected != found).sum())
        if deployed.argmax:
            batched += int((once != twice).sum())
        else:
            batched += int((once.argmax(1) != twice.argmax(1)).sum())
            with torch.inference_mode():
                ready = normalise_images(tensor, predictor.options.mean, predictor.options.std)
                logits = predictor.network(ready, upsample=False)
            largest = max(largest, float((logits - once).abs().max() / logits.abs().max()))
    proof = Proof(pixels, changed, batched, largest)
    if max(changed, batched) > CHANGED * pixels or largest > LARGEST:
        raise DataError(f"the exported network predicts otherwise, so nothing is written: {proof}")
    return proof
